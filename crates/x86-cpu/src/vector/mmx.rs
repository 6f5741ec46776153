//! MMX registers inside the x87 image: physical register *n* is MM*n*, and is
//! ST(*n* − TOP) (Intel SDM Vol. 1 §9.2, §9.5).

use iced_x86::{Instruction, OpAccess, OpKind};

use super::x87::{FSW, FTW};
use crate::state::Cpu;

const REGISTERS: usize = 32;

/// Every MMX instruction: TOP becomes 0 and all registers valid. The
/// image holds registers in stack order, so they move to their physical places.
pub(super) fn enter(cpu: &mut Cpu) {
    let b = &mut cpu.fpu.0;
    let top = (b[FSW + 1] >> 3 & 7) as usize;
    if top != 0 {
        // ST(i) is physical (top + i) % 8.
        b[REGISTERS..REGISTERS + 128].rotate_right(16 * top);
    }
    b[FSW + 1] &= !0x38;
    b[FTW] = 0xff;
}

/// EMMS: all registers empty, TOP 0.
pub(super) fn leave(cpu: &mut Cpu) {
    enter(cpu);
    cpu.fpu.0[FTW] = 0;
}

/// A written MMX register has all ones in sign and exponent.
pub(super) fn mark_written(cpu: &mut Cpu, insn: &Instruction) {
    for i in 0..insn.op_count() {
        if insn.op_kind(i) != OpKind::Register {
            continue;
        }
        let r = insn.op_register(i);
        let access = cpu.vector.factory.info(insn).op_access(i);
        if r.is_mm() && !matches!(access, OpAccess::Read | OpAccess::CondRead) {
            let at = REGISTERS + 16 * r.number() + 8;
            cpu.fpu.0[at..at + 2].fill(0xff);
        }
    }
}

/// MM`n` without a change of state.
pub(super) fn read(cpu: &Cpu, n: usize) -> [u8; 8] {
    let top = (cpu.fpu.0[FSW + 1] >> 3 & 7) as usize;
    let at = REGISTERS + 16 * ((n + 8 - top) % 8);
    let mut b = [0; 8];
    b.copy_from_slice(&cpu.fpu.0[at..at + 8]);
    b
}
