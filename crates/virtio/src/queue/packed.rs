//! Packed virtqueues (§2.8).

use core::sync::atomic::{Ordering, fence};

use caisson_memory::Gpa;
use serde::{Deserialize, Serialize};

use super::{
    Chain, MAX_SEGMENTS,
    access::RingAccess,
    split::{DESCRIPTOR, Descriptor, INDIRECT, NEXT, WRITE},
};
use crate::Fault;

/// Flags of a descriptor: what the driver and the device last said of it (§2.8.1).
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Values of the flags in an event suppression structure (§2.8.10).
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const AT_DESCRIPTOR: u16 = 2;
const WRAP: u16 = 1 << 15;

/// A place in the ring and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Position {
    slot: u16,
    wrap: bool,
}

impl Position {
    const START: Self = Self {
        slot: 0,
        wrap: true,
    };

    /// `by` entries further on in a ring of `size`.
    fn advance(self, by: u16, size: u16) -> Self {
        let slot = u32::from(self.slot) + u32::from(by);
        match slot.checked_sub(u32::from(size)) {
            None => Self {
                slot: slot as u16,
                wrap: self.wrap,
            },
            Some(slot) => Self {
                slot: slot as u16,
                wrap: !self.wrap,
            },
        }
    }

    fn word(self) -> u16 {
        self.slot | if self.wrap { WRAP } else { 0 }
    }
}

/// Where a packed ring's owner is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Packed {
    next_available: Position,
    next_used: Position,
    /// How many entries were given back since the driver was last told, or it was decided not to.
    untold: u16,
    /// What the driver was last told to notify at.
    notify_at: Option<u16>,
}

impl Default for Packed {
    fn default() -> Self {
        Self {
            next_available: Position::START,
            next_used: Position::START,
            untold: 0,
            notify_at: None,
        }
    }
}

impl Packed {
    pub(super) fn is_possible(&self, size: u16) -> bool {
        self.next_available.slot < size && self.next_used.slot < size && self.untold <= size
    }
}

/// A packed ring at work.
pub(super) struct PackedRing<'a> {
    pub(super) ring: RingAccess<'a>,
    pub(super) state: &'a mut Packed,
}

impl PackedRing<'_> {
    fn descriptor(&self, slot: u16) -> u64 {
        self.ring.place.descriptors + DESCRIPTOR * u64::from(slot)
    }

    /// Whether the driver has made the next entry available.
    fn is_available(&self) -> Result<bool, Fault> {
        let Position { slot, wrap } = self.state.next_available;
        let flags = self.ring.load(self.descriptor(slot) + 14)?;
        Ok((flags & AVAILABLE != 0) == wrap && (flags & USED != 0) != wrap)
    }

    /// Takes the next buffer into `chain`; `false` if there is none, and the driver will notify then.
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        if !self.is_available()? {
            self.ask_for_notification()?;
            if !self.is_available()? {
                return Ok(false);
            }
        }
        self.refuse_notifications()?;
        self.gather(chain)?;
        let size = self.ring.place.size;
        self.state.next_available = self.state.next_available.advance(chain.slots, size);
        Ok(true)
    }

    fn gather(&self, chain: &mut Chain) -> Result<(), Fault> {
        let queue = self.ring.queue;
        chain.begin(0);
        let mut at = self.state.next_available;
        let mut slots = 0;
        loop {
            if slots == self.ring.place.size {
                return Err(Fault::ChainTooLong { queue });
            }
            slots += 1;
            let descriptor = Descriptor::read(self.ring.memory, self.descriptor(at.slot))
                .map_err(|error| self.ring.fault(error))?;
            let flags = descriptor.word1;
            // The last descriptor of the buffer has its ID.
            chain.id = descriptor.word0;
            if flags & INDIRECT != 0 {
                if !self.ring.features.indirect || flags & NEXT != 0 {
                    return Err(Fault::Indirect { queue });
                }
                self.gather_indirect(descriptor.gpa, descriptor.len, usize::from(slots), chain)?;
            } else {
                chain
                    .push(descriptor.gpa, descriptor.len, flags & WRITE != 0)
                    .ok_or(Fault::Order { queue })?;
            }
            if flags & NEXT == 0 {
                chain.slots = slots;
                return Ok(());
            }
            at = at.advance(1, self.ring.place.size);
        }
    }

    /// All entries of an indirect table, in order (§2.8.8).
    fn gather_indirect(
        &self,
        table: u64,
        len: u32,
        before: usize,
        chain: &mut Chain,
    ) -> Result<(), Fault> {
        let queue = self.ring.queue;
        let len = u64::from(len);
        let end = table.checked_add(len);
        if len == 0 || !len.is_multiple_of(DESCRIPTOR) || end.is_none() {
            return Err(Fault::Indirect { queue });
        }
        let entries = len / DESCRIPTOR;
        let most = MAX_SEGMENTS.max(usize::from(self.ring.place.size));
        if entries > most.saturating_sub(before - 1) as u64 {
            return Err(Fault::ChainTooLong { queue });
        }
        for entry in 0..entries {
            let descriptor = Descriptor::read(self.ring.memory, table + entry * DESCRIPTOR)
                .map_err(|error| self.ring.fault(error))?;
            if descriptor.word1 & INDIRECT != 0 {
                return Err(Fault::Indirect { queue });
            }
            chain
                .push(
                    descriptor.gpa,
                    descriptor.len,
                    descriptor.word1 & WRITE != 0,
                )
                .ok_or(Fault::Order { queue })?;
        }
        Ok(())
    }

    /// Gives buffer `id`, which took `slots` entries, back with `written` bytes in it.
    pub(super) fn give(&mut self, id: u16, slots: u16, written: u32) -> Result<(), Fault> {
        let Position { slot, wrap } = self.state.next_used;
        let at = self.descriptor(slot);
        let mut body = [0; 6];
        body[..4].copy_from_slice(&written.to_le_bytes());
        body[4..].copy_from_slice(&id.to_le_bytes());
        self.ring
            .memory
            .write(Gpa(at + 8), &body)
            .map_err(|error| self.ring.fault(error))?;
        let mut flags = if wrap { AVAILABLE | USED } else { 0 };
        if written > 0 {
            flags |= WRITE;
        }
        self.ring.store(at + 14, flags)?;
        self.state.next_used = self.state.next_used.advance(slots, self.ring.place.size);
        self.state.untold = self.state.untold.saturating_add(slots);
        Ok(())
    }

    /// Decides whether the driver is to be interrupted for what was given back.
    pub(super) fn flush(&mut self) -> Result<bool, Fault> {
        let new = core::mem::take(&mut self.state.untold);
        if new == 0 {
            return Ok(false);
        }
        fence(Ordering::SeqCst);
        let flags = self.ring.load(self.ring.place.driver + 2)? & 0b11;
        if flags != AT_DESCRIPTOR || !self.ring.features.event_idx {
            return Ok(flags != DISABLE);
        }
        let event = self.ring.load(self.ring.place.driver)?;
        let now = self.state.next_used;
        let mut slot = event & !WRAP;
        if (event & WRAP != 0) != now.wrap {
            slot = slot.wrapping_sub(self.ring.place.size);
        }
        Ok(now.slot.wrapping_sub(slot).wrapping_sub(1) < new)
    }

    fn ask_for_notification(&mut self) -> Result<(), Fault> {
        let at = self.state.next_available.word();
        if self.state.notify_at != Some(at) {
            let area = self.ring.place.device;
            if self.ring.features.event_idx {
                self.ring.store(area, at)?;
                self.ring.store(area + 2, AT_DESCRIPTOR)?;
            } else if self.state.notify_at.is_none() {
                self.ring.store(area + 2, ENABLE)?;
            }
            self.state.notify_at = Some(at);
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn refuse_notifications(&mut self) -> Result<(), Fault> {
        if !self.ring.features.event_idx && self.state.notify_at.take().is_some() {
            self.ring.store(self.ring.place.device + 2, DISABLE)?;
        }
        Ok(())
    }
}
