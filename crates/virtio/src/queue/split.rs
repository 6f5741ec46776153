//! Split virtqueues (§2.7).

use core::sync::atomic::{Ordering, fence};

use caisson_memory::{Gpa, MemoryError, MemoryView};
use serde::{Deserialize, Serialize};

use super::{Chain, MAX_SEGMENTS, access::RingAccess};
use crate::Fault;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;
/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: u64 = 16;
/// Flag in the available ring: the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// Flag in the used ring: the device wants no notifications.
const NO_NOTIFY: u16 = 1;

/// A descriptor as it lies in memory.
#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) gpa: u64,
    pub(super) len: u32,
    /// Flags in a split ring, the buffer ID in a packed one.
    pub(super) word0: u16,
    /// The next descriptor in a split ring, flags in a packed one.
    pub(super) word1: u16,
}

impl Descriptor {
    pub(super) fn read(memory: &MemoryView, gpa: u64) -> Result<Self, MemoryError> {
        let mut bytes = [0; DESCRIPTOR as usize];
        memory.read(Gpa(gpa), &mut bytes)?;
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            w0,
            w1,
            w2,
            w3,
        ] = bytes;
        Ok(Self {
            gpa: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            word0: u16::from_le_bytes([w0, w1]),
            word1: u16::from_le_bytes([w2, w3]),
        })
    }
}

/// Where a split ring's owner is in it. Indices count on past the ring's size and wrap at 2^16.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Split {
    /// The next entry of the available ring to take.
    next_available: u16,
    /// The next entry of the used ring to fill.
    next_used: u16,
    /// How many entries were filled since the driver was last told, or it was decided not to.
    untold: u16,
    /// What the driver was last told to notify at.
    notify_at: Option<u16>,
}

/// A split ring at work.
pub(super) struct SplitRing<'a> {
    pub(super) ring: RingAccess<'a>,
    pub(super) state: &'a mut Split,
}

impl SplitRing<'_> {
    fn size(&self) -> u64 {
        u64::from(self.ring.place.size)
    }

    /// Takes the next buffer into `chain`; `false` if there is none, and the driver will notify then.
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        let mut available = self.ring.load(self.ring.place.driver + 2)?;
        if available == self.state.next_available {
            self.ask_for_notification()?;
            available = self.ring.load(self.ring.place.driver + 2)?;
            if available == self.state.next_available {
                return Ok(false);
            }
        }
        let queue = self.ring.queue;
        if available.wrapping_sub(self.state.next_available) > self.ring.place.size {
            return Err(Fault::TooManyAvailable { queue });
        }
        self.refuse_notifications()?;
        let slot = u64::from(self.state.next_available) % self.size();
        let head = self.ring.load(self.ring.place.driver + 4 + 2 * slot)?;
        self.gather(head, chain)?;
        self.state.next_available = self.state.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Follows the chain of descriptors that begins at `head`.
    fn gather(&self, head: u16, chain: &mut Chain) -> Result<(), Fault> {
        let queue = self.ring.queue;
        chain.begin(head);
        let mut table = (self.ring.place.descriptors, self.size());
        let mut indirect = false;
        let mut index = head;
        let mut left = MAX_SEGMENTS.max(usize::from(self.ring.place.size));
        // A chain within the ring's own table is never longer than the table.
        let mut direct = self.ring.place.size;
        loop {
            if u64::from(index) >= table.1 {
                return Err(Fault::DescriptorIndex { queue, index });
            }
            if left == 0 || !indirect && direct == 0 {
                return Err(Fault::ChainTooLong { queue });
            }
            left -= 1;
            let at = table.0.checked_add(u64::from(index) * DESCRIPTOR);
            let at = at.ok_or(Fault::Indirect { queue })?;
            let descriptor =
                Descriptor::read(self.ring.memory, at).map_err(|error| self.ring.fault(error))?;
            let flags = descriptor.word0;
            if flags & INDIRECT != 0 {
                let len = u64::from(descriptor.len);
                let misplaced = indirect || !self.ring.features.indirect || flags & NEXT != 0;
                // No index reaches further than 16 bits.
                let length = (DESCRIPTOR..=DESCRIPTOR * u64::from(u16::MAX)).contains(&len);
                if misplaced || !length || !len.is_multiple_of(DESCRIPTOR) {
                    return Err(Fault::Indirect { queue });
                }
                indirect = true;
                table = (descriptor.gpa, len / DESCRIPTOR);
                index = 0;
                continue;
            }
            direct = direct.saturating_sub(1);
            chain
                .push(descriptor.gpa, descriptor.len, flags & WRITE != 0)
                .ok_or(Fault::Order { queue })?;
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.word1;
        }
    }

    /// Gives buffer `id` back with `written` bytes in it.
    pub(super) fn give(&mut self, id: u16, written: u32) -> Result<(), Fault> {
        let slot = u64::from(self.state.next_used) % self.size();
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(id).to_le_bytes());
        element[4..].copy_from_slice(&written.to_le_bytes());
        self.ring
            .memory
            .write(Gpa(self.ring.place.device + 4 + 8 * slot), &element)
            .map_err(|error| self.ring.fault(error))?;
        self.state.next_used = self.state.next_used.wrapping_add(1);
        self.state.untold = self.state.untold.saturating_add(1);
        Ok(())
    }

    /// Shows the driver what was given back, and decides whether it is to be interrupted.
    pub(super) fn flush(&mut self) -> Result<bool, Fault> {
        let new = core::mem::take(&mut self.state.untold);
        if new == 0 {
            return Ok(false);
        }
        let index = self.state.next_used;
        self.ring.store(self.ring.place.device + 2, index)?;
        // The driver writes its wish before it reads our index; we do it the other way round.
        fence(Ordering::SeqCst);
        if self.ring.features.event_idx {
            let event = self
                .ring
                .load(self.ring.place.driver + 4 + 2 * self.size())?;
            Ok(index.wrapping_sub(event).wrapping_sub(1) < new)
        } else {
            Ok(self.ring.load(self.ring.place.driver)? & NO_INTERRUPT == 0)
        }
    }

    /// Asks for a notification of the next buffer. The caller looks at the ring again afterwards.
    fn ask_for_notification(&mut self) -> Result<(), Fault> {
        let at = self.state.next_available;
        if self.state.notify_at != Some(at) {
            if self.ring.features.event_idx {
                let event = self.ring.place.device + 4 + 8 * self.size();
                self.ring.store(event, at)?;
            } else if self.state.notify_at.is_none() {
                self.ring.store(self.ring.place.device, 0)?;
            }
            self.state.notify_at = Some(at);
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Says that notifications are not needed for now. With event indices silence says it.
    fn refuse_notifications(&mut self) -> Result<(), Fault> {
        if !self.ring.features.event_idx && self.state.notify_at.take().is_some() {
            self.ring.store(self.ring.place.device, NO_NOTIFY)?;
        }
        Ok(())
    }
}
