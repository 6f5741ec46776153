//! Vector, x87 and rarer integer instructions, which the host's own units
//! execute (see [`crate::vector`]). The micro-operation points at the decoded
//! instruction and its thunk.

use iced_x86::Instruction;

use super::access::{address, chain, fault, leave, rip_of};
use crate::{
    mem::fast::{probe_read, probe_write},
    state::Cpu,
    uop::Uop,
    vector::{self, Access, Memory, Op},
};

/// What a native micro-operation points at.
#[derive(Clone, Copy, Debug)]
pub struct Native {
    /// The instruction, decoded at its page offset.
    pub insn: Instruction,
    /// How it runs.
    pub op: Op,
}

unsafe fn native<'a>(u: *const Uop) -> &'a Native {
    // SAFETY: `imm` is the address of a `Native` that the block cache keeps as
    // long as the block.
    unsafe { &*((*u).imm as *const Native) }
}

/// Operands in registers only.
pub unsafe extern "sysv64" fn registers(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract; the thunk was made for this instruction.
    unsafe {
        let n = native(u);
        if (n.op.thunk)(cpu, &raw const n.op.args, core::ptr::null_mut()) != 0 {
            return slow(cpu, u);
        }
        chain!(cpu, u)
    }
}

/// An operand in memory, reached by address form `FORM`, on a TLB hit.
pub unsafe extern "sysv64" fn memory<const FORM: u8>(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract; the thunk was made for this instruction and
    // gets a pointer to as many bytes as the operand has.
    unsafe {
        let n = native(u);
        let Some(Memory {
            size,
            access,
            align_mask,
            ..
        }) = n.op.memory
        else {
            return slow(cpu, u);
        };
        let at = address::<FORM>(cpu, u);
        let p = match access {
            Access::Read => probe_read(cpu, at, size.into()),
            _ => probe_write(cpu, at, size.into()),
        };
        let Some(p) = p else { return slow(cpu, u) };
        if at & u64::from(align_mask) != 0 || (n.op.thunk)(cpu, &raw const n.op.args, p) != 0 {
            return slow(cpu, u);
        }
        chain!(cpu, u)
    }
}

/// Everything else, and every exception.
pub unsafe extern "sysv64" fn slow(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let n = native(u);
        let c = &mut *cpu;
        c.rip = rip_of(cpu, u);
        c.replay.begin_instruction();
        match vector::run(c, &n.insn, &n.op) {
            Ok(crate::flow::Flow::Next) if !(*cpu).break_block => chain!(cpu, u),
            // XSETBV and the like change what decoding depends on.
            Ok(_) => leave(cpu, u),
            Err(f) => fault(cpu, u, f),
        }
    }
}
