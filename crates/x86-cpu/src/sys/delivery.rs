//! Delivery of interrupts and exceptions (Intel SDM Vol. 3 chapter 7): which
//! event wins when delivery itself faults, and delivery in real-address mode.
//! Protected mode and IA-32e mode are in [`super::gate`].

use super::gate;
use crate::{
    fault::{Exception, Fault, vector},
    flags,
    flow::Flow,
    mem::Privilege,
    state::{Activity, Cpu, Shadow, mode, seg},
};

/// Where an event comes from; decides about privilege checks, the EXT bit of
/// error codes, and which RIP and RF are saved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Source {
    /// An exception of the processor.
    Exception,
    /// An interrupt, maskable or not.
    External,
    /// INT n, INT3, INTO: subject to the gate's DPL.
    Software,
    /// INT1: like an interrupt, but raised by an instruction.
    Icebp,
}

/// An event on its way to its handler.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub(super) vector: u8,
    pub(super) error: Option<u32>,
    pub(super) source: Source,
    /// The RIP to be saved.
    pub(super) return_ip: u64,
}

impl Event {
    /// The EXT bit of error codes of faults during delivery.
    pub(super) fn ext(&self) -> u32 {
        u32::from(self.source != Source::Software)
    }

    /// The error code that names this event's IDT entry.
    pub(super) fn idt_error(&self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.ext()
    }

    /// RFLAGS as they are saved. RF is set for faults, so that an instruction
    /// breakpoint does not hit again on return (§18.3.1.1); otherwise it is
    /// what it was, which only matters while breakpoints are armed: elsewhere
    /// the flag may be left over from an IRET.
    pub(super) fn saved_flags(&self, cpu: &Cpu) -> u64 {
        let mut f = cpu.rflags() & !flags::RF;
        let fault = self.source == Source::Exception
            && !matches!(self.vector, vector::DB | vector::DF | 18);
        if fault || cpu.mode & mode::STEP != 0 && cpu.rflags_system & flags::RF != 0 {
            f |= flags::RF;
        }
        f
    }
}

/// Delivers an exception; RIP is what will be saved. If delivery faults, the
/// second exception or a double fault is delivered in its place.
///
/// # Errors
/// [`Fault::Shutdown`] for a triple fault; [`Fault::Parked`].
pub fn deliver_exception(cpu: &mut Cpu, exception: Exception) -> Result<(), Fault> {
    let mut e = exception;
    cpu.pending_db = 0;
    note_address(cpu, &e);
    // Benign exceptions can follow each other without end (#AC while #AC is
    // delivered to a misaligned user stack); a processor would hang.
    for _ in 0..8 {
        if e.vector == vector::DB {
            cpu.dr6 = cpu.dr6 & !0xf | e.payload;
        }
        cpu.stats.exceptions += 1;
        cpu.delivering = Some(e.vector);
        let event = Event {
            vector: e.vector,
            error: e.error,
            source: Source::Exception,
            return_ip: cpu.rip,
        };
        let result = deliver(cpu, &event);
        cpu.delivering = None;
        match result {
            Ok(()) => {
                if e.vector == vector::DB {
                    cpu.dr7 &= !(1 << 13);
                }
                return Ok(());
            }
            Err(Fault::Exception(second)) => {
                note_address(cpu, &second);
                e = combine(e.vector, second).ok_or(Fault::Shutdown)?;
            }
            Err(other) => return Err(other),
        }
    }
    Err(Fault::Shutdown)
}

/// CR2 is set by every page fault, also by one that becomes a double fault.
fn note_address(cpu: &mut Cpu, e: &Exception) {
    if e.vector == vector::PF {
        cpu.cr2 = e.payload;
    }
}

/// Classes of exceptions (Intel SDM Vol. 3 table 7-4).
#[derive(PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    Page,
    Double,
}

fn class(vector: u8) -> Class {
    match vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::Page,
        vector::DF => Class::Double,
        _ => Class::Benign,
    }
}

/// What becomes of `second`, raised while `first` was delivered; `None` is a
/// triple fault (table 7-5).
fn combine(first: u8, second: Exception) -> Option<Exception> {
    let double = Exception {
        vector: vector::DF,
        error: Some(0),
        payload: 0,
    };
    match (class(first), class(second.vector)) {
        (Class::Double, Class::Contributory | Class::Page) => None,
        (Class::Contributory, Class::Contributory)
        | (Class::Page, Class::Contributory | Class::Page) => Some(double),
        _ => Some(second),
    }
}

/// Delivers an external interrupt.
///
/// # Errors
/// As [`deliver_exception`].
pub fn deliver_interrupt(cpu: &mut Cpu, vector: u8) -> Result<(), Fault> {
    cpu.stats.interrupts += 1;
    external(cpu, vector)
}

/// Delivers an NMI; further ones are blocked until IRET.
///
/// # Errors
/// As [`deliver_exception`].
pub fn deliver_nmi(cpu: &mut Cpu) -> Result<(), Fault> {
    cpu.nmi_masked = true;
    external(cpu, vector::NMI)
}

fn external(cpu: &mut Cpu, vector: u8) -> Result<(), Fault> {
    let event = Event {
        vector,
        error: None,
        source: Source::External,
        return_ip: cpu.rip,
    };
    match deliver(cpu, &event) {
        Err(Fault::Exception(e)) => deliver_exception(cpu, e),
        other => other,
    }
}

/// Executes a software interrupt whose instruction ends at `next`.
pub(super) fn software_interrupt(
    cpu: &mut Cpu,
    vector: u8,
    source: Source,
    next: u64,
) -> Result<Flow, Fault> {
    let event = Event {
        vector,
        error: None,
        source,
        return_ip: cpu.mask_ip(next),
    };
    deliver(cpu, &event)?;
    Ok(Flow::Jump)
}

fn deliver(cpu: &mut Cpu, event: &Event) -> Result<(), Fault> {
    if !cpu.is_protected() {
        deliver_real(cpu, event)?;
    } else if cpu.is_long() {
        gate::deliver_long(cpu, event)?;
    } else {
        gate::deliver_protected(cpu, event)?;
    }
    cpu.shadow = Shadow::None;
    cpu.activity = Activity::Running;
    // A handler is not stepped into.
    cpu.step.armed = false;
    Ok(())
}

/// Through the interrupt vector table (Intel SDM Vol. 3 §21.1.4).
fn deliver_real(cpu: &mut Cpu, event: &Event) -> Result<(), Fault> {
    let offset = u64::from(event.vector) * 4;
    if offset + 3 > u64::from(cpu.idtr.limit) {
        return Err(Fault::gp(event.idt_error()));
    }
    let at = cpu.wrap_linear(cpu.idtr.base.wrapping_add(offset));
    let entry = cpu.read_uint(at, 4, Privilege::Supervisor)?;
    let (ip, selector) = (entry & 0xffff, (entry >> 16) as u16);
    let mut stack = super::stack::Stack::current(cpu, 0);
    stack.push(cpu, event.saved_flags(cpu), 2)?;
    stack.push(cpu, u64::from(cpu.segments[seg::CS].selector), 2)?;
    stack.push(cpu, event.return_ip, 2)?;
    if ip > u64::from(cpu.segments[seg::CS].limit) {
        return Err(Fault::gp(0));
    }
    cpu.set_stack_pointer(stack.sp);
    let cs = &mut cpu.segments[seg::CS];
    cs.selector = selector;
    cs.base = u64::from(selector) << 4;
    cpu.rip = ip;
    cpu.rflags_system &= !(flags::IF | flags::TF | flags::AC | flags::RF);
    cpu.update_mode();
    Ok(())
}
