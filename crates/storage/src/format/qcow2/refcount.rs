//! Refcounts: which clusters of the file are in use, and handing out those that are not.
//!
//! Clusters are *reserved* in runs: their refcounts are raised and made durable before the first of them is used. So a
//! crash leaves clusters that are counted and not used (leaks), never the other way round. What was reserved and not
//! used is given back when the image is closed.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashSet, VecDeque},
    io,
    rc::Rc,
};

use super::header::{Header, be64};
use crate::{
    error::corrupt,
    layer::{Layer, read_bytes, write_bytes},
    runtime::local::{Turnstile, yield_now},
};

/// How much is reserved at once, in bytes, if a single request does not need more.
const RESERVE: u64 = 32 << 20;
/// The most clusters that are reserved at once.
const RESERVE_CLUSTERS: u64 = 4096;
/// Host offsets are below this.
pub(super) const MAX_OFFSET: u64 = 1 << 56;

/// A block of refcounts.
struct Block {
    offset: u64,
    bytes: Vec<u8>,
    /// Which bytes differ from the file's.
    dirty: Option<(usize, usize)>,
}

/// A run of clusters that may be used.
#[derive(Clone, Copy)]
struct Run {
    first: u64,
    count: u64,
}

/// Refcounts of an image that is written to.
pub(super) struct Refcounts {
    file: Rc<dyn Layer>,
    cluster_bits: u32,
    order: u32,
    max: u64,
    per_block: u64,
    /// Offsets of blocks.
    table: RefCell<Vec<u64>>,
    blocks: RefCell<BTreeMap<u64, Block>>,
    pool: RefCell<VecDeque<Run>>,
    /// No cluster before it is free.
    hint: Cell<u64>,
    /// Clusters from here on were never written to.
    virgin: Cell<u64>,
    /// Clusters of tables, which no data may ever be in.
    metadata: RefCell<HashSet<u64>>,
    /// Of those, which were made for refcounts since the image was opened.
    made: RefCell<HashSet<u64>>,
    reserving: Turnstile,
    writing: Turnstile,
}

/// Reads the refcount `index` of a block.
pub(super) fn get(bytes: &[u8], order: u32, index: u64) -> u64 {
    let index = index as usize;
    match order {
        0..=2 => {
            let per_byte = 8 >> order;
            let byte = bytes.get(index / per_byte).copied().unwrap_or(0);
            let shift = (index % per_byte) << order;
            u64::from(byte >> shift) & ((1 << (1 << order)) - 1)
        }
        3 => bytes.get(index).copied().unwrap_or(0).into(),
        4 => bytes
            .get(index * 2..index * 2 + 2)
            .and_then(|b| b.try_into().ok())
            .map_or(0, |b| u16::from_be_bytes(b).into()),
        5 => bytes
            .get(index * 4..index * 4 + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, |b| u32::from_be_bytes(b).into()),
        _ => be64(bytes, index * 8),
    }
}

/// Sets the refcount `index` of a block; which bytes that changed.
pub(super) fn set(bytes: &mut [u8], order: u32, index: u64, value: u64) -> (usize, usize) {
    let index = index as usize;
    match order {
        0..=2 => {
            let per_byte = 8 >> order;
            let shift = (index % per_byte) << order;
            let mask = (((1u16 << (1 << order)) - 1) as u8) << shift;
            let at = index / per_byte;
            bytes[at] = bytes[at] & !mask | (value as u8) << shift;
            (at, at + 1)
        }
        _ => {
            let width = 1 << (order - 3);
            let at = index * width;
            bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
            (at, at + width)
        }
    }
}

impl Refcounts {
    /// Reads the table of blocks. `metadata` are the clusters of other tables.
    pub(super) async fn load(
        file: Rc<dyn Layer>,
        header: &Header,
        metadata: HashSet<u64>,
    ) -> io::Result<Self> {
        let len = (u64::from(header.refcount_table_clusters) << header.cluster_bits) as usize;
        let bytes = read_bytes(&*file, header.refcount_table_offset, len).await?;
        let table: Vec<u64> = (0..len / 8).map(|i| be64(&bytes, i * 8)).collect();
        let mut metadata = metadata;
        for &offset in table.iter().filter(|&&offset| offset != 0) {
            if !offset.is_multiple_of(header.cluster()) || offset >= file.size() {
                return Err(corrupt(format!("a refcount block is at {offset:#x}")));
            }
            if !metadata.insert(offset >> header.cluster_bits) {
                return Err(corrupt(format!(
                    "the refcount block at {offset:#x} is something else too"
                )));
            }
        }
        let virgin = file.size().div_ceil(header.cluster());
        Ok(Self {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            max: header.refcount_max(),
            per_block: header.refcounts_per_block(),
            table: RefCell::new(table),
            blocks: RefCell::default(),
            pool: RefCell::default(),
            hint: Cell::new(0),
            virgin: Cell::new(virgin),
            metadata: RefCell::new(metadata),
            made: RefCell::default(),
            reserving: Turnstile::default(),
            writing: Turnstile::default(),
            file,
        })
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether the cluster at host offset `host` is a table's.
    pub(super) fn is_metadata(&self, host: u64) -> bool {
        self.metadata
            .borrow()
            .contains(&(host >> self.cluster_bits))
    }

    /// The cluster at `host` becomes, or is no more, a table's.
    pub(super) fn mark_metadata(&self, host: u64, is: bool) {
        let number = host >> self.cluster_bits;
        let mut metadata = self.metadata.borrow_mut();
        if is {
            metadata.insert(number);
        } else {
            metadata.remove(&number);
        }
    }

    /// Loads the block of cluster `number`; whether there is one.
    async fn load_block(&self, number: u64) -> io::Result<bool> {
        let index = number / self.per_block;
        if self.blocks.borrow().contains_key(&index) {
            return Ok(true);
        }
        let offset = self.table.borrow().get(index as usize).copied();
        let Some(offset) = offset.filter(|&offset| offset != 0) else {
            return Ok(false);
        };
        let bytes = read_bytes(&*self.file, offset, self.cluster() as usize).await?;
        // Somebody else may have been faster.
        self.blocks.borrow_mut().entry(index).or_insert(Block {
            offset,
            bytes,
            dirty: None,
        });
        Ok(true)
    }

    /// The refcount of cluster `number`.
    pub(super) async fn get(&self, number: u64) -> io::Result<u64> {
        if !self.load_block(number).await? {
            return Ok(0);
        }
        Ok(self.peek(number))
    }

    /// The same of a block that is loaded.
    fn peek(&self, number: u64) -> u64 {
        let blocks = self.blocks.borrow();
        let block = blocks.get(&(number / self.per_block));
        block.map_or(0, |b| get(&b.bytes, self.order, number % self.per_block))
    }

    fn poke(&self, number: u64, value: u64) {
        let mut blocks = self.blocks.borrow_mut();
        if let Some(block) = blocks.get_mut(&(number / self.per_block)) {
            let within = number % self.per_block;
            let (from, to) = set(&mut block.bytes, self.order, within, value);
            block.dirty = Some(match block.dirty {
                Some((a, b)) => (a.min(from), b.max(to)),
                None => (from, to),
            });
        }
    }

    /// Changes the refcount of cluster `number` in memory by `by`; the new one. There must be a block.
    pub(super) async fn add(&self, number: u64, by: i64) -> io::Result<u64> {
        if !self.load_block(number).await? {
            return Err(corrupt(format!("cluster {number} has no refcount")));
        }
        let old = self.peek(number);
        let new = old
            .checked_add_signed(by)
            .filter(|&new| new <= self.max)
            .ok_or_else(|| corrupt(format!("cluster {number} has the refcount {old}")))?;
        self.poke(number, new);
        if new == 0 {
            self.hint.set(self.hint.get().min(number));
        }
        Ok(new)
    }

    /// Sets a refcount, making a block for it where there is none.
    pub(super) async fn force(&self, number: u64, value: u64) -> io::Result<()> {
        if value > self.max {
            return Err(corrupt(format!(
                "cluster {number} is used {value} times, more than its refcount can count"
            )));
        }
        if !self.load_block(number).await? {
            if value == 0 {
                return Ok(());
            }
            self.make_block(number / self.per_block).await?;
        }
        self.poke(number, value);
        Ok(())
    }

    /// Takes up to `count` clusters in one run: offset of the first, how many, and whether they were never written to
    /// (so that they read as zeroes).
    pub(super) async fn take(&self, count: u64) -> io::Result<(u64, u64, bool)> {
        loop {
            if let Some(taken) = self.take_reserved(count) {
                return Ok(taken);
            }
            let _turn = self.reserving.pass().await;
            if self.pool.borrow().is_empty() {
                self.reserve(count).await?;
            }
        }
    }

    fn take_reserved(&self, count: u64) -> Option<(u64, u64, bool)> {
        let mut pool = self.pool.borrow_mut();
        let run = pool.front_mut()?;
        let (first, virgin) = (run.first, run.first >= self.virgin.get());
        let mut taken = run.count.min(count.max(1));
        if !virgin && first + taken > self.virgin.get() {
            // One answer for all of them.
            taken = self.virgin.get() - first;
        }
        run.first += taken;
        run.count -= taken;
        if run.count == 0 {
            pool.pop_front();
        }
        if virgin {
            self.virgin.set(first + taken);
        }
        Some((first << self.cluster_bits, taken, virgin))
    }

    /// Takes exactly `count` clusters in one run, for a table. Durable as [`Refcounts::take`]'s.
    pub(super) async fn take_run(&self, count: u64) -> io::Result<u64> {
        let _turn = self.reserving.pass().await;
        if count >= self.per_block / 2 {
            return self.take_fresh(count).await;
        }
        let mut first = self.hint.get().max(1);
        let mut found = 0;
        while found < count {
            if first + count >= MAX_OFFSET >> self.cluster_bits {
                return Err(io::ErrorKind::StorageFull.into());
            }
            // The block of refcounts may itself take a cluster of the run, so it is made before the cluster is looked at.
            if !self.load_block(first + found).await? {
                self.make_block((first + found) / self.per_block).await?;
            }
            if self.is_free(first + found).await? {
                found += 1;
            } else {
                first += found + 1;
                found = 0;
            }
        }
        for number in first..first + count {
            self.force(number, 1).await?;
        }
        self.write_dirty().await?;
        self.file.flush().await?;
        self.virgin.set(self.virgin.get().max(first + count));
        Ok(first << self.cluster_bits)
    }

    /// A run of which blocks of refcounts would be in the way: at the end of the file, after the blocks that count it.
    async fn take_fresh(&self, count: u64) -> io::Result<u64> {
        let blocks = self.blocks_before(count);
        let place = || {
            let end = self.file.size().div_ceil(self.cluster());
            end.max(self.counted_end()).div_ceil(self.per_block)
        };
        if place() + blocks > self.table.borrow().len() as u64 {
            self.grow_table(place() + blocks - 1).await?;
        }
        let index = place();
        let start = index * self.per_block;
        if start + blocks + count >= MAX_OFFSET >> self.cluster_bits
            || index + blocks > self.table.borrow().len() as u64
        {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let made = self.write_blocks(index, blocks, blocks + count).await?;
        self.file.flush().await?;
        for (index, offset, _) in &made {
            self.table.borrow_mut()[*index as usize] = *offset;
        }
        for (n, (index, _, _)) in made.iter().enumerate() {
            if let Err(error) = self.write_table_entry(*index).await {
                // Those that were not written are not there; no block has been used yet.
                for (index, _, _) in &made[n..] {
                    self.table.borrow_mut()[*index as usize] = 0;
                }
                return Err(error);
            }
        }
        self.know_blocks(made, start, blocks, start + blocks + count);
        Ok((start + blocks) << self.cluster_bits)
    }

    /// How many blocks count themselves and `count` clusters after them.
    fn blocks_before(&self, count: u64) -> u64 {
        let mut blocks = 1;
        while (blocks + count).div_ceil(self.per_block) > blocks {
            blocks += 1;
        }
        blocks
    }

    /// Writes `blocks` blocks from that of `index` on to the clusters that the first of them begins with; they count
    /// `total` clusters, themselves among them.
    async fn write_blocks(
        &self,
        index: u64,
        blocks: u64,
        total: u64,
    ) -> io::Result<Vec<(u64, u64, Vec<u8>)>> {
        let mut made = Vec::new();
        for n in 0..blocks {
            let offset = (index * self.per_block + n) << self.cluster_bits;
            let mut bytes = vec![0; self.cluster() as usize];
            let counted = total.saturating_sub(n * self.per_block).min(self.per_block);
            for within in 0..counted {
                set(&mut bytes, self.order, within, 1);
            }
            write_bytes(&*self.file, offset, &bytes).await?;
            made.push((index + n, offset, bytes));
        }
        Ok(made)
    }

    /// Notes blocks that are in the file, the first `tables` clusters from `start` on as tables, and that everything up to
    /// `end` was written to.
    fn know_blocks(&self, made: Vec<(u64, u64, Vec<u8>)>, start: u64, tables: u64, end: u64) {
        self.virgin.set(self.virgin.get().max(end));
        self.metadata.borrow_mut().extend(start..start + tables);
        self.made.borrow_mut().extend(start..start + tables);
        let mut map = self.blocks.borrow_mut();
        for (index, offset, bytes) in made {
            let dirty = None;
            map.insert(
                index,
                Block {
                    offset,
                    bytes,
                    dirty,
                },
            );
        }
    }

    /// Gives back clusters that were taken and never pointed to.
    pub(super) fn give_back(&self, host: u64, count: u64) {
        self.pool.borrow_mut().push_back(Run {
            first: host >> self.cluster_bits,
            count,
        });
    }

    async fn is_free(&self, number: u64) -> io::Result<bool> {
        Ok(!self.metadata.borrow().contains(&number) && self.get(number).await? == 0)
    }

    async fn reserve(&self, count: u64) -> io::Result<()> {
        let target = count.max((RESERVE >> self.cluster_bits).clamp(1, RESERVE_CLUSTERS));
        let limit = MAX_OFFSET >> self.cluster_bits;
        let begin = self.hint.get();
        let mut number = begin.max(1);
        let mut runs: Vec<Run> = Vec::new();
        let (mut found, mut looked) = (0, 0u64);
        while found < target {
            if number >= limit {
                return Err(io::ErrorKind::StorageFull.into());
            }
            if !self.load_block(number).await? {
                // The reservation ends here, or begins with a new block.
                if found > 0 {
                    break;
                }
                self.make_block(number / self.per_block).await?;
            }
            if self.is_free(number).await? {
                match runs.last_mut() {
                    Some(run) if run.first + run.count == number => run.count += 1,
                    _ => runs.push(Run {
                        first: number,
                        count: 1,
                    }),
                }
                found += 1;
            }
            number += 1;
            looked += 1;
            if looked.is_multiple_of(1 << 16) {
                yield_now().await;
            }
        }
        for run in &runs {
            for number in run.first..run.first + run.count {
                self.poke(number, 1);
            }
        }
        let durable = match self.write_dirty().await {
            Ok(()) => self.file.flush().await,
            failed => failed,
        };
        if let Err(error) = durable {
            // Nobody has them; in the file they may count as used, which is a leak at most.
            for run in &runs {
                for number in run.first..run.first + run.count {
                    self.poke(number, 0);
                }
            }
            return Err(error);
        }
        // Unless something before that was freed meanwhile.
        if self.hint.get() >= begin {
            self.hint.set(number);
        }
        self.pool.borrow_mut().extend(runs);
        Ok(())
    }

    /// Makes the block number `index`. Its cluster is one that it counts itself. Durable before it is used.
    async fn make_block(&self, index: u64) -> io::Result<()> {
        self.make_block_beside(index, &|_| false).await
    }

    /// Makes a block for cluster `number` in an image whose refcounts are wrong: clusters that are `used` are left alone,
    /// counted or not.
    pub(super) async fn make_block_for(
        &self,
        number: u64,
        used: &dyn Fn(u64) -> bool,
    ) -> io::Result<()> {
        self.make_block_beside(number / self.per_block, used).await
    }

    /// Whether the cluster became a table of refcounts since the image was opened.
    pub(super) fn is_made(&self, number: u64) -> bool {
        self.made.borrow().contains(&number)
    }

    async fn make_block_beside(&self, index: u64, used: &dyn Fn(u64) -> bool) -> io::Result<()> {
        if index >= self.table.borrow().len() as u64 {
            self.grow_table(index).await?;
        }
        if self.table.borrow()[index as usize] != 0 {
            return Ok(());
        }
        let first = index * self.per_block;
        let within = (0..self.per_block)
            .find(|n| {
                let number = first + n;
                number != 0 && !self.metadata.borrow().contains(&number) && !used(number)
            })
            .ok_or_else(|| {
                corrupt(format!(
                    "the refcounts of clusters {first} to {} are missing and all of them are in use",
                    first + self.per_block - 1
                ))
            })?;
        let mut bytes = vec![0; self.cluster() as usize];
        set(&mut bytes, self.order, within, 1);
        let offset = (first + within) << self.cluster_bits;
        write_bytes(&*self.file, offset, &bytes).await?;
        self.file.flush().await?;
        self.table.borrow_mut()[index as usize] = offset;
        if let Err(error) = self.write_table_entry(index).await {
            self.table.borrow_mut()[index as usize] = 0;
            return Err(error);
        }
        self.virgin.set(self.virgin.get().max(first + within + 1));
        self.metadata.borrow_mut().insert(first + within);
        self.made.borrow_mut().insert(first + within);
        let dirty = None;
        self.blocks.borrow_mut().insert(
            index,
            Block {
                offset,
                bytes,
                dirty,
            },
        );
        Ok(())
    }

    async fn write_table_entry(&self, index: u64) -> io::Result<()> {
        let (offset, entry) = {
            let header = read_bytes(&*self.file, 48, 8).await?;
            let table = self.table.borrow();
            (be64(&header, 0), table[index as usize])
        };
        write_bytes(&*self.file, offset + index * 8, &entry.to_be_bytes()).await?;
        self.file.flush().await
    }

    /// Makes the table long enough for block `index`: a new table at the end of the file, and blocks that count it.
    async fn grow_table(&self, index: u64) -> io::Result<()> {
        let entries_per_cluster = self.cluster() / 8;
        let old_len = self.table.borrow().len() as u64;
        let end = self.file.size().div_ceil(self.cluster());
        let last_block = old_len.max(index + 1).max(end / self.per_block + 1);
        // The new table lies in a range of its own, which blocks that begin it count.
        let start = last_block * self.per_block;
        let mut blocks = 1;
        let (clusters, total) = loop {
            let entries = (last_block + blocks).max(old_len * 3 / 2);
            let clusters = entries.div_ceil(entries_per_cluster);
            if (blocks + clusters).div_ceil(self.per_block) <= blocks {
                break (clusters, blocks + clusters);
            }
            blocks += 1;
        };
        if clusters << self.cluster_bits > (8 << 20).max(self.cluster())
            || clusters > u64::from(u32::MAX)
        {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if start + total >= MAX_OFFSET >> self.cluster_bits {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut table = self.table.borrow().clone();
        table.resize((clusters * entries_per_cluster) as usize, 0);
        let made = self.write_blocks(last_block, blocks, total).await?;
        for (index, offset, _) in &made {
            table[*index as usize] = *offset;
        }
        let table_at = (start + blocks) << self.cluster_bits;
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        write_bytes(&*self.file, table_at, &bytes).await?;
        self.file.flush().await?;
        let old = read_bytes(&*self.file, 48, 12).await?;
        let mut field = table_at.to_be_bytes().to_vec();
        field.extend((clusters as u32).to_be_bytes());
        write_bytes(&*self.file, 48, &field).await?;
        self.file.flush().await?;
        *self.table.borrow_mut() = table;
        self.know_blocks(made, start, total, start + total);
        // The old table is not pointed to any more.
        let (old_at, old_clusters) = (
            be64(&old, 0) >> self.cluster_bits,
            super::header::be32(&old, 8),
        );
        for number in old_at..old_at + u64::from(old_clusters) {
            self.metadata.borrow_mut().remove(&number);
            if self.load_block(number).await? && self.peek(number) > 0 {
                self.poke(number, self.peek(number) - 1);
            }
        }
        Ok(())
    }

    /// Writes the blocks that were changed. Such a write is never wrong: counts are lowered only when nothing points to
    /// the cluster any more.
    pub(super) async fn write_dirty(&self) -> io::Result<()> {
        let _turn = self.writing.pass().await;
        let dirty: Vec<u64> = {
            let blocks = self.blocks.borrow();
            let dirty = blocks.iter().filter(|(_, block)| block.dirty.is_some());
            dirty.map(|(index, _)| *index).collect()
        };
        for index in dirty {
            let part = {
                let mut blocks = self.blocks.borrow_mut();
                let Some(block) = blocks.get_mut(&index) else {
                    continue;
                };
                block.dirty.take().map(|(from, to)| {
                    let (from, to) = (from / 512 * 512, to.next_multiple_of(512));
                    let to = to.min(block.bytes.len());
                    (block.offset, from, block.bytes[from..to].to_vec())
                })
            };
            let Some((offset, from, bytes)) = part else {
                continue;
            };
            if let Err(error) = write_bytes(&*self.file, offset + from as u64, &bytes).await {
                if let Some(block) = self.blocks.borrow_mut().get_mut(&index) {
                    block.dirty = Some((0, block.bytes.len()));
                }
                return Err(error);
            }
        }
        Ok(())
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.blocks.borrow().values().any(|b| b.dirty.is_some())
    }

    /// Gives back what was reserved and not used.
    pub(super) async fn release(&self) -> io::Result<()> {
        let runs = std::mem::take(&mut *self.pool.borrow_mut());
        for run in runs {
            for number in run.first..run.first + run.count {
                self.add(number, -1).await?;
            }
        }
        self.write_dirty().await
    }
}

/// What a check looks at.
impl Refcounts {
    /// Where the blocks are.
    pub(super) fn block_offsets(&self) -> Vec<u64> {
        let table = self.table.borrow();
        table
            .iter()
            .copied()
            .filter(|&offset| offset != 0)
            .collect()
    }

    /// One after the last cluster that a block counts.
    pub(super) fn counted_end(&self) -> u64 {
        let table = self.table.borrow();
        let last = table.iter().rposition(|&offset| offset != 0);
        last.map_or(0, |index| (index as u64 + 1) * self.per_block)
    }

    /// Whether there is a block for cluster `number`.
    pub(super) fn has_block(&self, number: u64) -> bool {
        let table = self.table.borrow();
        let offset = table.get((number / self.per_block) as usize);
        offset.is_some_and(|&offset| offset != 0)
    }

    /// The first cluster of the block after that of `number`.
    pub(super) fn next_block(&self, number: u64) -> u64 {
        (number / self.per_block + 1) * self.per_block
    }
}
