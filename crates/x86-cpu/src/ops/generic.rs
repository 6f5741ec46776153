//! Instructions that are not worth a handler: system instructions. The micro-operation points at the decoded
//! instruction.

use iced_x86::Instruction;

use super::access::{chain, fault, rip_after, rip_of};
use crate::{
    fault::Fault,
    flow::Flow,
    state::{Cpu, request},
    sys,
    uop::{Next, Uop},
};

/// A system instruction.
pub unsafe extern "sysv64" fn system(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract; `imm` is the address of an `Instruction` that
    // the block cache keeps as long as the block.
    unsafe {
        let c = &mut *cpu;
        c.rip = rip_of(cpu, u);
        c.replay.begin_instruction();
        let insn = &*((*u).imm as *const Instruction);
        let result = sys::exec(c, insn);
        if c.window_wanted {
            // It may have allowed what waits.
            c.request_self(request::EVENT);
        }
        match result {
            Ok(Flow::Next) => {
                if (*cpu).break_block {
                    return super::access::leave(cpu, u);
                }
                chain!(cpu, u)
            }
            Ok(Flow::EndBlock) => super::access::leave(cpu, u),
            Ok(Flow::Jump) => {
                c.retired = c.retired.wrapping_sub(u64::from((*u).left));
                Next::LOOKUP
            }
            Ok(Flow::Halt) => {
                c.rip = rip_after(cpu, u);
                c.retired = c.retired.wrapping_sub(u64::from((*u).left));
                Next::HALT
            }
            Err(f) => {
                // Traps have moved RIP themselves.
                let rip = c.rip;
                let code = fault(cpu, u, f);
                (*cpu).rip = rip;
                code
            }
        }
    }
}

/// An exception decided when the block was built: vector in `aux`, with error
/// code 0 where `imm` is 1.
pub unsafe extern "sysv64" fn raise(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let vector = (*u).aux as u8;
        let f = if (*u).imm == 1 {
            Fault::with_error(vector, 0)
        } else {
            Fault::simple(vector)
        };
        fault(cpu, u, f)
    }
}

/// Ends a block of which the code itself does not: the instruction behind it
/// must be looked up.
pub unsafe extern "sysv64" fn end(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract. `off` is where the next instruction starts.
    unsafe {
        (*cpu).rip = rip_of(cpu, u);
    }
    Next::LOOKUP
}
