//! MOV, MOVZX, MOVSX, LEA, XCHG, CMOVcc, SETcc, PUSH, POP, and the sign
//! extensions of RAX.

use super::access::{
    address, chain, get, offset_other, read_ptr, set, slow, slow_load, slow_rmw, slow_store,
    write_ptr,
};
use crate::{
    flags::condition,
    mem::fast::{Word, probe_read, probe_write},
    state::{Cpu, reg},
    uop::Uop,
};

const RSP: u8 = (reg::RSP * 8) as u8;
const RAX: u8 = 0;
const RDX: u8 = (reg::RDX * 8) as u8;

/// `mov reg, reg`.
pub unsafe extern "sysv64" fn mov_rr<W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        set::<W>(cpu, (*u).dst, get::<W>(cpu, (*u).src));
        chain!(cpu, u)
    }
}

/// `mov reg, imm`.
pub unsafe extern "sysv64" fn mov_ri<W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        set::<W>(cpu, (*u).dst, (*u).imm);
        chain!(cpu, u)
    }
}

/// Loads `S`, extends it (`SIGNED` or not) and writes it as `W`: MOV, MOVZX,
/// MOVSX and MOVSXD from memory.
pub unsafe extern "sysv64" fn load<
    W: Word,
    S: Word,
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
            let Some(p) = read_ptr::<S, FORM>(cpu, u) else {
                return load::<W, S, SIGNED, { super::access::form::OTHER }, true>(cpu, u);
            };
            set::<W>(cpu, (*u).dst, extend::<S, SIGNED>(S::load(p).wide()));
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            let v = slow_load::<S>(c, u)?;
            set::<W>(c, (*u).dst, extend::<S, SIGNED>(v));
            Ok(())
        })
    }
}

#[inline(always)]
fn extend<S: Word, const SIGNED: bool>(v: u64) -> u64 {
    if !SIGNED {
        return v;
    }
    match S::SIZE {
        1 => v as i8 as u64,
        2 => v as i16 as u64,
        4 => v as i32 as u64,
        _ => v,
    }
}

/// MOVZX, MOVSX and MOVSXD between registers.
pub unsafe extern "sysv64" fn extend_rr<W: Word, S: Word, const SIGNED: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        set::<W>(cpu, (*u).dst, extend::<S, SIGNED>(get::<S>(cpu, (*u).src)));
        chain!(cpu, u)
    }
}

/// `mov mem, reg` (`IMM` false) or `mov mem, imm`.
pub unsafe extern "sysv64" fn store<W: Word, const FORM: u8, const IMM: bool, const SLOW: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let v = if IMM {
            (*u).imm
        } else {
            get::<W>(cpu, (*u).src)
        };
        if !SLOW {
            let Some(p) = write_ptr::<W, FORM>(cpu, u) else {
                return store::<W, FORM, IMM, true>(cpu, u);
            };
            W::store(p, W::narrow(v));
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| slow_store::<W>(c, u, v))
    }
}

/// `lea reg, [...]`; segment bases play no part.
pub unsafe extern "sysv64" fn lea<W: Word, const FORM: u8>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let v = if FORM == super::access::form::OTHER {
            offset_other(cpu, u)
        } else {
            address::<FORM>(cpu, u)
        };
        set::<W>(cpu, (*u).dst, v);
        chain!(cpu, u)
    }
}

/// `xchg reg, reg`.
pub unsafe extern "sysv64" fn xchg_rr<W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let (a, b) = (get::<W>(cpu, (*u).dst), get::<W>(cpu, (*u).src));
        set::<W>(cpu, (*u).dst, b);
        set::<W>(cpu, (*u).src, a);
        chain!(cpu, u)
    }
}

/// `cmovcc reg, reg`; `aux` is the condition. A 32-bit destination is
/// zero-extended even if the condition fails.
pub unsafe extern "sysv64" fn cmov_rr<W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let (a, b) = (get::<W>(cpu, (*u).dst), get::<W>(cpu, (*u).src));
        set::<W>(
            cpu,
            (*u).dst,
            if condition((*cpu).cc, (*u).aux as u8) {
                b
            } else {
                a
            },
        );
        chain!(cpu, u)
    }
}

/// `cmovcc reg, mem`: memory is read whatever the condition.
pub unsafe extern "sysv64" fn cmov_rm<W: Word, const FORM: u8, const SLOW: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let finish = |cpu: *mut Cpu, b: u64| {
            let a = get::<W>(cpu, (*u).dst);
            set::<W>(
                cpu,
                (*u).dst,
                if condition((*cpu).cc, (*u).aux as u8) {
                    b
                } else {
                    a
                },
            );
        };
        if !SLOW {
            let Some(p) = read_ptr::<W, FORM>(cpu, u) else {
                return cmov_rm::<W, { super::access::form::OTHER }, true>(cpu, u);
            };
            finish(cpu, W::load(p).wide());
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            let b = slow_load::<W>(c, u)?;
            finish(c, b);
            Ok(())
        })
    }
}

/// `setcc reg`.
pub unsafe extern "sysv64" fn setcc_r(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        set::<u8>(
            cpu,
            (*u).dst,
            u64::from(condition((*cpu).cc, (*u).aux as u8)),
        );
        chain!(cpu, u)
    }
}

/// `setcc mem`.
pub unsafe extern "sysv64" fn setcc_m(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let v = u64::from(condition((*cpu).cc, (*u).aux as u8));
        slow(cpu, u, |c| slow_store::<u8>(c, u, v))
    }
}

/// `push reg` (`IMM` false) or `push imm`, 64-bit stack and operand.
pub unsafe extern "sysv64" fn push64<const IMM: bool, const SLOW: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let v = if IMM {
            (*u).imm
        } else {
            get::<u64>(cpu, (*u).src)
        };
        if !SLOW {
            let sp = get::<u64>(cpu, RSP).wrapping_sub(8);
            let Some(p) = probe_write(cpu, sp, 8) else {
                return push64::<IMM, true>(cpu, u);
            };
            u64::store(p, v);
            set::<u64>(cpu, RSP, sp);
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| c.push(v, 8))
    }
}

/// `pop reg`, 64-bit stack and operand.
pub unsafe extern "sysv64" fn pop64<const SLOW: bool>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        if !SLOW {
            let sp = get::<u64>(cpu, RSP);
            let Some(p) = probe_read(cpu, sp, 8) else {
                return pop64::<true>(cpu, u);
            };
            let v = u64::load(p);
            set::<u64>(cpu, RSP, sp.wrapping_add(8));
            set::<u64>(cpu, (*u).dst, v);
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            let v = c.pop(8)?;
            set::<u64>(c, (*u).dst, v);
            Ok(())
        })
    }
}

/// PUSH of a register or immediate with any operand size (`aux`, bytes).
pub unsafe extern "sysv64" fn push_any<const IMM: bool>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let v = if IMM {
            (*u).imm
        } else {
            get::<u64>(cpu, (*u).src)
        };
        slow(cpu, u, |c| c.push(v, u64::from((*u).aux)))
    }
}

/// POP to a register with any operand size (`aux`, bytes).
pub unsafe extern "sysv64" fn pop_any(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        slow(cpu, u, |c| {
            let size = u64::from((*u).aux);
            let v = c.pop(size)?;
            match size {
                2 => set::<u16>(c, (*u).dst, v),
                4 => set::<u32>(c, (*u).dst, v),
                _ => set::<u64>(c, (*u).dst, v),
            }
            Ok(())
        })
    }
}

/// `push mem` with any operand size (`aux`, bytes).
pub unsafe extern "sysv64" fn push_m(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        slow(cpu, u, |c| {
            let v = match (*u).aux {
                2 => slow_load::<u16>(c, u)?,
                4 => slow_load::<u32>(c, u)?,
                _ => slow_load::<u64>(c, u)?,
            };
            c.push(v, u64::from((*u).aux))
        })
    }
}

/// `pop mem` with any operand size (`aux`, bytes). The address is computed
/// after RSP has moved (Intel SDM, POP).
pub unsafe extern "sysv64" fn pop_m(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        slow(cpu, u, |c| {
            let before = c.regs[reg::RSP];
            let size = u64::from((*u).aux);
            let v = c.pop(size)?;
            let stored = match size {
                2 => slow_store::<u16>(c, u, v),
                4 => slow_store::<u32>(c, u, v),
                _ => slow_store::<u64>(c, u, v),
            };
            if stored.is_err() {
                c.regs[reg::RSP] = before;
            }
            stored
        })
    }
}

/// `xchg mem, reg`: always locked.
pub unsafe extern "sysv64" fn xchg_mr<W: Word, const FORM: u8, const SLOW: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let v = get::<W>(cpu, (*u).src);
        if !SLOW {
            let Some(p) = write_ptr::<W, FORM>(cpu, u) else {
                return xchg_mr::<W, { super::access::form::OTHER }, true>(cpu, u);
            };
            let old = super::atomic::swap::<W>(p, v);
            set::<W>(cpu, (*u).src, old);
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            let old = slow_rmw::<W, _>(c, u, true, |p| super::atomic::swap::<W>(p, v))?;
            set::<W>(c, (*u).src, old);
            Ok(())
        })
    }
}

/// CBW, CWDE, CDQE: sign-extends the lower half of RAX within `W`.
pub unsafe extern "sysv64" fn extend_a<W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let a = get::<u64>(cpu, RAX);
        let v = match W::SIZE {
            2 => a as i8 as u64,
            4 => a as i16 as u64,
            _ => a as i32 as u64,
        };
        set::<W>(cpu, RAX, v);
        chain!(cpu, u)
    }
}

/// CWD, CDQ, CQO: the sign of RAX in every bit of RDX.
pub unsafe extern "sysv64" fn extend_ad<W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let a = get::<u64>(cpu, RAX);
        let sign = a >> (W::SIZE * 8 - 1) & 1;
        set::<W>(cpu, RDX, 0u64.wrapping_sub(sign));
        chain!(cpu, u)
    }
}

/// `leave` with 64-bit stack and operand.
pub unsafe extern "sysv64" fn leave64(cpu: *mut Cpu, u: *const Uop) -> u32 {
    const RBP: u8 = (reg::RBP * 8) as u8;
    // SAFETY: the handler contract.
    unsafe {
        let sp = get::<u64>(cpu, RBP);
        if let Some(p) = probe_read(cpu, sp, 8) {
            let v = u64::load(p);
            set::<u64>(cpu, RSP, sp.wrapping_add(8));
            set::<u64>(cpu, RBP, v);
            return chain!(cpu, u);
        }
        slow(cpu, u, |c| {
            let at = c.linear(crate::state::seg::SS, sp, 8, false)?;
            let privilege = c.privilege();
            let v = c.read_uint(at, 8, privilege)?;
            c.regs[reg::RSP] = sp.wrapping_add(8);
            c.regs[reg::RBP] = v;
            Ok(())
        })
    }
}

/// `bswap reg`. The 16-bit form, undefined by the manuals, yields zero as
/// processors do.
pub unsafe extern "sysv64" fn bswap<W: Word>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let v = get::<W>(cpu, (*u).dst);
        let r = match W::SIZE {
            8 => v.swap_bytes(),
            4 => u64::from((v as u32).swap_bytes()),
            _ => 0,
        };
        set::<W>(cpu, (*u).dst, r);
        chain!(cpu, u)
    }
}
