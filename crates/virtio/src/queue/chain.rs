//! A buffer: the segments of a descriptor chain.

use alloc::vec::Vec;

use caisson_memory::{Gpa, MemoryError, MemoryView};
use serde::{Deserialize, Serialize};

use super::MAX_SEGMENTS;

/// A run of guest memory in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes, at least 1.
    pub len: u32,
}

/// A buffer that a device has taken from a queue: first what the device reads, then what it writes.
///
/// It is plain data, so that a request in flight can be saved, and it is reused from one request to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// What names the buffer in its ring.
    pub(super) id: u16,
    /// How many entries of a packed ring it takes.
    pub(super) slots: u16,
    segments: Vec<Segment>,
    readable: usize,
}

impl Chain {
    /// Makes it the empty buffer `id`.
    pub(super) fn begin(&mut self, id: u16) {
        self.id = id;
        self.slots = 1;
        self.segments.clear();
        self.readable = 0;
    }

    /// Appends a segment; an empty one has no effect. `None` where it would be readable after a writable one.
    pub(super) fn push(&mut self, gpa: u64, len: u32, writable: bool) -> Option<()> {
        if !writable && self.readable < self.segments.len() {
            return None;
        }
        if len > 0 {
            self.segments.push(Segment { gpa, len });
            self.readable += usize::from(!writable);
        }
        Some(())
    }

    /// What names the buffer in its queue, for messages and traces.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// What the device reads.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// What the device writes.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// Bytes that the device reads.
    pub fn readable_len(&self) -> u64 {
        total(self.readable())
    }

    /// Bytes that the device writes.
    pub fn writable_len(&self) -> u64 {
        total(self.writable())
    }

    /// The addresses and lengths of `len` bytes of the readable part from `offset` on, as far as there are.
    pub fn readable_pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (u64, usize)> {
        pieces(self.readable(), offset, len)
    }

    /// The addresses and lengths of `len` bytes of the writable part from `offset` on, as far as there are.
    pub fn writable_pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (u64, usize)> {
        pieces(self.writable(), offset, len)
    }

    /// Copies out of the readable part from byte `offset` on and returns how many bytes there were, at most
    /// `data.len()`.
    ///
    /// # Errors
    /// Memory that is not there.
    pub fn read(
        &self,
        memory: &MemoryView,
        offset: u64,
        data: &mut [u8],
    ) -> Result<usize, MemoryError> {
        let mut done = 0;
        for (gpa, len) in self.readable_pieces(offset, data.len() as u64) {
            if let Some(part) = data.get_mut(done..done + len) {
                memory.read(Gpa(gpa), part)?;
            }
            done += len;
        }
        Ok(done)
    }

    /// Copies into the writable part from byte `offset` on and returns how many bytes fitted.
    ///
    /// # Errors
    /// Memory that is not there or cannot be written.
    pub fn write(
        &self,
        memory: &MemoryView,
        offset: u64,
        data: &[u8],
    ) -> Result<usize, MemoryError> {
        let mut done = 0;
        for (gpa, len) in self.writable_pieces(offset, data.len() as u64) {
            if let Some(part) = data.get(done..done + len) {
                memory.write(Gpa(gpa), part)?;
            }
            done += len;
        }
        Ok(done)
    }

    /// Whether a saved chain can be one of a queue of `size` entries.
    pub(crate) fn is_possible(&self, size: u16) -> bool {
        let most = MAX_SEGMENTS.max(usize::from(size));
        (1..=size).contains(&self.slots)
            && self.segments.len() <= most
            && self.readable <= self.segments.len()
            && self.segments.iter().all(|segment| segment.len > 0)
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// The addresses and lengths that `len` bytes from `offset` on take in `segments`.
fn pieces(segments: &[Segment], mut offset: u64, len: u64) -> impl Iterator<Item = (u64, usize)> {
    let mut left = len;
    segments.iter().filter_map(move |segment| {
        let skipped = offset.min(u64::from(segment.len));
        offset -= skipped;
        let taken = (u64::from(segment.len) - skipped).min(left);
        left -= taken;
        // A segment that wraps around ends nowhere: the memory view refuses it.
        (taken > 0).then(|| (segment.gpa.saturating_add(skipped), taken as usize))
    })
}
