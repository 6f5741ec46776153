//! Shifts and rotates, single and double precision.

use core::arch::asm;

use super::access::{chain, get, set, slow, slow_rmw, write_ptr};
use crate::{
    mem::fast::Word,
    state::{Cpu, reg},
    uop::Uop,
};

const RCX: u8 = (reg::RCX * 8) as u8;

/// A shift or rotate by a count of 0 to 31 (63 for 64-bit operands).
pub trait Shift {
    /// Result and packed flags. A count of zero changes neither.
    fn apply<W: Word>(a: u64, count: u64, cc: u64) -> (u64, u64);
}

macro_rules! shift {
    ($name:ident, $mnemonic:literal) => {
        #[doc = concat!("The `", $mnemonic, "` instruction.")]
        #[derive(Debug)]
        pub struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<W: Word>(mut a: u64, count: u64, cc: u64) -> (u64, u64) {
                let mut f = cc;
                // The packed flags go into the host's first: a count of zero, and
                // rotates, leave some as they are.
                // SAFETY: register arithmetic only.
                unsafe {
                    match W::SIZE {
                        8 => asm!("add al, 127", "sahf", concat!($mnemonic, " {a}, cl"), "lahf", "seto al",
                            a = inout(reg) a, in("rcx") count, inout("rax") f, options(pure, nomem, nostack)),
                        4 => asm!("add al, 127", "sahf", concat!($mnemonic, " {a:e}, cl"), "lahf", "seto al",
                            a = inout(reg) a, in("rcx") count, inout("rax") f, options(pure, nomem, nostack)),
                        2 => asm!("add al, 127", "sahf", concat!($mnemonic, " {a:x}, cl"), "lahf", "seto al",
                            a = inout(reg) a, in("rcx") count, inout("rax") f, options(pure, nomem, nostack)),
                        _ => asm!("add al, 127", "sahf", concat!($mnemonic, " {a:l}, cl"), "lahf", "seto al",
                            a = inout(reg) a, in("rcx") count, inout("rax") f, options(pure, nomem, nostack)),
                    }
                }
                (a, f & 0xffff)
            }
        }
    };
}
shift!(Shl, "shl");
shift!(Shr, "shr");
shift!(Sar, "sar");
shift!(Rol, "rol");
shift!(Ror, "ror");
shift!(Rcl, "rcl");
shift!(Rcr, "rcr");

/// The count operand: CL, or the immediate in `imm`.
#[inline(always)]
unsafe fn count<const CL: bool>(cpu: *const Cpu, u: *const Uop) -> u64 {
    // SAFETY: the handler contract.
    unsafe { if CL { get::<u8>(cpu, RCX) } else { (*u).imm } }
}

/// `op reg, count`.
pub unsafe extern "sysv64" fn r<O: Shift, W: Word, const CL: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let (v, f) = O::apply::<W>(get::<W>(cpu, (*u).dst), count::<CL>(cpu, u), (*cpu).cc);
        (*cpu).cc = f;
        set::<W>(cpu, (*u).dst, v);
        chain!(cpu, u)
    }
}

/// SHL, SHR and SAR of a register by an immediate other than zero where nobody
/// reads the flags. `KIND`: 0 SHL, 1 SHR, 2 SAR.
pub unsafe extern "sysv64" fn plain<W: Word, const KIND: u8>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let a = get::<W>(cpu, (*u).dst);
        let n = (*u).imm as u32 & 63;
        let v = match (KIND, W::SIZE) {
            (0, _) => a << n,
            (1, _) => a >> n,
            (_, 8) => (a as i64 >> n) as u64,
            _ => (i64::from(a as i32) >> n) as u64,
        };
        set::<W>(cpu, (*u).dst, v);
        chain!(cpu, u)
    }
}

/// `op mem, count`.
pub unsafe extern "sysv64" fn m<
    O: Shift,
    W: Word,
    const CL: bool,
    const FORM: u8,
    const SLOW: bool,
>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let (n, cc) = (count::<CL>(cpu, u), (*cpu).cc);
        let body = |p: *mut u8| {
            let (v, f) = O::apply::<W>(W::load(p).wide(), n, cc);
            W::store(p, W::narrow(v));
            f
        };
        if !SLOW {
            let Some(p) = write_ptr::<W, FORM>(cpu, u) else {
                return m::<O, W, CL, { super::access::form::OTHER }, true>(cpu, u);
            };
            (*cpu).cc = body(p);
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            c.cc = slow_rmw::<W, _>(c, u, false, body)?;
            Ok(())
        })
    }
}

#[inline(always)]
fn double<W: Word, const LEFT: bool>(mut a: u64, b: u64, count: u64, cc: u64) -> (u64, u64) {
    let mut f = cc;
    macro_rules! run {
        ($mnemonic:literal) => {
            // SAFETY: register arithmetic only.
            unsafe {
                match W::SIZE {
                    8 => asm!("add al, 127", "sahf", concat!($mnemonic, " {a}, {b}, cl"), "lahf", "seto al",
                        a = inout(reg) a, b = in(reg) b, in("rcx") count, inout("rax") f, options(pure, nomem, nostack)),
                    4 => asm!("add al, 127", "sahf", concat!($mnemonic, " {a:e}, {b:e}, cl"), "lahf", "seto al",
                        a = inout(reg) a, b = in(reg) b, in("rcx") count, inout("rax") f, options(pure, nomem, nostack)),
                    _ => asm!("add al, 127", "sahf", concat!($mnemonic, " {a:x}, {b:x}, cl"), "lahf", "seto al",
                        a = inout(reg) a, b = in(reg) b, in("rcx") count, inout("rax") f, options(pure, nomem, nostack)),
                }
            }
        };
    }
    if LEFT {
        run!("shld")
    } else {
        run!("shrd")
    }
    (a, f & 0xffff)
}

/// `shld`/`shrd reg, reg, count`.
pub unsafe extern "sysv64" fn double_r<W: Word, const LEFT: bool, const CL: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let (a, b) = (get::<W>(cpu, (*u).dst), get::<W>(cpu, (*u).src));
        let (v, f) = double::<W, LEFT>(a, b, count::<CL>(cpu, u), (*cpu).cc);
        (*cpu).cc = f;
        set::<W>(cpu, (*u).dst, v);
        chain!(cpu, u)
    }
}

/// `shld`/`shrd mem, reg, count`.
pub unsafe extern "sysv64" fn double_m<W: Word, const LEFT: bool, const CL: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        slow(cpu, u, |c| {
            let (b, n, cc) = (get::<W>(c, (*u).src), count::<CL>(c, u), c.cc);
            c.cc = slow_rmw::<W, _>(c, u, false, |p| {
                let (v, f) = double::<W, LEFT>(W::load(p).wide(), b, n, cc);
                W::store(p, W::narrow(v));
                f
            })?;
            Ok(())
        })
    }
}
