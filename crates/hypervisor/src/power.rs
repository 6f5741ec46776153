//! What not every backend can do.

use alloc::sync::Arc;

use caisson_memory::{DirtyBitmap, Gpa, Region};

use crate::{Doorbells, HypervisorError, InterruptEvents};

/// The optional powers of a partition.
#[derive(Default)]
#[non_exhaustive]
pub struct PartitionPower<'a> {
    /// Noting which pages vCPUs write.
    pub dirty_log: Option<&'a dyn DirtyLog>,
    /// Guest writes that signal an event.
    pub doorbells: Option<&'a dyn Doorbells>,
    /// Events that raise an interrupt.
    pub interrupt_events: Option<&'a dyn InterruptEvents>,
    /// Memory of the backend's own making.
    pub backend_memory: Option<&'a dyn BackendMemory>,
}

/// How written pages are noted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DirtyMethod {
    /// A bit per page. To ask costs as much as there is memory, and nothing
    /// while nobody asks: right for snapshots, and for machines that are never
    /// moved.
    #[default]
    Bitmap,
    /// A list per vCPU of the pages that it wrote. To ask costs as much as was
    /// written; a vCPU whose list is full stops until it is emptied, which
    /// [`Vcpu::run`](crate::Vcpu::run) does: right for live migration of large
    /// machines. Takes sixteen bytes of host memory per entry.
    Ring {
        /// How many pages a list holds: a power of two from 1024 to 65536.
        entries: u32,
    },
}

/// Starts and stops noting the pages that vCPUs write.
pub trait DirtyLog: Send + Sync {
    /// Which method is in use: the one asked for where the host has it and it can
    /// be relied on, else the bitmap.
    fn method(&self) -> DirtyMethod;
    /// From now on, vCPU writes mark `bitmap`s of the regions that have one.
    ///
    /// # Errors
    /// The host out of resources; memory whose pages it cannot watch
    /// ([`BackendMemory`]).
    fn set_enabled(&self, enabled: bool) -> Result<(), HypervisorError>;
    /// Makes every write of every vCPU so far visible in the bitmaps. Where that
    /// cannot be known, or logging is off, all pages are marked.
    fn sync(&self, bitmap: &Arc<DirtyBitmap>);
}

/// Makes memory that belongs to the partition instead of the process (KVM's
/// guest_memfd).
pub trait BackendMemory: Send + Sync {
    /// `len` bytes of zeroed RAM for this partition and no other, to be mapped
    /// at `gpa` by [`Partition::set_memory`](crate::Partition::set_memory).
    ///
    /// # Errors
    /// The host lacks it (the reason says what is missing) or is out of memory;
    /// a length that is no multiple of the page size.
    fn ram(&self, name: &str, gpa: Gpa, len: u64) -> Result<Region, HypervisorError>;
}
