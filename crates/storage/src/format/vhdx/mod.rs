//! VHDX, fixed, dynamic and differencing ([MS-VHDX], version 1).
//!
//! # What is durable when
//!
//! A new block is put at the end of the file, where there are zeroes, and its entry in the table is only changed in memory.
//! A flush (`commit`) makes data durable, writes the changed sectors of the table to the log, makes that durable, and
//! then writes them where they belong. So after a power cut the table is as it was at one of the flushes, or each of its
//! changes is in the log, which is replayed when the image is opened: in the file, or in memory where it is only read.
//!
//! # What an image may not do
//!
//! Blocks that lie over each other, over a table or over the log are refused when the image is opened, so what a guest writes
//! never becomes a table. After a table could not be written, nothing is written any more.
//!
//! A block of a differencing image that is written to is taken over from the parent as a whole. Space of blocks that are
//! discarded is given back to the host as holes; the file does not become shorter.

mod create;
mod header;
mod log;
mod metadata;
mod table;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    io,
    rc::Rc,
};

use caisson_memory::Pinned;

pub use create::{CreateOptions, create};
pub use metadata::{MAX_SIZE, Metadata, Parent};

use crate::{
    error::corrupt,
    file::{FileLayer, MemoryFile},
    format::{Format, FormatError, Opener, overlay::Overlay, refused},
    layer::{Answer, Content, Extent, Guid, Layer, Traits, write_bytes},
    open::{read_only_error, read_or_zeroes},
    runtime::local::{RangeLocks, Turnstile},
};
use header::{HEADERS, Header, Layout, MIB, random_guid};
use log::Writer;
use table::{Bitmaps, State};

/// An open image.
pub struct Vhdx {
    file: Rc<dyn Layer>,
    parent: Option<Rc<dyn Layer>>,
    write: bool,
    metadata: Metadata,
    layout: Layout,
    size: Cell<u64>,
    header: Cell<Header>,
    /// The slot of the header that counts.
    slot: Cell<usize>,
    /// Entries of the table of blocks.
    table: RefCell<Vec<u64>>,
    /// Sectors of the table that differ from the file's.
    dirty: RefCell<BTreeSet<usize>>,
    bitmaps: Bitmaps,
    /// Where the next block goes.
    end: Cell<u64>,
    /// By block: shared by who uses it, exclusive for who makes or completes it.
    locks: RangeLocks,
    log: RefCell<Option<Writer>>,
    /// Whether the identity was changed because the content is.
    changed: Cell<bool>,
    begin: Turnstile,
    commit_turn: Turnstile,
    commits_begun: Cell<u64>,
    commits_done: Cell<u64>,
    broken: Cell<bool>,
}

/// What of a block is where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// At this offset of the file.
    At(u64),
    Zero,
    /// The parent shows, or zeroes where there is none.
    Absent,
}

impl Vhdx {
    /// Opens the image in `file`; `opener` opens its parent.
    ///
    /// # Errors
    /// It is damaged, has something that is not supported, or its parent does not open or was changed since.
    pub async fn open(
        file: Rc<dyn Layer>,
        write: bool,
        opener: &dyn Opener,
    ) -> Result<Self, FormatError> {
        let (file, layout, metadata) = Self::look(file, write).await?;
        let parent = match &metadata.parent {
            None => None,
            Some(parent) => {
                let name = parent.path.as_deref().ok_or_else(|| {
                    refused("it names its parent by a path of Windows only; convert it there")
                })?;
                let layer = opener.open(name, Some(Format::Vhdx)).await?;
                if layer.identity() != Some(parent.linkage) {
                    return Err(refused(format!(
                        "its parent \"{name}\" was changed after it was made, or is another"
                    )));
                }
                Some(layer)
            }
        };
        Self::load(file, layout, metadata, parent, write).await
    }

    /// Opens an image without its parent, for a look at its tables.
    ///
    /// # Errors
    /// As [`Vhdx::open`].
    pub async fn open_tables(file: Rc<dyn Layer>) -> Result<Self, FormatError> {
        let (file, layout, metadata) = Self::look(file, false).await?;
        Self::load(file, layout, metadata, None, false).await
    }

    /// Reads the tables, after the log was replayed.
    async fn look(
        mut file: Rc<dyn Layer>,
        write: bool,
    ) -> Result<(Rc<dyn Layer>, Layout, Metadata), FormatError> {
        let mut layout = Layout::read(&*file).await?;
        let id = layout.header.log;
        if id != [0; 16] {
            if !write {
                let memory = Rc::new(FileLayer::new(MemoryFile::default(), None)?);
                file = Rc::new(Overlay::new(file, memory));
            }
            if log::replay(&*file, layout.log, id).await? {
                if write {
                    file.flush().await?;
                }
                // The log changes tables, and may have changed the file's length.
                let again = Layout::read(&*file).await?;
                if again.header != layout.header {
                    return Err(refused("its log changes its headers"));
                }
                layout = again;
            }
        }
        let metadata = Metadata::read(&*file, layout.metadata).await?;
        Ok((file, layout, metadata))
    }

    async fn load(
        file: Rc<dyn Layer>,
        layout: Layout,
        metadata: Metadata,
        parent: Option<Rc<dyn Layer>>,
        write: bool,
    ) -> Result<Self, FormatError> {
        let (table, end) = table::load(&*file, &layout, &metadata).await?;
        let image = Self {
            size: Cell::new(metadata.size),
            header: Cell::new(layout.header),
            slot: Cell::new(layout.slot),
            bitmaps: Bitmaps::default(),
            table: RefCell::new(table),
            dirty: RefCell::default(),
            end: Cell::new(end),
            locks: RangeLocks::default(),
            log: RefCell::default(),
            changed: Cell::new(false),
            begin: Turnstile::default(),
            commit_turn: Turnstile::default(),
            commits_begun: Cell::new(0),
            commits_done: Cell::new(0),
            broken: Cell::new(false),
            file,
            parent,
            write,
            metadata,
            layout,
        };
        if write {
            // An empty log, and a sign that somebody had the file.
            let mut header = image.header.get();
            header.log = [0; 16];
            header.file_write = random_guid()?;
            image.write_header(header).await?;
        }
        Ok(image)
    }

    /// What the metadata says.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

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

    /// Writes the other header; it counts once it is there.
    async fn write_header(&self, mut header: Header) -> io::Result<()> {
        header.sequence = self
            .header
            .get()
            .sequence
            .checked_add(1)
            .ok_or_else(|| corrupt("its headers cannot be counted any more"))?;
        let slot = 1 - self.slot.get();
        write_bytes(&*self.file, HEADERS[slot], &header.encode()).await?;
        self.file.flush().await?;
        self.slot.set(slot);
        self.header.set(header);
        Ok(())
    }

    /// Before the first change of the content: whoever has differences to it must see that.
    async fn note_change(&self) -> io::Result<()> {
        if self.changed.get() {
            return Ok(());
        }
        let _turn = self.begin.pass().await;
        if self.changed.get() {
            return Ok(());
        }
        let mut header = self.header.get();
        header.data_write = random_guid()?;
        self.write_header(header).await?;
        self.changed.set(true);
        Ok(())
    }

    fn block(&self) -> u64 {
        self.metadata.block
    }

    fn entry(&self, index: u64) -> u64 {
        let table = self.table.borrow();
        let entry = table.get(self.metadata.entry(index)).copied();
        entry.unwrap_or(0)
    }

    fn set_entry(&self, index: u64, state: State, host: u64) -> io::Result<()> {
        let number = self.metadata.entry(index);
        let mut table = self.table.borrow_mut();
        let entry = table
            .get_mut(number)
            .ok_or_else(|| corrupt("a block beyond the table"))?;
        *entry = host | state as u64;
        self.dirty.borrow_mut().insert(number / 512);
        Ok(())
    }

    /// What is at `at`, and for how many of `len` bytes.
    async fn part(&self, at: u64, len: u64) -> io::Result<(Part, u64)> {
        let (index, within) = (at / self.block(), at % self.block());
        let mut run = (self.block() - within).min(len);
        let entry = self.entry(index);
        let host = table::offset(entry);
        let part = match State::of(entry) {
            State::Full => Part::At(host + within),
            State::Absent => Part::Absent,
            State::Zero => Part::Zero,
            State::Partial => {
                let sector = u64::from(self.metadata.logical_sector);
                let bitmap = table::offset(
                    self.table
                        .borrow()
                        .get(self.metadata.bitmap_entry(index))
                        .copied()
                        .unwrap_or(0),
                );
                let first = index % self.metadata.ratio() * (self.block() / sector);
                let bits = self.bitmaps.at(&*self.file, bitmap).await?;
                let is = |n: u64| {
                    let bit = first + n;
                    bits[(bit / 8) as usize] >> (bit % 8) & 1 == 1
                };
                let (from, to) = (within / sector, (within + run).div_ceil(sector));
                let present = is(from);
                let next = (from + 1..to).find(|&n| is(n) != present);
                run = run.min(next.unwrap_or(to) * sector - within);
                if present {
                    Part::At(host + within)
                } else {
                    Part::Absent
                }
            }
        };
        Ok((part, run))
    }

    async fn read_range(&self, at: u64, into: Pinned) -> io::Result<()> {
        let len = into.len() as u64;
        let mut done = 0;
        while done < len {
            let (part, run) = self.part(at + done, len - done).await?;
            let into = into.slice(done as usize, run as usize);
            match (part, &self.parent) {
                (Part::At(host), _) => self.file.read(host, into).await?,
                (Part::Absent, Some(parent)) => {
                    read_or_zeroes(&**parent, at + done, into).await?;
                }
                _ => into.fill(0, into.len(), 0),
            }
            done += run;
        }
        Ok(())
    }

    /// Takes over from the parent what of a block is not in the file, to `host`.
    async fn complete(&self, index: u64, host: u64) -> io::Result<()> {
        let Some(parent) = &self.parent else {
            return Ok(());
        };
        let start = index * self.block();
        let end = (start + self.block()).min(self.size.get());
        let mut at = start;
        while at < end {
            let (part, run) = self.part(at, end - at).await?;
            let mut left = run;
            while part == Part::Absent && left > 0 {
                let here = at + (run - left);
                let n = left.min(MIB);
                let there = parent.size().saturating_sub(here).min(n);
                let zero = there == 0
                    || crate::layer::content_of(&**parent, here, there).await?
                        == Some(Content::Zero);
                // In a new block there are zeroes already; in an old one there may be anything.
                if !zero || State::of(self.entry(index)) == State::Partial {
                    let memory = Pinned::zeroed(n as usize);
                    read_or_zeroes(&**parent, here, memory.clone()).await?;
                    self.file
                        .write(host + (here - start), memory, false)
                        .await?;
                }
                left -= n;
            }
            at += run;
        }
        Ok(())
    }

    /// Makes sure that all of a block is in the file, where it is.
    async fn own_block(&self, index: u64) -> io::Result<u64> {
        let entry = self.entry(index);
        if State::of(entry) == State::Full {
            return Ok(table::offset(entry));
        }
        let _lock = self.locks.lock(index, index + 1, true).await;
        let entry = self.entry(index);
        let host = match State::of(entry) {
            State::Full => return Ok(table::offset(entry)),
            State::Partial => table::offset(entry),
            State::Absent | State::Zero => {
                let host = self.end.get();
                let end = host + self.block();
                if end >= 1 << 56 {
                    return Err(io::ErrorKind::FileTooLarge.into());
                }
                // Whatever becomes of it, nobody else gets this space: it may not be zeroes any more.
                self.end.set(end);
                if self.file.size() < end {
                    self.file.resize(end).await?;
                }
                host
            }
        };
        if matches!(State::of(entry), State::Absent | State::Partial) {
            self.complete(index, host).await?;
        }
        self.set_entry(index, State::Full, host)?;
        Ok(host)
    }

    async fn write_range(&self, at: u64, from: Pinned) -> io::Result<()> {
        self.writable()?;
        self.note_change().await?;
        let len = from.len() as u64;
        let mut done = 0;
        while done < len {
            let here = at + done;
            let within = here % self.block();
            let run = (self.block() - within).min(len - done);
            let host = self.own_block(here / self.block()).await?;
            let part = from.slice(done as usize, run as usize);
            self.file.write(host + within, part, false).await?;
            done += run;
        }
        Ok(())
    }

    async fn zero_range(&self, at: u64, len: u64, unmap: bool, discard: bool) -> io::Result<()> {
        self.writable()?;
        self.note_change().await?;
        let mut done = 0;
        while done < len {
            let here = at + done;
            let (index, within) = (here / self.block(), here % self.block());
            let run = (self.block() - within).min(len - done);
            let whole = within == 0 && (run == self.block() || here + run == self.size.get());
            match State::of(self.entry(index)) {
                State::Full => {
                    let host = table::offset(self.entry(index)) + within;
                    self.file.write_zeroes(host, run, unmap).await?;
                }
                State::Zero => {}
                State::Absent if self.parent.is_none() || discard => {}
                State::Absent if whole => {
                    let _lock = self.locks.lock(index, index + 1, true).await;
                    // Somebody may have made it meanwhile.
                    if State::of(self.entry(index)) != State::Absent {
                        continue;
                    }
                    self.set_entry(index, State::Zero, 0)?;
                }
                State::Partial if discard => {}
                State::Absent | State::Partial => {
                    self.own_block(index).await?;
                    continue;
                }
            }
            done += run;
        }
        Ok(())
    }

    /// Makes everything durable that was completed before; who asks meanwhile shares the next time.
    async fn commit(&self) -> io::Result<()> {
        if !self.write {
            return Ok(());
        }
        let needed = self.commits_begun.get() + 1;
        let _turn = self.commit_turn.pass().await;
        if self.commits_done.get() >= needed {
            return Ok(());
        }
        self.writable()?;
        let number = self.commits_begun.get() + 1;
        self.commits_begun.set(number);
        match self.commit_once().await {
            Ok(()) => {
                self.commits_done.set(number);
                Ok(())
            }
            Err(error) => {
                self.broken.set(true);
                Err(error)
            }
        }
    }

    async fn commit_once(&self) -> io::Result<()> {
        // Entries that are set from here on belong to data that the flush does not cover, and blocks that come may make the
        // file longer.
        let size = self.file.size();
        let sectors: Vec<(u64, Vec<u8>)> = {
            let table = self.table.borrow();
            let dirty = std::mem::take(&mut *self.dirty.borrow_mut());
            let sector = |n: usize| {
                let entries = &table[n * 512..table.len().min(n * 512 + 512)];
                let mut bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
                bytes.resize(log::SECTOR as usize, 0);
                (self.layout.bat.offset + n as u64 * log::SECTOR, bytes)
            };
            dirty.into_iter().map(sector).collect()
        };
        self.file.flush().await?;
        self.change_tables(&sectors, size).await
    }

    /// Changes sectors of tables by way of the log. What the log told before is durable in its place already.
    async fn change_tables(&self, sectors: &[(u64, Vec<u8>)], size: u64) -> io::Result<()> {
        if sectors.is_empty() {
            return Ok(());
        }
        // Taken out meanwhile, so that a failure leaves none; commits take turns.
        let writer = self.log.borrow_mut().take();
        let mut writer = match writer {
            Some(writer) => writer,
            None => {
                let _turn = self.begin.pass().await;
                let id = random_guid()?;
                let mut header = self.header.get();
                header.log = id;
                self.write_header(header).await?;
                Writer::new(self.layout.log, id)
            }
        };
        for (n, part) in sectors.chunks(writer.capacity()).enumerate() {
            if n > 0 {
                // The part before must be in its place before its entry may go.
                self.file.flush().await?;
            }
            writer.write(&*self.file, part, size).await?;
            self.file.flush().await?;
            for (at, bytes) in part {
                write_bytes(&*self.file, *at, bytes).await?;
            }
        }
        *self.log.borrow_mut() = Some(writer);
        Ok(())
    }

    async fn resize_to(&self, size: u64) -> io::Result<()> {
        self.writable()?;
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::Unsupported, why));
        let old = self.size.get();
        if size < old || self.metadata.fixed {
            return refuse("only a dynamic VHDX grows, and none shrinks; convert it");
        }
        let wanted = Metadata {
            size,
            ..self.metadata.clone()
        };
        let unit = u64::from(self.metadata.logical_sector);
        if size > MAX_SIZE || !size.is_multiple_of(unit) {
            return refuse("a VHDX has whole sectors and 64T at most");
        }
        if wanted.entries() * 8 > self.layout.bat.len.min(header::MAX_TABLE) {
            return refuse("its table of blocks is too short for this size; convert it");
        }
        if self
            .parent
            .as_ref()
            .is_some_and(|parent| parent.size() > old)
        {
            return refuse("its parent is longer than it; convert it");
        }
        self.note_change().await?;
        // In the last block there may be anything after the disk's end.
        let edge = old.next_multiple_of(self.block()).min(size);
        let last = State::of(self.entry(old / self.block()));
        if edge > old && matches!(last, State::Full | State::Partial) {
            self.own_block(old / self.block()).await?;
            self.zero_range(old, edge - old, true, false).await?;
        }
        let _turn = self.commit_turn.pass().await;
        let at = self.metadata.size_at / log::SECTOR * log::SECTOR;
        let mut bytes = crate::layer::read_bytes(&*self.file, at, log::SECTOR as usize).await?;
        let within = (self.metadata.size_at - at) as usize;
        bytes[within..within + 8].copy_from_slice(&size.to_le_bytes());
        // Beyond the table there may be anything too.
        let (before, after) = (self.table.borrow().len(), wanted.entries() as usize);
        self.table.borrow_mut().resize(after, 0);
        let sectors = before / 512..after.div_ceil(512);
        self.dirty.borrow_mut().extend(sectors);
        let changed = async {
            self.commit_once().await?;
            self.file.flush().await?;
            self.change_tables(&[(at, bytes)], self.file.size()).await?;
            self.file.flush().await
        };
        if let Err(error) = changed.await {
            self.broken.set(true);
            return Err(error);
        }
        self.size.set(size);
        Ok(())
    }
}

impl Layer for Vhdx {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn traits(&self) -> Traits {
        Traits {
            granularity: 4096,
            read_only: !self.write,
            discards: self.file.traits().discards,
            // Tables are only written by a flush.
            write_cache: true,
        }
    }

    fn read<'a>(&'a self, at: u64, into: Pinned) -> Answer<'a> {
        Box::pin(self.read_range(at, into))
    }

    fn write<'a>(&'a self, at: u64, from: Pinned, durable: bool) -> Answer<'a> {
        Box::pin(async move {
            self.write_range(at, from).await?;
            if durable || !self.file.traits().write_cache {
                self.commit().await?;
            }
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> Answer<'a> {
        Box::pin(self.commit())
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> Answer<'a> {
        Box::pin(self.zero_range(at, len, true, true))
    }

    fn write_zeroes<'a>(&'a self, at: u64, len: u64, unmap: bool) -> Answer<'a> {
        Box::pin(self.zero_range(at, len, unmap, false))
    }

    fn extent<'a>(&'a self, at: u64, len: u64) -> Answer<'a, Extent> {
        Box::pin(async move {
            let (part, run) = self.part(at, len).await?;
            let content = match part {
                Part::At(host) => {
                    let stored = self.file.extent(host, run).await?;
                    return Ok(Extent {
                        len: stored.len.min(run),
                        ..stored
                    });
                }
                Part::Absent if self.parent.as_ref().is_some_and(|p| at < p.size()) => {
                    Content::Absent
                }
                _ => Content::Zero,
            };
            Ok(Extent { len: run, content })
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
            self.commit().await?;
            self.file.flush().await?;
            // What the log tells is in its place.
            let mut header = self.header.get();
            header.log = [0; 16];
            *self.log.borrow_mut() = None;
            self.write_header(header).await
        })
    }

    fn identity(&self) -> Option<Guid> {
        Some(self.header.get().data_write)
    }
}
