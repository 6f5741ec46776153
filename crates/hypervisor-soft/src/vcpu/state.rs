//! A vCPU's state in neutral form.

use caisson_hypervisor::{
    HypervisorError,
    x86::{
        ApicState, DebugRegs, DescriptorTable, Gprs, MsrEntry, PendingEvents, RunState, Segment,
        Segments, VcpuState, XsaveArea,
    },
};
use caisson_lapic::PAGE_LEN;
use caisson_memory::Vtl;
use caisson_x86_cpu::{
    state::{Activity, Cpu, Shadow, VecReg, efer, reg, seg},
    sys::msr::index as core_msr,
    vector,
};

use super::SoftVcpu;
use crate::{msr, speculation::SPEC_CTRL};

/// Legacy region and header of an XSAVE area, and the AVX component after it.
const XSAVE_LEN: usize = 576 + 256;

/// This backend has no trust levels yet.
pub(super) fn check_vtl(vtl: Vtl) -> Result<(), HypervisorError> {
    if vtl == Vtl::VTL0 {
        Ok(())
    } else {
        Err(HypervisorError::State(format!(
            "this partition has no VTL{}",
            vtl.index()
        )))
    }
}

fn segment(s: &caisson_x86_cpu::state::Segment) -> Segment {
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        attributes: s.attributes,
        unusable: s.unusable,
    }
}

fn from_segment(s: &Segment) -> caisson_x86_cpu::state::Segment {
    caisson_x86_cpu::state::Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        attributes: s.attributes & 0xf0ff,
        unusable: s.unusable,
    }
}

/// Core MSRs that are saved by number, with their places.
fn core_msrs(cpu: &mut Cpu) -> [(u32, &mut u64); 12] {
    let m = &mut cpu.msr;
    [
        (core_msr::STAR, &mut m.star),
        (core_msr::LSTAR, &mut m.lstar),
        (core_msr::CSTAR, &mut m.cstar),
        (core_msr::FMASK, &mut m.sfmask),
        (core_msr::KERNEL_GS_BASE, &mut m.kernel_gs_base),
        (core_msr::TSC_AUX, &mut m.tsc_aux),
        (core_msr::SYSENTER_CS, &mut m.sysenter_cs),
        (core_msr::SYSENTER_ESP, &mut m.sysenter_esp),
        (core_msr::SYSENTER_EIP, &mut m.sysenter_eip),
        (core_msr::PAT, &mut m.pat),
        (core_msr::MISC_ENABLE, &mut m.misc_enable),
        (0xda0, &mut m.xss),
    ]
}

impl SoftVcpu {
    /// All of VTL0's state.
    pub(super) fn save(&self) -> VcpuState {
        let cpu = &self.cpu;
        let s = |n: usize| segment(&cpu.segments[n]);
        let mut gprs = Gprs {
            regs: [0; 16],
            rip: cpu.rip,
            rflags: cpu.rflags(),
        };
        gprs.regs.copy_from_slice(&cpu.regs[..16]);
        let now = self.env.time();
        let m = &cpu.msr;
        let mut msrs: Vec<MsrEntry> = [
            (core_msr::STAR, m.star),
            (core_msr::LSTAR, m.lstar),
            (core_msr::CSTAR, m.cstar),
            (core_msr::FMASK, m.sfmask),
            (core_msr::KERNEL_GS_BASE, m.kernel_gs_base),
            (core_msr::TSC_AUX, m.tsc_aux),
            (core_msr::SYSENTER_CS, m.sysenter_cs),
            (core_msr::SYSENTER_ESP, m.sysenter_esp),
            (core_msr::SYSENTER_EIP, m.sysenter_eip),
            (core_msr::PAT, m.pat),
            (core_msr::MISC_ENABLE, m.misc_enable),
            (0xda0, m.xss),
            (msr::TSC, now.tsc),
            (msr::TSC_ADJUST, self.env.tsc_adjust),
        ]
        .into_iter()
        .chain(self.env.mtrrs.entries())
        .chain(
            self.env
                .speculation
                .read(SPEC_CTRL)
                .map(|value| (SPEC_CTRL, value)),
        )
        .map(|(index, value)| MsrEntry { index, value })
        .collect();
        msrs.sort_by_key(|e| e.index);
        let mut lapic = self.env.lapic.clone();
        let page = lapic.to_page(now);
        let deadline = lapic.save().timer.tsc_deadline;
        VcpuState {
            gprs,
            segments: Segments {
                es: s(seg::ES),
                cs: s(seg::CS),
                ss: s(seg::SS),
                ds: s(seg::DS),
                fs: s(seg::FS),
                gs: s(seg::GS),
                ldtr: s(seg::LDTR),
                tr: s(seg::TR),
            },
            gdtr: DescriptorTable {
                base: cpu.gdtr.base,
                limit: cpu.gdtr.limit,
            },
            idtr: DescriptorTable {
                base: cpu.idtr.base,
                limit: cpu.idtr.limit,
            },
            cr0: cpu.cr0,
            cr2: cpu.cr2,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            cr8: lapic.cr8().into(),
            efer: cpu.efer,
            debug: DebugRegs {
                address: cpu.dr,
                dr6: cpu.dr6,
                dr7: cpu.dr7,
            },
            msrs,
            xsave: XsaveArea {
                xcr0: cpu.xcr0,
                area: xsave_area(cpu),
            },
            apic: ApicState {
                base: lapic.apic_base(),
                regs: page
                    .chunks_exact(16)
                    .map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]))
                    .collect(),
                tsc_deadline: deadline,
                timer_remaining_ns: match lapic.next_timer_deadline() {
                    Some(caisson_lapic::Deadline::Nanos(n)) => Some(n.saturating_sub(now.nanos)),
                    _ => None,
                },
            },
            events: PendingEvents {
                exception: self.injected.map(|e| caisson_hypervisor::x86::Exception {
                    vector: e.vector,
                    error: e.error,
                    payload: e.payload,
                }),
                interrupt: self.accepted,
                nmi_pending: self.nmi_pending,
                nmi_masked: cpu.nmi_masked,
                sti_shadow: cpu.shadow == Shadow::Sti,
                mov_ss_shadow: cpu.shadow == Shadow::MovSs,
                sipi: None,
                init: false,
            },
            run_state: match cpu.activity {
                Activity::Running => RunState::Running,
                Activity::Halted => RunState::Halted,
                Activity::WaitForSipi => RunState::WaitForSipi,
                Activity::Shutdown => RunState::Shutdown,
            },
        }
    }

    /// Takes over a state.
    pub(super) fn load(&mut self, state: &VcpuState) -> Result<(), HypervisorError> {
        let refuse = |what: &str| Err(HypervisorError::State(what.into()));
        let xcr0 = state.xsave.xcr0;
        if state.cr0 & 0x8000_0001 == 0x8000_0000 {
            return refuse("CR0 has paging without protected mode");
        }
        if state.efer & efer::LMA != 0 && state.cr0 >> 31 & 1 == 0 {
            return refuse("EFER.LMA is set without paging");
        }
        if !vector::valid_xcr0(&self.cpu, xcr0) {
            return Err(HypervisorError::State(format!(
                "XCR0 is {xcr0:#x}, which enables state that the software CPU does not offer here"
            )));
        }
        if state.apic.regs.len() != PAGE_LEN / 16 && !state.apic.regs.is_empty() {
            return refuse("the local APIC's register page has the wrong length");
        }
        if state.xsave.area.len() < 576 && !state.xsave.area.is_empty() {
            return refuse("the XSAVE area is shorter than its header");
        }
        // Guest time goes on from where it was saved. While it runs, one vCPU's
        // state does not move it for all.
        let tsc = state.msrs.iter().find(|e| e.index == msr::TSC);
        if let Some(tsc) = tsc
            && !self.shared.clock.is_running()
        {
            let adjust = state.msrs.iter().find(|e| e.index == msr::TSC_ADJUST);
            let base = tsc.value.wrapping_sub(adjust.map_or(0, |e| e.value));
            self.shared.clock.set_tsc(base);
        }
        let now = self.env.time();
        let mut page = [0; PAGE_LEN];
        for (word, bytes) in state.apic.regs.iter().zip(page.chunks_exact_mut(16)) {
            bytes[..4].copy_from_slice(&word.to_le_bytes());
        }
        if !state.apic.regs.is_empty() {
            let _ = self
                .env
                .lapic
                .set_apic_base(state.apic.base, now)
                .map_err(|_| HypervisorError::State("IA32_APIC_BASE is impossible".into()))?;
            self.env.lapic.load_page(&page, now);
        }
        let cpu = &mut self.cpu;
        cpu.regs[..16].copy_from_slice(&state.gprs.regs);
        cpu.rip = state.gprs.rip;
        cpu.set_rflags(state.gprs.rflags);
        let g = &state.segments;
        let order = [&g.es, &g.cs, &g.ss, &g.ds, &g.fs, &g.gs, &g.ldtr, &g.tr];
        for (n, s) in order.into_iter().enumerate() {
            cpu.segments[n] = from_segment(s);
        }
        // The CPL is SS.DPL (Intel SDM Vol. 3 §24.2); V86 runs at 3, real mode at 0.
        cpu.cpl = if state.cr0 & 1 == 0 {
            0
        } else if state.gprs.rflags >> 17 & 1 != 0 {
            3
        } else {
            cpu.segments[seg::SS].dpl()
        };
        cpu.gdtr.base = state.gdtr.base;
        cpu.gdtr.limit = state.gdtr.limit;
        cpu.idtr.base = state.idtr.base;
        cpu.idtr.limit = state.idtr.limit;
        cpu.cr0 = state.cr0;
        cpu.cr2 = state.cr2;
        cpu.cr3 = state.cr3;
        cpu.cr4 = state.cr4;
        cpu.efer = state.efer;
        cpu.dr = state.debug.address;
        cpu.dr6 = state.debug.dr6;
        cpu.dr7 = state.debug.dr7;
        cpu.xcr0 = state.xsave.xcr0;
        for (index, slot) in core_msrs(cpu) {
            if let Some(e) = state.msrs.iter().find(|e| e.index == index) {
                *slot = e.value;
            }
        }
        load_xsave(cpu, &state.xsave.area);
        cpu.nmi_masked = state.events.nmi_masked;
        cpu.shadow = match (state.events.mov_ss_shadow, state.events.sti_shadow) {
            (true, _) => Shadow::MovSs,
            (_, true) => Shadow::Sti,
            _ => Shadow::None,
        };
        cpu.activity = match state.run_state {
            RunState::Running => Activity::Running,
            RunState::Halted => Activity::Halted,
            RunState::WaitForSipi => Activity::WaitForSipi,
            RunState::Shutdown => Activity::Shutdown,
        };
        cpu.replay.abandon();
        cpu.flush_tlb(false);
        cpu.update_mode();
        cpu.regs[reg::ZERO] = 0;
        for e in &state.msrs {
            match e.index {
                msr::TSC_ADJUST => self.env.tsc_adjust = e.value,
                SPEC_CTRL => {
                    let _ = self.env.speculation.write(SPEC_CTRL, e.value);
                }
                i => {
                    let _ = self.env.mtrrs.write(i, e.value, self.shared.phys_bits);
                }
            }
        }
        self.nmi_pending = state.events.nmi_pending;
        self.accepted = state.events.interrupt;
        self.injected = state
            .events
            .exception
            .map(|e| caisson_x86_cpu::fault::Exception {
                vector: e.vector,
                error: e.error,
                payload: e.payload,
            });
        let now = self.env.time();
        let _ = self
            .env
            .lapic
            .set_tsc_deadline(state.apic.tsc_deadline, now);
        self.env.publish();
        Ok(())
    }
}

/// Tells of the processor, not of its state; the host's units leave it in what they save.
const MXCSR_MASK: std::ops::Range<usize> = 28..32;

/// The standard-format XSAVE area of `cpu`.
fn xsave_area(cpu: &Cpu) -> Vec<u8> {
    let mut area = vec![0; XSAVE_LEN];
    area[..512].copy_from_slice(&cpu.fpu.0);
    area[MXCSR_MASK].fill(0);
    area[512..520].copy_from_slice(&vector::in_use(cpu).to_le_bytes());
    for (i, v) in cpu.vec.iter().take(16).enumerate() {
        area[160 + 16 * i..][..16].copy_from_slice(&v.0[..16]);
        area[576 + 16 * i..][..16].copy_from_slice(&v.0[16..32]);
    }
    area
}

fn load_xsave(cpu: &mut Cpu, area: &[u8]) {
    if area.len() < 576 {
        return;
    }
    let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
    cpu.fpu.0[..MXCSR_MASK.start].copy_from_slice(&area[..MXCSR_MASK.start]);
    cpu.fpu.0[MXCSR_MASK.end..160].copy_from_slice(&area[MXCSR_MASK.end..160]);
    cpu.set_mxcsr(mxcsr);
    cpu.vec = [VecReg([0; 64]); 32];
    for (i, v) in cpu.vec.iter_mut().take(16).enumerate() {
        v.0[..16].copy_from_slice(&area[160 + 16 * i..][..16]);
        if let Some(high) = area.get(576 + 16 * i..).and_then(|h| h.get(..16)) {
            v.0[16..32].copy_from_slice(high);
        }
    }
}
