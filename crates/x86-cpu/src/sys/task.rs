//! Hardware task switching, 16-bit and 32-bit (Intel SDM Vol. 3 chapter 9).

use super::{
    debug::dr6,
    delivery::Event,
    descriptor::{Descriptor, is_null, kind, load_segment, rpl, selector_error},
    stack::Stack,
    table,
};
use crate::{
    fault::Fault,
    flags,
    flow::Flow,
    mem::Privilege,
    mmu,
    state::{Cpu, Segment, cr0, cr4, seg},
};

/// What started a task switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cause {
    Jump,
    Call,
    /// IRET with NT set.
    Return,
    /// An interrupt or exception through a task gate.
    Interrupt,
}

/// Everything that a switch needs to know.
struct Switch {
    cause: Cause,
    /// EXT bit of error codes.
    ext: u32,
    /// RIP and RFLAGS to be saved for the old task.
    ip: u64,
    flags: u64,
    /// Error code to be pushed on the new task's stack.
    error: Option<u32>,
}

/// Offsets in a TSS format.
struct Layout {
    /// Size of a general field.
    word: usize,
    cr3: Option<usize>,
    ip: usize,
    /// Flags, followed by the eight general registers.
    flags: usize,
    /// ES, followed by the other segment registers.
    segments: usize,
    segment_count: usize,
    ldt: usize,
    trap: Option<usize>,
    /// The smallest limit allowed.
    limit: u32,
}

const LAYOUT_32: Layout = Layout {
    word: 4,
    cr3: Some(0x1c),
    ip: 0x20,
    flags: 0x24,
    segments: 0x48,
    segment_count: 6,
    ldt: 0x60,
    trap: Some(0x64),
    limit: 0x67,
};

const LAYOUT_16: Layout = Layout {
    word: 2,
    cr3: None,
    ip: 0xe,
    flags: 0x10,
    segments: 0x22,
    segment_count: 4,
    ldt: 0x2a,
    trap: None,
    limit: 0x2b,
};

fn layout(tss: &Segment) -> &'static Layout {
    if tss.kind() & 8 != 0 {
        &LAYOUT_32
    } else {
        &LAYOUT_16
    }
}

/// A little-endian field of a TSS image.
fn field(image: &[u8], at: usize, size: usize) -> u64 {
    let mut b = [0; 8];
    b[..size].copy_from_slice(&image[at..at + size]);
    u64::from_le_bytes(b)
}

/// JMP or CALL to a TSS descriptor or task gate, whose `d` has been read.
pub(super) fn far_transfer(
    cpu: &mut Cpu,
    d: Descriptor,
    next: u64,
    call: bool,
) -> Result<Flow, Fault> {
    let s = d.segment;
    let error = selector_error(s.selector, 0);
    if s.dpl() < cpu.cpl.max(rpl(s.selector)) {
        return Err(Fault::gp(error));
    }
    let tss = if s.kind() == kind::TASK_GATE {
        if !s.present() {
            return Err(Fault::np(error));
        }
        available_tss(cpu, (d.raw >> 16) as u16, 0)?
    } else {
        d
    };
    let how = Switch {
        cause: if call { Cause::Call } else { Cause::Jump },
        ext: 0,
        ip: next,
        flags: cpu.rflags() & !flags::RF,
        error: None,
    };
    switch(cpu, tss, &how)?;
    Ok(Flow::Jump)
}

/// An event through a task gate with `selector` in it.
pub(super) fn through_gate(cpu: &mut Cpu, selector: u16, event: &Event) -> Result<(), Fault> {
    let tss = available_tss(cpu, selector, event.ext())?;
    let how = Switch {
        cause: Cause::Interrupt,
        ext: event.ext(),
        ip: event.return_ip,
        flags: event.saved_flags(cpu),
        error: event.error,
    };
    switch(cpu, tss, &how)
}

/// The TSS descriptor that a task gate names.
fn available_tss(cpu: &mut Cpu, selector: u16, ext: u32) -> Result<Descriptor, Fault> {
    let error = selector_error(selector, ext);
    if selector & 4 != 0 {
        return Err(Fault::gp(error));
    }
    match Descriptor::fetch(cpu, selector)? {
        Some(d) if matches!(d.segment.system_kind(), Some(kind::TSS | kind::TSS16)) => Ok(d),
        _ => Err(Fault::gp(error)),
    }
}

/// IRET with NT set: back to the task that the link field names.
pub(super) fn return_to_previous(cpu: &mut Cpu, len: u64) -> Result<Flow, Fault> {
    let at = cpu.segments[seg::TR].base;
    let link = cpu.read_uint(at, 2, Privilege::Supervisor)? as u16;
    let error = selector_error(link, 0);
    if link & 4 != 0 {
        return Err(Fault::ts(error));
    }
    let d = match Descriptor::fetch(cpu, link)? {
        Some(d)
            if matches!(
                d.segment.system_kind(),
                Some(kind::TSS_BUSY | kind::TSS16_BUSY)
            ) =>
        {
            d
        }
        _ => return Err(Fault::ts(error)),
    };
    let how = Switch {
        cause: Cause::Return,
        ext: 0,
        ip: cpu.mask_ip(cpu.rip.wrapping_add(len)),
        flags: cpu.rflags() & !(flags::NT | flags::RF),
        error: None,
    };
    switch(cpu, d, &how)?;
    Ok(Flow::Jump)
}

/// Switches to the task of `new`. Faults up to the point where the new task's
/// registers are loaded belong to the old one; later ones to the new one.
fn switch(cpu: &mut Cpu, mut new: Descriptor, how: &Switch) -> Result<(), Fault> {
    let selector = new.segment.selector;
    if !new.segment.present() {
        return Err(Fault::np(selector_error(selector, how.ext)));
    }
    let to = layout(&new.segment);
    if new.segment.limit < to.limit {
        return Err(Fault::ts(selector_error(selector, how.ext)));
    }
    let mut image = [0; 0x68];
    let image = &mut image[..=to.limit as usize];
    cpu.read_linear(new.segment.base, image, Privilege::Supervisor)?;

    let old = cpu.segments[seg::TR];
    save(cpu, &old, how)?;
    if matches!(how.cause, Cause::Jump | Cause::Return)
        && let Some(mut d) = Descriptor::fetch(cpu, old.selector)?
    {
        d.mark_busy(cpu, false)?;
    }
    if matches!(how.cause, Cause::Call | Cause::Interrupt) {
        let at = new.segment.base;
        cpu.write_uint(at, 2, u64::from(old.selector), Privilege::Supervisor)?;
    }
    if how.cause != Cause::Return {
        new.mark_busy(cpu, true)?;
    }
    new.segment.attributes |= 2;
    cpu.segments[seg::TR] = new.segment;
    cpu.cr0 |= cr0::TS;
    // Local breakpoints belong to the task that set them.
    cpu.dr7 &= !0x155;
    load(cpu, to, image, how)
}

/// Writes the old task's registers to its TSS.
fn save(cpu: &mut Cpu, old: &Segment, how: &Switch) -> Result<(), Fault> {
    let from = layout(old);
    let start = from.ip;
    let end = from.segments + from.segment_count * from.word;
    // The upper halves of the selector fields stay as they are.
    let mut image = [0; 0x60];
    let area = old.base.wrapping_add(start as u64);
    let area = cpu.wrap_linear(area);
    cpu.read_linear(area, &mut image[start..end], Privilege::Supervisor)?;
    let mut put = |at: usize, size: usize, value: u64| {
        image[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    };
    put(from.ip, from.word, how.ip);
    put(from.flags, from.word, how.flags);
    for i in 0..8 {
        put(from.flags + from.word * (i + 1), from.word, cpu.regs[i]);
    }
    for i in 0..from.segment_count {
        let selector = u64::from(cpu.segments[i].selector);
        put(from.segments + from.word * i, 2, selector);
    }
    // Nothing of it may land if a part would fault.
    cpu.probe_write_linear(area, end - start, Privilege::Supervisor)?;
    cpu.write_linear(area, &image[start..end], Privilege::Supervisor)
}

/// Loads the new task's registers from its TSS.
fn load(cpu: &mut Cpu, to: &Layout, image: &[u8], how: &Switch) -> Result<(), Fault> {
    if let Some(at) = to.cr3
        && cpu.cr0 & cr0::PG != 0
    {
        let cr3 = field(image, at, 4);
        if cpu.cr4 & cr4::PAE != 0 {
            cpu.pdptes = mmu::load_pdptes(cpu, cr3)
                .map_err(|_| Fault::ts(selector_error(cpu.segments[seg::TR].selector, how.ext)))?;
        }
        cpu.cr3 = cr3;
        cpu.flush_tlb(true);
    }
    let word = |at: usize| field(image, at, to.word);
    let selector = |at: usize| field(image, at, 2) as u16;
    let mut rflags = word(to.flags);
    if to.word == 2 {
        rflags |= cpu.rflags() & !0xffff & !(flags::VM | flags::RF);
    }
    if matches!(how.cause, Cause::Call | Cause::Interrupt) {
        rflags |= flags::NT;
    }
    cpu.set_rflags(rflags);
    cpu.step.armed = false;
    cpu.step.keep_rf = rflags & flags::RF != 0;
    cpu.rip = word(to.ip);
    for i in 0..8 {
        cpu.regs[i] = word(to.flags + to.word * (i + 1));
    }
    let mut selectors = [0; 6];
    for (i, s) in selectors.iter_mut().enumerate().take(to.segment_count) {
        *s = selector(to.segments + to.word * i);
    }
    let ldt = selector(to.ldt);
    if to.trap.is_some_and(|at| image[at] & 1 != 0) {
        cpu.pending_db |= dr6::BT;
        cpu.break_block = true;
    }
    load_segments(cpu, selectors, ldt, how.ext)?;
    if cpu.rip > u64::from(cpu.segments[seg::CS].limit) {
        return Err(Fault::gp(how.ext));
    }
    if let Some(error) = how.error {
        let mut stack = Stack::current(cpu, how.ext);
        stack.push(cpu, u64::from(error), to.word as u64)?;
        cpu.set_stack_pointer(stack.sp);
    }
    Ok(())
}

fn load_segments(cpu: &mut Cpu, selectors: [u16; 6], ldt: u16, ext: u32) -> Result<(), Fault> {
    // Selectors are visible, and nothing is usable, until each has been checked.
    for (index, &selector) in selectors.iter().enumerate() {
        cpu.segments[index] = Segment::null(selector);
    }
    cpu.segments[seg::LDTR] = Segment::null(ldt);
    if cpu.is_v86() {
        for (index, &selector) in selectors.iter().enumerate() {
            cpu.segments[index] = Segment::v86(selector);
        }
        cpu.cpl = 3;
        cpu.update_mode();
    } else {
        cpu.cpl = rpl(selectors[seg::CS]);
        cpu.segments[seg::CS].attributes = 0x409b;
        cpu.segments[seg::SS].attributes = 0x4093;
        cpu.update_mode();
    }
    let ts = |e: u32| move |_: u32| Fault::ts(e);
    if !is_null(ldt) {
        let error = selector_error(ldt, ext);
        cpu.segments[seg::LDTR] = table::ldt_segment(cpu, ldt, ts(error), ts(error), ext)?;
    }
    if cpu.is_v86() {
        return Ok(());
    }
    // SS comes first, so that a bad CS finds a stack for its exception.
    let ss = selectors[seg::SS];
    if is_null(ss) {
        return Err(Fault::ts(selector_error(ss, ext)));
    }
    cpu.segments[seg::SS] =
        super::descriptor::check_stack_segment(cpu, ss, cpu.cpl, Fault::ts, ext)?;
    cpu.update_mode();
    let cs = selectors[seg::CS];
    let error = selector_error(cs, ext);
    let mut d = match Descriptor::fetch(cpu, cs)? {
        Some(d) if !is_null(cs) && d.segment.is_code() => d,
        _ => return Err(Fault::ts(error)),
    };
    let s = d.segment;
    let denied = if s.is_conforming() {
        s.dpl() > rpl(cs)
    } else {
        s.dpl() != rpl(cs)
    };
    if denied {
        return Err(Fault::ts(error));
    }
    if !s.present() {
        return Err(Fault::np(error));
    }
    d.mark_accessed(cpu)?;
    cpu.segments[seg::CS] = d.segment;
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let selector = selectors[index];
        // What a MOV would call #GP is #TS here.
        cpu.segments[index] = load_segment(cpu, index, selector).map_err(|f| match f {
            Fault::Exception(e) if e.vector == crate::fault::vector::GP => {
                Fault::ts(selector_error(selector, ext))
            }
            Fault::Exception(e) if e.vector == crate::fault::vector::NP => {
                Fault::np(selector_error(selector, ext))
            }
            other => other,
        })?;
    }
    cpu.update_mode();
    Ok(())
}
