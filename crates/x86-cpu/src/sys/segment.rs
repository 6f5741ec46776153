//! Segment registers: MOV, PUSH, POP, LDS and its kin, and the bases of FS and
//! GS (Intel SDM Vol. 2).

use iced_x86::{Code, Instruction, OpKind};

use super::{
    control::{read_word, require_cpl0, store_word},
    descriptor::load_segment,
    far::memory_far_pointer,
    msr::set_base,
};
use crate::{
    fault::Fault,
    flow::Flow,
    mem::ea::segment_number,
    state::{Cpu, Shadow, cr4, seg},
};

/// Loads segment register `index`.
fn load(cpu: &mut Cpu, index: usize, selector: u16) -> Result<(), Fault> {
    cpu.segments[index] = load_segment(cpu, index, selector)?;
    cpu.update_mode();
    Ok(())
}

/// Whether a load of register `index` ends the block: SS changes the stack's
/// width and holds back interrupts; the others change the mode only outside of
/// 64-bit code.
fn after_load(cpu: &Cpu, index: usize) -> Flow {
    if index == seg::SS || !cpu.is_64bit() {
        Flow::EndBlock
    } else {
        Flow::Next
    }
}

/// MOV to a segment register.
pub(super) fn mov_to(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let index = segment_number(insn.op0_register());
    if index == seg::CS {
        return Err(Fault::ud());
    }
    let selector = read_word(cpu, insn)?;
    load(cpu, index, selector)?;
    if index == seg::SS {
        cpu.shadow = Shadow::MovSs;
    }
    Ok(after_load(cpu, index))
}

/// MOV from a segment register.
pub(super) fn mov_from(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let index = segment_number(insn.op1_register());
    store_word(cpu, insn, u64::from(cpu.segments[index].selector))?;
    Ok(Flow::Next)
}

/// Operand size of PUSH and POP of a segment register.
fn operand_size(insn: &Instruction) -> u64 {
    u64::from(insn.stack_pointer_increment().unsigned_abs())
}

/// PUSH of a segment register.
pub(super) fn push(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let index = segment_number(insn.op0_register());
    let selector = cpu.segments[index].selector;
    cpu.push(u64::from(selector), operand_size(insn))?;
    Ok(Flow::Next)
}

/// POP of a segment register.
pub(super) fn pop(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let index = segment_number(insn.op0_register());
    let size = operand_size(insn);
    let selector = cpu.peek(0, size)? as u16;
    let segment = load_segment(cpu, index, selector)?;
    // SP moves with the width of the stack that was popped from.
    cpu.pop(size)?;
    cpu.segments[index] = segment;
    cpu.update_mode();
    if index == seg::SS {
        cpu.shadow = Shadow::MovSs;
    }
    Ok(after_load(cpu, index))
}

/// LDS, LES, LFS, LGS, LSS.
pub(super) fn load_far_pointer(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    use Code::*;
    let index = match insn.code() {
        Lds_r16_m1616 | Lds_r32_m1632 => seg::DS,
        Les_r16_m1616 | Les_r32_m1632 => seg::ES,
        Lfs_r16_m1616 | Lfs_r32_m1632 | Lfs_r64_m1664 => seg::FS,
        Lgs_r16_m1616 | Lgs_r32_m1632 | Lgs_r64_m1664 => seg::GS,
        _ => seg::SS,
    };
    if insn.op1_kind() != OpKind::Memory {
        return Err(Fault::ud());
    }
    let register = insn.op0_register();
    let (offset, selector) = memory_far_pointer(cpu, insn, register.size() as u64)?;
    load(cpu, index, selector)?;
    cpu.set_gpr(register, offset);
    Ok(after_load(cpu, index))
}

/// FS for RDFSBASE and WRFSBASE, GS for the others; #UD unless enabled.
fn base_register(cpu: &Cpu, insn: &Instruction) -> Result<usize, Fault> {
    if !cpu.is_64bit() || cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(Fault::ud());
    }
    Ok(match insn.code() {
        Code::Rdfsbase_r32 | Code::Rdfsbase_r64 | Code::Wrfsbase_r32 | Code::Wrfsbase_r64 => {
            seg::FS
        }
        _ => seg::GS,
    })
}

pub(super) fn read_base(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let index = base_register(cpu, insn)?;
    cpu.set_gpr(insn.op0_register(), cpu.segments[index].base);
    Ok(Flow::Next)
}

pub(super) fn write_base(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let index = base_register(cpu, insn)?;
    let base = cpu.gpr(insn.op0_register());
    if !cpu.canonical(base) {
        return Err(Fault::gp(0));
    }
    set_base(cpu, index, base);
    Ok(Flow::Next)
}

pub(super) fn swapgs(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    if !cpu.is_64bit() {
        return Err(Fault::ud());
    }
    require_cpl0(cpu)?;
    let base = core::mem::replace(&mut cpu.msr.kernel_gs_base, cpu.segments[seg::GS].base);
    set_base(cpu, seg::GS, base);
    Ok(Flow::Next)
}
