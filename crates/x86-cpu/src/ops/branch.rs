//! Branches, calls and returns within a code segment. Every block ends in one
//! of these, or in [`super::generic::end`].

use super::access::{chain, fault, get, read_ptr, rip_after, set, slow_load};
use crate::{
    fault::Fault,
    flags::condition,
    mem::fast::{Word, probe_read, probe_write},
    state::{Cpu, reg},
    uop::{Next, Uop},
};

const RSP: u8 = (reg::RSP * 8) as u8;
const RCX: u8 = (reg::RCX * 8) as u8;

/// JMP to a fixed target.
pub unsafe extern "sysv64" fn jmp(_: *mut Cpu, _: *const Uop) -> u32 {
    Next::TAKEN
}

/// The end of a block that just goes on behind it.
pub unsafe extern "sysv64" fn fall(_: *mut Cpu, _: *const Uop) -> u32 {
    Next::FALL
}

/// Jcc; `aux` is the condition.
pub unsafe extern "sysv64" fn jcc<const COND: u8>(cpu: *mut Cpu, _: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe { u32::from(condition((*cpu).cc, COND)) }
}

/// JCXZ, JECXZ, JRCXZ; `aux` is the counter's width in bytes.
pub unsafe extern "sysv64" fn jrcxz(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let unused_bits = 64 - 8 * u32::from((*u).aux);
        u32::from(get::<u64>(cpu, RCX) << unused_bits == 0)
    }
}

/// LOOP (`KIND` 0), LOOPE (1), LOOPNE (2); `aux` is the counter's width in bytes.
pub unsafe extern "sysv64" fn loop_<const KIND: u8>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let count = get::<u64>(cpu, RCX).wrapping_sub(1);
        let zero = match (*u).aux {
            2 => {
                set::<u16>(cpu, RCX, count);
                count & 0xffff == 0
            }
            4 => {
                set::<u32>(cpu, RCX, count);
                count & 0xffff_ffff == 0
            }
            _ => {
                set::<u64>(cpu, RCX, count);
                count == 0
            }
        };
        let zf = condition((*cpu).cc, 4);
        let go = !zero
            && match KIND {
                0 => true,
                1 => zf,
                _ => !zf,
            };
        u32::from(go)
    }
}

/// CALL to a fixed target, 64-bit.
pub unsafe extern "sysv64" fn call64(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let sp = get::<u64>(cpu, RSP).wrapping_sub(8);
        let Some(p) = probe_write(cpu, sp, 8) else {
            return call64_slow(cpu, u);
        };
        u64::store(p, rip_after(cpu, u));
        set::<u64>(cpu, RSP, sp);
        Next::TAKEN
    }
}

#[cold]
#[inline(never)]
unsafe extern "sysv64" fn call64_slow(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        (*cpu).replay.begin_instruction();
        match (*cpu).push(rip_after(cpu, u), 8) {
            Ok(()) => Next::TAKEN,
            Err(f) => fault(cpu, u, f),
        }
    }
}

/// Goes to `target` if it is canonical.
#[inline(always)]
unsafe fn go(cpu: *mut Cpu, u: *const Uop, target: u64) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        if !(*cpu).canonical(target) {
            return fault(cpu, u, Fault::gp(0));
        }
        (*cpu).rip = target;
        Next::LOOKUP
    }
}

/// `jmp reg`, 64-bit.
pub unsafe extern "sysv64" fn jmp_r64(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe { go(cpu, u, get::<u64>(cpu, (*u).src)) }
}

/// `jmp mem`, 64-bit.
pub unsafe extern "sysv64" fn jmp_m64<const FORM: u8>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let Some(p) = read_ptr::<u64, FORM>(cpu, u) else {
            return jmp_m64_slow(cpu, u);
        };
        go(cpu, u, u64::load(p))
    }
}

#[cold]
#[inline(never)]
unsafe extern "sysv64" fn jmp_m64_slow(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        (*cpu).replay.begin_instruction();
        match slow_load::<u64>(&mut *cpu, u) {
            Ok(t) => go(cpu, u, t),
            Err(f) => fault(cpu, u, f),
        }
    }
}

/// `call reg` (`MEMORY` false) and `call mem`, 64-bit.
pub unsafe extern "sysv64" fn call_indirect64<const MEMORY: bool>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let target = if MEMORY {
            (*cpu).replay.begin_instruction();
            match slow_load::<u64>(&mut *cpu, u) {
                Ok(t) => t,
                Err(f) => return fault(cpu, u, f),
            }
        } else {
            get::<u64>(cpu, (*u).src)
        };
        if !(*cpu).canonical(target) {
            return fault(cpu, u, Fault::gp(0));
        }
        let sp = get::<u64>(cpu, RSP).wrapping_sub(8);
        let next = rip_after(cpu, u);
        if let Some(p) = probe_write(cpu, sp, 8) {
            u64::store(p, next);
            set::<u64>(cpu, RSP, sp);
        } else if let Err(f) = (*cpu).push(next, 8) {
            return fault(cpu, u, f);
        }
        (*cpu).rip = target;
        Next::LOOKUP
    }
}

/// `ret` and `ret imm`, 64-bit.
pub unsafe extern "sysv64" fn ret64(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let sp = get::<u64>(cpu, RSP);
        let Some(p) = probe_read(cpu, sp, 8) else {
            return ret64_slow(cpu, u);
        };
        let target = u64::load(p);
        if !(*cpu).canonical(target) {
            return fault(cpu, u, Fault::gp(0));
        }
        set::<u64>(cpu, RSP, sp.wrapping_add(8).wrapping_add((*u).imm));
        (*cpu).rip = target;
        Next::LOOKUP
    }
}

#[cold]
#[inline(never)]
unsafe extern "sysv64" fn ret64_slow(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        (*cpu).replay.begin_instruction();
        match (*cpu).peek(0, 8) {
            Ok(target) if (*cpu).canonical(target) => {
                let sp = get::<u64>(cpu, RSP);
                set::<u64>(cpu, RSP, sp.wrapping_add(8).wrapping_add((*u).imm));
                (*cpu).rip = target;
                Next::LOOKUP
            }
            Ok(_) => fault(cpu, u, Fault::gp(0)),
            Err(f) => fault(cpu, u, f),
        }
    }
}

/// Near branches of 16- and 32-bit code (and 16-bit operands in 64-bit code).
/// `aux` bits 0 to 3: operand size in bytes; bits 4 and up: [`legacy`] kind.
pub unsafe extern "sysv64" fn near_any(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        (*cpu).replay.begin_instruction();
        match near(&mut *cpu, u) {
            Ok(target) => {
                (*cpu).rip = target;
                Next::LOOKUP
            }
            Err(f) => fault(cpu, u, f),
        }
    }
}

/// Kinds of branches that [`near_any`] makes.
#[allow(missing_docs, reason = "named for the instruction")]
pub mod legacy {
    pub const JMP_REL: u16 = 0;
    pub const CALL_REL: u16 = 1;
    pub const JMP_REG: u16 = 2;
    pub const CALL_REG: u16 = 3;
    pub const JMP_MEM: u16 = 4;
    pub const CALL_MEM: u16 = 5;
    pub const RET: u16 = 6;
}

unsafe fn near(cpu: &mut Cpu, u: *const Uop) -> Result<u64, Fault> {
    // SAFETY: the handler contract.
    unsafe {
        let (size, kind) = (u64::from((*u).aux & 15), (*u).aux >> 4);
        let mask = if size == 8 {
            !0
        } else {
            (1u64 << (8 * size)) - 1
        };
        let next = rip_after(cpu, u);
        let target = match kind {
            legacy::JMP_REL | legacy::CALL_REL => next.wrapping_add((*u).imm),
            legacy::JMP_REG | legacy::CALL_REG => get::<u64>(cpu, (*u).src),
            legacy::JMP_MEM | legacy::CALL_MEM => match size {
                2 => slow_load::<u16>(cpu, u)?,
                4 => slow_load::<u32>(cpu, u)?,
                _ => slow_load::<u64>(cpu, u)?,
            },
            _ => cpu.peek(0, size)?,
        } & mask;
        let limit = u64::from(cpu.segments[crate::state::seg::CS].limit);
        let inside = if cpu.is_64bit() {
            cpu.canonical(target)
        } else {
            target <= limit
        };
        if !inside {
            return Err(Fault::gp(0));
        }
        match kind {
            legacy::CALL_REL | legacy::CALL_REG | legacy::CALL_MEM => cpu.push(next, size)?,
            legacy::RET => {
                let sp = cpu.regs[reg::RSP].wrapping_add(size).wrapping_add((*u).imm);
                cpu.set_stack_pointer(sp);
            }
            _ => {}
        }
        Ok(target)
    }
}

/// A conditional branch of 16- and 32-bit code: leaves the block either way.
/// The micro-operation before it is the branch itself, returning 0 or 1.
pub unsafe extern "sysv64" fn jcc_any(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let cond = ((*u).aux >> 4) as u8;
        let taken = match cond {
            0..16 => condition((*cpu).cc, cond),
            16 => jrcxz(cpu, counter(u).as_ptr()) != 0,
            17 => loop_::<0>(cpu, counter(u).as_ptr()) != 0,
            18 => loop_::<1>(cpu, counter(u).as_ptr()) != 0,
            _ => loop_::<2>(cpu, counter(u).as_ptr()) != 0,
        };
        let next = rip_after(cpu, u);
        (*cpu).rip = if taken {
            let size = (*u).aux & 15;
            let mask = if size == 2 { 0xffff } else { 0xffff_ffff };
            let target = next.wrapping_add((*u).imm) & mask;
            if target > u64::from((*cpu).segments[crate::state::seg::CS].limit) {
                return fault(cpu, u, Fault::gp(0));
            }
            target
        } else {
            next
        };
        Next::LOOKUP
    }
}

/// `u` with the counter's width, kept in `disp`, where [`loop_`] looks for it.
unsafe fn counter(u: *const Uop) -> [Uop; 1] {
    // SAFETY: the handler contract.
    let mut u = unsafe { *u };
    u.aux = u.disp as u16;
    [u]
}

/// NOP and everything that amounts to one.
pub unsafe extern "sysv64" fn nop(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe { chain!(cpu, u) }
}
