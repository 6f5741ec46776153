//! One enabled virtqueue, of either format.

use caisson_device::StateError;
use caisson_memory::MemoryView;
use serde::{Deserialize, Serialize};

use super::{
    Chain, MAX_SIZE,
    access::RingAccess,
    packed::{Packed, PackedRing},
    reorder::Reorder,
    split::{Split, SplitRing},
};
use crate::{Fault, feature};

/// Where a ring is, as the driver has said. The names are those of §2.6: a split ring's descriptor table, available
/// ring and used ring, or a packed ring's descriptor ring, driver and device event suppression areas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingPlace {
    /// Entries, 1 to 32768.
    pub size: u16,
    /// Guest physical address of the descriptor area.
    pub descriptors: u64,
    /// Guest physical address of the driver area.
    pub driver: u64,
    /// Guest physical address of the device area.
    pub device: u64,
}

/// What was negotiated about rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingFeatures {
    /// Packed instead of split.
    pub packed: bool,
    /// Indirect descriptors.
    pub indirect: bool,
    /// Notifications at an index.
    pub event_idx: bool,
    /// Buffers are given back in the order in which they were made available.
    pub in_order: bool,
}

impl RingFeatures {
    /// Those among the feature bits of a device.
    pub fn from_bits(bits: u64) -> Self {
        Self {
            packed: bits & feature::RING_PACKED != 0,
            indirect: bits & feature::INDIRECT_DESC != 0,
            event_idx: bits & feature::EVENT_IDX != 0,
            in_order: bits & feature::IN_ORDER != 0,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Format {
    Split(Split),
    Packed(Packed),
}

/// The saved state of a [`Queue`], a part of its device's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    place: RingPlace,
    features: RingFeatures,
    format: Format,
    in_flight: u16,
    reorder: Option<Reorder>,
}

/// An enabled virtqueue.
#[derive(Clone, Debug)]
pub struct Queue {
    index: u16,
    state: QueueState,
}

impl Queue {
    /// Queue number `index` of a device, at its start.
    ///
    /// # Errors
    /// A size or an address that no ring of the format can have.
    pub fn new(index: u16, place: RingPlace, features: RingFeatures) -> Result<Self, Fault> {
        check(index, &place, features)?;
        let format = match features.packed {
            false => Format::Split(Split::default()),
            true => Format::Packed(Packed::default()),
        };
        Ok(Self {
            index,
            state: QueueState {
                place,
                features,
                format,
                in_flight: 0,
                reorder: features.in_order.then(Reorder::default),
            },
        })
    }

    /// Where its ring is.
    pub fn place(&self) -> &RingPlace {
        &self.state.place
    }

    /// How many buffers the device has taken and not completed.
    pub fn in_flight(&self) -> u16 {
        self.state.in_flight
    }

    /// Takes the next buffer that the driver has made available into `chain`. `false` if there is none; the driver
    /// notifies when there is again.
    ///
    /// # Errors
    /// A ring or a chain that breaks a rule.
    pub fn pop(&mut self, memory: &MemoryView, chain: &mut Chain) -> Result<bool, Fault> {
        let ring = self.access(memory);
        let popped = match &mut self.state.format {
            Format::Split(state) => SplitRing { ring, state }.pop(chain),
            Format::Packed(state) => PackedRing { ring, state }.pop(chain),
        };
        if !popped? {
            return Ok(false);
        }
        if self.state.in_flight >= ring.place.size {
            return Err(Fault::TooManyAvailable { queue: ring.queue });
        }
        self.state.in_flight += 1;
        if let Some(reorder) = &mut self.state.reorder {
            reorder.take(chain.id, chain.slots);
        }
        Ok(true)
    }

    /// Gives back a buffer that was taken, with `written` bytes in its writable part. The driver is told at the next
    /// [`Queue::flush`].
    ///
    /// # Errors
    /// A ring that is not in memory.
    pub fn complete(
        &mut self,
        memory: &MemoryView,
        chain: &Chain,
        written: u32,
    ) -> Result<(), Fault> {
        self.state.in_flight = self.state.in_flight.saturating_sub(1);
        let Some(reorder) = &mut self.state.reorder else {
            return self.give(memory, chain.id, chain.slots, written);
        };
        reorder.done(chain.id, written);
        while let Some(next) = self.state.reorder.as_mut().and_then(Reorder::next) {
            self.give(memory, next.id, next.slots, next.written.unwrap_or(0))?;
        }
        Ok(())
    }

    /// The ring in `memory`.
    fn access<'a>(&self, memory: &'a MemoryView) -> RingAccess<'a> {
        RingAccess {
            memory,
            place: self.state.place,
            features: self.state.features,
            queue: self.index,
        }
    }

    fn give(
        &mut self,
        memory: &MemoryView,
        id: u16,
        slots: u16,
        written: u32,
    ) -> Result<(), Fault> {
        let ring = self.access(memory);
        match &mut self.state.format {
            Format::Split(state) => SplitRing { ring, state }.give(id, written),
            Format::Packed(state) => PackedRing { ring, state }.give(id, slots, written),
        }
    }

    /// Shows the driver what was completed. Returns whether it wants an interrupt for it.
    ///
    /// # Errors
    /// A ring that is not in memory.
    pub fn flush(&mut self, memory: &MemoryView) -> Result<bool, Fault> {
        let ring = self.access(memory);
        match &mut self.state.format {
            Format::Split(state) => SplitRing { ring, state }.flush(),
            Format::Packed(state) => PackedRing { ring, state }.flush(),
        }
    }

    /// Its state.
    pub fn state(&self) -> QueueState {
        self.state.clone()
    }

    /// Queue number `index` with `state`, which was saved with `features` negotiated.
    ///
    /// # Errors
    /// It cannot be.
    pub fn restore(
        index: u16,
        state: &QueueState,
        features: RingFeatures,
    ) -> Result<Self, StateError> {
        let invalid = |what| StateError::Invalid {
            id: "virtqueue",
            what,
        };
        let size = state.place.size;
        check(index, &state.place, state.features).map_err(|_| invalid("no ring can be there"))?;
        if state.features != features {
            return Err(invalid("its ring has features that were not negotiated"));
        }
        let fits = match &state.format {
            Format::Split(_) => !features.packed,
            Format::Packed(packed) => features.packed && packed.is_possible(size),
        };
        if !fits || state.in_flight > size {
            return Err(invalid("its position is outside of the ring"));
        }
        let order = match &state.reorder {
            Some(reorder) => {
                features.in_order
                    && reorder.is_possible(size)
                    && reorder.unfinished() == usize::from(state.in_flight)
            }
            None => !features.in_order,
        };
        if !order {
            return Err(invalid("its buffers are in no possible order"));
        }
        let state = state.clone();
        Ok(Self { index, state })
    }
}

/// Sizes and alignments (§2.7, §2.8.10.1), and that no part runs past the end of the address space.
fn check(queue: u16, place: &RingPlace, features: RingFeatures) -> Result<(), Fault> {
    let size = place.size;
    if size == 0 || size > MAX_SIZE || !features.packed && !size.is_power_of_two() {
        return Err(Fault::QueueSize { queue, size });
    }
    let entries = u64::from(size);
    let parts = match features.packed {
        false => [
            (place.descriptors, 16, 16 * entries),
            (place.driver, 2, 6 + 2 * entries),
            (place.device, 4, 6 + 8 * entries),
        ],
        true => [
            (place.descriptors, 16, 16 * entries),
            (place.driver, 4, 4),
            (place.device, 4, 4),
        ],
    };
    for (address, align, len) in parts {
        if !address.is_multiple_of(align) || address.checked_add(len).is_none() {
            return Err(Fault::RingAddress { queue, address });
        }
    }
    Ok(())
}
