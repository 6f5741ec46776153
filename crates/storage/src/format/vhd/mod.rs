//! VHD, fixed, dynamic and differencing (Microsoft's *Virtual Hard Disk Image Format Specification*, version 1.0). Sizes do
//! not change. A block of a differencing image that is written to is taken over from the parent as a whole. The format
//! knows a parent by an identity that stays when the parent is written to: nobody notices that.
//!
//! A new block of a dynamic image is put where the footer is, after a footer has been put behind it: at each moment there
//! is one at the end or the copy at the start. The table's entry is written when the block is durable. Each block begins
//! with a map of the sectors that were written; before the first write to a block, the others are zeroed and the map is
//! filled. Blocks that lie over each other, or over anything else that counts, are refused.

mod header;

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    io,
    rc::Rc,
};

use caisson_memory::Pinned;

pub use header::{Kind, MAX_SIZE, Parent, Shape, create};

use crate::{
    error::corrupt,
    format::{Format, FormatError, Opener, refused},
    layer::{Answer, Content, Extent, Guid, Layer, Traits, read_bytes, write_bytes},
    open::{read_only_error, read_or_zeroes},
    runtime::local::{RangeLocks, Turnstile},
};
use header::{ABSENT, SECTOR};

/// The most maps of sectors that are remembered.
const MAX_MAPS: usize = 4096;

/// How much is taken over from a parent at once, in bytes.
const COPY: u64 = 1 << 20;

/// An open image.
pub struct Vhd {
    file: Rc<dyn Layer>,
    parent: Option<Rc<dyn Layer>>,
    shape: Shape,
    write: bool,
    /// Sectors at which blocks begin.
    table: RefCell<Vec<u32>>,
    /// Where the next block goes.
    end: Cell<u64>,
    /// Maps of blocks that are not filled.
    maps: RefCell<HashMap<u32, Rc<Vec<u8>>>>,
    /// Blocks whose maps are filled.
    full: RefCell<HashSet<u32>>,
    /// By block: exclusive for who makes or fills it.
    locks: RangeLocks,
    growing: Turnstile,
}

/// What of a block is where.
enum Part {
    Absent,
    At(u64),
    Zero,
}

impl Vhd {
    /// Opens the image in `file`; `opener` opens its parent.
    ///
    /// # Errors
    /// It is damaged, or its parent does not open or is another.
    pub async fn open(
        file: Rc<dyn Layer>,
        write: bool,
        opener: &dyn Opener,
    ) -> Result<Self, FormatError> {
        let mut image = Self::load(file, write).await?;
        if let Some(parent) = &image.shape.parent {
            let layer = opener.open(&parent.path, Some(Format::Vhd)).await?;
            if layer.identity() != Some(parent.id) {
                return Err(refused(format!(
                    "its parent \"{}\" is another image",
                    parent.path
                )));
            }
            image.parent = Some(layer);
        }
        Ok(image)
    }

    /// Opens an image without its parent, for a look at its tables.
    ///
    /// # Errors
    /// As [`Vhd::open`].
    pub async fn open_tables(file: Rc<dyn Layer>) -> Result<Self, FormatError> {
        Self::load(file, false).await
    }

    async fn load(file: Rc<dyn Layer>, write: bool) -> Result<Self, FormatError> {
        let shape = Shape::read(&*file).await?;
        let mut table = Vec::new();
        let mut end = file.size().saturating_sub(SECTOR);
        if let Kind::Dynamic {
            table: at,
            blocks,
            block,
        } = shape.kind
        {
            let bytes = read_bytes(&*file, at, blocks as usize * 4).await?;
            let entries = bytes
                .chunks_exact(4)
                .map(|b| b.try_into().unwrap_or_default());
            table.extend(entries.map(u32::from_be_bytes));
            let whole = map_len(block) + u64::from(block);
            let mut ranges: Vec<(u64, u64)> = table
                .iter()
                .filter(|&&entry| entry != ABSENT)
                .map(|&entry| u64::from(entry) * SECTOR)
                .map(|start| (start, start + whole))
                .collect();
            ranges.extend(shape.taken.iter().filter(|range| range.0 < range.1));
            ranges.sort_unstable();
            if ranges.windows(2).any(|pair| pair[0].1 > pair[1].0) {
                return Err(refused(
                    "two blocks, or a block and a table, lie over each other",
                ));
            }
            // The footer at the end moves; everything else stays.
            let footer = (file.size().saturating_sub(SECTOR), file.size());
            let stay = ranges.iter().filter(|&&range| range != footer);
            end = stay.fold(end, |end, range| end.max(range.1));
            end = end.next_multiple_of(SECTOR);
        }
        Ok(Self {
            file,
            parent: None,
            shape,
            write,
            table: RefCell::new(table),
            end: Cell::new(end),
            maps: RefCell::default(),
            full: RefCell::default(),
            locks: RangeLocks::default(),
            growing: Turnstile::default(),
        })
    }

    /// What footer and header say.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    fn block(&self) -> u64 {
        match self.shape.kind {
            Kind::Fixed => self.shape.size.max(1),
            Kind::Dynamic { block, .. } => block.into(),
        }
    }

    fn start(&self, index: u32) -> Option<u64> {
        let entry = self.table.borrow().get(index as usize).copied();
        entry
            .filter(|&entry| entry != ABSENT)
            .map(|entry| u64::from(entry) * SECTOR)
    }

    /// Which sectors of a block were written; `None` for all.
    async fn map(&self, index: u32, start: u64) -> io::Result<Option<Rc<Vec<u8>>>> {
        if self.full.borrow().contains(&index) {
            return Ok(None);
        }
        let known = self.maps.borrow().get(&index).cloned();
        if known.is_some() {
            return Ok(known);
        }
        let sectors = self.block() / SECTOR;
        let bytes = read_bytes(&*self.file, start, sectors.div_ceil(8) as usize).await?;
        if bytes.iter().all(|&byte| byte == 0xff) {
            self.full.borrow_mut().insert(index);
            return Ok(None);
        }
        let map = Rc::new(bytes);
        let mut maps = self.maps.borrow_mut();
        if maps.len() >= MAX_MAPS {
            maps.clear();
        }
        maps.insert(index, map.clone());
        Ok(Some(map))
    }

    /// What is at `at`, and for how many of `len` bytes.
    async fn part(&self, at: u64, len: u64) -> io::Result<(Part, u64)> {
        let Kind::Dynamic { block, .. } = self.shape.kind else {
            return Ok((Part::At(at), len));
        };
        let block_len = u64::from(block);
        let (index, within) = ((at / block_len) as u32, at % block_len);
        let len = len.min(block_len - within);
        let Some(start) = self.start(index) else {
            return Ok((Part::Absent, len));
        };
        let data = start + map_len(block) + within;
        let Some(map) = self.map(index, start).await? else {
            return Ok((Part::At(data), len));
        };
        let written = |sector: u64| {
            let byte = map.get((sector / 8) as usize).copied().unwrap_or(0);
            byte >> (7 - sector % 8) & 1 == 1
        };
        let first = within / SECTOR;
        let is = written(first);
        let mut sector = first + 1;
        while sector * SECTOR < within + len && written(sector) == is {
            sector += 1;
        }
        let run = (sector * SECTOR - within).min(len);
        let part = match (is, &self.parent) {
            (true, _) => Part::At(data),
            (false, None) => Part::Zero,
            (false, Some(_)) => Part::Absent,
        };
        Ok((part, run))
    }

    /// Makes sure that a block is there and all of it counts as written.
    async fn prepare(&self, index: u32) -> io::Result<()> {
        let Kind::Dynamic { block, table, .. } = self.shape.kind else {
            return Ok(());
        };
        if let Some(start) = self.start(index) {
            let Some(map) = self.map(index, start).await? else {
                return Ok(());
            };
            self.complete(index, start + map_len(block)).await?;
            self.file.flush().await?;
            write_bytes(&*self.file, start, &vec![0xff; map.len()]).await?;
            self.maps.borrow_mut().remove(&index);
            self.full.borrow_mut().insert(index);
            return Ok(());
        }
        let _turn = self.growing.pass().await;
        let start = self.end.get();
        let whole = map_len(block) + u64::from(block);
        let entry = u32::try_from(start / SECTOR).ok().filter(|&e| e != ABSENT);
        let entry = entry.ok_or(io::ErrorKind::FileTooLarge)?;
        write_bytes(&*self.file, start + whole, &self.shape.footer).await?;
        let data = start + map_len(block);
        self.file.write_zeroes(data, block.into(), true).await?;
        if self.parent.is_some() {
            self.complete(index, data).await?;
        }
        let sectors = u64::from(block) / SECTOR;
        let mut map = vec![0; map_len(block) as usize];
        map[..sectors.div_ceil(8) as usize].fill(0xff);
        write_bytes(&*self.file, start, &map).await?;
        self.file.flush().await?;
        self.end.set(start + whole);
        let place = table + u64::from(index) * 4;
        write_bytes(&*self.file, place, &entry.to_be_bytes()).await?;
        let mut table = self.table.borrow_mut();
        let slot = table.get_mut(index as usize);
        *slot.ok_or_else(|| corrupt("a block beyond the table"))? = entry;
        self.full.borrow_mut().insert(index);
        Ok(())
    }

    /// Gives the sectors of a block that were not written their content: the parent's, or zeroes. The block's data goes to
    /// `data`.
    async fn complete(&self, index: u32, data: u64) -> io::Result<()> {
        let begin = u64::from(index) * self.block();
        let mut at = begin;
        while at < begin + self.block() {
            let (part, run) = self.part(at, (begin + self.block() - at).min(COPY)).await?;
            let to = data + (at - begin);
            match (part, &self.parent) {
                (Part::At(_), _) => {}
                (Part::Absent, Some(parent)) => {
                    let memory = Pinned::zeroed(run as usize);
                    read_or_zeroes(&**parent, at, memory.clone()).await?;
                    self.file.write(to, memory, false).await?;
                }
                _ => self.file.write_zeroes(to, run, false).await?,
            }
            at += run;
        }
        Ok(())
    }

    /// Prepares the blocks of a range; a range of one that is there already needs no lock to write.
    async fn write_range(&self, at: u64, from: Pinned) -> io::Result<()> {
        if !self.write {
            return Err(read_only_error());
        }
        let len = from.len() as u64;
        let mut done = 0;
        while done < len {
            let here = at + done;
            let index = (here / self.block()) as u32;
            let ready = match self.shape.kind {
                Kind::Fixed => true,
                Kind::Dynamic { .. } => self.full.borrow().contains(&index),
            };
            if !ready {
                let lock = self.locks.lock(index.into(), u64::from(index) + 1, true);
                let _lock = lock.await;
                self.prepare(index).await?;
            }
            let (part, run) = self.part(here, len - done).await?;
            let Part::At(host) = part else {
                return Err(corrupt("a block that was prepared is not there"));
            };
            let from = from.slice(done as usize, run as usize);
            self.file.write(host, from, false).await?;
            done += run;
        }
        Ok(())
    }
}

/// Bytes of the map of sectors in front of a block, in whole sectors.
fn map_len(block: u32) -> u64 {
    (u64::from(block) / SECTOR)
        .div_ceil(8)
        .next_multiple_of(SECTOR)
}

impl Layer for Vhd {
    fn size(&self) -> u64 {
        self.shape.size
    }

    fn traits(&self) -> Traits {
        let below = self.file.traits();
        let granularity = match self.shape.kind {
            Kind::Fixed => below.granularity,
            Kind::Dynamic { block, .. } => block,
        };
        Traits {
            granularity,
            read_only: !self.write,
            discards: below.discards,
            write_cache: true,
        }
    }

    fn read<'a>(&'a self, at: u64, into: Pinned) -> Answer<'a> {
        Box::pin(async move {
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
        })
    }

    fn write<'a>(&'a self, at: u64, from: Pinned, durable: bool) -> Answer<'a> {
        Box::pin(async move {
            self.write_range(at, from).await?;
            if durable || !self.file.traits().write_cache {
                self.file.flush().await?;
            }
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> Answer<'a> {
        if self.write {
            self.file.flush()
        } else {
            Box::pin(async { Ok(()) })
        }
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> Answer<'a> {
        if self.parent.is_some() {
            // Zeroes would take space that the parent's content does not.
            return Box::pin(async move {
                if self.write {
                    Ok(())
                } else {
                    Err(read_only_error())
                }
            });
        }
        self.write_zeroes(at, len, true)
    }

    fn write_zeroes<'a>(&'a self, at: u64, len: u64, unmap: bool) -> Answer<'a> {
        Box::pin(async move {
            if !self.write {
                return Err(read_only_error());
            }
            let mut done = 0;
            while done < len {
                let here = at + done;
                let (part, run) = self.part(here, len - done).await?;
                match part {
                    Part::At(host) => self.file.write_zeroes(host, run, unmap).await?,
                    Part::Absent if self.parent.is_some() => {
                        let index = (here / self.block()) as u32;
                        let lock = self.locks.lock(index.into(), u64::from(index) + 1, true);
                        let _lock = lock.await;
                        self.prepare(index).await?;
                        continue;
                    }
                    Part::Absent | Part::Zero => {}
                }
                done += run;
            }
            Ok(())
        })
    }

    fn extent<'a>(&'a self, at: u64, len: u64) -> Answer<'a, Extent> {
        Box::pin(async move {
            let (part, run) = self.part(at, len).await?;
            if let Part::At(host) = part {
                let stored = self.file.extent(host, run).await?;
                return Ok(Extent {
                    len: stored.len.min(run),
                    ..stored
                });
            }
            let content = match (part, &self.parent) {
                (Part::Absent, Some(parent)) if at < parent.size() => Content::Absent,
                _ => Content::Zero,
            };
            Ok(Extent { len: run, content })
        })
    }

    fn resize<'a>(&'a self, _: u64) -> Answer<'a> {
        Box::pin(async {
            Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a VHD keeps its size; convert it to another format",
            ))
        })
    }

    fn identity(&self) -> Option<Guid> {
        self.shape.footer.get(68..84)?.try_into().ok()
    }
}
