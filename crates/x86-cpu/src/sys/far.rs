//! Far jumps, calls and returns (Intel SDM Vol. 2A, JMP, CALL, RET;
//! Vol. 3 §6.8).

use iced_x86::{Code, Instruction, OpKind};

use super::{
    descriptor::{Descriptor, check_stack_segment, is_null, kind, null_stack, rpl, selector_error},
    gate,
    iret::return_segment,
    stack::Stack,
    task,
};
use crate::{
    fault::Fault,
    flow::Flow,
    mem::ea,
    state::{Cpu, Segment, reg, seg},
};

/// A far pointer and the operand size of the instruction that has it.
struct FarPointer {
    selector: u16,
    offset: u64,
    size: u64,
}

/// Reads a far pointer operand.
fn far_pointer(cpu: &mut Cpu, insn: &Instruction) -> Result<FarPointer, Fault> {
    let (selector, offset, size) = match insn.op0_kind() {
        OpKind::FarBranch16 => (
            insn.far_branch_selector(),
            u64::from(insn.far_branch16()),
            2,
        ),
        OpKind::FarBranch32 => (
            insn.far_branch_selector(),
            u64::from(insn.far_branch32()),
            4,
        ),
        _ => {
            let size = match insn.code() {
                Code::Jmp_m1616 | Code::Call_m1616 => 2,
                Code::Jmp_m1632 | Code::Call_m1632 => 4,
                _ => 8,
            };
            let (offset, selector) = memory_far_pointer(cpu, insn, size)?;
            (selector, offset, size)
        }
    };
    Ok(FarPointer {
        selector,
        offset,
        size,
    })
}

/// Reads offset and selector of a far pointer in memory.
pub(super) fn memory_far_pointer(
    cpu: &mut Cpu,
    insn: &Instruction,
    size: u64,
) -> Result<(u64, u16), Fault> {
    let (segment, ea) = cpu.effective_address(insn);
    let privilege = cpu.privilege();
    let at = cpu.linear(segment, ea, size, false)?;
    let offset = cpu.read_uint(at, size as usize, privilege)?;
    let ea = ea.wrapping_add(size) & ea::address_mask(insn);
    let at = cpu.linear(segment, ea, 2, false)?;
    let selector = cpu.read_uint(at, 2, privilege)? as u16;
    Ok((offset, selector))
}

pub(super) fn jump(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let p = far_pointer(cpu, insn)?;
    transfer(cpu, &p, insn.len() as u64, false)
}

pub(super) fn call(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let p = far_pointer(cpu, insn)?;
    transfer(cpu, &p, insn.len() as u64, true)
}

fn transfer(cpu: &mut Cpu, p: &FarPointer, len: u64, call: bool) -> Result<Flow, Fault> {
    let next = cpu.mask_ip(cpu.rip.wrapping_add(len));
    if !cpu.is_protected() || cpu.is_v86() {
        return transfer_real(cpu, p, next, call);
    }
    if is_null(p.selector) {
        return Err(Fault::gp(0));
    }
    let error = selector_error(p.selector, 0);
    let Some(d) = Descriptor::fetch(cpu, p.selector)? else {
        return Err(Fault::gp(error));
    };
    let long = cpu.is_long();
    match d.segment.system_kind() {
        None => to_code(cpu, p, d, next, call)?,
        Some(kind::CALL_GATE) => through_call_gate(cpu, p.selector, d, next, call)?,
        Some(kind::CALL_GATE16) if !long => {
            through_call_gate(cpu, p.selector, d, next, call)?;
        }
        Some(kind::TASK_GATE | kind::TSS | kind::TSS16) if !long => {
            return task::far_transfer(cpu, d, next, call);
        }
        Some(_) => return Err(Fault::gp(error)),
    }
    Ok(Flow::Jump)
}

/// Real-address and virtual-8086 mode.
fn transfer_real(cpu: &mut Cpu, p: &FarPointer, next: u64, call: bool) -> Result<Flow, Fault> {
    let limit = u64::from(cpu.segments[seg::CS].limit);
    let mut stack = Stack::current(cpu, 0);
    if call {
        let cs = u64::from(cpu.segments[seg::CS].selector);
        stack.push(cpu, cs, p.size)?;
        stack.push(cpu, next, p.size)?;
    }
    if p.offset > limit {
        return Err(Fault::gp(0));
    }
    cpu.set_stack_pointer(stack.sp);
    let cs = &mut cpu.segments[seg::CS];
    cs.selector = p.selector;
    cs.base = u64::from(p.selector) << 4;
    cpu.rip = p.offset;
    cpu.update_mode();
    Ok(Flow::Jump)
}

/// Checks that `ip` can be executed in `cs`.
fn check_target(cpu: &Cpu, cs: &Segment, ip: u64) -> Result<(), Fault> {
    let ok = if cpu.is_long() && cs.long() {
        cpu.canonical(ip)
    } else {
        ip <= u64::from(cs.limit)
    };
    if ok { Ok(()) } else { Err(Fault::gp(0)) }
}

/// Loads CS:RIP for privilege level `cpl`.
fn set_code(cpu: &mut Cpu, cs: Segment, cpl: u8, ip: u64) {
    cpu.segments[seg::CS] = Segment {
        selector: cs.selector & !3 | u16::from(cpl),
        ..cs
    };
    cpu.cpl = cpl;
    cpu.rip = ip;
    cpu.update_mode();
}

/// Directly to a code segment: the privilege level stays.
fn to_code(
    cpu: &mut Cpu,
    p: &FarPointer,
    mut d: Descriptor,
    next: u64,
    call: bool,
) -> Result<(), Fault> {
    let error = selector_error(p.selector, 0);
    let s = d.segment;
    let denied = if s.is_conforming() {
        s.dpl() > cpu.cpl
    } else {
        rpl(p.selector) > cpu.cpl || s.dpl() != cpu.cpl
    };
    if !s.is_code() || denied || cpu.is_long() && s.long() && s.big() {
        return Err(Fault::gp(error));
    }
    if !s.present() {
        return Err(Fault::np(error));
    }
    let mut stack = Stack::current(cpu, 0);
    if call {
        let cs = u64::from(cpu.segments[seg::CS].selector);
        stack.push(cpu, cs, p.size)?;
        stack.push(cpu, next, p.size)?;
    }
    check_target(cpu, &s, p.offset)?;
    d.mark_accessed(cpu)?;
    if call {
        // SP has the width of the stack that was pushed to.
        cpu.set_stack_pointer(stack.sp);
    }
    set_code(cpu, d.segment, cpu.cpl, p.offset);
    Ok(())
}

fn through_call_gate(
    cpu: &mut Cpu,
    gate_selector: u16,
    gate: Descriptor,
    next: u64,
    call: bool,
) -> Result<(), Fault> {
    let error = selector_error(gate_selector, 0);
    let long = cpu.is_long();
    let g = gate.segment;
    if g.dpl() < cpu.cpl.max(rpl(gate_selector)) {
        return Err(Fault::gp(error));
    }
    let mut offset = gate.raw & 0xffff | gate.raw >> 32 & 0xffff_0000;
    if long {
        match gate.fetch_high(cpu)? {
            // The upper half must not look like a descriptor itself.
            Some(high) if high >> 40 & 0x1f == 0 => offset |= high << 32,
            _ => return Err(Fault::gp(error)),
        }
    }
    if !g.present() {
        return Err(Fault::np(error));
    }
    let size = match (long, g.kind() & 8 != 0) {
        (true, _) => 8,
        (false, true) => 4,
        (false, false) => 2,
    };
    if size == 2 {
        offset &= 0xffff;
    }
    let selector = (gate.raw >> 16) as u16;
    if is_null(selector) {
        return Err(Fault::gp(0));
    }
    let error = selector_error(selector, 0);
    let Some(mut d) = Descriptor::fetch(cpu, selector)? else {
        return Err(Fault::gp(error));
    };
    let s = d.segment;
    let denied = s.dpl() > cpu.cpl || !call && !s.is_conforming() && s.dpl() != cpu.cpl;
    if !s.is_code() || denied || long && (!s.long() || s.big()) {
        return Err(Fault::gp(error));
    }
    if !s.present() {
        return Err(Fault::np(error));
    }
    let cpl = if s.is_conforming() { cpu.cpl } else { s.dpl() };
    let frame = [u64::from(cpu.segments[seg::CS].selector), next];
    if cpl < cpu.cpl {
        let count = gate.raw >> 32 & 0x1f;
        return call_inner(cpu, d, cpl, offset, size, count, frame);
    }
    let mut stack = if long && call {
        // A call from compatibility mode pushes on the stack as 64-bit mode sees it.
        Stack::flat(cpu, cpu.regs[reg::RSP], cpu.cpl, 0)
    } else {
        Stack::current(cpu, 0)
    };
    if call {
        for value in frame {
            stack.push(cpu, value, size)?;
        }
    }
    check_target(cpu, &s, offset)?;
    d.mark_accessed(cpu)?;
    if long {
        cpu.regs[reg::RSP] = stack.sp;
    } else {
        cpu.set_stack_pointer(stack.sp);
    }
    set_code(cpu, d.segment, cpl, offset);
    Ok(())
}

/// A call to a more privileged level, with a stack switch.
fn call_inner(
    cpu: &mut Cpu,
    mut cs: Descriptor,
    cpl: u8,
    offset: u64,
    size: u64,
    parameters: u64,
    frame: [u64; 2],
) -> Result<(), Fault> {
    let old_ss = u64::from(cpu.segments[seg::SS].selector);
    let old_sp = cpu.regs[reg::RSP];
    let (ss, mut stack) = if cpu.is_long() {
        let rsp = gate::stack_pointer_64(cpu, 4 + 8 * u64::from(cpl), 0)?;
        let ss = null_stack(u16::from(cpl));
        (ss, Stack::flat(cpu, rsp, cpl, 0))
    } else {
        let (ss, sp) = gate::inner_stack(cpu, cpl, 0)?;
        let error = selector_error(ss.selector, 0);
        (ss, Stack::protected(cpu, ss, sp, cpl, error))
    };
    stack.push(cpu, old_ss, size)?;
    stack.push(cpu, old_sp, size)?;
    if !cpu.is_long() {
        for i in (0..parameters).rev() {
            let value = cpu.peek(i * size, size)?;
            stack.push(cpu, value, size)?;
        }
    }
    for value in frame {
        stack.push(cpu, value, size)?;
    }
    check_target(cpu, &cs.segment, offset)?;
    cs.mark_accessed(cpu)?;
    cpu.segments[seg::SS] = ss;
    set_code(cpu, cs.segment, cpl, offset);
    cpu.set_stack_pointer(stack.sp);
    Ok(())
}

/// Where a far return or an IRET goes.
pub(super) struct Return {
    pub(super) selector: u16,
    pub(super) ip: u64,
    /// Operand size.
    pub(super) size: u64,
    /// Where SS:SP is on the stack, if it is to be popped.
    pub(super) stack_at: Option<u64>,
    /// Bytes to release from the stack returned to.
    pub(super) release: u64,
}

/// Returns to the same or an outer privilege level. Without a new stack,
/// `popped` bytes leave the present one. `flags` runs when nothing can fault
/// any more, still at the old privilege level.
pub(super) fn return_to(
    cpu: &mut Cpu,
    target: &Return,
    popped: u64,
    flags: impl FnOnce(&mut Cpu),
) -> Result<(), Fault> {
    let mut cs = return_segment(cpu, target.selector)?;
    let level = rpl(target.selector);
    let stack = match target.stack_at {
        None => None,
        Some(at) => {
            let sp = cpu.peek(at, target.size)?;
            let selector = cpu.peek(at + target.size, target.size)? as u16;
            Some((outer_stack(cpu, &cs.segment, selector)?, sp))
        }
    };
    check_target(cpu, &cs.segment, target.ip)?;
    cs.mark_accessed(cpu)?;
    flags(cpu);
    let outer = level > cpu.cpl;
    let sp = match stack {
        None => cpu.regs[reg::RSP].wrapping_add(popped),
        Some((ss, sp)) => {
            cpu.segments[seg::SS] = ss;
            sp
        }
    };
    if stack.is_none() {
        // SP has the width of the stack that was popped from.
        cpu.set_stack_pointer(sp.wrapping_add(target.release));
    }
    set_code(cpu, cs.segment, level, target.ip);
    if stack.is_some() {
        cpu.set_stack_pointer(sp.wrapping_add(target.release));
    }
    if outer {
        drop_privileged_segments(cpu);
    }
    Ok(())
}

/// SS of the level that a return goes to.
fn outer_stack(cpu: &mut Cpu, cs: &Segment, selector: u16) -> Result<Segment, Fault> {
    let level = rpl(cs.selector);
    if is_null(selector) {
        let allowed = cpu.is_long() && cs.long() && level != 3 && rpl(selector) == level;
        return if allowed {
            Ok(null_stack(selector))
        } else {
            Err(Fault::gp(0))
        };
    }
    check_stack_segment(cpu, selector, level, Fault::gp, 0)
}

/// Data segments that the outer level may not use become null.
fn drop_privileged_segments(cpu: &mut Cpu) {
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let s = cpu.segments[index];
        if !s.unusable && !s.is_conforming() && s.dpl() < cpu.cpl {
            // The base of FS or GS stays in force in 64-bit mode.
            cpu.segments[index] = Segment {
                base: s.base,
                ..Segment::null(0)
            };
        }
    }
    cpu.update_mode();
}

pub(super) fn ret(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let size = match insn.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let release = if insn.op_count() > 0 {
        u64::from(insn.immediate16())
    } else {
        0
    };
    let ip = cpu.peek(0, size)?;
    let selector = cpu.peek(size, size)? as u16;
    if !cpu.is_protected() || cpu.is_v86() {
        if ip > u64::from(cpu.segments[seg::CS].limit) {
            return Err(Fault::gp(0));
        }
        cpu.set_stack_pointer(cpu.regs[reg::RSP].wrapping_add(2 * size + release));
        let cs = &mut cpu.segments[seg::CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        cpu.rip = ip;
        cpu.update_mode();
        return Ok(Flow::Jump);
    }
    let outer = rpl(selector) > cpu.cpl;
    let target = Return {
        selector,
        ip,
        size,
        stack_at: outer.then_some(2 * size + release),
        release,
    };
    return_to(cpu, &target, 2 * size, |_| {})?;
    Ok(Flow::Jump)
}
