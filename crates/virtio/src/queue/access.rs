//! A ring's fields in guest memory, of either format.

use core::sync::atomic::Ordering;

use caisson_memory::{Gpa, MemoryError, MemoryView};

use super::{RingFeatures, RingPlace};
use crate::Fault;

/// Where a ring is, and what was negotiated about it.
#[derive(Clone, Copy)]
pub(super) struct RingAccess<'a> {
    pub(super) memory: &'a MemoryView,
    pub(super) place: RingPlace,
    pub(super) features: RingFeatures,
    /// The queue's number, for faults.
    pub(super) queue: u16,
}

impl RingAccess<'_> {
    pub(super) fn fault(&self, error: MemoryError) -> Fault {
        let queue = self.queue;
        Fault::Memory { queue, error }
    }

    /// Reads a field that the driver writes, before anything that it tells of.
    pub(super) fn load(&self, gpa: u64) -> Result<u16, Fault> {
        let value = self.memory.load_u16(Gpa(gpa), Ordering::Acquire);
        value.map(u16::from_le).map_err(|error| self.fault(error))
    }

    /// Writes a field that the driver reads, behind everything that it tells of.
    pub(super) fn store(&self, gpa: u64, value: u16) -> Result<(), Fault> {
        self.memory
            .store_u16(Gpa(gpa), value.to_le(), Ordering::Release)
            .map_err(|error| self.fault(error))
    }
}
