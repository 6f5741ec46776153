//! Interrupt, trap and task gates (Intel SDM Vol. 3 §7.12 to §7.14).

use super::{
    delivery::{Event, Source},
    descriptor::{Descriptor, check_stack_segment, is_null, kind, null_stack, selector_error},
    stack::Stack,
    task,
};
use crate::{
    fault::Fault,
    flags,
    mem::Privilege,
    state::{Cpu, Segment, reg, seg},
};

/// The parts that all gate formats share.
struct Gate {
    kind: u16,
    selector: u16,
    offset: u64,
    ist: u8,
}

/// Reads the gate of `event` and makes the checks that concern the gate itself.
fn fetch_gate(cpu: &mut Cpu, event: &Event, long: bool) -> Result<Gate, Fault> {
    let size = if long { 16 } else { 8 };
    let offset = u64::from(event.vector) * size;
    if offset + size - 1 > u64::from(cpu.idtr.limit) {
        return Err(Fault::gp(event.idt_error()));
    }
    let at = cpu.wrap_linear(cpu.idtr.base.wrapping_add(offset));
    let low = cpu.read_uint(at, 8, Privilege::Supervisor)?;
    let high = if long {
        cpu.read_uint(at.wrapping_add(8), 8, Privilege::Supervisor)?
    } else {
        0
    };
    let attributes = (low >> 40) as u16 & 0xff;
    let gate = Gate {
        kind: attributes & 0x1f,
        selector: (low >> 16) as u16,
        offset: low & 0xffff | low >> 32 & 0xffff_0000 | high << 32,
        ist: (low >> 32 & 7) as u8,
    };
    let known = match gate.kind {
        kind::INTERRUPT_GATE | kind::TRAP_GATE => true,
        kind::TASK_GATE | kind::INTERRUPT_GATE16 | kind::TRAP_GATE16 => !long,
        _ => false,
    };
    let dpl = (attributes >> 5 & 3) as u8;
    if !known || event.source == Source::Software && dpl < cpu.cpl {
        return Err(Fault::gp(event.idt_error()));
    }
    if attributes & 0x80 == 0 {
        return Err(Fault::np(event.idt_error()));
    }
    Ok(gate)
}

/// The handler's code segment, and the privilege level it will run at.
fn handler_segment(
    cpu: &mut Cpu,
    event: &Event,
    selector: u16,
    long: bool,
) -> Result<(Descriptor, u8), Fault> {
    let ext = event.ext();
    if is_null(selector) {
        return Err(Fault::gp(ext));
    }
    let error = selector_error(selector, ext);
    let Some(d) = Descriptor::fetch(cpu, selector)? else {
        return Err(Fault::gp(error));
    };
    let s = d.segment;
    if !s.is_code() || s.dpl() > cpu.cpl || long && (!s.long() || s.big()) {
        return Err(Fault::gp(error));
    }
    if !s.present() {
        return Err(Fault::np(error));
    }
    let cpl = if s.is_conforming() { cpu.cpl } else { s.dpl() };
    // Virtual-8086 mode is left for privilege level 0 only.
    if cpu.is_v86() && cpl != 0 {
        return Err(Fault::gp(error));
    }
    Ok((d, cpl))
}

/// Enters the handler: all checks are done, everything is pushed.
fn enter(cpu: &mut Cpu, cs: Segment, cpl: u8, ip: u64, interrupt_gate: bool) {
    cpu.segments[seg::CS] = Segment {
        selector: cs.selector & !3 | u16::from(cpl),
        ..cs
    };
    cpu.cpl = cpl;
    cpu.rip = ip;
    cpu.rflags_system &= !(flags::TF | flags::NT | flags::RF | flags::VM);
    if interrupt_gate {
        cpu.rflags_system &= !flags::IF;
    }
    cpu.update_mode();
}

/// IA-32e mode.
pub(super) fn deliver_long(cpu: &mut Cpu, event: &Event) -> Result<(), Fault> {
    let ext = event.ext();
    let gate = fetch_gate(cpu, event, true)?;
    let (mut cs, cpl) = handler_segment(cpu, event, gate.selector, true)?;
    let inner = cpl < cpu.cpl;
    let rsp = if gate.ist != 0 {
        stack_pointer_64(cpu, 0x24 + 8 * u64::from(gate.ist - 1), ext)?
    } else if inner {
        stack_pointer_64(cpu, 4 + 8 * u64::from(cpl), ext)?
    } else {
        cpu.regs[reg::RSP]
    };
    let mut stack = Stack::flat(cpu, rsp & !0xf, cpl, ext);
    if !cpu.canonical(rsp) {
        return Err(Fault::ss(ext));
    }
    let frame = [
        u64::from(cpu.segments[seg::SS].selector),
        cpu.regs[reg::RSP],
        event.saved_flags(cpu),
        u64::from(cpu.segments[seg::CS].selector),
        event.return_ip,
    ];
    for value in frame {
        stack.push(cpu, value, 8)?;
    }
    if let Some(error) = event.error {
        stack.push(cpu, u64::from(error), 8)?;
    }
    if !cpu.canonical(gate.offset) {
        return Err(Fault::gp(ext));
    }
    cs.mark_accessed(cpu)?;
    if inner {
        cpu.segments[seg::SS] = null_stack(u16::from(cpl));
    }
    cpu.regs[reg::RSP] = stack.sp;
    let interrupt = gate.kind == kind::INTERRUPT_GATE;
    enter(cpu, cs.segment, cpl, gate.offset, interrupt);
    Ok(())
}

/// A stack pointer in the 64-bit TSS.
pub(super) fn stack_pointer_64(cpu: &mut Cpu, offset: u64, ext: u32) -> Result<u64, Fault> {
    let tr = cpu.segments[seg::TR];
    if offset + 7 > u64::from(tr.limit) {
        return Err(Fault::ts(selector_error(tr.selector, ext)));
    }
    cpu.read_uint(tr.base.wrapping_add(offset), 8, Privilege::Supervisor)
}

/// SS and ESP for privilege level `cpl` from the 16-bit or 32-bit TSS, checked.
pub(super) fn inner_stack(cpu: &mut Cpu, cpl: u8, ext: u32) -> Result<(Segment, u64), Fault> {
    let tr = cpu.segments[seg::TR];
    let wide = tr.kind() & 8 != 0;
    let (offset, size) = if wide {
        (4 + 8 * u64::from(cpl), 8)
    } else {
        (2 + 4 * u64::from(cpl), 4)
    };
    // ESP and SS: in the 32-bit format SS is followed by two unused bytes.
    let used = if wide { 6 } else { 4 };
    if offset + used - 1 > u64::from(tr.limit) {
        return Err(Fault::ts(selector_error(tr.selector, ext)));
    }
    let at = cpu.wrap_linear(tr.base.wrapping_add(offset));
    let sp = cpu.read_uint(at, size / 2, Privilege::Supervisor)?;
    let at = cpu.wrap_linear(at.wrapping_add(size as u64 / 2));
    let selector = cpu.read_uint(at, 2, Privilege::Supervisor)? as u16;
    if is_null(selector) {
        return Err(Fault::ts(ext));
    }
    let ss = check_stack_segment(cpu, selector, cpl, Fault::ts, ext)?;
    Ok((ss, sp))
}

/// Protected mode and virtual-8086 mode.
pub(super) fn deliver_protected(cpu: &mut Cpu, event: &Event) -> Result<(), Fault> {
    let ext = event.ext();
    let gate = fetch_gate(cpu, event, false)?;
    if gate.kind == kind::TASK_GATE {
        return task::through_gate(cpu, gate.selector, event);
    }
    let (mut cs, cpl) = handler_segment(cpu, event, gate.selector, false)?;
    let size = if gate.kind & 8 != 0 { 4 } else { 2 };
    let offset = if size == 4 {
        gate.offset
    } else {
        gate.offset & 0xffff
    };
    let v86 = cpu.is_v86();
    let (mut stack, ss) = if cpl < cpu.cpl {
        let (ss, sp) = inner_stack(cpu, cpl, ext)?;
        let stack = Stack::protected(cpu, ss, sp, cpl, selector_error(ss.selector, ext));
        (stack, Some(ss))
    } else {
        (Stack::current(cpu, ext), None)
    };
    let selector = |cpu: &Cpu, s: usize| u64::from(cpu.segments[s].selector);
    if ss.is_some() {
        if v86 {
            for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
                stack.push(cpu, selector(cpu, s), size)?;
            }
        }
        stack.push(cpu, selector(cpu, seg::SS), size)?;
        stack.push(cpu, cpu.regs[reg::RSP], size)?;
    }
    stack.push(cpu, event.saved_flags(cpu), size)?;
    stack.push(cpu, selector(cpu, seg::CS), size)?;
    stack.push(cpu, event.return_ip, size)?;
    if let Some(error) = event.error {
        stack.push(cpu, u64::from(error), size)?;
    }
    if offset > u64::from(cs.segment.limit) {
        return Err(Fault::gp(ext));
    }
    cs.mark_accessed(cpu)?;
    if let Some(ss) = ss {
        cpu.segments[seg::SS] = ss;
        if v86 {
            for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
                cpu.segments[s] = Segment::null(0);
            }
        }
    }
    let interrupt = matches!(gate.kind, kind::INTERRUPT_GATE | kind::INTERRUPT_GATE16);
    enter(cpu, cs.segment, cpl, offset, interrupt);
    cpu.set_stack_pointer(stack.sp);
    Ok(())
}
