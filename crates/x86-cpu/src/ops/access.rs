//! What all handlers share: registers, addresses, flags, chaining, exits.

use crate::{
    fault::Fault,
    mem::fast::{Word, probe_read, probe_write},
    state::{Cpu, reg},
    uop::{Next, Uop},
};

/// Reads a register at byte offset `off`.
#[inline(always)]
pub(crate) unsafe fn get<W: Word>(cpu: *const Cpu, off: u8) -> u64 {
    // SAFETY: offsets come from the block builder and are inside `regs`, which
    // is at offset 0; byte offsets 1 mod 8 are only made for byte operands.
    unsafe {
        match W::SIZE {
            8 => *(cpu.cast::<u8>().add(off as usize).cast::<u64>()),
            4 => u64::from(*(cpu.cast::<u8>().add(off as usize).cast::<u32>())),
            2 => u64::from(*(cpu.cast::<u8>().add(off as usize).cast::<u16>())),
            _ => u64::from(*cpu.cast::<u8>().add(off as usize)),
        }
    }
}

/// Writes a register: 32 bits clear the upper half, 8 and 16 merge.
#[inline(always)]
pub(crate) unsafe fn set<W: Word>(cpu: *mut Cpu, off: u8, v: u64) {
    // SAFETY: as in `get`.
    unsafe {
        let p = cpu.cast::<u8>().add(off as usize);
        match W::SIZE {
            8 => *p.cast::<u64>() = v,
            4 => *p.cast::<u64>() = v & 0xffff_ffff,
            2 => {
                // A full-width store, so that a later wide load is forwarded.
                let p = p.cast::<u64>();
                *p = *p & !0xffff | v & 0xffff;
            }
            _ if off & 1 == 0 => {
                let p = p.cast::<u64>();
                *p = *p & !0xff | v & 0xff;
            }
            _ => *p = v as u8,
        }
    }
}

/// Address forms, as const parameters of handlers.
pub(crate) mod form {
    /// Base and displacement, 64 bits wide.
    pub(crate) const BASE: u8 = 0;
    /// Base, scaled index and displacement, 64 bits wide.
    pub(crate) const INDEX: u8 = 1;
    /// Anything with a segment base or a narrower address.
    pub(crate) const OTHER: u8 = 2;
}

/// The linear address of a micro-operation's operand, unchecked.
#[inline(always)]
pub(crate) unsafe fn address<const FORM: u8>(cpu: *const Cpu, u: *const Uop) -> u64 {
    // SAFETY: `u` is a live micro-operation, its offsets are inside `regs`.
    unsafe {
        let base = get::<u64>(cpu, (*u).base).wrapping_add((*u).disp as i64 as u64);
        match FORM {
            form::BASE => base,
            form::INDEX => base.wrapping_add(get::<u64>(cpu, (*u).index) << ((*u).scale & 3)),
            _ => {
                let offset = offset_other(cpu, u);
                offset.wrapping_add((*cpu).regs[reg::SEG_BASE + ((*u).seg & 7) as usize])
            }
        }
    }
}

/// The segment offset of a micro-operation's operand, any form.
#[inline(always)]
pub(crate) unsafe fn offset_other(cpu: *const Cpu, u: *const Uop) -> u64 {
    // SAFETY: as in `address`.
    unsafe {
        let sum = get::<u64>(cpu, (*u).base)
            .wrapping_add((*u).disp as i64 as u64)
            .wrapping_add(get::<u64>(cpu, (*u).index) << ((*u).scale & 3));
        let unused_bits = 64 - (8u32 << ((*u).seg >> 4 & 3));
        sum << unused_bits >> unused_bits
    }
}

/// The operand's linear address with every check of the present mode.
pub(crate) unsafe fn address_checked(
    cpu: &mut Cpu,
    u: *const Uop,
    size: u64,
    write: bool,
) -> Result<u64, Fault> {
    // SAFETY: as in `address`.
    let (segment, offset) = unsafe { (((*u).seg & 7) as usize, offset_other(cpu, u)) };
    cpu.linear(segment, offset, size, write)
}

/// RIP of the instruction at `u`.
#[inline(always)]
pub(crate) unsafe fn rip_of(cpu: *const Cpu, u: *const Uop) -> u64 {
    // SAFETY: both are live.
    unsafe { (*cpu).mask_ip((*cpu).regs[reg::PAGE_RIP].wrapping_add(u64::from((*u).off))) }
}

/// RIP of the instruction after `u`.
#[inline(always)]
pub(crate) unsafe fn rip_after(cpu: *const Cpu, u: *const Uop) -> u64 {
    // SAFETY: both are live.
    unsafe {
        let end = u64::from((*u).off) + u64::from((*u).len);
        (*cpu).mask_ip((*cpu).regs[reg::PAGE_RIP].wrapping_add(end))
    }
}

/// Runs the next micro-operation of the block.
macro_rules! chain {
    ($cpu:expr, $u:expr) => {{
        let n = $u.add(1);
        ((*n).handler)($cpu, n)
    }};
}
pub(crate) use chain;

/// Leaves the block: the instruction did not complete.
#[cold]
#[inline(never)]
pub(crate) unsafe fn fault(cpu: *mut Cpu, u: *const Uop, f: Fault) -> u32 {
    // SAFETY: both are live.
    unsafe {
        (*cpu).rip = rip_of(cpu, u);
        (*cpu).retired = (*cpu).retired.wrapping_sub(u64::from((*u).left) + 1);
        (*cpu).fault = Some(f);
    }
    Next::FAULT
}

/// After a slow instruction completed: on with the block, unless something
/// asked to leave it.
pub(crate) unsafe extern "sysv64" fn resume(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: both are live; a micro-operation that is not a terminator has a successor.
    unsafe {
        if (*cpu).break_block {
            return leave(cpu, u);
        }
        chain!(cpu, u)
    }
}

/// Leaves the block after the instruction at `u`.
#[cold]
pub(crate) unsafe fn leave(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: both are live.
    unsafe {
        (*cpu).rip = rip_after(cpu, u);
        (*cpu).retired = (*cpu).retired.wrapping_sub(u64::from((*u).left));
    }
    Next::LOOKUP
}

/// Runs a slow body and turns its result into a handler's.
#[inline(always)]
pub(crate) unsafe fn slow(
    cpu: *mut Cpu,
    u: *const Uop,
    body: impl FnOnce(&mut Cpu) -> Result<(), Fault>,
) -> u32 {
    // SAFETY: the handler that calls has the only access to `cpu`.
    unsafe {
        (*cpu).replay.begin_instruction();
        match body(&mut *cpu) {
            Ok(()) => resume(cpu, u),
            Err(f) => fault(cpu, u, f),
        }
    }
}

/// A TLB probe for reading `W` at the operand's address.
#[inline(always)]
pub(crate) unsafe fn read_ptr<W: Word, const FORM: u8>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> Option<*mut u8> {
    // SAFETY: live by the caller's contract.
    unsafe { probe_read(cpu, address::<FORM>(cpu, u), W::SIZE) }
}

/// A TLB probe for writing `W` at the operand's address.
#[inline(always)]
pub(crate) unsafe fn write_ptr<W: Word, const FORM: u8>(
    cpu: *mut Cpu,
    u: *const Uop,
) -> Option<*mut u8> {
    // SAFETY: live by the caller's contract.
    unsafe { probe_write(cpu, address::<FORM>(cpu, u), W::SIZE) }
}

/// A slow load of the operand.
pub(crate) unsafe fn slow_load<W: Word>(cpu: &mut Cpu, u: *const Uop) -> Result<u64, Fault> {
    // SAFETY: `begin_read` vouches for the pointer.
    unsafe {
        let at = address_checked(cpu, u, W::SIZE, false)?;
        let privilege = cpu.privilege();
        let p = cpu.begin_read(at, W::SIZE as usize, privilege)?;
        Ok(W::load(p).wide())
    }
}

/// A slow store to the operand.
pub(crate) unsafe fn slow_store<W: Word>(
    cpu: &mut Cpu,
    u: *const Uop,
    v: u64,
) -> Result<(), Fault> {
    // SAFETY: `begin_write` vouches for the pointer.
    unsafe {
        let at = address_checked(cpu, u, W::SIZE, true)?;
        let privilege = cpu.privilege();
        let p = cpu.begin_write(at, W::SIZE as usize, privilege)?;
        W::store(p, W::narrow(v));
        cpu.end_write()
    }
}

/// A slow read-modify-write: `f` works on the bytes behind the pointer.
pub(crate) unsafe fn slow_rmw<W: Word, R>(
    cpu: &mut Cpu,
    u: *const Uop,
    locked: bool,
    f: impl FnOnce(*mut u8) -> R,
) -> Result<R, Fault> {
    // SAFETY: the micro-operation is live.
    let at = unsafe { address_checked(cpu, u, W::SIZE, true)? };
    let privilege = cpu.privilege();
    let p = cpu.begin_rmw(at, W::SIZE as usize, privilege, locked)?;
    let r = f(p);
    cpu.end_write()?;
    Ok(r)
}
