//! A file in memory, which can record what is done to it, and what of it a power cut may leave.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
};

use caisson_memory::Pinned;

use super::{Attempts, fault::random};
use crate::{
    layer::Traits,
    runtime::{Call, LocalFuture, local::yield_now},
};

/// The unit of memory, in bytes.
const PAGE: u64 = 4096;

/// The longest file, in bytes: more is a full disk.
const MAX_LEN: u64 = 1 << 46;

/// Bytes by offset, of which only pages that were written are there.
#[derive(Clone, Default)]
struct Sparse {
    pages: BTreeMap<u64, Box<[u8]>>,
    len: u64,
}

impl Sparse {
    fn write(&mut self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let here = at + done as u64;
            let offset = (here % PAGE) as usize;
            let n = (bytes.len() - done).min(PAGE as usize - offset);
            let page = self
                .pages
                .entry(here / PAGE)
                .or_insert_with(|| vec![0; PAGE as usize].into());
            page[offset..offset + n].copy_from_slice(&bytes[done..done + n]);
            done += n;
        }
        self.len = self.len.max(at + bytes.len() as u64);
    }

    fn read(&self, at: u64, bytes: &mut [u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let here = at + done as u64;
            let offset = (here % PAGE) as usize;
            let n = (bytes.len() - done).min(PAGE as usize - offset);
            match self.pages.get(&(here / PAGE)) {
                Some(page) => bytes[done..done + n].copy_from_slice(&page[offset..offset + n]),
                None => bytes[done..done + n].fill(0),
            }
            done += n;
        }
    }

    fn zero(&mut self, at: u64, end: u64) {
        if at >= end {
            return;
        }
        let pages: Vec<u64> = self
            .pages
            .range(at / PAGE..end.div_ceil(PAGE))
            .map(|(number, _)| *number)
            .collect();
        for number in pages {
            let (first, last) = (number * PAGE, (number + 1) * PAGE);
            if at <= first && last <= end {
                self.pages.remove(&number);
            } else if let Some(page) = self.pages.get_mut(&number) {
                let from = at.saturating_sub(first) as usize;
                let to = (end.min(last) - first) as usize;
                page[from..to].fill(0);
            }
        }
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len);
        }
        self.len = len;
    }

    fn apply(&mut self, entry: &LogEntry) {
        match entry {
            LogEntry::Write { at, bytes } => self.write(*at, bytes),
            LogEntry::Zero { at, len, extend } => {
                let end = at.saturating_add(*len);
                self.zero(*at, end.min(self.len));
                if *extend {
                    self.len = self.len.max(end);
                }
            }
            LogEntry::Resize { len } => self.set_len(*len),
        }
    }
}

/// A change of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogEntry {
    /// Bytes were written.
    Write {
        /// Where.
        at: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// A range was zeroed or given back.
    Zero {
        /// Where.
        at: u64,
        /// How many bytes.
        len: u64,
        /// Whether it made the file longer.
        extend: bool,
    },
    /// The length was set.
    Resize {
        /// Bytes.
        len: u64,
    },
}

/// What was done to a file since the recording began.
#[derive(Clone, Default)]
pub struct Recording {
    start: Sparse,
    /// Each change, and the tick at which its caller was told of its end.
    changes: Vec<(LogEntry, Option<u64>)>,
    /// Flushes that ended: after how many changes, and from which tick on a change is not covered.
    flushes: Vec<(usize, u64)>,
}

#[derive(Default)]
struct State {
    content: Sparse,
    recording: Option<Recording>,
    tick: u64,
    reads: u64,
}

/// A file in memory.
#[derive(Default)]
pub struct MemoryFile {
    state: RefCell<State>,
    /// Where calls take turns by chance, as on a real disk; `None` for not at all.
    shuffle: Cell<Option<u64>>,
}

impl MemoryFile {
    /// A file with this content.
    pub fn new(content: &[u8]) -> Self {
        let file = Self::default();
        file.state.borrow_mut().content.write(0, content);
        file
    }

    /// Has calls overtake each other by chance.
    #[must_use]
    pub fn shuffled(self, seed: u64) -> Self {
        self.shuffle.set(Some(seed));
        self
    }

    /// Begins to record.
    pub fn record(&self) {
        let mut state = self.state.borrow_mut();
        state.recording = Some(Recording {
            start: state.content.clone(),
            ..Recording::default()
        });
    }

    /// What was recorded so far.
    pub fn recording(&self) -> Recording {
        self.state.borrow().recording.clone().unwrap_or_default()
    }

    /// How many changes were recorded so far.
    pub fn changes(&self) -> usize {
        let state = self.state.borrow();
        state.recording.as_ref().map_or(0, |r| r.changes.len())
    }

    /// How many reads there were.
    pub fn reads(&self) -> u64 {
        self.state.borrow().reads
    }

    /// All bytes.
    pub fn content(&self) -> Vec<u8> {
        let state = self.state.borrow();
        let mut bytes = vec![0; state.content.len as usize];
        state.content.read(0, &mut bytes);
        bytes
    }

    async fn maybe_yield(&self) {
        let Some(mut seed) = self.shuffle.get() else {
            return;
        };
        let turns = random(&mut seed) % 4;
        self.shuffle.set(Some(seed));
        for _ in 0..turns {
            yield_now().await;
        }
    }

    /// Makes a change; its number in the recording.
    fn change(&self, entry: LogEntry) -> Option<usize> {
        let mut state = self.state.borrow_mut();
        state.content.apply(&entry);
        let recording = state.recording.as_mut()?;
        recording.changes.push((entry, None));
        Some(recording.changes.len() - 1)
    }

    /// The change's caller is about to be told.
    fn acknowledge(&self, change: Option<usize>) {
        let mut state = self.state.borrow_mut();
        state.tick += 1;
        let tick = state.tick;
        if let (Some(recording), Some(change)) = (&mut state.recording, change)
            && let Some((_, acknowledged)) = recording.changes.get_mut(change)
        {
            *acknowledged = Some(tick);
        }
    }

    async fn perform(&self, call: Call, memory: Pinned) -> io::Result<usize> {
        let full = || io::Error::from_raw_os_error(libc::EFBIG);
        let within = |at: u64, len: u64| {
            at.checked_add(len)
                .filter(|end| *end <= MAX_LEN)
                .ok_or_else(full)
        };
        let asked = {
            let mut state = self.state.borrow_mut();
            state.tick += 1;
            state.tick
        };
        self.maybe_yield().await;
        match call {
            Call::Read { at } => {
                let n = {
                    let mut state = self.state.borrow_mut();
                    state.reads += 1;
                    let there = state.content.len.saturating_sub(at);
                    let n = (memory.len() as u64).min(there) as usize;
                    let mut bytes = vec![0; n];
                    state.content.read(at, &mut bytes);
                    memory.write(0, &bytes);
                    n
                };
                self.maybe_yield().await;
                Ok(n)
            }
            Call::Write { at, durable } => {
                within(at, memory.len() as u64)?;
                let bytes = memory.to_vec();
                let change = self.change(LogEntry::Write { at, bytes });
                self.maybe_yield().await;
                self.acknowledge(change);
                if durable {
                    self.synchronised(u64::MAX, change);
                }
                Ok(memory.len())
            }
            Call::Sync => {
                self.synchronised(asked, None);
                self.maybe_yield().await;
                Ok(0)
            }
            Call::Punch { at, len } | Call::Zero { at, len } => {
                within(at, len)?;
                let extend = matches!(call, Call::Zero { .. });
                let change = self.change(LogEntry::Zero { at, len, extend });
                self.maybe_yield().await;
                self.acknowledge(change);
                Ok(0)
            }
        }
    }

    /// Notes a flush that was asked for at tick `asked`; or, for a durable write, only that change.
    fn synchronised(&self, asked: u64, only: Option<usize>) {
        let mut state = self.state.borrow_mut();
        if let Some(recording) = &mut state.recording {
            match only {
                Some(change) => {
                    // As if it had been acknowledged before a flush of its own.
                    if let Some((_, acknowledged)) = recording.changes.get_mut(change) {
                        *acknowledged = Some(0);
                    }
                    recording.flushes.push((recording.changes.len(), 1));
                }
                None => recording.flushes.push((recording.changes.len(), asked)),
            }
        }
    }
}

impl Attempts for MemoryFile {
    fn attempt<'a>(&'a self, call: Call, memory: Pinned) -> LocalFuture<'a, io::Result<usize>> {
        Box::pin(self.perform(call, memory))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.state.borrow().content.len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > MAX_LEN {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let change = self.change(LogEntry::Resize { len });
        self.acknowledge(change);
        Ok(())
    }

    fn stored(&self, at: u64, len: u64) -> io::Result<(u64, bool)> {
        let state = self.state.borrow();
        let here = at / PAGE;
        let stored = state.content.pages.contains_key(&here);
        let end = if stored {
            (here + 1) * PAGE
        } else {
            let next = state.content.pages.range(here..).next();
            next.map_or(u64::MAX, |(number, _)| number * PAGE)
        };
        Ok((len.min(end - at), stored))
    }

    fn traits(&self) -> Traits {
        Traits {
            granularity: 4096,
            read_only: false,
            discards: true,
            write_cache: true,
        }
    }
}

impl Recording {
    /// How many changes there are.
    pub fn changes(&self) -> usize {
        self.changes.len()
    }

    /// What a power cut after the first `count` changes may leave: what flushes cover is there, and any part of the
    /// rest in any order, writes torn at multiples of 512 bytes.
    pub fn crash(&self, count: usize) -> CrashImages<'_> {
        let covered_before = self
            .flushes
            .iter()
            .filter(|(changes, _)| *changes <= count)
            .map(|(_, asked)| *asked)
            .max()
            .unwrap_or(0);
        CrashImages {
            recording: self,
            count,
            covered_before,
        }
    }
}

/// What may be left.
pub struct CrashImages<'a> {
    recording: &'a Recording,
    count: usize,
    covered_before: u64,
}

impl CrashImages<'_> {
    fn is_covered(&self, change: &(LogEntry, Option<u64>)) -> bool {
        // A length is set in the file system's own tables, which keep their order.
        matches!(change.0, LogEntry::Resize { .. })
            || change.1.is_some_and(|tick| tick < self.covered_before)
    }

    fn image(&self, mut kept: impl FnMut(usize) -> Kept) -> MemoryFile {
        let mut content = self.recording.start.clone();
        for (number, change) in self.recording.changes.iter().take(self.count).enumerate() {
            if self.is_covered(change) {
                content.apply(&change.0);
                continue;
            }
            match (kept(number), &change.0) {
                (Kept::All, entry) => content.apply(entry),
                (Kept::Nothing, _) => {}
                (Kept::Sectors(seed), LogEntry::Write { at, bytes }) => {
                    let mut seed = seed;
                    let mut done = 0;
                    while done < bytes.len() {
                        let to_edge = 512 - ((*at + done as u64) % 512) as usize;
                        let n = to_edge.min(bytes.len() - done);
                        if random(&mut seed) & 1 == 1 {
                            content.write(*at + done as u64, &bytes[done..done + n]);
                        }
                        done += n;
                    }
                }
                (Kept::Sectors(_), entry) => content.apply(entry),
            }
        }
        let file = MemoryFile::default();
        file.state.borrow_mut().content = content;
        file
    }

    /// Nothing that was not flushed is there.
    pub fn least(&self) -> MemoryFile {
        self.image(|_| Kept::Nothing)
    }

    /// Everything is there.
    pub fn most(&self) -> MemoryFile {
        self.image(|_| Kept::All)
    }

    /// Everything is there but this change.
    pub fn without(&self, number: usize) -> MemoryFile {
        self.image(|n| {
            if n == number {
                Kept::Nothing
            } else {
                Kept::All
            }
        })
    }

    /// Nothing that was not flushed is there but this change.
    pub fn only(&self, number: usize) -> MemoryFile {
        self.image(|n| {
            if n == number {
                Kept::All
            } else {
                Kept::Nothing
            }
        })
    }

    /// Which changes are not covered by a flush.
    pub fn loose(&self) -> Vec<usize> {
        let changes = self.recording.changes.iter().take(self.count).enumerate();
        changes
            .filter(|(_, change)| !self.is_covered(change))
            .map(|(number, _)| number)
            .collect()
    }

    /// Each change is there, torn or missing by chance.
    pub fn by_chance(&self, seed: u64) -> MemoryFile {
        let mut state = seed;
        self.image(|_| {
            let chance = random(&mut state);
            match chance % 4 {
                0 => Kept::Nothing,
                1 => Kept::Sectors(chance),
                _ => Kept::All,
            }
        })
    }
}

enum Kept {
    All,
    Nothing,
    /// Some sectors, by this seed.
    Sectors(u64),
}
