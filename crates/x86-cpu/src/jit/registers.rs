//! Where guest registers are while translated code runs.
//!
//! Guest and host have the same registers, so most keep their place. The engine
//! needs four of the host's: a stack, the vCPU and two temporaries. The guest's
//! stack pointer moves to R9, which no encoding treats specially, and the
//! guest's R9, R10, R11 and R15 stay in [`Cpu::regs`].

use core::mem::offset_of;

use super::Frame;
use crate::state::{Cpu, reg};

/// Host register numbers.
#[allow(missing_docs, reason = "register names")]
pub(super) mod host {
    pub(crate) const RAX: u8 = 0;
    pub(crate) const RCX: u8 = 1;
    pub(crate) const RDX: u8 = 2;
    pub(crate) const RBX: u8 = 3;
    pub(crate) const RSP: u8 = 4;
    pub(crate) const RBP: u8 = 5;
    pub(crate) const RSI: u8 = 6;
    pub(crate) const RDI: u8 = 7;
    pub(crate) const R12: u8 = 12;
    pub(crate) const R13: u8 = 13;
    pub(crate) const R14: u8 = 14;
}

/// The guest's stack pointer.
pub(super) const SP: u8 = 9;
/// First temporary.
pub(super) const T0: u8 = 10;
/// Second temporary.
pub(super) const T1: u8 = 11;
/// Points [`BIAS`] bytes into the vCPU.
pub(super) const CPU: u8 = 15;
/// So that the first 256 bytes of the vCPU are in reach of 8-bit displacements.
pub(super) const BIAS: i32 = 128;

/// The host register that holds guest register `n`, unless it stays in memory.
pub(super) const fn place(n: u8) -> Option<u8> {
    match n {
        4 => Some(SP),
        9 | 10 | 11 | 15 => None,
        n => Some(n),
    }
}

/// Guest registers that are in host registers, with those.
pub(super) const RESIDENT: [(u8, u8); 12] = [
    (0, 0),
    (1, 1),
    (2, 2),
    (3, 3),
    (4, SP),
    (5, 5),
    (6, 6),
    (7, 7),
    (8, 8),
    (12, 12),
    (13, 13),
    (14, 14),
];

/// Displacements from [`CPU`] of what translated code looks at.
pub(super) mod at {
    use super::{BIAS, Cpu, Frame, offset_of, reg};

    const fn field(offset: usize) -> i32 {
        offset as i32 - BIAS
    }

    /// Guest register `n`.
    pub(crate) const fn register(n: u8) -> i32 {
        field(8 * n as usize)
    }
    /// Effective base of segment `s`.
    pub(crate) const fn segment(s: usize) -> i32 {
        field(8 * (reg::SEG_BASE + s))
    }
    /// RIP of the page's first byte.
    pub(crate) const PAGE_RIP: i32 = field(8 * reg::PAGE_RIP);
    /// Packed flags.
    pub(crate) const FLAGS: i32 = field(offset_of!(Cpu, cc));
    /// The TLB array in force.
    pub(crate) const TLB: i32 = field(offset_of!(Cpu, tlb));
    /// RIP.
    pub(crate) const RIP: i32 = field(offset_of!(Cpu, rip));
    /// Instructions retired.
    pub(crate) const RETIRED: i32 = field(offset_of!(Cpu, retired));
    const FRAME: usize = offset_of!(Cpu, native);
    /// Address of the request word.
    pub(crate) const REQUEST: i32 = field(FRAME + offset_of!(Frame, request));
    /// Stamp of jump cache entries in force.
    pub(crate) const STAMP: i32 = field(FRAME + offset_of!(Frame, stamp));
    /// Address of the jump cache.
    pub(crate) const JUMPS: i32 = field(FRAME + offset_of!(Frame, jumps));
    /// Address of the function that interprets one instruction.
    pub(crate) const INTERPRET: i32 = field(FRAME + offset_of!(Frame, interpret));
    /// The block that was left.
    pub(crate) const BLOCK: i32 = field(FRAME + offset_of!(Frame, block));
    /// Whether the host's unit has the guest's MXCSR.
    pub(crate) const MXCSR_LIVE: i32 = field(FRAME + offset_of!(Frame, mxcsr_live));
    /// The engine's MXCSR.
    pub(crate) const MXCSR_HOST: i32 = field(FRAME + offset_of!(Frame, mxcsr_host));
    /// The guest's MXCSR, where FXSAVE has it.
    pub(crate) const MXCSR: i32 = field(offset_of!(Cpu, fpu) + 24);
    /// Where an indirect call goes once its return address is stored.
    pub(crate) const TARGET: i32 = field(FRAME + offset_of!(Frame, target));
}

const _: () = assert!(offset_of!(Cpu, regs) == 0);
const _: () = assert!(at::REQUEST <= 127, "read by every loop");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_registers_are_those_with_a_place() {
        for n in 0..16 {
            let listed = RESIDENT.iter().find(|(g, _)| *g == n).map(|(_, h)| *h);
            assert_eq!(place(n), listed);
        }
        let mut taken: alloc::vec::Vec<u8> = RESIDENT.iter().map(|(_, h)| *h).collect();
        taken.extend([T0, T1, CPU, host::RSP]);
        taken.sort_unstable();
        assert_eq!(taken, (0..16).collect::<alloc::vec::Vec<u8>>());
    }
}
