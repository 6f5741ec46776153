//! Debug exceptions (Intel SDM Vol. 3 chapter 18): instruction breakpoints and
//! single steps around each instruction of a STEP-mode vCPU, I/O breakpoints.
//! Data breakpoints are noted by memory accesses in [`Cpu::pending_db`].
//!
//! The engine calls [`check_instruction`] before an instruction and
//! [`after_instruction`] once it has completed and RIP has been advanced; what
//! either returns is to be delivered at that RIP. A HLT that [`after_instruction`]
//! faults does not sleep.

use crate::{
    fault::{Exception, Fault, vector},
    flags,
    state::{Cpu, Shadow, cr4, seg},
};

/// Condition bits of DR6.
pub mod dr6 {
    /// A debug register was accessed while DR7.GD was set.
    pub const BD: u64 = 1 << 13;
    /// Single step.
    pub const BS: u64 = 1 << 14;
    /// Task switch to a TSS with its T bit set.
    pub const BT: u64 = 1 << 15;
}

/// What the single-step logic remembers of the instruction in progress.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Step {
    /// TF was set when the instruction began: #DB follows it.
    pub armed: bool,
    /// The instruction has loaded RF: it stays for the next one.
    pub keep_rf: bool,
}

/// #DB with conditions for DR6.
pub(super) fn debug_exception(conditions: u64) -> Fault {
    Fault::Exception(Exception {
        vector: vector::DB,
        error: None,
        payload: conditions,
    })
}

/// What DR7 says of breakpoint `i`: its R/W field, if it is enabled.
fn enabled(cpu: &Cpu, i: usize) -> Option<u64> {
    (cpu.dr7 >> (2 * i) & 3 != 0).then(|| cpu.dr7 >> (16 + 4 * i) & 3)
}

/// Begins the instruction at CS:RIP of a vCPU in STEP mode. Takes note of TF
/// and ends the shadow of the instruction before.
///
/// # Errors
/// #DB, as a fault, for an instruction breakpoint, or for data breakpoints that
/// event delivery has met.
pub fn check_instruction(cpu: &mut Cpu) -> Result<(), Fault> {
    let shadow = core::mem::take(&mut cpu.shadow);
    cpu.step = Step {
        armed: cpu.rflags_system & flags::TF != 0,
        keep_rf: false,
    };
    if shadow == Shadow::MovSs {
        return Ok(());
    }
    let pending = core::mem::take(&mut cpu.pending_db);
    if pending != 0 {
        return Err(debug_exception(pending));
    }
    if cpu.dr7 & 0xff == 0 || cpu.rflags_system & flags::RF != 0 {
        return Ok(());
    }
    let base = if cpu.is_64bit() {
        0
    } else {
        cpu.segments[seg::CS].base
    };
    let address = cpu.wrap_linear(base.wrapping_add(cpu.rip));
    let matching = |i: &usize| cpu.dr7 >> (16 + 4 * i) & 3 == 0 && cpu.dr[*i] == address;
    if !(0..4).any(|i| matching(&i) && enabled(cpu, i).is_some()) {
        return Ok(());
    }
    // One that matches is reported beside it even if it is not enabled (§18.2.3).
    let hits = (0..4).filter(matching).fold(0, |hits, i| hits | 1 << i);
    Err(debug_exception(hits))
}

/// Ends an instruction that has completed; RIP is the next one's. After a load
/// of SS by MOV or POP, debug traps wait for one more instruction.
///
/// # Errors
/// #DB, as a trap: single step, data and I/O breakpoints, task switch.
pub fn after_instruction(cpu: &mut Cpu) -> Result<(), Fault> {
    if !cpu.step.keep_rf {
        cpu.rflags_system &= !flags::RF;
    }
    if cpu.shadow == Shadow::MovSs {
        return Ok(());
    }
    let mut conditions = core::mem::take(&mut cpu.pending_db);
    if core::mem::take(&mut cpu.step.armed) {
        conditions |= dr6::BS;
    }
    if conditions == 0 {
        Ok(())
    } else {
        Err(debug_exception(conditions))
    }
}

/// Notes I/O breakpoints on `size` bytes at `port`: the #DB follows the
/// instruction (or the iteration of a repeated one).
pub fn match_port(cpu: &mut Cpu, port: u16, size: u64) {
    if cpu.dr7 & 0xff == 0 || cpu.cr4 & cr4::DE == 0 {
        return;
    }
    let port = u64::from(port);
    for i in 0..4 {
        if enabled(cpu, i) != Some(2) {
            continue;
        }
        let len = [1, 2, 8, 4][(cpu.dr7 >> (18 + 4 * i) & 3) as usize];
        let start = cpu.dr[i] & !(len - 1);
        if port < start.wrapping_add(len) && start < port + size {
            cpu.pending_db |= 1 << i;
            cpu.break_block = true;
        }
    }
}
