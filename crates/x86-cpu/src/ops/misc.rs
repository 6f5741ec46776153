//! Flag instructions and PAUSE.

use super::access::{chain, leave};
use crate::{
    flags::{self, packed},
    state::Cpu,
    uop::Uop,
};

/// CLC (0), STC (1), CMC (2).
pub unsafe extern "sysv64" fn carry<const KIND: u8>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        match KIND {
            0 => (*cpu).cc &= !packed::CF,
            1 => (*cpu).cc |= packed::CF,
            _ => (*cpu).cc ^= packed::CF,
        }
        chain!(cpu, u)
    }
}

/// CLD (false) and STD.
pub unsafe extern "sysv64" fn direction<const SET: bool>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        if SET {
            (*cpu).rflags_system |= flags::DF;
        } else {
            (*cpu).rflags_system &= !flags::DF;
        }
        chain!(cpu, u)
    }
}

/// LAHF (false) and SAHF.
pub unsafe extern "sysv64" fn ah<const STORE: bool>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        if STORE {
            let low = (*cpu).regs[0] >> 8 & 0xd5 | 2;
            (*cpu).cc = (*cpu).cc & 0xff | low << 8;
        } else {
            let low = ((*cpu).cc >> 8 & 0xd5) | 2;
            (*cpu).regs[0] = (*cpu).regs[0] & !0xff00 | low << 8;
        }
        chain!(cpu, u)
    }
}

/// MFENCE, LFENCE and SFENCE. The host orders guest accesses as it orders its
/// own, so a fence is a fence.
pub unsafe extern "sysv64" fn fence(cpu: *mut Cpu, u: *const Uop) -> u32 {
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    // SAFETY: every x86-64 processor has it. LFENCE also holds back what comes
    // after it, such as a RDTSC.
    unsafe { core::arch::x86_64::_mm_lfence() };
    // SAFETY: the handler contract.
    unsafe { chain!(cpu, u) }
}

/// PAUSE: a spinning vCPU may give way to the one it waits for.
pub unsafe extern "sysv64" fn pause(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        (*cpu).env().pause();
        leave(cpu, u)
    }
}
