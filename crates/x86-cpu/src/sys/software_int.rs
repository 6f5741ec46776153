//! Instructions that raise interrupts and exceptions: INT n, INT3, INTO, INT1,
//! BOUND, UD.

use iced_x86::{Instruction, OpKind};

use super::delivery::{Source, software_interrupt};
use crate::{
    fault::{Fault, vector},
    flags::packed,
    flow::Flow,
    state::Cpu,
};

fn raise(cpu: &mut Cpu, insn: &Instruction, vector: u8, source: Source) -> Result<Flow, Fault> {
    let next = cpu.rip.wrapping_add(insn.len() as u64);
    software_interrupt(cpu, vector, source, next)
}

pub(super) fn int(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    // Without VME, virtual-8086 mode may use INT n at IOPL 3 only.
    if cpu.is_protected() && cpu.is_v86() && cpu.iopl() < 3 {
        return Err(Fault::gp(0));
    }
    raise(cpu, insn, insn.immediate8(), Source::Software)
}

pub(super) fn int3(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    raise(cpu, insn, vector::BP, Source::Software)
}

pub(super) fn into(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    if cpu.cc & packed::OF == 0 {
        return Ok(Flow::Next);
    }
    raise(cpu, insn, vector::OF, Source::Software)
}

pub(super) fn int1(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let flow = raise(cpu, insn, vector::DB, Source::Icebp)?;
    // Data breakpoints that a MOV SS held back arrive together with it.
    let held = core::mem::take(&mut cpu.pending_db);
    if held != 0 {
        cpu.dr6 = cpu.dr6 & !0xf | held;
    }
    Ok(flow)
}

pub(super) fn bound(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    if insn.op1_kind() != OpKind::Memory {
        return Err(Fault::ud());
    }
    let register = insn.op0_register();
    let size = register.size();
    let at = cpu.operand_address(insn, 2 * size as u64, false)?;
    let privilege = cpu.privilege();
    let both = cpu.read_uint(at, 2 * size, privilege)?;
    let shift = 64 - 8 * size as u32;
    let signed = |v: u64| (v << shift) as i64 >> shift;
    let index = signed(cpu.gpr(register));
    let (lower, upper) = (signed(both), signed(both >> (8 * size)));
    if index < lower || index > upper {
        return Err(Fault::simple(vector::BR));
    }
    Ok(Flow::Next)
}

/// UD0, UD1, UD2 and what the processor does not offer.
pub(super) fn undefined(_: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    Err(Fault::ud())
}
