//! IRET in every mode (Intel SDM Vol. 2A, IRET; Vol. 3 §7.12.1, §21.2).

use iced_x86::{Code, Instruction};

use super::{
    descriptor::{is_null, rpl, selector_error},
    far::{self, Return},
    task,
};
use crate::{
    fault::Fault,
    flags,
    flow::Flow,
    state::{Cpu, Segment, reg, seg},
};

/// Operand size of an IRET in bytes.
fn operand_size(insn: &Instruction) -> u64 {
    match insn.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    }
}

/// Merges a popped flags image: `mask` says which flags may change.
fn merge_flags(cpu: &mut Cpu, image: u64, mask: u64, size: u64) {
    let mask = if size == 2 { mask & 0xffff } else { mask };
    let value = cpu.rflags() & !mask | image & mask;
    cpu.set_rflags(value);
    cpu.step.keep_rf = value & flags::RF != 0;
}

/// Flags that IRET loads at any privilege level.
const ALWAYS: u64 =
    flags::ARITHMETIC_MASK | flags::TF | flags::DF | flags::NT | flags::RF | flags::AC | flags::ID;

pub(super) fn iret(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let size = operand_size(insn);
    // Even an IRET that faults ends the blocking of NMIs.
    cpu.nmi_masked = false;
    if !cpu.is_protected() {
        return iret_real(cpu, size, ALWAYS | flags::IF | flags::IOPL);
    }
    if cpu.is_v86() {
        if cpu.iopl() < 3 {
            return Err(Fault::gp(0));
        }
        return iret_real(cpu, size, ALWAYS | flags::IF);
    }
    if cpu.rflags_system & flags::NT != 0 {
        if cpu.is_long() {
            return Err(Fault::gp(0));
        }
        return task::return_to_previous(cpu, insn.len() as u64);
    }
    let ip = cpu.peek(0, size)?;
    let selector = cpu.peek(size, size)? as u16;
    let image = cpu.peek(2 * size, size)?;
    if image & flags::VM != 0 && size == 4 && cpu.cpl == 0 && !cpu.is_long() {
        return iret_to_v86(cpu, ip, selector, image);
    }
    let mut mask = ALWAYS;
    if cpu.cpl <= cpu.iopl() {
        mask |= flags::IF;
    }
    if cpu.cpl == 0 {
        mask |= flags::IOPL | flags::VIF | flags::VIP;
    }
    // In 64-bit mode SS:RSP is popped whatever the privilege level.
    let pops_stack = cpu.is_64bit() || rpl(selector) > cpu.cpl;
    let target = Return {
        selector,
        ip,
        size,
        stack_at: pops_stack.then_some(3 * size),
        release: 0,
    };
    let popped = 3 * size;
    far::return_to(cpu, &target, popped, |cpu| {
        merge_flags(cpu, image, mask, size);
    })?;
    Ok(Flow::Jump)
}

/// Real-address mode, and virtual-8086 mode at IOPL 3.
fn iret_real(cpu: &mut Cpu, size: u64, mask: u64) -> Result<Flow, Fault> {
    let ip = cpu.peek(0, size)?;
    let selector = cpu.peek(size, size)? as u16;
    let image = cpu.peek(2 * size, size)?;
    if ip > u64::from(cpu.segments[seg::CS].limit) {
        return Err(Fault::gp(0));
    }
    cpu.set_stack_pointer(cpu.regs[reg::RSP].wrapping_add(3 * size));
    let cs = &mut cpu.segments[seg::CS];
    cs.selector = selector;
    cs.base = u64::from(selector) << 4;
    cpu.rip = ip;
    merge_flags(cpu, image, mask, size);
    cpu.update_mode();
    Ok(Flow::Jump)
}

/// From privilege level 0 to virtual-8086 mode.
fn iret_to_v86(cpu: &mut Cpu, ip: u64, cs: u16, image: u64) -> Result<Flow, Fault> {
    let mut words = [0; 6];
    for (i, w) in words.iter_mut().enumerate() {
        *w = cpu.peek(12 + 4 * i as u64, 4)?;
    }
    let [esp, ss, es, ds, fs, gs] = words;
    if ip > 0xffff {
        return Err(Fault::gp(0));
    }
    let all = [
        (seg::CS, cs),
        (seg::SS, ss as u16),
        (seg::ES, es as u16),
        (seg::DS, ds as u16),
        (seg::FS, fs as u16),
        (seg::GS, gs as u16),
    ];
    for (index, selector) in all {
        cpu.segments[index] = Segment::v86(selector);
    }
    cpu.set_rflags(image);
    cpu.step.keep_rf = image & flags::RF != 0;
    cpu.regs[reg::RSP] = esp;
    cpu.rip = ip;
    cpu.cpl = 3;
    cpu.update_mode();
    Ok(Flow::Jump)
}

/// The code segment of a far return or IRET to `selector`, checked.
pub(super) fn return_segment(
    cpu: &mut Cpu,
    selector: u16,
) -> Result<super::descriptor::Descriptor, Fault> {
    if is_null(selector) {
        return Err(Fault::gp(0));
    }
    let error = selector_error(selector, 0);
    let Some(d) = super::descriptor::Descriptor::fetch(cpu, selector)? else {
        return Err(Fault::gp(error));
    };
    let (s, level) = (d.segment, rpl(selector));
    let privileged = if s.is_conforming() {
        s.dpl() > level
    } else {
        s.dpl() != level
    };
    if !s.is_code() || level < cpu.cpl || privileged || cpu.is_long() && s.long() && s.big() {
        return Err(Fault::gp(error));
    }
    if !s.present() {
        return Err(Fault::np(error));
    }
    Ok(d)
}
