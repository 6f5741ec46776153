//! Registers between their neutral form and KVM's.

use caisson_hypervisor::x86::{
    ApicState, DescriptorTable, Exception, Gprs, PendingEvents, RunState, Segment, Segments,
    VcpuState,
};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_dtable, kvm_lapic_state, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events,
};

/// Words of the neutral register page.
const APIC_WORDS: usize = 64;
/// Task priority, processor priority, and the first of eight words of what is in service.
const TPR: usize = 0x08;
const PPR: usize = 0x0a;
const ISR: usize = 0x10;
/// KVM_X86_SHADOW_INT_MOV_SS and _STI.
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;

pub(super) fn gprs(r: &kvm_regs) -> Gprs {
    Gprs {
        regs: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags,
    }
}

pub(super) fn to_regs(g: &Gprs) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = g.regs;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: g.rip,
        rflags: g.rflags,
    }
}

fn segment(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u16| u16::from(value & 1) << at;
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        attributes: u16::from(s.type_ & 15)
            | bit(s.s, 4)
            | u16::from(s.dpl & 3) << 5
            | bit(s.present, 7)
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15),
        unusable: s.unusable != 0,
    }
}

fn to_segment(s: &Segment) -> kvm_segment {
    let bit = |at: u16| (s.attributes >> at & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 15) as u8,
        s: bit(4),
        dpl: (s.attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: s.unusable.into(),
        padding: 0,
    }
}

fn table(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: t.base,
        limit: t.limit,
    }
}

fn to_table(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        padding: [0; 3],
    }
}

/// Takes what `sregs` holds into `state`.
pub(super) fn take_sregs(state: &mut VcpuState, s: &kvm_sregs) {
    state.segments = Segments {
        es: segment(&s.es),
        cs: segment(&s.cs),
        ss: segment(&s.ss),
        ds: segment(&s.ds),
        fs: segment(&s.fs),
        gs: segment(&s.gs),
        ldtr: segment(&s.ldt),
        tr: segment(&s.tr),
    };
    state.gdtr = table(&s.gdt);
    state.idtr = table(&s.idt);
    state.cr0 = s.cr0;
    state.cr2 = s.cr2;
    state.cr3 = s.cr3;
    state.cr4 = s.cr4;
    state.cr8 = s.cr8;
    state.efer = s.efer;
    state.apic.base = s.apic_base;
}

pub(super) fn to_sregs(state: &VcpuState) -> kvm_sregs {
    let s = &state.segments;
    kvm_sregs {
        es: to_segment(&s.es),
        cs: to_segment(&s.cs),
        ss: to_segment(&s.ss),
        ds: to_segment(&s.ds),
        fs: to_segment(&s.fs),
        gs: to_segment(&s.gs),
        ldt: to_segment(&s.ldtr),
        tr: to_segment(&s.tr),
        gdt: to_table(&state.gdtr),
        idt: to_table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.efer,
        apic_base: state.apic.base,
        interrupt_bitmap: [0; 4],
    }
}

/// The APIC's registers as words, one for every sixteen bytes of the page.
pub(super) fn apic_words(page: &kvm_lapic_state) -> Vec<u32> {
    let mut words: Vec<u32> = page
        .regs
        .chunks_exact(16)
        .map(|c| u32::from_le_bytes([c[0] as u8, c[1] as u8, c[2] as u8, c[3] as u8]))
        .collect();
    // The kernel brings it up to date only where it is about to use it.
    words[PPR] = processor_priority(&words);
    words
}

/// The processor priority that follows from the task priority and the interrupts in service
/// (SDM volume 3, 12.8.3.1).
fn processor_priority(words: &[u32]) -> u32 {
    let task = words[TPR] & 0xff;
    let in_service = (0..8u32).rev().find_map(|index| {
        let bits = words[ISR + index as usize];
        (bits != 0).then(|| index * 32 + bits.ilog2())
    });
    match in_service.unwrap_or(0) & 0xf0 {
        class if class > task & 0xf0 => class,
        _ => task,
    }
}

/// `None` where the neutral state has no APIC, or not one of this shape.
pub(super) fn to_apic(apic: &ApicState) -> Option<kvm_lapic_state> {
    if apic.regs.len() != APIC_WORDS {
        return None;
    }
    let mut page = kvm_lapic_state::default();
    for (word, place) in apic.regs.iter().zip(page.regs.chunks_exact_mut(16)) {
        for (to, byte) in place.iter_mut().zip(word.to_le_bytes()) {
            *to = byte.cast_signed();
        }
    }
    Some(page)
}

pub(super) fn events(e: &kvm_vcpu_events) -> PendingEvents {
    let exception = &e.exception;
    let has_payload = e.flags & KVM_VCPUEVENT_VALID_PAYLOAD != 0 && e.exception_has_payload != 0;
    PendingEvents {
        exception: (exception.injected != 0 || exception.pending != 0).then_some(Exception {
            vector: exception.nr,
            error: (exception.has_error_code != 0).then_some(exception.error_code),
            payload: if has_payload { e.exception_payload } else { 0 },
        }),
        interrupt: (e.interrupt.injected != 0 && e.interrupt.soft == 0).then_some(e.interrupt.nr),
        // One that was being delivered is delivered anew.
        nmi_pending: e.nmi.pending != 0 || e.nmi.injected != 0,
        nmi_masked: e.nmi.masked != 0 && e.nmi.injected == 0,
        sti_shadow: e.interrupt.shadow & SHADOW_STI != 0,
        mov_ss_shadow: e.interrupt.shadow & SHADOW_MOV_SS != 0,
        sipi: None,
        init: false,
    }
}

/// Whether the vCPU is about to shut down.
pub(super) fn has_triple_fault(e: &kvm_vcpu_events) -> bool {
    e.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0 && e.triple_fault.pending != 0
}

pub(super) fn to_events(p: &PendingEvents) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(x) = p.exception {
        e.exception.injected = 1;
        e.exception.nr = x.vector;
        e.exception.has_error_code = x.error.is_some().into();
        e.exception.error_code = x.error.unwrap_or(0);
    }
    if let Some(vector) = p.interrupt {
        e.interrupt.injected = 1;
        e.interrupt.nr = vector;
    }
    if p.sti_shadow {
        e.interrupt.shadow |= SHADOW_STI;
    }
    if p.mov_ss_shadow {
        e.interrupt.shadow |= SHADOW_MOV_SS;
    }
    e.nmi.pending = p.nmi_pending.into();
    e.nmi.masked = p.nmi_masked.into();
    if let Some(vector) = p.sipi {
        e.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        e.sipi_vector = vector.into();
    }
    e
}

pub(super) fn run_state(mp_state: u32) -> RunState {
    match mp_state {
        KVM_MP_STATE_HALTED => RunState::Halted,
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => RunState::WaitForSipi,
        _ => RunState::Running,
    }
}

pub(super) fn to_mp_state(state: &VcpuState) -> u32 {
    match state.run_state {
        RunState::Halted => KVM_MP_STATE_HALTED,
        RunState::WaitForSipi if state.events.sipi.is_some() => KVM_MP_STATE_SIPI_RECEIVED,
        // A vCPU in this state takes a start-up IPI at once.
        RunState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        RunState::Running | RunState::Shutdown => KVM_MP_STATE_RUNNABLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_priority_follows_from_what_is_in_service() {
        let mut words = [0; APIC_WORDS];
        words[TPR] = 0x35;
        assert_eq!(processor_priority(&words), 0x35);
        words[ISR + 1] = 1 << 5;
        assert_eq!(processor_priority(&words), 0x35);
        words[ISR + 1] = 1 << 31;
        assert_eq!(processor_priority(&words), 0x35);
        words[ISR + 2] = 1 << 5 | 1;
        assert_eq!(processor_priority(&words), 0x40);
        words[ISR + 7] = 1 << 31;
        assert_eq!(processor_priority(&words), 0xf0);
    }

    #[test]
    fn segments_keep_every_bit() {
        for at in 0..16u16 {
            let attributes = (1 << at) & 0xf0ff;
            let s = Segment {
                selector: 0x1234,
                base: u64::MAX,
                limit: 0xfffff,
                attributes,
                unusable: at == 3,
            };
            assert_eq!(segment(&to_segment(&s)), s, "bit {at}");
        }
    }

    #[test]
    fn general_registers_are_in_encoding_order() {
        let g = Gprs {
            regs: core::array::from_fn(|n| n as u64),
            rip: 77,
            rflags: 2,
        };
        let r = to_regs(&g);
        assert_eq!((r.rax, r.rcx, r.rbx, r.rsp, r.r15), (0, 1, 3, 4, 15));
        assert_eq!(gprs(&r), g);
    }

    #[test]
    fn events_survive_the_way() {
        let p = PendingEvents {
            exception: Some(Exception {
                vector: 14,
                error: Some(5),
                payload: 0,
            }),
            interrupt: Some(0x30),
            nmi_pending: true,
            nmi_masked: true,
            sti_shadow: true,
            mov_ss_shadow: false,
            sipi: None,
            init: false,
        };
        assert_eq!(events(&to_events(&p)), p);
    }

    #[test]
    fn apic_registers_survive_the_way() {
        let mut apic = ApicState {
            regs: (0..64u32).map(|n| n.wrapping_mul(0x9e37_79b9)).collect(),
            ..Default::default()
        };
        apic.regs[PPR] = processor_priority(&apic.regs);
        assert_eq!(apic_words(&to_apic(&apic).unwrap()), apic.regs);
        assert!(to_apic(&ApicState::default()).is_none());
    }
}
