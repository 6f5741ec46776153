//! Locked read-modify-writes: one locked host instruction on guest memory, so
//! they are atomic across vCPUs.

use core::arch::asm;

use super::access::{chain, get, set, slow, slow_rmw, write_ptr};
use crate::{
    fault::Fault,
    flags::packed,
    mem::fast::Word,
    state::{Cpu, reg},
    uop::Uop,
};

/// Exchanges; XCHG locks by itself.
///
/// # Safety
/// `p` must be mapped for the operand's size.
pub(crate) unsafe fn swap<W: Word>(p: *mut u8, mut v: u64) -> u64 {
    // SAFETY: the caller vouches for the address.
    unsafe {
        match W::SIZE {
            8 => {
                asm!("xchg [{p}], {v}", p = in(reg) p, v = inout(reg) v, options(nostack, preserves_flags))
            }
            4 => {
                asm!("xchg [{p}], {v:e}", p = in(reg) p, v = inout(reg) v, options(nostack, preserves_flags))
            }
            2 => {
                asm!("xchg [{p}], {v:x}", p = in(reg) p, v = inout(reg) v, options(nostack, preserves_flags))
            }
            _ => {
                asm!("xchg [{p}], {v:l}", p = in(reg) p, v = inout(reg) v, options(nostack, preserves_flags))
            }
        }
    }
    W::narrow(v).wide()
}

/// Stores `new` if the memory holds `old`; returns what it held.
///
/// # Safety
/// `p` must be mapped for the operand's size.
pub(crate) unsafe fn compare_exchange<W: Word>(p: *mut u8, old: u64, new: u64) -> u64 {
    let mut a = old;
    // SAFETY: the caller vouches for the address.
    unsafe {
        match W::SIZE {
            8 => {
                asm!("lock cmpxchg [{p}], {n}", p = in(reg) p, n = in(reg) new, inout("rax") a, options(nostack))
            }
            4 => {
                asm!("lock cmpxchg [{p}], {n:e}", p = in(reg) p, n = in(reg) new, inout("rax") a, options(nostack))
            }
            2 => {
                asm!("lock cmpxchg [{p}], {n:x}", p = in(reg) p, n = in(reg) new, inout("rax") a, options(nostack))
            }
            _ => {
                asm!("lock cmpxchg [{p}], {n:l}", p = in(reg) p, n = in(reg) new, inout("rax") a, options(nostack))
            }
        }
    }
    W::narrow(a).wide()
}

/// A locked operation on memory with a register or immediate operand.
pub trait Locked {
    /// Applies it at `p`, returns packed flags.
    ///
    /// # Safety
    /// `p` must be mapped for the operand's size.
    unsafe fn apply<W: Word>(p: *mut u8, b: u64, cc: u64) -> u64;
}

macro_rules! locked {
    ($name:ident, $mnemonic:literal) => {
        #[doc = concat!("`lock ", $mnemonic, "`.")]
        #[derive(Debug)]
        pub struct $name;
        impl Locked for $name {
            #[inline(always)]
            unsafe fn apply<W: Word>(p: *mut u8, b: u64, cc: u64) -> u64 {
                let f: u64;
                // SAFETY: the caller vouches for the address. BT moves the packed
                // CF into the host's, for those that read or keep it.
                unsafe {
                    match W::SIZE {
                        8 => asm!("bt {cc:e}, 8", concat!("lock ", $mnemonic, " qword ptr [{p}], {b}"), "lahf", "seto al",
                            p = in(reg) p, b = in(reg) b, cc = in(reg) cc, out("rax") f, options(nostack)),
                        4 => asm!("bt {cc:e}, 8", concat!("lock ", $mnemonic, " dword ptr [{p}], {b:e}"), "lahf", "seto al",
                            p = in(reg) p, b = in(reg) b, cc = in(reg) cc, out("rax") f, options(nostack)),
                        2 => asm!("bt {cc:e}, 8", concat!("lock ", $mnemonic, " word ptr [{p}], {b:x}"), "lahf", "seto al",
                            p = in(reg) p, b = in(reg) b, cc = in(reg) cc, out("rax") f, options(nostack)),
                        _ => asm!("bt {cc:e}, 8", concat!("lock ", $mnemonic, " byte ptr [{p}], {b:l}"), "lahf", "seto al",
                            p = in(reg) p, b = in(reg) b, cc = in(reg) cc, out("rax") f, options(nostack)),
                    }
                }
                f & 0xffff
            }
        }
    };
}
locked!(Add, "add");
locked!(Or, "or");
locked!(Adc, "adc");
locked!(Sbb, "sbb");
locked!(And, "and");
locked!(Sub, "sub");
locked!(Xor, "xor");

macro_rules! locked_unary {
    ($name:ident, $mnemonic:literal) => {
        #[doc = concat!("`lock ", $mnemonic, "`.")]
        #[derive(Debug)]
        pub struct $name;
        impl Locked for $name {
            #[inline(always)]
            unsafe fn apply<W: Word>(p: *mut u8, _: u64, cc: u64) -> u64 {
                let f: u64;
                // SAFETY: as above.
                unsafe {
                    match W::SIZE {
                        8 => asm!("bt {cc:e}, 8", concat!("lock ", $mnemonic, " qword ptr [{p}]"), "lahf", "seto al",
                            p = in(reg) p, cc = in(reg) cc, out("rax") f, options(nostack)),
                        4 => asm!("bt {cc:e}, 8", concat!("lock ", $mnemonic, " dword ptr [{p}]"), "lahf", "seto al",
                            p = in(reg) p, cc = in(reg) cc, out("rax") f, options(nostack)),
                        2 => asm!("bt {cc:e}, 8", concat!("lock ", $mnemonic, " word ptr [{p}]"), "lahf", "seto al",
                            p = in(reg) p, cc = in(reg) cc, out("rax") f, options(nostack)),
                        _ => asm!("bt {cc:e}, 8", concat!("lock ", $mnemonic, " byte ptr [{p}]"), "lahf", "seto al",
                            p = in(reg) p, cc = in(reg) cc, out("rax") f, options(nostack)),
                    }
                }
                f & 0xffff
            }
        }
    };
}
locked_unary!(Inc, "inc");
locked_unary!(Dec, "dec");
locked_unary!(Neg, "neg");

/// `lock not`: no flags.
#[derive(Debug)]
pub struct Not;
impl Locked for Not {
    #[inline(always)]
    unsafe fn apply<W: Word>(p: *mut u8, _: u64, cc: u64) -> u64 {
        // SAFETY: the caller vouches for the address.
        unsafe { Xor::apply::<W>(p, !0, cc) };
        cc
    }
}

/// `lock op mem, reg` (`IMM` false), `lock op mem, imm`, or `lock op mem`.
pub unsafe extern "sysv64" fn op<
    O: Locked,
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
        let b = if IMM {
            (*u).imm
        } else {
            get::<W>(cpu, (*u).src)
        };
        let cc = (*cpu).cc;
        if !SLOW {
            let Some(p) = write_ptr::<W, FORM>(cpu, u) else {
                return op::<O, W, IMM, { super::access::form::OTHER }, true>(cpu, u);
            };
            (*cpu).cc = O::apply::<W>(p, b, cc);
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            c.cc = slow_rmw::<W, _>(c, u, true, |p| O::apply::<W>(p, b, cc))?;
            Ok(())
        })
    }
}

/// XADD with memory; locked or not, it is done locked.
pub unsafe extern "sysv64" fn xadd_m<W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        slow(cpu, u, |c| {
            let b = get::<W>(c, (*u).src);
            let (old, f) = slow_rmw::<W, _>(c, u, true, |p| exchange_add::<W>(p, b))?;
            c.cc = f;
            set::<W>(c, (*u).src, old);
            Ok(())
        })
    }
}

/// XADD with memory on a TLB hit.
pub unsafe extern "sysv64" fn xadd_m_fast<W: Word, const FORM: u8>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let Some(p) = write_ptr::<W, FORM>(cpu, u) else {
            return xadd_m::<W>(cpu, u);
        };
        let (old, f) = exchange_add::<W>(p, get::<W>(cpu, (*u).src));
        (*cpu).cc = f;
        set::<W>(cpu, (*u).src, old);
        chain!(cpu, u)
    }
}

#[inline(always)]
unsafe fn exchange_add<W: Word>(p: *mut u8, mut b: u64) -> (u64, u64) {
    let f: u64;
    // SAFETY: the caller vouches for the address.
    unsafe {
        match W::SIZE {
            8 => {
                asm!("lock xadd [{p}], {b}", "lahf", "seto al", p = in(reg) p, b = inout(reg) b, out("rax") f, options(nostack))
            }
            4 => {
                asm!("lock xadd [{p}], {b:e}", "lahf", "seto al", p = in(reg) p, b = inout(reg) b, out("rax") f, options(nostack))
            }
            2 => {
                asm!("lock xadd [{p}], {b:x}", "lahf", "seto al", p = in(reg) p, b = inout(reg) b, out("rax") f, options(nostack))
            }
            _ => {
                asm!("lock xadd [{p}], {b:l}", "lahf", "seto al", p = in(reg) p, b = inout(reg) b, out("rax") f, options(nostack))
            }
        }
    }
    (b, f & 0xffff)
}

/// XADD between registers.
pub unsafe extern "sysv64" fn xadd_r<W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    use super::alu::Binary;
    // SAFETY: the handler contract.
    unsafe {
        let (a, b) = (get::<W>(cpu, (*u).dst), get::<W>(cpu, (*u).src));
        let (sum, f) = super::alu::Add::apply::<W>(a, b, 0);
        (*cpu).cc = f;
        set::<W>(cpu, (*u).src, a);
        set::<W>(cpu, (*u).dst, sum);
        chain!(cpu, u)
    }
}

/// CMPXCHG between registers.
pub unsafe extern "sysv64" fn cmpxchg_r<W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    use super::alu::Binary;
    // SAFETY: the handler contract.
    unsafe {
        let (d, a) = (get::<W>(cpu, (*u).dst), get::<W>(cpu, 0));
        (*cpu).cc = super::alu::Cmp::apply::<W>(a, d, 0).1;
        if a == d {
            let s = get::<W>(cpu, (*u).src);
            set::<W>(cpu, (*u).dst, s);
        } else {
            set::<W>(cpu, 0, d);
        }
        chain!(cpu, u)
    }
}

/// CMPXCHG with memory; locked or not, it is done locked.
pub unsafe extern "sysv64" fn cmpxchg_m<W: Word, const FORM: u8, const SLOW: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    use super::alu::Binary;
    // SAFETY: the handler contract.
    unsafe {
        let (new, a) = (get::<W>(cpu, (*u).src), get::<W>(cpu, 0));
        let finish = |cpu: *mut Cpu, old: u64| {
            (*cpu).cc = super::alu::Cmp::apply::<W>(a, old, 0).1;
            if old != a {
                set::<W>(cpu, 0, old);
            }
        };
        if !SLOW {
            let Some(p) = write_ptr::<W, FORM>(cpu, u) else {
                return cmpxchg_m::<W, { super::access::form::OTHER }, true>(cpu, u);
            };
            finish(cpu, compare_exchange::<W>(p, a, new));
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            let old = slow_rmw::<W, _>(c, u, true, |p| compare_exchange::<W>(p, a, new))?;
            finish(c, old);
            Ok(())
        })
    }
}

/// CMPXCHG8B (`WIDE` false) and CMPXCHG16B.
pub unsafe extern "sysv64" fn cmpxchg_pair<const WIDE: bool>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe { slow(cpu, u, |c| pair::<WIDE>(c, u)) }
}

unsafe fn pair<const WIDE: bool>(cpu: &mut Cpu, u: *const Uop) -> Result<(), Fault> {
    let size = if WIDE { 16 } else { 8 };
    // SAFETY: the handler contract; `begin_rmw` vouches for the pointer.
    unsafe {
        let at = super::access::address_checked(cpu, u, size, true)?;
        if WIDE && at % 16 != 0 {
            return Err(Fault::gp(0));
        }
        let privilege = cpu.privilege();
        let p = cpu.begin_rmw(at, size as usize, privilege, true)?;
        let r = |cpu: &Cpu, n: usize| {
            if WIDE {
                cpu.regs[n]
            } else {
                cpu.regs[n] & 0xffff_ffff
            }
        };
        let (mut a, mut d) = (r(cpu, reg::RAX), r(cpu, reg::RDX));
        let (b, c) = (r(cpu, reg::RBX), r(cpu, reg::RCX));
        let equal: u8;
        if WIDE {
            // RBX is reserved by the compiler: it is swapped in and out.
            asm!("xchg rbx, {b}", "lock cmpxchg16b [{p}]", "sete {e}", "mov rbx, {b}",
                b = inout(reg) b => _, p = in(reg) p, e = out(reg_byte) equal,
                inout("rax") a, inout("rdx") d, in("rcx") c, options(nostack));
        } else {
            asm!("xchg rbx, {b}", "lock cmpxchg8b [{p}]", "sete {e}", "mov rbx, {b}",
                b = inout(reg) b => _, p = in(reg) p, e = out(reg_byte) equal,
                inout("rax") a, inout("rdx") d, in("rcx") c, options(nostack));
        }
        cpu.end_write()?;
        if equal != 0 {
            cpu.cc |= packed::ZF;
        } else {
            cpu.cc &= !packed::ZF;
            let mask = if WIDE { !0 } else { 0xffff_ffff };
            cpu.regs[reg::RAX] = a & mask;
            cpu.regs[reg::RDX] = d & mask;
        }
        Ok(())
    }
}
