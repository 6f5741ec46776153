//! Instructions about RFLAGS: CLI, STI, PUSHF, POPF, LAHF, SAHF, CLAC, STAC and
//! single-flag ones.

use iced_x86::{Code, Instruction};

use crate::{
    fault::Fault,
    flags::{self, packed},
    flow::Flow,
    state::{Cpu, Shadow, cr4, reg},
};

/// #GP(0) unless the program may change IF. Virtual interrupts (VME, PVI) are
/// not offered.
fn require_iopl(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.is_protected() && cpu.cpl > cpu.iopl() {
        Err(Fault::gp(0))
    } else {
        Ok(())
    }
}

/// #GP(0) in virtual-8086 mode below IOPL 3.
fn require_v86_iopl(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.is_protected() && cpu.is_v86() && cpu.iopl() < 3 {
        Err(Fault::gp(0))
    } else {
        Ok(())
    }
}

pub(super) fn cli(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    require_iopl(cpu)?;
    cpu.rflags_system &= !flags::IF;
    Ok(Flow::Next)
}

pub(super) fn sti(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    require_iopl(cpu)?;
    if cpu.rflags_system & flags::IF == 0 {
        cpu.rflags_system |= flags::IF;
        cpu.shadow = Shadow::Sti;
    }
    Ok(Flow::EndBlock)
}

pub(super) fn pushf(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_v86_iopl(cpu)?;
    let size = match insn.code() {
        Code::Pushfw => 2,
        Code::Pushfd => 4,
        _ => 8,
    };
    let image = cpu.rflags() & !(flags::VM | flags::RF);
    cpu.push(image, size)?;
    Ok(Flow::Next)
}

pub(super) fn popf(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_v86_iopl(cpu)?;
    let (size, width) = match insn.code() {
        Code::Popfw => (2, 0xffff),
        Code::Popfd => (4, 0xffff_ffff),
        _ => (8, !0),
    };
    let mut mask =
        flags::ARITHMETIC_MASK | flags::TF | flags::DF | flags::NT | flags::AC | flags::ID;
    if !cpu.is_protected() || cpu.cpl == 0 {
        mask |= flags::IOPL;
    }
    if !cpu.is_protected() || cpu.cpl <= cpu.iopl() {
        mask |= flags::IF;
    }
    let mask = mask & width;
    let image = cpu.pop(size)?;
    let old = cpu.rflags_system;
    cpu.set_rflags((cpu.rflags() & !mask | image & mask) & !flags::RF);
    if (old ^ cpu.rflags_system) & !(flags::DF | flags::ID | flags::NT) == 0 {
        return Ok(Flow::Next);
    }
    cpu.update_mode();
    Ok(Flow::EndBlock)
}

pub(super) fn lahf(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    let ah = cpu.rflags() & 0xff;
    let rax = &mut cpu.regs[reg::RAX];
    *rax = *rax & !0xff00 | ah << 8;
    Ok(Flow::Next)
}

pub(super) fn sahf(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    let ah = cpu.regs[reg::RAX] >> 8 & 0xd5;
    let overflow = cpu.rflags() & 1 << 11;
    cpu.cc = flags::from_rflags(ah | overflow);
    Ok(Flow::Next)
}

pub(super) fn clc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    cpu.cc &= !packed::CF;
    Ok(Flow::Next)
}

pub(super) fn stc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    cpu.cc |= packed::CF;
    Ok(Flow::Next)
}

pub(super) fn cmc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    cpu.cc ^= packed::CF;
    Ok(Flow::Next)
}

pub(super) fn cld(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    cpu.rflags_system &= !flags::DF;
    Ok(Flow::Next)
}

pub(super) fn std(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    cpu.rflags_system |= flags::DF;
    Ok(Flow::Next)
}

/// CLAC and STAC: #UD above privilege level 0 and without SMAP's CPUID bit,
/// which the decoder's allow-list has checked.
fn set_ac(cpu: &mut Cpu, on: bool) -> Result<Flow, Fault> {
    if cpu.cpl != 0 {
        return Err(Fault::ud());
    }
    if on {
        cpu.rflags_system |= flags::AC;
    } else {
        cpu.rflags_system &= !flags::AC;
    }
    cpu.update_mode();
    // Without SMAP the flag has no meaning at this privilege level.
    Ok(if cpu.cr4 & cr4::SMAP != 0 {
        Flow::EndBlock
    } else {
        Flow::Next
    })
}

pub(super) fn clac(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    set_ac(cpu, false)
}

pub(super) fn stac(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    set_ac(cpu, true)
}
