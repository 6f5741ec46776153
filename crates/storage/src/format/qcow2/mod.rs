//! qcow2, versions 2 and 3 (QEMU's `docs/interop/qcow2.txt`): backing files, compressed clusters (deflate and zstd), zero
//! clusters, discard, internal snapshots, repair of images with lazy refcounts. Images with subclusters (extended L2
//! entries) are read only. Refused by name: encrypted images, images with an external data file.
//!
//! # What is durable when
//!
//! The format has no journal, so order is everything:
//!
//! 1. A cluster's refcount is raised, and that is durable, before the cluster is used for anything (`refcount`).
//! 2. A write that needs a cluster writes the guest's data and what surrounds it, and then notes the cluster in the L2
//!    table in memory.
//! 3. A flush (`flush`) first makes data and new tables durable, then writes L2 and L1 entries as they were when it
//!    began, and makes them durable.
//! 4. Only then are clusters free that these entries do not point to any more: their space is given back, and their
//!    refcounts go down.
//!
//! So whatever a crash leaves, no table points to what is not there, and no cluster is used twice; at worst clusters are
//! counted and not used.
//!
//! # What an image may not do
//!
//! Clusters that tables are in are known, and data is neither read from them nor written to them: an L2 entry that points
//! there is an error. After such an error in a table, or a table that could not be written, nothing is written any more.

mod check;
mod create;
mod entry;
mod flush;
pub mod header;
mod read;
mod refcount;
mod resize;
mod snapshot;
mod tables;
mod write;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashSet},
    io,
    rc::Rc,
};

use caisson_memory::Pinned;

pub use check::CheckReport;
pub use create::{CreateOptions, create};
pub use header::{Compression, Header};
pub use snapshot::SnapshotInfo;

use crate::{
    error::corrupt,
    format::{FormatError, Opener, refused},
    layer::{Answer, Content, Extent, Layer, Traits, read_bytes, write_bytes},
    open::read_only_error,
    runtime::local::{RangeLocks, Turnstile},
};
use entry::{COPIED, Mapping, OFFSET};
use header::{CORRUPT, DIRTY, be64};
use refcount::Refcounts;
use tables::Tables;

/// An open image.
pub struct Qcow2 {
    file: Rc<dyn Layer>,
    header: RefCell<Header>,
    backing: Option<Rc<dyn Layer>>,
    write: bool,
    cluster_bits: u32,
    size: Cell<u64>,
    l1: RefCell<Vec<u64>>,
    l1_dirty: RefCell<BTreeSet<usize>>,
    tables: Tables,
    /// Known for images that are written to.
    refcounts: Option<Refcounts>,
    /// By guest cluster: shared by who uses the mapping, exclusive for who changes it.
    locks: RangeLocks,
    /// By L1 entry: for who makes the table.
    l1_locks: RangeLocks,
    /// Host ranges that are free after the next flush.
    freed: RefCell<Vec<Freed>>,
    flush_turn: Turnstile,
    flushes_begun: Cell<u64>,
    flushes_done: Cell<u64>,
    broken: Cell<bool>,
    /// The tables contradict themselves, and the file does not say so yet.
    tell_corrupt: Cell<bool>,
    /// The compressed cluster that was read last: its entry and its content.
    unpacked: RefCell<Option<Unpacked>>,
}

/// A host range that nothing will point to any more.
#[derive(Clone, Copy)]
struct Freed {
    host: u64,
    len: u64,
    /// Whether a table was there. Clusters of tables are not freed with data, whatever an entry says.
    table: bool,
}

/// Host range and content of a compressed cluster.
type Unpacked = ((u64, u64), Rc<Vec<u8>>);

impl Qcow2 {
    /// Opens the image in `file`; `opener` opens its backing file.
    ///
    /// # Errors
    /// It is damaged, has something that is not supported, or what it names does not open.
    pub async fn open(
        file: Rc<dyn Layer>,
        write: bool,
        opener: &dyn Opener,
    ) -> Result<Self, FormatError> {
        let header = Header::read(&*file).await?;
        if write && header.extended_l2() {
            return Err(refused(
                "it has subclusters (extended L2 entries), which can only be read here; open it read-only or convert it",
            ));
        }
        if write && header.incompatible & CORRUPT != 0 {
            return Err(refused(
                "it is marked as corrupt; open it read-only, or repair it with `caisson disk check --repair`",
            ));
        }
        let backing = match &header.backing {
            Some(name) => Some(opener.open(name, Some(header.backing_format()?)).await?),
            None => None,
        };
        let image = Self::load(file, header, backing, write).await?;
        if write {
            image.take_over().await?;
        }
        Ok(image)
    }

    /// Opens an image without what it names, for a look at its tables: [`Qcow2::check`]. Nothing is written unless it
    /// is asked to repair.
    ///
    /// # Errors
    /// As [`Qcow2::open`].
    pub async fn open_tables(file: Rc<dyn Layer>) -> Result<Self, FormatError> {
        let header = Header::read(&*file).await?;
        Self::load(file, header, None, true).await
    }

    async fn load(
        file: Rc<dyn Layer>,
        header: Header,
        backing: Option<Rc<dyn Layer>>,
        write: bool,
    ) -> Result<Self, FormatError> {
        let len = header.l1_entries as usize * 8;
        let bytes = read_bytes(&*file, header.l1_offset, len).await?;
        let l1: Vec<u64> = (0..len / 8).map(|i| be64(&bytes, i * 8)).collect();
        let metadata = Self::metadata(&header, &l1)?;
        let refcounts = if write {
            Some(Refcounts::load(file.clone(), &header, metadata).await?)
        } else {
            None
        };
        Ok(Self {
            backing,
            write,
            cluster_bits: header.cluster_bits,
            size: Cell::new(header.size),
            l1: RefCell::new(l1),
            l1_dirty: RefCell::default(),
            tables: Tables::new(&header),
            refcounts,
            locks: RangeLocks::default(),
            l1_locks: RangeLocks::default(),
            freed: RefCell::default(),
            flush_turn: Turnstile::default(),
            flushes_begun: Cell::new(0),
            flushes_done: Cell::new(0),
            broken: Cell::new(false),
            tell_corrupt: Cell::new(false),
            unpacked: RefCell::default(),
            header: RefCell::new(header),
            file,
        })
    }

    /// The clusters of all tables but refcount blocks.
    fn metadata(header: &Header, l1: &[u64]) -> io::Result<HashSet<u64>> {
        let bits = header.cluster_bits;
        let mut known = HashSet::new();
        let mut add = |what: &str, offset: u64, len: u64| {
            let (first, end) = (
                offset >> bits,
                offset.saturating_add(len).div_ceil(1 << bits),
            );
            for number in first..end {
                if !known.insert(number) {
                    return Err(corrupt(format!(
                        "the {what} at {offset:#x} lies over another table"
                    )));
                }
            }
            Ok(())
        };
        add("header", 0, header.cluster())?;
        add(
            "L1 table",
            header.l1_offset,
            u64::from(header.l1_entries) * 8,
        )?;
        let refcounts = u64::from(header.refcount_table_clusters) << bits;
        add("refcount table", header.refcount_table_offset, refcounts)?;
        let snapshots = u64::from(header.snapshots) * 40;
        add("snapshot table", header.snapshots_offset, snapshots)?;
        for table in l1.iter().map(|entry| entry & OFFSET).filter(|&t| t != 0) {
            if !table.is_multiple_of(header.cluster()) {
                return Err(corrupt(format!("an L2 table is at {table:#x}")));
            }
            add("L2 table", table, header.cluster())?;
        }
        Ok(known)
    }

    /// Makes the image ours: repairs refcounts that were written late, clears what we do not keep up to date.
    async fn take_over(&self) -> Result<(), FormatError> {
        if self.header.borrow().incompatible & DIRTY != 0 {
            self.repair_refcounts().await?;
        }
        let before = self.header.borrow().clone();
        if before.version >= 3 && (before.autoclear != 0 || before.incompatible & DIRTY != 0) {
            {
                let mut header = self.header.borrow_mut();
                header.autoclear = 0;
                header.incompatible &= !DIRTY;
            }
            self.write_features().await?;
        }
        Ok(())
    }

    /// Writes the three words of features.
    async fn write_features(&self) -> io::Result<()> {
        let bytes = {
            let header = self.header.borrow();
            [header.incompatible, header.compatible, header.autoclear].map(u64::to_be_bytes)
        };
        write_bytes(&*self.file, 72, &bytes.concat()).await?;
        self.file.flush().await
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.header.borrow().clone()
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn refcounts(&self) -> io::Result<&Refcounts> {
        self.refcounts.as_ref().ok_or_else(read_only_error)
    }

    /// Refuses what would change the image if it may not be.
    fn writable(&self) -> io::Result<()> {
        if !self.write {
            return Err(read_only_error());
        }
        if self.broken.get() {
            return Err(corrupt(
                "the image's tables could not be written before; it is not written to any more",
            ));
        }
        Ok(())
    }

    /// The error of an image whose tables contradict themselves. Nothing is written to it from now on.
    fn damaged(&self, why: impl Into<String>) -> io::Error {
        if self.write && !self.broken.replace(true) {
            self.tell_corrupt.set(true);
        }
        corrupt(why)
    }

    /// Marks the image as corrupt in its file if that was just found, so that nobody writes to it before it was
    /// repaired.
    async fn note_damage<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        if outcome.is_err() && self.tell_corrupt.replace(false) {
            // Version 2 has no place for it.
            if self.header.borrow().version >= 3 {
                self.header.borrow_mut().incompatible |= CORRUPT;
                if let Err(error) = self.write_features().await {
                    tracing::warn!("cannot mark the image as corrupt: {error}");
                }
            }
        }
        outcome
    }

    /// What shows where this image has nothing.
    async fn read_backing(&self, at: u64, into: Pinned) -> io::Result<()> {
        match &self.backing {
            Some(backing) => crate::open::read_or_zeroes(&**backing, at, into).await,
            None => {
                into.fill(0, into.len(), 0);
                Ok(())
            }
        }
    }
}

impl Layer for Qcow2 {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn traits(&self) -> Traits {
        let below = self.file.traits();
        Traits {
            granularity: 1 << self.cluster_bits,
            read_only: !self.write,
            discards: below.discards,
            // Tables are only written by a flush.
            write_cache: true,
        }
    }

    fn read<'a>(&'a self, at: u64, into: Pinned) -> Answer<'a> {
        Box::pin(async move {
            let end = at + into.len() as u64;
            let first = at >> self.cluster_bits;
            let _lock = self
                .locks
                .lock(first, end.div_ceil(self.cluster()), false)
                .await;
            let read = self.read_mapped(at, into).await;
            self.note_damage(read).await
        })
    }

    fn write<'a>(&'a self, at: u64, from: Pinned, durable: bool) -> Answer<'a> {
        Box::pin(async move {
            let written = self.write_mapped(at, from).await;
            self.note_damage(written).await?;
            if durable || !self.file.traits().write_cache {
                self.flush_all().await?;
            }
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> Answer<'a> {
        Box::pin(self.flush_all())
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> Answer<'a> {
        Box::pin(async move {
            let discarded = self.discard_mapped(at, len).await;
            self.note_damage(discarded).await
        })
    }

    fn write_zeroes<'a>(&'a self, at: u64, len: u64, unmap: bool) -> Answer<'a> {
        Box::pin(async move {
            let zeroed = self.zero_mapped(at, len, unmap).await;
            self.note_damage(zeroed).await
        })
    }

    fn extent<'a>(&'a self, at: u64, len: u64) -> Answer<'a, Extent> {
        Box::pin(async move {
            let (mapping, run) = self.lookup(at, len).await?;
            let content = match mapping {
                Mapping::Absent => Content::Absent,
                Mapping::Zero { .. } => Content::Zero,
                Mapping::Parts { bitmap: 0, .. } => Content::Absent,
                _ => Content::Data,
            };
            match (content, &self.backing) {
                (Content::Absent, None) => Ok(Extent {
                    len: run,
                    content: Content::Zero,
                }),
                (Content::Absent, Some(backing)) if at >= backing.size() => Ok(Extent {
                    len: run,
                    content: Content::Zero,
                }),
                _ => Ok(Extent { len: run, content }),
            }
        })
    }

    fn resize<'a>(&'a self, size: u64) -> Answer<'a> {
        Box::pin(self.resize_to(size))
    }

    fn close<'a>(&'a self) -> Answer<'a> {
        Box::pin(async move {
            if !self.write {
                return Ok(());
            }
            self.flush_all().await?;
            self.refcounts()?.release().await?;
            self.file.flush().await
        })
    }
}

/// Whether an entry of the L1 table may be changed where it is.
fn is_own(entry: u64) -> bool {
    entry & COPIED != 0 && entry & OFFSET != 0
}
