//! Segment descriptors: finding them in the GDT and LDT, what their fields
//! mean, and loading data-segment and stack-segment registers
//! (Intel SDM Vol. 3 §3.4.5, §6.5 to §6.8).

use core::sync::atomic::{AtomicU8, Ordering};

use crate::{
    fault::Fault,
    mem::Privilege,
    state::{Cpu, Segment, seg},
};

/// System descriptor types.
pub(super) mod kind {
    pub(in crate::sys) const TSS16: u16 = 1;
    pub(in crate::sys) const LDT: u16 = 2;
    pub(in crate::sys) const TSS16_BUSY: u16 = 3;
    pub(in crate::sys) const CALL_GATE16: u16 = 4;
    pub(in crate::sys) const TASK_GATE: u16 = 5;
    pub(in crate::sys) const INTERRUPT_GATE16: u16 = 6;
    pub(in crate::sys) const TRAP_GATE16: u16 = 7;
    pub(in crate::sys) const TSS: u16 = 9;
    pub(in crate::sys) const TSS_BUSY: u16 = 0xb;
    pub(in crate::sys) const CALL_GATE: u16 = 0xc;
    pub(in crate::sys) const INTERRUPT_GATE: u16 = 0xe;
    pub(in crate::sys) const TRAP_GATE: u16 = 0xf;
}

/// The error code that names `selector`; `ext` is 1 when the fault happened
/// while an event from outside of the program was delivered.
pub(super) fn selector_error(selector: u16, ext: u32) -> u32 {
    u32::from(selector & !3) | ext
}

/// Whether `selector` is null.
pub(super) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Requested privilege level.
pub(super) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

impl Segment {
    /// A null selector's segment: not to be used, based at 0.
    pub(super) fn null(selector: u16) -> Self {
        Self {
            selector,
            unusable: true,
            ..Self::default()
        }
    }

    /// A segment of real-address or virtual-8086 mode.
    pub(super) fn v86(selector: u16) -> Self {
        Self {
            base: u64::from(selector) << 4,
            limit: 0xffff,
            selector,
            attributes: 0xf3,
            unusable: false,
        }
    }

    pub(super) fn is_code(&self) -> bool {
        self.attributes & 0x18 == 0x18
    }

    pub(super) fn is_conforming(&self) -> bool {
        self.attributes & 0x1c == 0x1c
    }

    /// Data, or code that may be read.
    pub(super) fn is_readable(&self) -> bool {
        self.is_code_or_data() && (self.attributes & 8 == 0 || self.attributes & 2 != 0)
    }

    pub(super) fn is_writable_data(&self) -> bool {
        self.attributes & 0x1a == 0x12
    }

    /// The system type, if this is a system descriptor.
    pub(super) fn system_kind(&self) -> Option<u16> {
        (!self.is_code_or_data()).then(|| self.kind())
    }
}

/// A descriptor as it is in its table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) raw: u64,
    /// Linear address in the table.
    address: u64,
    /// As a segment with its selector; gates have meaning only in `attributes`.
    pub(super) segment: Segment,
}

impl Descriptor {
    /// Reads the descriptor that `selector` names. `None` if it is outside of
    /// its table.
    pub(super) fn fetch(cpu: &mut Cpu, selector: u16) -> Result<Option<Self>, Fault> {
        let Some(address) = slot(cpu, selector, 8) else {
            return Ok(None);
        };
        let raw = cpu.read_uint(address, 8, Privilege::Supervisor)?;
        Ok(Some(Self {
            raw,
            address,
            segment: unpack(raw, selector),
        }))
    }

    /// Reads the upper half of a 16-byte descriptor of IA-32e mode. `None` if
    /// it is outside of the table.
    pub(super) fn fetch_high(&self, cpu: &mut Cpu) -> Result<Option<u64>, Fault> {
        if slot(cpu, self.segment.selector, 16).is_none() {
            return Ok(None);
        }
        let at = cpu.wrap_linear(self.address.wrapping_add(8));
        cpu.read_uint(at, 8, Privilege::Supervisor).map(Some)
    }

    /// Sets the accessed bit of a code or data descriptor, in memory and here.
    pub(super) fn mark_accessed(&mut self, cpu: &mut Cpu) -> Result<(), Fault> {
        if self.segment.attributes & 1 == 0 {
            self.update_access(cpu, |byte| byte | 1)?;
            self.segment.attributes |= 1;
        }
        Ok(())
    }

    /// Sets or clears the busy bit of a TSS descriptor, in memory and here.
    pub(super) fn mark_busy(&mut self, cpu: &mut Cpu, busy: bool) -> Result<(), Fault> {
        let set = |attributes: u16| attributes & !2 | u16::from(busy) << 1;
        self.update_access(cpu, |byte| set(u16::from(byte)) as u8)?;
        self.segment.attributes = set(self.segment.attributes);
        Ok(())
    }

    fn update_access(&self, cpu: &mut Cpu, change: impl Fn(u8) -> u8) -> Result<(), Fault> {
        let at = cpu.wrap_linear(self.address.wrapping_add(5));
        let p = cpu.begin_rmw(at, 1, Privilege::Supervisor, true)?;
        // SAFETY: `begin_rmw` vouches for the byte; other vCPUs reach it by
        // single host instructions only.
        let byte = unsafe { AtomicU8::from_ptr(p) };
        let _ = byte.fetch_update(Ordering::AcqRel, Ordering::Acquire, |b| Some(change(b)));
        cpu.end_write()
    }
}

/// The linear address of `size` bytes at `selector`'s place in its table.
fn slot(cpu: &Cpu, selector: u16, size: u64) -> Option<u64> {
    let offset = u64::from(selector & !7);
    let (base, limit) = if selector & 4 != 0 {
        let ldt = &cpu.segments[seg::LDTR];
        if ldt.unusable {
            return None;
        }
        (ldt.base, u64::from(ldt.limit))
    } else {
        (cpu.gdtr.base, u64::from(cpu.gdtr.limit))
    };
    (offset + size - 1 <= limit).then(|| cpu.wrap_linear(base.wrapping_add(offset)))
}

fn unpack(raw: u64, selector: u16) -> Segment {
    let mut limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
    if raw & 1 << 55 != 0 {
        limit = limit << 12 | 0xfff;
    }
    Segment {
        base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
        limit,
        selector,
        attributes: (raw >> 40) as u16 & 0xf0ff,
        unusable: false,
    }
}

/// Whether `address` may be put into a register that holds a linear address (a
/// descriptor table's or hidden segment base, an MSR) or named to INVPCID: the
/// processor's full width counts, not the paging mode's.
pub(super) fn canonical_base(cpu: &mut Cpu, address: u64) -> bool {
    const LA57: u32 = 1 << 16;
    cpu.canonical(address)
        || (address as i64) << 7 >> 7 == address as i64 && cpu.env().cpuid(7, 0)[2] & LA57 != 0
}

/// What `selector` would put into segment register `index` (not CS) in the
/// present mode. Marks the descriptor as accessed; changes nothing else.
pub(super) fn load_segment(cpu: &mut Cpu, index: usize, selector: u16) -> Result<Segment, Fault> {
    if !cpu.is_protected() {
        return Ok(real_mode_segment(&cpu.segments[index], selector));
    }
    if cpu.is_v86() {
        return Ok(Segment::v86(selector));
    }
    if index == seg::SS {
        return load_stack_segment(cpu, selector);
    }
    if is_null(selector) {
        return Ok(Segment::null(selector));
    }
    let error = selector_error(selector, 0);
    let Some(mut d) = Descriptor::fetch(cpu, selector)? else {
        return Err(Fault::gp(error));
    };
    let s = d.segment;
    if !s.is_readable() {
        return Err(Fault::gp(error));
    }
    if !s.is_conforming() && s.dpl() < rpl(selector).max(cpu.cpl) {
        return Err(Fault::gp(error));
    }
    if !s.present() {
        return Err(Fault::np(error));
    }
    d.mark_accessed(cpu)?;
    Ok(d.segment)
}

/// Real-address mode changes base and selector only: a limit loaded in
/// protected mode stays in force.
pub(super) fn real_mode_segment(old: &Segment, selector: u16) -> Segment {
    let fresh = old.unusable;
    Segment {
        base: u64::from(selector) << 4,
        selector,
        limit: if fresh { 0xffff } else { old.limit },
        attributes: if fresh { 0x93 } else { old.attributes },
        unusable: false,
    }
}

fn load_stack_segment(cpu: &mut Cpu, selector: u16) -> Result<Segment, Fault> {
    if is_null(selector) {
        if cpu.is_64bit() && cpu.cpl != 3 && rpl(selector) == cpu.cpl {
            return Ok(null_stack(selector));
        }
        return Err(Fault::gp(0));
    }
    check_stack_segment(cpu, selector, cpu.cpl, Fault::gp, 0)
}

/// SS as a null selector leaves it in 64-bit mode: its DPL is the CPL.
pub(super) fn null_stack(selector: u16) -> Segment {
    Segment {
        attributes: (selector & 3) << 5,
        ..Segment::null(selector)
    }
}

/// The stack segment that `selector`, not null, names for use at privilege
/// level `cpl`. Faults other than "not present" are made by `fault`, with
/// `ext` in their error codes.
pub(super) fn check_stack_segment(
    cpu: &mut Cpu,
    selector: u16,
    cpl: u8,
    fault: impl Fn(u32) -> Fault,
    ext: u32,
) -> Result<Segment, Fault> {
    let error = selector_error(selector, ext);
    let Some(mut d) = Descriptor::fetch(cpu, selector)? else {
        return Err(fault(error));
    };
    let s = d.segment;
    if rpl(selector) != cpl || !s.is_writable_data() || s.dpl() != cpl {
        return Err(fault(error));
    }
    if !s.present() {
        return Err(Fault::ss(error));
    }
    d.mark_accessed(cpu)?;
    Ok(d.segment)
}
