//! L2 tables in memory, in slices of 4 KiB.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    io,
    rc::Rc,
};

use super::{
    Freed, Qcow2,
    entry::{Mapping, OFFSET},
    header::{Header, be64},
    is_own,
};
use crate::{
    error::corrupt,
    layer::{read_bytes, write_bytes},
    runtime::local::RangeLocks,
};

/// Bytes of slices that are kept if none of them is dirty: enough for 256 GiB of a disk with clusters of 64 KiB.
const BUDGET: usize = 32 << 20;

/// A part of an L2 table.
pub(super) struct Slice {
    /// Where it is in the file.
    pub(super) offset: u64,
    pub(super) words: RefCell<Vec<u64>>,
    pub(super) dirty: Cell<bool>,
    used: Cell<bool>,
}

impl Slice {
    /// Its bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let words = self.words.borrow();
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }
}

/// All slices that are in memory.
pub(super) struct Tables {
    pub(super) slice_len: usize,
    words_per_entry: usize,
    slices: RefCell<HashMap<u64, Rc<Slice>>>,
    /// In the order in which they are looked at when there are too many.
    clock: RefCell<VecDeque<u64>>,
    loading: RangeLocks,
}

impl Tables {
    pub(super) fn new(header: &Header) -> Self {
        Self {
            slice_len: header.cluster().min(4096) as usize,
            words_per_entry: (header.entry_size() / 8) as usize,
            slices: RefCell::default(),
            clock: RefCell::default(),
            loading: RangeLocks::default(),
        }
    }

    fn entries_per_slice(&self) -> u64 {
        (self.slice_len / 8 / self.words_per_entry) as u64
    }

    fn cached(&self, offset: u64) -> Option<Rc<Slice>> {
        let slice = self.slices.borrow().get(&offset)?.clone();
        slice.used.set(true);
        Some(slice)
    }

    fn insert(&self, slice: Rc<Slice>) {
        let mut slices = self.slices.borrow_mut();
        let mut clock = self.clock.borrow_mut();
        clock.push_back(slice.offset);
        slices.insert(slice.offset, slice);
        let mut looks = clock.len() * 2;
        while slices.len() * self.slice_len > BUDGET && looks > 0 {
            looks -= 1;
            let Some(offset) = clock.pop_front() else {
                return;
            };
            match slices.get(&offset) {
                None => {}
                // In use, or not written yet.
                Some(slice) if slice.dirty.get() || Rc::strong_count(slice) > 1 => {
                    clock.push_back(offset);
                }
                Some(slice) if slice.used.replace(false) => clock.push_back(offset),
                Some(_) => {
                    slices.remove(&offset);
                }
            }
        }
    }

    /// The slices that must be written.
    pub(super) fn dirty(&self) -> Vec<Rc<Slice>> {
        let slices = self.slices.borrow();
        let dirty = slices.values().filter(|slice| slice.dirty.get());
        dirty.cloned().collect()
    }

    /// Whether so much is dirty that it should be written.
    pub(super) fn crowded(&self) -> bool {
        let slices = self.slices.borrow();
        slices.len() * self.slice_len > BUDGET
            && slices.values().filter(|s| s.dirty.get()).count() * self.slice_len > BUDGET / 2
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.slices.borrow_mut().clear();
        self.clock.borrow_mut().clear();
    }
}

impl Qcow2 {
    async fn slice(&self, offset: u64) -> io::Result<Rc<Slice>> {
        if let Some(slice) = self.tables.cached(offset) {
            return Ok(slice);
        }
        let _loading = self.tables.loading.lock(offset, offset + 1, true).await;
        if let Some(slice) = self.tables.cached(offset) {
            return Ok(slice);
        }
        let len = self.tables.slice_len;
        let bytes = read_bytes(&*self.file, offset, len).await?;
        let words = (0..len / 8).map(|i| be64(&bytes, i * 8)).collect();
        let slice = Rc::new(Slice {
            offset,
            words: RefCell::new(words),
            dirty: Cell::new(false),
            used: Cell::new(true),
        });
        self.tables.insert(slice.clone());
        Ok(slice)
    }

    /// Which L1 entry, and which entry of its table, the cluster at `at` has.
    fn place(&self, at: u64) -> (usize, u64) {
        let reach_bits = {
            let entries = self.cluster() / 8 / self.tables.words_per_entry as u64;
            self.cluster_bits + entries.trailing_zeros()
        };
        let index = (at >> reach_bits) as usize;
        let entry = (at & ((1 << reach_bits) - 1)) >> self.cluster_bits;
        (index, entry)
    }

    /// The slice with the entry of the cluster at `at`, and its number in it; `None` if there is no table.
    async fn slice_of(&self, at: u64) -> io::Result<Option<(Rc<Slice>, u64)>> {
        let (index, entry) = self.place(at);
        let l1 = self.l1.borrow().get(index).copied();
        let table = l1.ok_or_else(|| corrupt("an offset beyond the L1 table"))? & OFFSET;
        if table == 0 {
            return Ok(None);
        }
        let per_slice = self.tables.entries_per_slice();
        let offset = table + entry / per_slice * self.tables.slice_len as u64;
        Ok(Some((self.slice(offset).await?, entry % per_slice)))
    }

    /// What the image has from `at` on, for at most `len` bytes: the first cluster's mapping, and for how many bytes the
    /// next clusters go on like that.
    pub(super) async fn lookup(&self, at: u64, len: u64) -> io::Result<(Mapping, u64)> {
        let Some((slice, first)) = self.slice_of(at).await? else {
            // No table: nothing as far as it would reach.
            let mut left = self.table_end(at) - at;
            let (mut index, _) = self.place(at);
            let reach = self.table_end(0);
            while left < len {
                index += 1;
                if self.l1.borrow().get(index).is_none_or(|e| e & OFFSET != 0) {
                    break;
                }
                left += reach;
            }
            return Ok((Mapping::Absent, left.min(len)));
        };
        let words = slice.words.borrow();
        let header = self.header.borrow();
        let decode = |n: u64| {
            let at = n as usize * self.tables.words_per_entry;
            let bitmap = (self.tables.words_per_entry == 2).then(|| words[at + 1]);
            Mapping::decode(&header, words[at], bitmap).map_err(|e| self.damaged(e.to_string()))
        };
        let mapping = decode(first)?;
        self.check_target(&mapping)?;
        let cluster = self.cluster();
        let mut run = cluster - (at & (cluster - 1));
        let mut next = first + 1;
        while run < len && next < self.tables.entries_per_slice() {
            let done = (next - first) << self.cluster_bits;
            let follows = match (mapping, decode(next)?) {
                (Mapping::Absent, Mapping::Absent) => true,
                (Mapping::Zero { kept: None }, Mapping::Zero { kept: None }) => true,
                (Mapping::Data { host: a, copied: x }, Mapping::Data { host: b, copied: y }) => {
                    let follows = x == y && b == a + done;
                    if follows {
                        self.check_target(&Mapping::Data { host: b, copied: y })?;
                    }
                    follows
                }
                _ => false,
            };
            if !follows {
                break;
            }
            run += cluster;
            next += 1;
        }
        Ok((mapping, run.min(len)))
    }

    /// Refuses a mapping that points at a table.
    fn check_target(&self, mapping: &Mapping) -> io::Result<()> {
        let Some((host, len)) = mapping.range(self.cluster()) else {
            return Ok(());
        };
        let last = host + len - 1;
        let beyond = last >= super::refcount::MAX_OFFSET;
        let table = match &self.refcounts {
            // What is compressed begins and ends anywhere, and may lie in three clusters.
            Some(refcounts) => (host >> self.cluster_bits..=last >> self.cluster_bits)
                .any(|number| refcounts.is_metadata(number << self.cluster_bits)),
            None => host < self.cluster(),
        };
        if beyond || table {
            return Err(self.damaged(format!("an L2 entry points at {host:#x}, where a table is")));
        }
        Ok(())
    }

    /// Where the range of the table of `at` ends.
    pub(super) fn table_end(&self, at: u64) -> u64 {
        let entries = self.cluster() / 8 / self.tables.words_per_entry as u64;
        let reach = entries << self.cluster_bits;
        (at / reach + 1) * reach
    }

    /// Where the range of the slice of `at` ends.
    pub(super) fn slice_end(&self, at: u64) -> u64 {
        let reach = self.tables.entries_per_slice() << self.cluster_bits;
        (at / reach + 1) * reach
    }

    /// Whether there is a table for `at`.
    pub(super) fn has_table(&self, at: u64) -> bool {
        let (index, _) = self.place(at);
        self.l1.borrow().get(index).is_some_and(|e| e & OFFSET != 0)
    }

    /// Makes sure that the table of `at` may be changed: makes it, or copies one that snapshots use too.
    pub(super) async fn own_table(&self, at: u64) -> io::Result<()> {
        let (index, _) = self.place(at);
        let entry = |image: &Self| image.l1.borrow().get(index).copied();
        let missing = || corrupt("an offset beyond the L1 table");
        if is_own(entry(self).ok_or_else(missing)?) {
            return Ok(());
        }
        let _lock = self
            .l1_locks
            .lock(index as u64, index as u64 + 1, true)
            .await;
        let old = entry(self).ok_or_else(missing)?;
        if is_own(old) {
            return Ok(());
        }
        let refcounts = self.refcounts()?;
        let cluster = self.cluster() as usize;
        let bytes = match old & OFFSET {
            0 => vec![0; cluster],
            table => {
                let mut bytes = read_bytes(&*self.file, table, cluster).await?;
                // Whoever else uses the table uses the clusters too.
                for word in bytes.chunks_exact_mut(8) {
                    word[0] &= 0x7f;
                }
                bytes
            }
        };
        let (host, _, _) = refcounts.take(1).await?;
        // Also where there are zeroes already: the file must be so long before anything points there.
        if let Err(error) = write_bytes(&*self.file, host, &bytes).await {
            refcounts.give_back(host, 1);
            return Err(error);
        }
        refcounts.mark_metadata(host, true);
        self.l1.borrow_mut()[index] = host | super::COPIED;
        self.l1_dirty.borrow_mut().insert(index);
        if old & OFFSET != 0 {
            self.freed.borrow_mut().push(Freed {
                host: old & OFFSET,
                len: self.cluster(),
                table: true,
            });
        }
        Ok(())
    }

    /// Sets the entries of `count` clusters from the one at `at` on, all of one slice, to `entry(n)`; what they were.
    /// The table must be ours.
    pub(super) async fn set_entries(
        &self,
        at: u64,
        count: u64,
        entry: impl Fn(u64) -> u64,
    ) -> io::Result<()> {
        let Some((slice, first)) = self.slice_of(at).await? else {
            return Err(corrupt("an L2 table is gone"));
        };
        let mut words = slice.words.borrow_mut();
        for n in 0..count {
            let place = (first + n) as usize * self.tables.words_per_entry;
            match words.get_mut(place) {
                Some(word) => *word = entry(n),
                None => return Err(corrupt("a run leaves its slice")),
            }
        }
        slice.dirty.set(true);
        Ok(())
    }
}
