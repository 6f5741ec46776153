//! ADD OR ADC SBB AND SUB XOR CMP TEST, and the unary INC DEC NEG NOT: register,
//! immediate and memory forms. Also CMP and TEST fused with a following Jcc.

use core::arch::asm;

use super::access::{chain, get, read_ptr, set, slow, slow_load, slow_rmw, write_ptr};
use crate::{mem::fast::Word, state::Cpu, uop::Uop};

/// A two-operand operation whose flags are the host's.
pub trait Binary {
    /// The destination is written.
    const WRITES: bool;
    /// Result and packed flags of `a op b` with packed flags `cc` before.
    fn apply<W: Word>(a: u64, b: u64, cc: u64) -> (u64, u64);
    /// The result alone, where nobody reads the flags.
    fn plain<W: Word>(a: u64, b: u64, cc: u64) -> u64;
}

macro_rules! flags_after {
    ($mnemonic:literal, $a:ident, $b:ident, $w:ident) => {{
        let f: u64;
        // SAFETY: register arithmetic only.
        unsafe {
            match $w::SIZE {
                8 => asm!(concat!($mnemonic, " {a}, {b}"), "lahf", "seto al",
                    a = inout(reg) $a, b = in(reg) $b, out("rax") f, options(pure, nomem, nostack)),
                4 => asm!(concat!($mnemonic, " {a:e}, {b:e}"), "lahf", "seto al",
                    a = inout(reg) $a, b = in(reg) $b, out("rax") f, options(pure, nomem, nostack)),
                2 => asm!(concat!($mnemonic, " {a:x}, {b:x}"), "lahf", "seto al",
                    a = inout(reg) $a, b = in(reg) $b, out("rax") f, options(pure, nomem, nostack)),
                _ => asm!(concat!($mnemonic, " {a:l}, {b:l}"), "lahf", "seto al",
                    a = inout(reg) $a, b = in(reg) $b, out("rax") f, options(pure, nomem, nostack)),
            }
        }
        f & 0xffff
    }};
}

macro_rules! binary {
    ($name:ident, $mnemonic:literal, $writes:expr, |$a:ident, $b:ident| $plain:expr) => {
        #[doc = concat!("The `", $mnemonic, "` instruction.")]
        #[derive(Debug)]
        pub struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<W: Word>(mut a: u64, b: u64, _cc: u64) -> (u64, u64) {
                let f = flags_after!($mnemonic, a, b, W);
                (a, f)
            }
            #[inline(always)]
            fn plain<W: Word>($a: u64, $b: u64, _cc: u64) -> u64 {
                $plain
            }
        }
    };
}
binary!(Add, "add", true, |a, b| a.wrapping_add(b));
binary!(Sub, "sub", true, |a, b| a.wrapping_sub(b));
binary!(And, "and", true, |a, b| a & b);
binary!(Or, "or", true, |a, b| a | b);
binary!(Xor, "xor", true, |a, b| a ^ b);
binary!(Cmp, "cmp", false, |a, b| a.wrapping_sub(b));
binary!(Test, "test", false, |a, b| a & b);

macro_rules! carrying {
    ($name:ident, $mnemonic:literal, $host:literal) => {
        #[doc = concat!("The `", $mnemonic, "` instruction.")]
        #[derive(Debug)]
        pub struct $name;
        impl Binary for $name {
            const WRITES: bool = true;
            #[inline(always)]
            fn apply<W: Word>(mut a: u64, b: u64, cc: u64) -> (u64, u64) {
                let f: u64;
                // SAFETY: register arithmetic only. BT moves the packed CF into the host's.
                unsafe {
                    match W::SIZE {
                        8 => asm!("bt {cc:e}, 8", concat!($host, " {a}, {b}"), "lahf", "seto al",
                            a = inout(reg) a, b = in(reg) b, cc = in(reg) cc, out("rax") f, options(pure, nomem, nostack)),
                        4 => asm!("bt {cc:e}, 8", concat!($host, " {a:e}, {b:e}"), "lahf", "seto al",
                            a = inout(reg) a, b = in(reg) b, cc = in(reg) cc, out("rax") f, options(pure, nomem, nostack)),
                        2 => asm!("bt {cc:e}, 8", concat!($host, " {a:x}, {b:x}"), "lahf", "seto al",
                            a = inout(reg) a, b = in(reg) b, cc = in(reg) cc, out("rax") f, options(pure, nomem, nostack)),
                        _ => asm!("bt {cc:e}, 8", concat!($host, " {a:l}, {b:l}"), "lahf", "seto al",
                            a = inout(reg) a, b = in(reg) b, cc = in(reg) cc, out("rax") f, options(pure, nomem, nostack)),
                    }
                }
                (a, f & 0xffff)
            }
            #[inline(always)]
            fn plain<W: Word>(a: u64, b: u64, cc: u64) -> u64 {
                Self::apply::<W>(a, b, cc).0
            }
        }
    };
}
carrying!(Adc, "adc", "adc");
carrying!(Sbb, "sbb", "sbb");

/// `op reg, reg`.
pub unsafe extern "sysv64" fn rr<O: Binary, W: Word, const FLAGS: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract of this module's parent.
    unsafe {
        let (a, b) = (get::<W>(cpu, (*u).dst), get::<W>(cpu, (*u).src));
        finish::<O, W, FLAGS>(cpu, u, a, b);
        chain!(cpu, u)
    }
}

/// `op reg, imm`.
pub unsafe extern "sysv64" fn ri<O: Binary, W: Word, const FLAGS: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let a = get::<W>(cpu, (*u).dst);
        finish::<O, W, FLAGS>(cpu, u, a, (*u).imm);
        chain!(cpu, u)
    }
}

#[inline(always)]
unsafe fn finish<O: Binary, W: Word, const FLAGS: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
    a: u64,
    b: u64,
) {
    // SAFETY: the handler contract.
    unsafe {
        if FLAGS {
            let (r, f) = O::apply::<W>(a, b, (*cpu).cc);
            (*cpu).cc = f;
            if O::WRITES {
                set::<W>(cpu, (*u).dst, r);
            }
        } else if O::WRITES {
            set::<W>(cpu, (*u).dst, O::plain::<W>(a, b, (*cpu).cc));
        }
    }
}

/// `op reg, mem`.
pub unsafe extern "sysv64" fn rm<O: Binary, W: Word, const FORM: u8, const SLOW: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        if !SLOW {
            let Some(p) = read_ptr::<W, FORM>(cpu, u) else {
                return rm::<O, W, { super::access::form::OTHER }, true>(cpu, u);
            };
            let b = W::load(p).wide();
            let a = get::<W>(cpu, (*u).dst);
            finish::<O, W, true>(cpu, u, a, b);
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            let b = slow_load::<W>(c, u)?;
            let a = get::<W>(c, (*u).dst);
            finish::<O, W, true>(c, u, a, b);
            Ok(())
        })
    }
}

/// `op mem, reg` (`IMM` false) or `op mem, imm`.
pub unsafe extern "sysv64" fn mr<
    O: Binary,
    W: Word,
    const FORM: u8,
    const IMM: bool,
    const SLOW: bool,
>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let b = if IMM {
            (*u).imm
        } else {
            get::<W>(cpu, (*u).src)
        };
        let cc = (*cpu).cc;
        if !SLOW {
            let p = if O::WRITES {
                write_ptr::<W, FORM>(cpu, u)
            } else {
                read_ptr::<W, FORM>(cpu, u)
            };
            let Some(p) = p else {
                return mr::<O, W, FORM, IMM, true>(cpu, u);
            };
            let (r, f) = O::apply::<W>(W::load(p).wide(), b, cc);
            if O::WRITES {
                W::store(p, W::narrow(r));
            }
            (*cpu).cc = f;
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            let f = if O::WRITES {
                slow_rmw::<W, _>(c, u, false, |p| {
                    let (r, f) = O::apply::<W>(W::load(p).wide(), b, cc);
                    W::store(p, W::narrow(r));
                    f
                })?
            } else {
                O::apply::<W>(slow_load::<W>(c, u)?, b, cc).1
            };
            c.cc = f;
            Ok(())
        })
    }
}

/// A one-operand operation.
pub trait Unary {
    /// Result and packed flags.
    fn apply<W: Word>(a: u64, cc: u64) -> (u64, u64);
}

macro_rules! unary {
    ($name:ident, $mnemonic:literal) => {
        #[doc = concat!("The `", $mnemonic, "` instruction.")]
        #[derive(Debug)]
        pub struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<W: Word>(mut a: u64, cc: u64) -> (u64, u64) {
                let f: u64;
                // SAFETY: register arithmetic only. BT keeps CF for INC and DEC.
                unsafe {
                    match W::SIZE {
                        8 => asm!("bt {cc:e}, 8", concat!($mnemonic, " {a}"), "lahf", "seto al",
                            a = inout(reg) a, cc = in(reg) cc, out("rax") f, options(pure, nomem, nostack)),
                        4 => asm!("bt {cc:e}, 8", concat!($mnemonic, " {a:e}"), "lahf", "seto al",
                            a = inout(reg) a, cc = in(reg) cc, out("rax") f, options(pure, nomem, nostack)),
                        2 => asm!("bt {cc:e}, 8", concat!($mnemonic, " {a:x}"), "lahf", "seto al",
                            a = inout(reg) a, cc = in(reg) cc, out("rax") f, options(pure, nomem, nostack)),
                        _ => asm!("bt {cc:e}, 8", concat!($mnemonic, " {a:l}"), "lahf", "seto al",
                            a = inout(reg) a, cc = in(reg) cc, out("rax") f, options(pure, nomem, nostack)),
                    }
                }
                (a, f & 0xffff)
            }
        }
    };
}
unary!(Inc, "inc");
unary!(Dec, "dec");
unary!(Neg, "neg");

/// The `not` instruction: no flags.
#[derive(Debug)]
pub struct Not;
impl Unary for Not {
    #[inline(always)]
    fn apply<W: Word>(a: u64, cc: u64) -> (u64, u64) {
        (!a, cc)
    }
}

/// `op reg`.
pub unsafe extern "sysv64" fn unary_r<O: Unary, W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let (r, f) = O::apply::<W>(get::<W>(cpu, (*u).dst), (*cpu).cc);
        (*cpu).cc = f;
        set::<W>(cpu, (*u).dst, r);
        chain!(cpu, u)
    }
}

/// `op mem`.
pub unsafe extern "sysv64" fn unary_m<O: Unary, W: Word, const FORM: u8, const SLOW: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let cc = (*cpu).cc;
        let body = |p: *mut u8| {
            let (r, f) = O::apply::<W>(W::load(p).wide(), cc);
            W::store(p, W::narrow(r));
            f
        };
        if !SLOW {
            let Some(p) = write_ptr::<W, FORM>(cpu, u) else {
                return unary_m::<O, W, { super::access::form::OTHER }, true>(cpu, u);
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

/// Whether condition pair `PAIR` (condition code without its lowest bit, shifted
/// down) holds after `cmp a, b` or `test a, b`.
#[inline(always)]
fn holds<W: Word, const TEST: bool, const PAIR: u8>(a: u64, b: u64, cc: u64) -> bool {
    let signed = |v: u64| match W::SIZE {
        8 => v as i64,
        4 => i64::from(v as i32),
        2 => i64::from(v as i16),
        _ => i64::from(v as i8),
    };
    let (ua, ub) = (W::narrow(a).wide(), W::narrow(b).wide());
    if TEST {
        let r = ua & ub;
        match PAIR {
            0 | 1 => false,
            2 | 3 => r == 0,
            4 | 6 => signed(r) < 0,
            7 => signed(r) <= 0,
            _ => crate::flags::condition(cc, PAIR << 1),
        }
    } else {
        match PAIR {
            1 => ua < ub,
            2 => ua == ub,
            3 => ua <= ub,
            4 => signed(ua.wrapping_sub(ub)) < 0,
            6 => signed(ua) < signed(ub),
            7 => signed(ua) <= signed(ub),
            _ => crate::flags::condition(cc, PAIR << 1),
        }
    }
}

/// `cmp`/`test` of two registers (`IMM` false) or register and immediate, then
/// Jcc. `aux` bit 0 inverts the condition.
pub unsafe extern "sysv64" fn fused_r<
    O: Binary,
    W: Word,
    const TEST: bool,
    const PAIR: u8,
    const IMM: bool,
>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let a = get::<W>(cpu, (*u).dst);
        let b = if IMM {
            (*u).imm
        } else {
            get::<W>(cpu, (*u).src)
        };
        let (_, f) = O::apply::<W>(a, b, 0);
        (*cpu).cc = f;
        u32::from(holds::<W, TEST, PAIR>(a, b, f)) ^ u32::from((*u).aux)
    }
}

/// `cmp`/`test mem, imm` (`IMM`) or `mem, reg`, then Jcc. `aux` bit 0 inverts
/// the condition; bit 1 says that memory is the second operand (`cmp reg, mem`).
pub unsafe extern "sysv64" fn fused_m<
    O: Binary,
    W: Word,
    const TEST: bool,
    const PAIR: u8,
    const FORM: u8,
>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let Some(p) = read_ptr::<W, FORM>(cpu, u) else {
            return fused_m_slow::<O, W, TEST, PAIR>(cpu, u);
        };
        let m = W::load(p).wide();
        fused_m_rest::<O, W, TEST, PAIR>(cpu, u, m)
    }
}

#[inline(always)]
unsafe fn fused_m_rest<O: Binary, W: Word, const TEST: bool, const PAIR: u8>(
    cpu: *mut Cpu,
    u: *const Uop,
    m: u64,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let aux = (*u).aux;
        let other = if aux & 4 != 0 {
            (*u).imm
        } else {
            get::<W>(cpu, (*u).src)
        };
        let (a, b) = if aux & 2 != 0 { (other, m) } else { (m, other) };
        let (_, f) = O::apply::<W>(a, b, 0);
        (*cpu).cc = f;
        u32::from(holds::<W, TEST, PAIR>(a, b, f)) ^ u32::from(aux & 1)
    }
}

/// The slow half of [`fused_m`].
#[cold]
#[inline(never)]
unsafe extern "sysv64" fn fused_m_slow<O: Binary, W: Word, const TEST: bool, const PAIR: u8>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        (*cpu).replay.begin_instruction();
        match slow_load::<W>(&mut *cpu, u) {
            Ok(m) => fused_m_rest::<O, W, TEST, PAIR>(cpu, u, m),
            Err(f) => super::access::fault(cpu, u, f),
        }
    }
}
