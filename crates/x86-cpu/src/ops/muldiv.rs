//! MUL, IMUL, DIV, IDIV.

use core::arch::asm;

use super::access::{chain, fault, get, read_ptr, resume, set, slow_load};
use crate::{
    fault::{Fault, vector},
    mem::fast::Word,
    state::{Cpu, reg},
    uop::Uop,
};

const RAX: u8 = 0;
const RDX: u8 = (reg::RDX * 8) as u8;

/// One-operand MUL and IMUL: RDX:RAX (AX for bytes) = RAX × `b`.
#[inline(always)]
unsafe fn wide_mul<W: Word, const SIGNED: bool>(cpu: *mut Cpu, b: u64) {
    macro_rules! run {
        ($mnemonic:literal, $suffix:literal, $a:ident, $d:ident, $f:ident) => {
            asm!(concat!($mnemonic, " {b", $suffix, "}"), "mov {lo}, rax", "lahf", "seto al",
                b = in(reg) b, lo = out(reg) $a, inout("rax") $f, inout("rdx") $d, options(pure, nomem, nostack))
        };
    }
    // SAFETY: the handler contract; the assembly is register arithmetic only.
    unsafe {
        let mut f = get::<W>(cpu, RAX);
        let mut d = get::<u64>(cpu, RDX);
        let a: u64;
        match (W::SIZE, SIGNED) {
            (8, false) => run!("mul", "", a, d, f),
            (8, true) => run!("imul", "", a, d, f),
            (4, false) => run!("mul", ":e", a, d, f),
            (4, true) => run!("imul", ":e", a, d, f),
            (2, false) => run!("mul", ":x", a, d, f),
            (2, true) => run!("imul", ":x", a, d, f),
            (_, false) => run!("mul", ":l", a, d, f),
            (_, true) => run!("imul", ":l", a, d, f),
        }
        (*cpu).cc = f & 0xffff;
        if W::SIZE == 1 {
            set::<u16>(cpu, RAX, a);
        } else {
            set::<W>(cpu, RAX, a);
            set::<W>(cpu, RDX, d);
        }
    }
}

/// One-operand DIV and IDIV.
#[inline(always)]
unsafe fn wide_div<W: Word, const SIGNED: bool>(cpu: *mut Cpu, b: u64) -> Result<(), Fault> {
    const ERROR: Fault = Fault::simple(vector::DE);
    // SAFETY: the handler contract.
    let (a, d) = unsafe { (get::<u64>(cpu, RAX), get::<u64>(cpu, RDX)) };
    let bits = W::SIZE * 8;
    let (q, r) = if W::SIZE == 8 {
        let n = u128::from(d) << 64 | u128::from(a);
        if SIGNED {
            let (n, b) = (n as i128, i128::from(b as i64));
            let q = n.checked_div(b).ok_or(ERROR)?;
            if q != i128::from(q as i64) {
                return Err(ERROR);
            }
            (q as u64, (n - q * b) as u64)
        } else {
            if d >= b {
                return Err(ERROR);
            }
            let (mut q, mut r) = (a, d);
            // SAFETY: the quotient fits, as the check above says.
            unsafe {
                asm!("div {b}", b = in(reg) b, inout("rax") q, inout("rdx") r, options(pure, nomem, nostack));
            }
            (q, r)
        }
    } else {
        let n = match W::SIZE {
            4 => d << 32 | a & 0xffff_ffff,
            2 => (d & 0xffff) << 16 | a & 0xffff,
            _ => a & 0xffff,
        };
        if SIGNED {
            let extend = |v: u64, bits: u64| (v << (64 - bits)) as i64 >> (64 - bits);
            let (n, b) = (extend(n, bits * 2), extend(b, bits));
            let q = n.checked_div(b).ok_or(ERROR)?;
            if q != extend(q as u64, bits) {
                return Err(ERROR);
            }
            (q as u64, (n - q * b) as u64)
        } else {
            let b = W::narrow(b).wide();
            let q = n.checked_div(b).ok_or(ERROR)?;
            if q >> bits != 0 {
                return Err(ERROR);
            }
            (q, n - q * b)
        }
    };
    // SAFETY: the handler contract.
    unsafe {
        if W::SIZE == 1 {
            set::<u16>(cpu, RAX, (q & 0xff) | (r & 0xff) << 8);
        } else {
            set::<W>(cpu, RAX, q);
            set::<W>(cpu, RDX, r);
        }
    }
    Ok(())
}

/// MUL (`SIGNED` false) and one-operand IMUL of a register.
pub unsafe extern "sysv64" fn mul_r<W: Word, const SIGNED: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        wide_mul::<W, SIGNED>(cpu, get::<W>(cpu, (*u).src));
        chain!(cpu, u)
    }
}

/// MUL and one-operand IMUL of memory.
pub unsafe extern "sysv64" fn mul_m<
    W: Word,
    const SIGNED: bool,
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
                return mul_m::<W, SIGNED, { super::access::form::OTHER }, true>(cpu, u);
            };
            wide_mul::<W, SIGNED>(cpu, W::load(p).wide());
            return chain!(cpu, u);
        }
        super::access::slow(cpu, u, |c| {
            let b = slow_load::<W>(c, u)?;
            wide_mul::<W, SIGNED>(c, b);
            Ok(())
        })
    }
}

/// DIV and IDIV of a register.
pub unsafe extern "sysv64" fn div_r<W: Word, const SIGNED: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        match wide_div::<W, SIGNED>(cpu, get::<W>(cpu, (*u).src)) {
            Ok(()) => chain!(cpu, u),
            Err(f) => fault(cpu, u, f),
        }
    }
}

/// DIV and IDIV of memory.
pub unsafe extern "sysv64" fn div_m<W: Word, const SIGNED: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        (*cpu).replay.begin_instruction();
        match slow_load::<W>(&mut *cpu, u).and_then(|b| wide_div::<W, SIGNED>(cpu, b)) {
            Ok(()) => resume(cpu, u),
            Err(f) => fault(cpu, u, f),
        }
    }
}

#[inline(always)]
fn short_mul<W: Word>(mut a: u64, b: u64) -> (u64, u64) {
    let f: u64;
    // SAFETY: register arithmetic only.
    unsafe {
        match W::SIZE {
            8 => {
                asm!("imul {a}, {b}", "lahf", "seto al", a = inout(reg) a, b = in(reg) b, out("rax") f,
                options(pure, nomem, nostack))
            }
            4 => {
                asm!("imul {a:e}, {b:e}", "lahf", "seto al", a = inout(reg) a, b = in(reg) b, out("rax") f,
                options(pure, nomem, nostack))
            }
            _ => {
                asm!("imul {a:x}, {b:x}", "lahf", "seto al", a = inout(reg) a, b = in(reg) b, out("rax") f,
                options(pure, nomem, nostack))
            }
        }
    }
    (a, f & 0xffff)
}

/// `imul reg, reg` and, with `IMM`, `imul reg, reg, imm`.
pub unsafe extern "sysv64" fn imul_rr<W: Word, const IMM: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let a = if IMM {
            (*u).imm
        } else {
            get::<W>(cpu, (*u).dst)
        };
        let (v, f) = short_mul::<W>(a, get::<W>(cpu, (*u).src));
        (*cpu).cc = f;
        set::<W>(cpu, (*u).dst, v);
        chain!(cpu, u)
    }
}

/// `imul reg, mem` and, with `IMM`, `imul reg, mem, imm`.
pub unsafe extern "sysv64" fn imul_rm<
    W: Word,
    const IMM: bool,
    const FORM: u8,
    const SLOW: bool,
>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let finish = |cpu: *mut Cpu, b: u64| {
            let a = if IMM {
                (*u).imm
            } else {
                get::<W>(cpu, (*u).dst)
            };
            let (v, f) = short_mul::<W>(a, b);
            (*cpu).cc = f;
            set::<W>(cpu, (*u).dst, v);
        };
        if !SLOW {
            let Some(p) = read_ptr::<W, FORM>(cpu, u) else {
                return imul_rm::<W, IMM, { super::access::form::OTHER }, true>(cpu, u);
            };
            finish(cpu, W::load(p).wide());
            return chain!(cpu, u);
        }
        super::access::slow(cpu, u, |c| {
            let b = slow_load::<W>(c, u)?;
            finish(c, b);
            Ok(())
        })
    }
}
