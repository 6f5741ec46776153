//! The table of regions.

use alloc::{string::String, sync::Arc, vec::Vec};
use core::{any::Any, ptr::NonNull};

use crate::{
    DirtyBitmap, Gpa, PAGE_SIZE,
    watch::{Watches, WriteWatch},
};

bitflags::bitflags! {
    /// What a trust level may do with a page. Execute is split by privilege
    /// as in Intel's mode-based execute control.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Perms: u8 {
        /// Data reads.
        const READ = 1;
        /// Data writes.
        const WRITE = 2;
        /// Instruction fetch at CPL 0 to 2.
        const KERNEL_EXEC = 4;
        /// Instruction fetch at CPL 3.
        const USER_EXEC = 8;
    }
}

/// What a region is to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RegionKind {
    /// Ordinary memory.
    Ram,
    /// Memory that the guest reads and executes; its writes go to the device
    /// bus instead (flash, firmware).
    Rom,
}

/// A run of guest physical memory backed by host memory.
#[derive(Clone)]
pub struct Region {
    gpa: Gpa,
    len: u64,
    host: NonNull<u8>,
    kind: RegionKind,
    dirty: Option<Arc<DirtyBitmap>>,
    name: Arc<str>,
    /// Keeps the host mapping alive for as long as anyone holds the region.
    mapping: Arc<dyn Any + Send + Sync>,
}

// SAFETY: `host` points to memory that `mapping` keeps mapped; all access to
// it goes through volatile or atomic operations in `access`.
unsafe impl Send for Region {}
// SAFETY: as above; concurrent access is by volatile or atomic operations.
unsafe impl Sync for Region {}

/// Why a region table could not be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TableError {
    /// Two regions share addresses.
    #[error("memory regions \"{0}\" and \"{1}\" overlap")]
    Overlap(String, String),
    /// A region that is empty, not page aligned, or past the end of the address space.
    #[error("memory region \"{name}\" at {gpa} of {len:#x} bytes is empty, unaligned or too long")]
    Shape {
        /// The region's name.
        name: String,
        /// Where it was to start.
        gpa: Gpa,
        /// Its length in bytes.
        len: u64,
    },
}

/// A guest address that could not be accessed.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum MemoryError {
    /// No memory there, or the range leaves its region's end into nothing.
    #[error("no guest memory at {gpa} ({len} bytes)")]
    Unmapped {
        /// First address of the access.
        gpa: Gpa,
        /// Length of the access in bytes.
        len: u64,
    },
    /// The memory is there but this view may not use it so.
    #[error("guest memory at {gpa} may not be accessed that way ({wanted:?})")]
    Denied {
        /// First address refused.
        gpa: Gpa,
        /// What was asked.
        wanted: Perms,
    },
    /// An atomic access that is not naturally aligned.
    #[error("unaligned atomic access to guest memory at {0}")]
    Unaligned(Gpa),
}

impl Region {
    /// Describes `len` bytes of host memory at `host` as guest memory at `gpa`.
    ///
    /// # Safety
    /// `host..host+len` must be readable and writable for as long as `mapping`
    /// lives, and no Rust reference into it may exist meanwhile.
    pub unsafe fn new(
        name: &str,
        gpa: Gpa,
        len: u64,
        host: NonNull<u8>,
        kind: RegionKind,
        mapping: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            gpa,
            len,
            host,
            kind,
            dirty: None,
            name: name.into(),
            mapping,
        }
    }

    /// The same region with dirty tracking into `bitmap`.
    #[must_use]
    pub fn with_dirty(mut self, bitmap: Arc<DirtyBitmap>) -> Self {
        self.dirty = Some(bitmap);
        self
    }

    /// First guest physical address.
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }
    /// Length in bytes, a multiple of the page size.
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Never true for a region in a table.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// One past the last address.
    pub fn end(&self) -> u64 {
        self.gpa.0 + self.len
    }
    /// Host address of the first byte; valid while the region is held.
    pub fn host(&self) -> NonNull<u8> {
        self.host
    }
    /// RAM or ROM.
    pub fn kind(&self) -> RegionKind {
        self.kind
    }
    /// What keeps the host memory, for a backend that knows memory of its own
    /// making.
    pub fn mapping(&self) -> &(dyn Any + Send + Sync) {
        &*self.mapping
    }
    /// The name given when it was made, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Where writes to it are noted, if they are.
    pub fn dirty(&self) -> Option<&Arc<DirtyBitmap>> {
        self.dirty.as_ref()
    }
}

/// All memory of a machine: an immutable, sorted table of regions. Hot-plug
/// makes a new table.
#[derive(Clone)]
pub struct GuestMemory {
    regions: Arc<[Region]>,
    watches: Arc<Watches>,
}

impl GuestMemory {
    /// Builds the table.
    ///
    /// # Errors
    /// Regions that overlap, are empty, unaligned, or wrap around.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, TableError> {
        regions.sort_by_key(|r| r.gpa);
        for r in &regions {
            let aligned = r.gpa.0 % PAGE_SIZE == 0 && r.len % PAGE_SIZE == 0;
            if r.len == 0 || !aligned || r.gpa.0.checked_add(r.len).is_none() {
                return Err(TableError::Shape {
                    name: (&*r.name).into(),
                    gpa: r.gpa,
                    len: r.len,
                });
            }
        }
        for pair in regions.windows(2) {
            if pair[0].end() > pair[1].gpa.0 {
                return Err(TableError::Overlap(
                    (&*pair[0].name).into(),
                    (&*pair[1].name).into(),
                ));
            }
        }
        Ok(Self {
            regions: regions.into(),
            watches: Arc::default(),
        })
    }

    /// Has `watch` told of writes to this table that no vCPU makes, from now on
    /// and for as long as the table is there. To add the same `watch` again
    /// changes nothing.
    pub fn watch_writes(&self, watch: Arc<dyn WriteWatch>) {
        self.watches.add(watch);
    }

    /// Tells the watchers that `len` bytes at `gpa` were written.
    pub(crate) fn tell_written(&self, gpa: Gpa, len: u64) {
        self.watches.tell(gpa, len);
    }

    /// The regions in address order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region that holds `gpa`.
    pub fn find(&self, gpa: Gpa) -> Option<&Region> {
        let i = self.regions.partition_point(|r| r.gpa <= gpa);
        let r = self.regions.get(i.checked_sub(1)?)?;
        (gpa.0 < r.end()).then_some(r)
    }

    /// Total RAM in bytes.
    pub fn ram_size(&self) -> u64 {
        self.regions
            .iter()
            .filter(|r| r.kind == RegionKind::Ram)
            .map(|r| r.len)
            .sum()
    }
}
