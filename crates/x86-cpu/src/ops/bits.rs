//! BT, BTS, BTR, BTC, BSF, BSR, and the counts POPCNT, LZCNT, TZCNT.

use core::arch::asm;

use super::access::{chain, get, offset_other, read_ptr, set, slow, slow_load};
use crate::{fault::Fault, mem::fast::Word, state::Cpu, uop::Uop};

/// What a bit test does to the bit.
pub mod kind {
    /// BT.
    pub const TEST: u8 = 0;
    /// BTS.
    pub const SET: u8 = 1;
    /// BTR.
    pub const RESET: u8 = 2;
    /// BTC.
    pub const COMPLEMENT: u8 = 3;
}

/// New value and packed flags: only CF changes.
#[inline(always)]
fn test<const KIND: u8>(a: u64, bit: u64, cc: u64) -> (u64, u64) {
    let mask = 1 << bit;
    let cc = cc & !(1 << 8) | (a >> bit & 1) << 8;
    let a = match KIND {
        kind::SET => a | mask,
        kind::RESET => a & !mask,
        kind::COMPLEMENT => a ^ mask,
        _ => a,
    };
    (a, cc)
}

/// Bit operation on a register, by a register (`IMM` false) or immediate.
pub unsafe extern "sysv64" fn bt_r<W: Word, const KIND: u8, const IMM: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let bit = if IMM {
            (*u).imm
        } else {
            get::<W>(cpu, (*u).src)
        } & (W::SIZE * 8 - 1);
        let (v, f) = test::<KIND>(get::<W>(cpu, (*u).dst), bit, (*cpu).cc);
        (*cpu).cc = f;
        if KIND != kind::TEST {
            set::<W>(cpu, (*u).dst, v);
        }
        chain!(cpu, u)
    }
}

/// Bit operation on memory, by a register (`IMM` false: the index may reach
/// outside of the operand) or immediate. `aux` says whether it is locked.
pub unsafe extern "sysv64" fn bt_m<W: Word, const KIND: u8, const IMM: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe { slow(cpu, u, |c| bit_memory::<W, KIND, IMM>(c, u)) }
}

unsafe fn bit_memory<W: Word, const KIND: u8, const IMM: bool>(
    cpu: &mut Cpu,
    u: *const Uop,
) -> Result<(), Fault> {
    // SAFETY: the handler contract; `begin_*` vouch for their pointers.
    unsafe {
        let bits = W::SIZE * 8;
        let (index, unit) = if IMM {
            ((*u).imm & (bits - 1), 0)
        } else {
            let raw = match W::SIZE {
                8 => get::<W>(cpu, (*u).src) as i64,
                4 => i64::from(get::<W>(cpu, (*u).src) as i32),
                _ => i64::from(get::<W>(cpu, (*u).src) as i16),
            };
            (
                raw as u64 & (bits - 1),
                (raw >> bits.trailing_zeros()) * W::SIZE as i64,
            )
        };
        let unused_bits = 64 - (8u32 << ((*u).seg >> 4 & 3));
        let offset = offset_other(cpu, u).wrapping_add(unit as u64) << unused_bits >> unused_bits;
        let at = cpu.linear(((*u).seg & 7) as usize, offset, W::SIZE, KIND != kind::TEST)?;
        let (privilege, cc) = (cpu.privilege(), cpu.cc);
        if KIND == kind::TEST {
            let p = cpu.begin_read(at, W::SIZE as usize, privilege)?;
            cpu.cc = test::<KIND>(W::load(p).wide(), index, cc).1;
            return Ok(());
        }
        let locked = (*u).aux != 0;
        let p = cpu.begin_rmw(at, W::SIZE as usize, privilege, locked)?;
        let f = loop {
            let old = W::load(p).wide();
            let (v, f) = test::<KIND>(old, index, cc);
            if !locked {
                W::store(p, W::narrow(v));
                break f;
            }
            if super::atomic::compare_exchange::<W>(p, old, v) == old {
                break f;
            }
        };
        cpu.end_write()?;
        cpu.cc = f;
        Ok(())
    }
}

/// A scan or count of one source operand.
pub trait Scan {
    /// Result and packed flags; `old` is the destination's value before.
    fn apply<W: Word>(a: u64, old: u64, cc: u64) -> (u64, u64);
}

macro_rules! scan {
    ($name:ident, $mnemonic:literal) => {
        #[doc = concat!("The `", $mnemonic, "` instruction.")]
        #[derive(Debug)]
        pub struct $name;
        impl Scan for $name {
            #[inline(always)]
            fn apply<W: Word>(a: u64, mut old: u64, cc: u64) -> (u64, u64) {
                let mut f = cc;
                // SAFETY: register arithmetic only; the builder offers an
                // instruction to the guest only where the host has it.
                unsafe {
                    match W::SIZE {
                        8 => asm!("add al, 127", "sahf", concat!($mnemonic, " {d}, {a}"), "lahf", "seto al",
                            d = inout(reg) old, a = in(reg) a, inout("rax") f, options(pure, nomem, nostack)),
                        4 => asm!("add al, 127", "sahf", concat!($mnemonic, " {d:e}, {a:e}"), "lahf", "seto al",
                            d = inout(reg) old, a = in(reg) a, inout("rax") f, options(pure, nomem, nostack)),
                        _ => asm!("add al, 127", "sahf", concat!($mnemonic, " {d:x}, {a:x}"), "lahf", "seto al",
                            d = inout(reg) old, a = in(reg) a, inout("rax") f, options(pure, nomem, nostack)),
                    }
                }
                (old, f & 0xffff)
            }
        }
    };
}
scan!(Bsf, "bsf");
scan!(Bsr, "bsr");
scan!(Popcnt, "popcnt");
scan!(Lzcnt, "lzcnt");
scan!(Tzcnt, "tzcnt");

/// BSF and BSR leave a 32-bit destination's upper half alone when the source is
/// zero; everything else zero-extends.
#[inline(always)]
unsafe fn put<O: Scan, W: Word, const KEEPS: bool>(cpu: *mut Cpu, u: *const Uop, a: u64) {
    // SAFETY: the handler contract.
    unsafe {
        let (v, f) = O::apply::<W>(a, get::<W>(cpu, (*u).dst), (*cpu).cc);
        (*cpu).cc = f;
        if !(KEEPS && a == 0) {
            set::<W>(cpu, (*u).dst, v);
        }
    }
}

/// Scan of a register.
pub unsafe extern "sysv64" fn scan_r<O: Scan, W: Word, const KEEPS: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        put::<O, W, KEEPS>(cpu, u, get::<W>(cpu, (*u).src));
        chain!(cpu, u)
    }
}

/// Scan of memory.
pub unsafe extern "sysv64" fn scan_m<
    O: Scan,
    W: Word,
    const KEEPS: bool,
    const FORM: u8,
    const SLOW: bool,
>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        if !SLOW {
            let Some(p) = read_ptr::<W, FORM>(cpu, u) else {
                return scan_m::<O, W, KEEPS, { super::access::form::OTHER }, true>(cpu, u);
            };
            put::<O, W, KEEPS>(cpu, u, W::load(p).wide());
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            let a = slow_load::<W>(c, u)?;
            put::<O, W, KEEPS>(c, u, a);
            Ok(())
        })
    }
}
