//! A throw-away layer: it takes all writes, and is gone with the disk.
//!
//! What is written lies at its own offset in a sparse store, in memory or in a file without a name. A set of blocks says
//! what is there.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    path::Path,
    rc::Rc,
};

use caisson_memory::Pinned;

use crate::{
    OpenError,
    file::{FileLayer, HostFile, MemoryFile},
    layer::{Answer, Content, Extent, Layer, Traits},
    open::{Ephemeral, read_or_zeroes},
    runtime::{Runtime, local::RangeLocks},
};

/// The unit in which the layer takes content over, in bytes.
const BLOCK: u64 = 4096;

/// Blocks in one part of the set.
const CHUNK: u64 = 1 << 15;

/// A set of blocks of which long stretches are alike.
#[derive(Default)]
struct Blocks {
    chunks: RefCell<HashMap<u64, Box<[u64]>>>,
}

impl Blocks {
    fn insert(&self, first: u64, end: u64) {
        let mut chunks = self.chunks.borrow_mut();
        let mut block = first;
        while block < end {
            let chunk = chunks
                .entry(block / CHUNK)
                .or_insert_with(|| vec![0; (CHUNK / 64) as usize].into());
            let within = block % CHUNK;
            let bits = (64 - within % 64).min(end - block);
            let mask = if bits == 64 {
                u64::MAX
            } else {
                ((1 << bits) - 1) << (within % 64)
            };
            chunk[(within / 64) as usize] |= mask;
            block += bits;
        }
    }

    /// Whether `first` is in the set, and how many blocks up to `end` are alike.
    fn run(&self, first: u64, end: u64) -> (bool, u64) {
        let chunks = self.chunks.borrow();
        let present = |block: u64| {
            chunks
                .get(&(block / CHUNK))
                .map(|chunk| chunk[(block % CHUNK / 64) as usize] >> (block % 64) & 1 == 1)
        };
        let is = present(first).unwrap_or(false);
        let mut block = first;
        while block < end {
            match present(block) {
                // A whole chunk that is not there.
                None if !is => block = (block / CHUNK + 1) * CHUNK,
                found if found.unwrap_or(false) == is => block += 1,
                _ => break,
            }
        }
        (is, block.min(end) - first)
    }
}

/// The layer over another.
pub struct Overlay {
    below: Rc<dyn Layer>,
    store: Rc<dyn Layer>,
    blocks: Blocks,
    locks: RangeLocks,
    size: Cell<u64>,
}

/// Puts a throw-away layer over `below`.
pub(crate) fn over(
    runtime: &Runtime,
    below: Rc<dyn Layer>,
    place: &Ephemeral,
) -> Result<Rc<dyn Layer>, OpenError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Io { path, source }
    };
    let store: Rc<dyn Layer> = match place {
        Ephemeral::Memory => {
            let file = FileLayer::new(MemoryFile::default(), None);
            Rc::new(file.map_err(failed(Path::new("memory")))?)
        }
        Ephemeral::Folder(folder) => {
            let file = HostFile::unnamed(runtime, folder)?;
            Rc::new(FileLayer::new(file, None).map_err(failed(folder))?)
        }
    };
    Ok(Rc::new(Overlay::new(below, store)))
}

impl Overlay {
    /// A layer over `below` with its content in `store`, which is empty.
    pub fn new(below: Rc<dyn Layer>, store: Rc<dyn Layer>) -> Self {
        Self {
            size: Cell::new(below.size()),
            below,
            store,
            blocks: Blocks::default(),
            locks: RangeLocks::default(),
        }
    }

    /// Takes the rest of a block over that is written in part.
    async fn fill(&self, block: u64) -> std::io::Result<()> {
        if self.blocks.run(block, block + 1).0 {
            return Ok(());
        }
        let memory = Pinned::zeroed(BLOCK as usize);
        let there = self.size.get().saturating_sub(block * BLOCK).min(BLOCK);
        let part = memory.slice(0, there as usize);
        read_or_zeroes(&*self.below, block * BLOCK, part).await?;
        self.store.write(block * BLOCK, memory, false).await?;
        self.blocks.insert(block, block + 1);
        Ok(())
    }

    /// Prepares the first and last block of a range that begins or ends within them.
    async fn fill_edges(&self, at: u64, end: u64) -> std::io::Result<()> {
        if !at.is_multiple_of(BLOCK) {
            self.fill(at / BLOCK).await?;
        }
        if !end.is_multiple_of(BLOCK) && end < self.size.get() {
            self.fill(end / BLOCK).await?;
        }
        Ok(())
    }

    fn lock(&self, at: u64, end: u64) -> crate::runtime::local::Acquire<'_> {
        let exclusive = !at.is_multiple_of(BLOCK) || !end.is_multiple_of(BLOCK);
        self.locks.lock(at / BLOCK, end.div_ceil(BLOCK), exclusive)
    }
}

impl Layer for Overlay {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn traits(&self) -> Traits {
        Traits {
            granularity: BLOCK as u32,
            read_only: false,
            discards: true,
            write_cache: true,
        }
    }

    fn read<'a>(&'a self, at: u64, into: Pinned) -> Answer<'a> {
        Box::pin(async move {
            let end = at + into.len() as u64;
            let _lock = self
                .locks
                .lock(at / BLOCK, end.div_ceil(BLOCK), false)
                .await;
            let mut here = at;
            while here < end {
                let (present, blocks) = self.blocks.run(here / BLOCK, end.div_ceil(BLOCK));
                let stop = ((here / BLOCK + blocks) * BLOCK).min(end);
                let part = into.slice((here - at) as usize, (stop - here) as usize);
                if present {
                    self.store.read(here, part).await?;
                } else {
                    read_or_zeroes(&*self.below, here, part).await?;
                }
                here = stop;
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, at: u64, from: Pinned, _: bool) -> Answer<'a> {
        Box::pin(async move {
            let end = at + from.len() as u64;
            let _lock = self.lock(at, end).await;
            self.fill_edges(at, end).await?;
            self.store.write(at, from, false).await?;
            self.blocks.insert(at / BLOCK, end.div_ceil(BLOCK));
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> Answer<'a> {
        // Nothing of it is to survive anything.
        Box::pin(async { Ok(()) })
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> Answer<'a> {
        let (first, end) = (at.next_multiple_of(BLOCK), (at + len) / BLOCK * BLOCK);
        Box::pin(async move {
            if first < end {
                self.write_zeroes(first, end - first, true).await?;
            }
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, at: u64, len: u64, _: bool) -> Answer<'a> {
        Box::pin(async move {
            let end = at + len;
            let _lock = self.lock(at, end).await;
            self.fill_edges(at, end).await?;
            let stored = self.store.size().saturating_sub(at).min(len);
            if stored > 0 {
                self.store.write_zeroes(at, stored, true).await?;
            }
            self.blocks.insert(at / BLOCK, end.div_ceil(BLOCK));
            Ok(())
        })
    }

    fn extent<'a>(&'a self, at: u64, len: u64) -> Answer<'a, Extent> {
        Box::pin(async move {
            let end = (at + len).div_ceil(BLOCK);
            let (present, blocks) = self.blocks.run(at / BLOCK, end);
            let len = ((at / BLOCK + blocks) * BLOCK - at).min(len);
            if present {
                let stored = self.store.extent(at, len).await?;
                return Ok(Extent {
                    len: stored.len.min(len),
                    ..stored
                });
            }
            if at >= self.below.size() {
                let content = Content::Zero;
                return Ok(Extent { len, content });
            }
            self.below.extent(at, len.min(self.below.size() - at)).await
        })
    }

    fn resize<'a>(&'a self, size: u64) -> Answer<'a> {
        Box::pin(async move {
            let old = self.size.get();
            if size < old {
                // What is cut off must not come back when it grows again.
                self.write_zeroes(size, old - size, true).await?;
            } else if size > old && old < self.below.size() {
                let hidden = size.min(self.below.size()) - old;
                self.size.set(size);
                self.write_zeroes(old, hidden, true).await?;
            }
            self.size.set(size);
            Ok(())
        })
    }
}
