//! The registers that a boot protocol asks for.

use caisson_hypervisor::x86::{DescriptorTable, Gprs, RunState, Segment, Segments, VcpuState};

/// Selector of the flat code segment in [`BOOT_GDT`]: Linux' `__BOOT_CS`.
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the flat data segment in [`BOOT_GDT`]: Linux' `__BOOT_DS`.
pub const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment in [`BOOT_GDT`], which PVH wants in TR.
pub const TSS_SELECTOR: u16 = 0x20;

/// The descriptors that the selectors above name, for either mode. The loader
/// puts them in guest memory at [`BootState::gdt`].
///
/// SDM vol. 3A, 3.4.5: null; unused; code, base 0, limit 4 GiB, execute/read,
/// accessed, DPL 0 (64-bit in one table, 32-bit in the other); data, base 0,
/// limit 4 GiB, read/write, accessed; busy 32-bit TSS, base 0, limit 0x67.
pub const BOOT_GDT: BootGdt = BootGdt {
    long: [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x0000_8b00_0000_0067,
        0,
    ],
    protected: [
        0,
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x0000_8b00_0000_0067,
        0,
    ],
};

/// The two forms of the boot GDT. The sixth slot makes the TSS descriptor 16
/// bytes long in long mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootGdt {
    /// With a 64-bit code segment.
    pub long: [u64; 6],
    /// With a 32-bit code segment.
    pub protected: [u64; 6],
}

impl BootGdt {
    /// The table for `mode` (real mode has none).
    pub const fn for_mode(&self, mode: BootMode) -> Option<&[u64; 6]> {
        match mode {
            BootMode::Real => None,
            BootMode::Protected32 => Some(&self.protected),
            BootMode::Long64 { .. } => Some(&self.long),
        }
    }
}

/// The processor mode at entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BootMode {
    /// As after a reset, but with CS:IP set so that CS.base + IP is
    /// [`BootState::rip`].
    Real,
    /// Protected mode without paging: CR0.PE set, PG clear, CR4 0, EFER 0. CS, DS, ES,
    /// FS, GS and SS flat over 4 GiB.
    Protected32,
    /// 64-bit mode: CR0.PE and PG, CR4.PAE, EFER.LME and LMA set. CS is a
    /// 64-bit code segment, the data segments are flat.
    Long64 {
        /// Guest physical address of the top-level page table, which
        /// identity-maps at least the first 4 GiB.
        cr3: u64,
    },
}

/// State of the first vCPU at entry. Registers not named are zero; RFLAGS is 2
/// (interrupts off), no interrupt is pending, A20 is on, DR6/DR7, MSRs and FPU
/// are as after reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BootState {
    /// The processor mode.
    pub mode: BootMode,
    /// Where execution starts: a guest physical address, mapped to itself.
    pub rip: u64,
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RSI.
    pub rsi: u64,
    /// Stack pointer; zero where the protocol gives no stack.
    pub rsp: u64,
    /// Guest physical address of [`BOOT_GDT`] in the form for `mode` (limit
    /// 0x2f). CS holds [`CODE_SELECTOR`], the data segments [`DATA_SELECTOR`],
    /// TR [`TSS_SELECTOR`]. `None` in real mode.
    pub gdt: Option<u64>,
}

/// RFLAGS with nothing but the bit that is always set.
const RFLAGS_FIXED: u64 = 2;
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

impl BootState {
    /// Turns `state`, that of a vCPU after reset, into that of the boot vCPU at entry.
    pub fn apply(&self, state: &mut VcpuState) {
        state.gprs = Gprs {
            regs: [0; 16],
            rip: self.rip,
            rflags: RFLAGS_FIXED,
        };
        const RAX: usize = 0;
        const RBX: usize = 3;
        const RSP: usize = 4;
        const RSI: usize = 6;
        state.gprs.regs[RAX] = self.rax;
        state.gprs.regs[RBX] = self.rbx;
        state.gprs.regs[RSP] = self.rsp;
        state.gprs.regs[RSI] = self.rsi;
        state.run_state = RunState::Running;

        let Some(gdt) = BOOT_GDT.for_mode(self.mode) else {
            // The segment whose base is the highest that the entry point allows.
            let base = self.rip & !0xffff;
            state.segments.cs.selector = (base >> 4) as u16;
            state.segments.cs.base = base;
            state.gprs.rip = self.rip - base;
            return;
        };
        let segment = |selector: u16| Segment {
            selector,
            ..gdt
                .get(usize::from(selector / 8))
                .map_or(Segment::default(), |d| decode(*d))
        };
        let data = segment(DATA_SELECTOR);
        state.segments = Segments {
            cs: segment(CODE_SELECTOR),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: segment(TSS_SELECTOR),
            ldtr: Segment {
                unusable: true,
                ..Segment::default()
            },
        };
        state.gdtr = DescriptorTable {
            base: self.gdt.unwrap_or(0),
            limit: (size_of_val(gdt) - 1) as u16,
        };
        // No interrupt can be taken before the guest has a table of its own.
        state.idtr = DescriptorTable { base: 0, limit: 0 };
        state.cr2 = 0;
        match self.mode {
            BootMode::Long64 { cr3 } => {
                state.cr0 = CR0_PE | CR0_ET | CR0_PG;
                state.cr3 = cr3;
                state.cr4 = CR4_PAE;
                state.efer = EFER_LME | EFER_LMA;
            }
            BootMode::Protected32 | BootMode::Real => {
                state.cr0 = CR0_PE | CR0_ET;
                state.cr3 = 0;
                state.cr4 = 0;
                state.efer = 0;
            }
        }
    }
}

/// A code, data or 32-bit system descriptor as a segment register holds it
/// (SDM vol. 3A, 3.4.5).
fn decode(descriptor: u64) -> Segment {
    let d = descriptor;
    let limit = (d & 0xffff | d >> 32 & 0xf_0000) as u32;
    let granular = d >> 55 & 1 == 1;
    Segment {
        selector: 0,
        base: d >> 16 & 0xff_ffff | d >> 32 & 0xff00_0000,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        attributes: (d >> 40) as u16 & 0xf0ff,
        unusable: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: BootState = BootState {
        mode: BootMode::Protected32,
        rip: 0x10_0000,
        rax: 1,
        rbx: 2,
        rsi: 3,
        rsp: 4,
        gdt: Some(0x7000),
    };

    fn applied(boot: BootState) -> VcpuState {
        // What a guest left behind must not shine through.
        let mut s = VcpuState {
            cr0: !0,
            cr3: !0,
            cr4: !0,
            efer: !0,
            ..VcpuState::default()
        };
        s.gprs.regs = [!0; 16];
        s.run_state = RunState::WaitForSipi;
        boot.apply(&mut s);
        s
    }

    #[test]
    fn protected_mode_is_flat() {
        let s = applied(BOOT);
        assert_eq!((s.cr0, s.cr3, s.cr4, s.efer), (0x11, 0, 0, 0));
        assert_eq!(s.gprs.regs[..8], [1, 0, 0, 2, 4, 0, 3, 0]);
        assert_eq!(
            (s.gprs.rip, s.gprs.rflags, s.run_state),
            (0x10_0000, 2, RunState::Running)
        );
        let cs = s.segments.cs;
        assert_eq!(
            (cs.selector, cs.base, cs.limit, cs.attributes),
            (0x10, 0, !0, 0xc09b)
        );
        for seg in [
            s.segments.ds,
            s.segments.es,
            s.segments.fs,
            s.segments.gs,
            s.segments.ss,
        ] {
            assert_eq!(
                (seg.selector, seg.base, seg.limit, seg.attributes),
                (0x18, 0, !0, 0xc093)
            );
        }
        let tr = s.segments.tr;
        assert_eq!(
            (tr.selector, tr.base, tr.limit, tr.attributes),
            (0x20, 0, 0x67, 0x008b)
        );
        assert_eq!((s.gdtr.base, s.gdtr.limit), (0x7000, 0x2f));
        assert!(s.segments.ldtr.unusable);
    }

    #[test]
    fn long_mode_has_paging_and_64_bit_code() {
        let s = applied(BootState {
            mode: BootMode::Long64 { cr3: 0x1000 },
            ..BOOT
        });
        assert_eq!(
            (s.cr0, s.cr3, s.cr4, s.efer),
            (0x8000_0011, 0x1000, 0x20, 0x500)
        );
        assert_eq!(s.segments.cs.attributes, 0xa09b);
        assert_eq!(s.segments.ss.attributes, 0xc093);
    }

    #[test]
    fn real_mode_starts_at_the_address() {
        let mut s = VcpuState::default();
        BootState {
            mode: BootMode::Real,
            rip: 0xf_fff0,
            gdt: None,
            ..BOOT
        }
        .apply(&mut s);
        assert_eq!(
            (s.segments.cs.selector, s.segments.cs.base, s.gprs.rip),
            (0xf000, 0xf_0000, 0xfff0)
        );
    }
}
