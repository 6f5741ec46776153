//! Where in guest memory the data of a request is.

use alloc::vec::Vec;

use caisson_memory::{Gpa, MemoryView};

use crate::BlockError;

/// The longest buffer of one request, in bytes: 1 GiB. Devices announce far less.
pub const MAX_BUFFER_LEN: u64 = 1 << 30;

/// One run of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub gpa: Gpa,
    /// Length in bytes.
    pub len: u32,
}

/// A scatter list of guest memory and the view that it is reached through.
///
/// Whether there is memory, and whether the view may use it, is only found out by the backend.
#[derive(Clone)]
pub struct GuestBuffer {
    view: MemoryView,
    segments: Vec<Segment>,
    len: u64,
}

impl GuestBuffer {
    /// The buffer that `segments` make in their order, seen through `view`.
    ///
    /// # Errors
    /// [`BlockError::Memory`] when they are longer than [`MAX_BUFFER_LEN`] together, or one wraps around.
    pub fn new(view: MemoryView, segments: Vec<Segment>) -> Result<Self, BlockError> {
        let mut len = 0u64;
        for segment in &segments {
            segment
                .gpa
                .checked_add(segment.len.into())
                .ok_or(BlockError::Memory)?;
            len = len.saturating_add(segment.len.into());
        }
        if len > MAX_BUFFER_LEN {
            return Err(BlockError::Memory);
        }
        Ok(Self {
            view,
            segments,
            len,
        })
    }

    /// The view that the memory is reached through.
    pub fn view(&self) -> &MemoryView {
        &self.view
    }

    /// The runs, in the order of the data.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl core::fmt::Debug for GuestBuffer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(&self.segments).finish()
    }
}
