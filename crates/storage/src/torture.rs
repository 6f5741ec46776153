//! Power cuts at every moment.
//!
//! Random operations run on an image in memory that records what reaches it. Then, for every prefix of that record and
//! for many of the orders in which a disk may have written what no flush covers, the image is opened: it must open, a
//! check must find leaks at most, and each sector must have a value that it may have: the last one that was flushed, or a
//! later one.

use std::{cell::RefCell, rc::Rc};

use caisson_memory::Pinned;

use crate::{
    Layer,
    file::{FileLayer, MemoryFile, SeededFaults},
    format::{
        Format, FormatError, Opener,
        qcow2::{self, Qcow2},
        raw::Raw,
        vhd::{self, Vhd},
        vhdx::{self, Vhdx},
    },
    runtime::{EngineKind, LocalFuture, Runtime, local::join_all},
};

const SECTOR: u64 = 512;
/// Sectors that lie one after the other in a format of blocks.
const GROUP: u64 = 8;
/// From one group to the next, in sectors: about three in a block of 1 MiB.
const SPREAD: u64 = 700;

/// What to torture.
#[derive(Clone, Copy, Debug)]
pub struct Torture {
    /// Same seed, same run.
    pub seed: u64,
    /// Of the image: qcow2, VHD or VHDX.
    pub format: Format,
    /// Bytes of a cluster of qcow2 or a block of VHDX.
    pub cluster: u32,
    /// Version of qcow2.
    pub version: u32,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// Whether there is a backing file.
    pub backing: bool,
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Rounds of up to eight operations at once.
    pub rounds: u32,
    /// How many images are tried at each cut, besides that with the least and that with the most.
    pub images: u32,
}

impl Torture {
    /// A run whose shape depends on the seed.
    pub fn by_seed(seed: u64) -> Self {
        let mut state = seed;
        let mut pick = |n: u64| random(&mut state) % n;
        let version = if pick(4) == 0 { 2 } else { 3 };
        Self {
            seed,
            format: Format::Qcow2,
            cluster: 512 << pick(4),
            version,
            refcount_bits: if version == 2 { 16 } else { 1 << pick(7) },
            backing: pick(2) == 0,
            sectors: 64 + pick(1024),
            rounds: 12,
            images: 3,
        }
    }

    /// The same for a format of blocks: VHD or VHDX.
    pub fn of_blocks(format: Format, seed: u64) -> Self {
        let qcow2 = Self::by_seed(seed);
        Self {
            format,
            cluster: 1 << 20,
            sectors: 32 + qcow2.sectors % 64,
            rounds: 8,
            images: 2,
            ..qcow2
        }
    }

    /// Where sector `number` of those that are used is on the disk. Blocks are large: there are a few sectors in each.
    fn place(&self, number: u64) -> u64 {
        match self.format {
            Format::Qcow2 => number * SECTOR,
            _ => (number / GROUP * SPREAD + number % GROUP) * SECTOR,
        }
    }

    /// Size of the disk in bytes.
    fn size(&self) -> u64 {
        self.place(self.sectors - 1) + SECTOR
    }

    /// How many of `len` sectors from `from` on lie one after the other.
    fn together(&self, from: u64, len: u64) -> u64 {
        match self.format {
            Format::Qcow2 => len,
            _ => len.min(GROUP - from % GROUP),
        }
    }

    /// The values of the sectors that are used; `None` for one that is torn.
    async fn values(&self, disk: &dyn Layer) -> std::io::Result<Vec<Option<u64>>> {
        let mut values = Vec::new();
        let mut number = 0;
        while number < self.sectors {
            let run = self.together(number, self.sectors - number);
            let memory = Pinned::zeroed((run * SECTOR) as usize);
            disk.read(self.place(number), memory.clone()).await?;
            let value = |bytes: &[u8]| {
                let first = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
                (sector(first)[..] == *bytes).then_some(first)
            };
            let bytes = memory.to_vec();
            values.extend(bytes.chunks_exact(SECTOR as usize).map(value));
            number += run;
        }
        Ok(values)
    }

    async fn create(&self, image: &Rc<dyn Layer>, base: &Base) -> Result<(), String> {
        let id = base.0.as_ref().and_then(|base| base.identity());
        match self.format {
            Format::Vhdx => {
                let options = vhdx::CreateOptions {
                    block: self.cluster,
                    parent: id.map(|id| ("base".to_owned(), id)),
                    ..vhdx::CreateOptions::new(self.size())
                };
                vhdx::create(image, &options).await.map_err(told)
            }
            Format::Vhd => {
                let path = "base".to_owned();
                let parent = id.map(|id| vhd::Parent { id, path });
                let made = vhd::create(image, self.size(), true, parent.as_ref()).await;
                made.map_err(told)
            }
            _ => {
                let options = qcow2::CreateOptions {
                    cluster: self.cluster,
                    version: self.version,
                    refcount_bits: self.refcount_bits,
                    backing: self.backing.then(|| ("base".to_owned(), Format::Raw)),
                    ..qcow2::CreateOptions::new(self.size())
                };
                qcow2::create(image, &options).await.map_err(told)
            }
        }
    }

    async fn open(
        &self,
        image: Rc<dyn Layer>,
        write: bool,
        base: &Base,
    ) -> Result<Rc<dyn Layer>, String> {
        Ok(match self.format {
            Format::Vhdx => Rc::new(Vhdx::open(image, write, base).await.map_err(told)?),
            Format::Vhd => Rc::new(Vhd::open(image, write, base).await.map_err(told)?),
            _ => Rc::new(Qcow2::open(image, write, base).await.map_err(told)?),
        })
    }

    /// Checks the tables; how many clusters leaked. The other formats are checked by being opened.
    async fn check(&self, image: Rc<dyn Layer>) -> Result<u64, String> {
        match self.format {
            Format::Vhdx => Vhdx::open_tables(image).await.map(|_| 0).map_err(told),
            Format::Vhd => Vhd::open_tables(image).await.map(|_| 0).map_err(told),
            _ => {
                let tables = Qcow2::open_tables(image).await.map_err(told)?;
                let report = tables.check(false).await.map_err(told)?;
                if report.corruptions > 0 {
                    return Err(first_of(&report.messages));
                }
                Ok(report.leaks)
            }
        }
    }
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Places at which the power was cut.
    pub cuts: u64,
    /// Images that were opened and read.
    pub images: u64,
    /// Clusters that leaked in all of them.
    pub leaks: u64,
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A change of a sector.
#[derive(Clone, Copy)]
struct Change {
    /// What it holds then; `None` for zero or what it was.
    value: Option<u64>,
    /// How many changes the file had seen when it was asked for.
    asked: usize,
    /// The moment when it was completed.
    completed: Option<u64>,
}

/// A flush that was completed.
struct Flush {
    /// The moment when it was asked for.
    asked: u64,
    /// How many changes the file had seen when it was completed.
    completed: usize,
}

#[derive(Default)]
struct Model {
    moment: u64,
    sectors: Vec<Vec<Change>>,
    flushes: Vec<Flush>,
}

impl Model {
    fn tick(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// Whether sector `number` may hold `value` after a cut at `cut` changes.
    fn allows(&self, number: usize, value: u64, cut: usize) -> bool {
        let covered = self
            .flushes
            .iter()
            .filter(|flush| flush.completed <= cut)
            .map(|flush| flush.asked)
            .max()
            .unwrap_or(0);
        let history = &self.sectors[number];
        let sure = history
            .iter()
            .rposition(|change| change.completed.is_some_and(|at| at < covered))
            .unwrap_or(0);
        let possible = |index: usize| {
            let change = &history[index];
            index == sure || change.asked <= cut
        };
        (sure..history.len()).any(|index| possible(index) && self.value_at(number, index, value))
    }

    fn value_at(&self, number: usize, index: usize, value: u64) -> bool {
        match self.sectors[number][index].value {
            Some(is) => is == value,
            None => value == 0 || index > 0 && self.value_at(number, index - 1, value),
        }
    }
}

/// The backing file of a run.
struct Base(Option<Rc<dyn Layer>>);

impl Opener for Base {
    fn open<'a>(
        &'a self,
        _: &'a str,
        _: Option<Format>,
    ) -> LocalFuture<'a, Result<Rc<dyn Layer>, FormatError>> {
        let base = self.0.clone();
        let missing = || FormatError::Refused("there is no base".into());
        Box::pin(async move { base.ok_or_else(missing) })
    }
}

fn sector(value: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn layer(file: MemoryFile) -> Result<Rc<FileLayer<MemoryFile>>, String> {
    FileLayer::new(file, None).map(Rc::new).map_err(told)
}

fn told(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Somebody else who looks at an image.
pub type Watch<'a> = &'a mut dyn FnMut(&MemoryFile) -> Result<(), String>;

fn first_of(messages: &[String]) -> String {
    messages
        .iter()
        .find(|m| !m.contains("leak"))
        .cloned()
        .unwrap_or_default()
}

impl Torture {
    /// Runs.
    ///
    /// # Errors
    /// What went wrong, and where.
    pub fn run(&self) -> Result<Tally, String> {
        self.run_watched(&mut |_| Ok(()))
    }

    /// Runs, and shows `watch` each image that a cut left, before it is opened.
    ///
    /// # Errors
    /// What went wrong, and where; also what `watch` says.
    pub fn run_watched(&self, watch: Watch<'_>) -> Result<Tally, String> {
        let runtime = Runtime::new(EngineKind::Threads).map_err(told)?;
        runtime
            .block_on(self.run_in(watch))
            .map_err(|why| format!("{self:?}: {why}"))
    }

    async fn run_in(&self, watch: Watch<'_>) -> Result<Tally, String> {
        let base = self.base().await?;
        let file = layer(MemoryFile::default().shuffled(self.seed))?;
        let image: Rc<dyn Layer> = file.clone();
        self.create(&image, &base).await?;
        file.file().record();
        let disk = self.open(image, true, &base).await?;
        let model = RefCell::new(Model::default());
        for number in 0..self.sectors {
            model.borrow_mut().sectors.push(vec![Change {
                value: Some(self.base_value(number)),
                asked: 0,
                completed: Some(0),
            }]);
        }
        let mut state = self.seed ^ 0x5eed;
        for _ in 0..self.rounds {
            self.round(&*disk, &model, &file, &mut state).await?;
        }
        let close = random(&mut state) & 1 == 0;
        if close {
            disk.close().await.map_err(told)?;
        }
        let seen = self.values(&*disk).await.map_err(told)?;
        let recording = file.file().recording();
        let last = recording.changes();
        let model = model.into_inner();
        self.compare(&model, &seen, last, "without a cut")?;
        drop(disk);

        let mut tally = Tally::default();
        for cut in 0..=last {
            tally.cuts += 1;
            let crash = recording.crash(cut);
            let mut images = vec![
                (crash.least(), "least".to_owned()),
                (crash.most(), "most".to_owned()),
            ];
            let loose = crash.loose();
            for n in 0..self.images {
                let chance = random(&mut state);
                let (image, name) = match loose.get(chance as usize % (loose.len() + 1)) {
                    Some(&number) if n % 3 == 0 => (crash.only(number), format!("only {number}")),
                    Some(&number) if n % 3 == 1 => {
                        (crash.without(number), format!("without {number}"))
                    }
                    _ => (crash.by_chance(chance), format!("by chance {chance}")),
                };
                images.push((image, name));
            }
            for (image, name) in images {
                let place = format!("cut at {cut} of {last}, {name}");
                watch(&image).map_err(|why| format!("{place}: {why}"))?;
                let leaks = self.survive(image, &base, &model, cut, &place).await;
                tally.leaks += leaks.map_err(|why| format!("{place}: {why}"))?;
                tally.images += 1;
            }
        }
        Ok(tally)
    }

    async fn base(&self) -> Result<Base, String> {
        if !self.backing {
            return Ok(Base(None));
        }
        if self.format != Format::Qcow2 {
            // An image in the same format, which is complete.
            let file: Rc<dyn Layer> = layer(MemoryFile::default())?;
            self.create(&file, &Base(None)).await?;
            let disk = self.open(file.clone(), true, &Base(None)).await?;
            for number in 0..self.base_sectors() {
                let memory = Pinned::copy_of(&sector(self.base_value(number)));
                let written = disk.write(self.place(number), memory, false).await;
                written.map_err(told)?;
            }
            disk.close().await.map_err(told)?;
            return Ok(Base(Some(self.open(file, false, &Base(None)).await?)));
        }
        // Shorter than the disk, and not by whole clusters.
        let mut bytes = Vec::new();
        for number in 0..self.base_sectors() {
            bytes.extend(sector(self.base_value(number)));
        }
        let file = layer(MemoryFile::new(&bytes))?;
        Ok(Base(Some(Rc::new(Raw::new(file, false)))))
    }

    fn base_sectors(&self) -> u64 {
        self.sectors * 3 / 4 + 1
    }

    fn base_value(&self, number: u64) -> u64 {
        if self.backing && number < self.base_sectors() {
            1 << 40 | number
        } else {
            0
        }
    }

    /// Some operations at once, on sectors of their own.
    async fn round(
        &self,
        disk: &dyn Layer,
        model: &RefCell<Model>,
        file: &FileLayer<MemoryFile>,
        state: &mut u64,
    ) -> Result<(), String> {
        let count = 1 + random(state) % 8;
        let share = (self.sectors / count).max(1);
        let mut operations: Vec<LocalFuture<'_, Result<(), String>>> = Vec::new();
        for n in 0..count {
            let kind = random(state) % 16;
            let first = n * share;
            if first >= self.sectors {
                break;
            }
            let end = (first + share).min(self.sectors);
            let from = first + random(state) % (end - first);
            let len = self.together(from, 1 + random(state) % (end - from).min(40));
            operations.push(Box::pin(async move {
                if kind < 3 {
                    let asked = model.borrow_mut().tick();
                    disk.flush().await.map_err(told)?;
                    let completed = file.file().changes();
                    model.borrow_mut().flushes.push(Flush { asked, completed });
                    return Ok(());
                }
                let (value, memory) = {
                    let mut model = model.borrow_mut();
                    let moment = model.tick();
                    let value = match kind {
                        3 | 4 => None,
                        5 | 6 => Some(0),
                        _ => Some(2 << 40 | moment),
                    };
                    let asked = file.file().changes();
                    for number in from..from + len {
                        model.sectors[number as usize].push(Change {
                            value,
                            asked,
                            completed: None,
                        });
                    }
                    let bytes = sector(value.unwrap_or(0)).repeat(len as usize);
                    (value, Pinned::copy_of(&bytes))
                };
                let (at, bytes) = (self.place(from), len * SECTOR);
                match (kind, value) {
                    (3 | 4, _) => disk.discard(at, bytes).await,
                    (5 | 6, _) => disk.write_zeroes(at, bytes, kind == 5).await,
                    _ => disk.write(at, memory, false).await,
                }
                .map_err(told)?;
                let mut model = model.borrow_mut();
                let moment = model.tick();
                for number in from..from + len {
                    if let Some(change) = model.sectors[number as usize].last_mut() {
                        change.completed = Some(moment);
                    }
                }
                Ok(())
            }));
        }
        join_all(operations).await.into_iter().collect()
    }

    fn compare(
        &self,
        model: &Model,
        seen: &[Option<u64>],
        cut: usize,
        place: &str,
    ) -> Result<(), String> {
        for (number, value) in seen.iter().enumerate() {
            let fine = value.is_some_and(|value| model.allows(number, value, cut));
            if !fine {
                return Err(format!("{place}: sector {number} holds {value:x?}"));
            }
        }
        Ok(())
    }

    /// Opens what a cut left; how many clusters leaked.
    async fn survive(
        &self,
        image: MemoryFile,
        base: &Base,
        model: &Model,
        cut: usize,
        place: &str,
    ) -> Result<u64, String> {
        let file: Rc<dyn Layer> = layer(image)?;
        let leaks = self.check(file.clone()).await?;
        let disk = self.open(file.clone(), true, base).await?;
        let seen = self.values(&*disk).await.map_err(told)?;
        self.compare(model, &seen, cut, place)?;
        // Life goes on: nothing that was there is touched by what is written next.
        let number = cut as u64 % self.sectors;
        let memory = Pinned::copy_of(&sector(3 << 40));
        disk.write(self.place(number), memory, false)
            .await
            .map_err(told)?;
        disk.close().await.map_err(told)?;
        let after = self.values(&*disk).await.map_err(told)?;
        for (n, (before, after)) in seen.iter().zip(&after).enumerate() {
            let expected = if n as u64 == number {
                Some(3 << 40)
            } else {
                *before
            };
            if *after != expected {
                return Err(format!("sector {n} changed from {before:x?} to {after:x?}"));
            }
        }
        let checked = self.check(file).await;
        checked.map_err(|why| format!("after a write: {why}"))?;
        Ok(leaks)
    }

    /// Runs operations while calls of the file fail, end early or are interrupted: nothing panics, nothing that was
    /// flushed is lost, and the tables stay sound.
    ///
    /// # Errors
    /// What went wrong, and where.
    pub fn run_with_faults(&self, errno: i32) -> Result<(), String> {
        let runtime = Runtime::new(EngineKind::Threads).map_err(told)?;
        let run = self.faults_in(errno);
        runtime
            .block_on(run)
            .map_err(|why| format!("{self:?} with error {errno}: {why}"))
    }

    async fn faults_in(&self, errno: i32) -> Result<(), String> {
        let base = self.base().await?;
        let content = {
            let file = layer(MemoryFile::default())?;
            let image: Rc<dyn Layer> = file.clone();
            self.create(&image, &base).await?;
            file.file().content()
        };
        let mut faults = SeededFaults::new(self.seed);
        faults.short = 100_000;
        faults.interrupted = 50_000;
        faults.failing = (8_000, errno);
        let file = MemoryFile::new(&content).shuffled(self.seed);
        let file = FileLayer::new(file, Some(Rc::new(faults))).map_err(told)?;
        let file = Rc::new(file);
        let disk = match self.open(file.clone(), true, &base).await {
            Ok(disk) => disk,
            // The fault came at once.
            Err(_) => return Ok(()),
        };
        let mut state = self.seed ^ 0xfa17;
        let mut sure: Vec<Option<u64>> = (0..self.sectors)
            .map(|n| Some(self.base_value(n)))
            .collect();
        let mut pending: Vec<(u64, u64)> = Vec::new();
        for n in 0..u64::from(self.rounds) * 4 {
            let number = random(&mut state) % self.sectors;
            let value = 4 << 40 | n;
            let memory = Pinned::copy_of(&sector(value));
            match disk.write(self.place(number), memory, false).await {
                Ok(()) => pending.push((number, value)),
                // It may hold either.
                Err(_) => {
                    pending.retain(|(at, _)| *at != number);
                    sure[number as usize] = None;
                }
            }
            if n % 5 == 0 && disk.flush().await.is_ok() {
                for (number, value) in pending.drain(..) {
                    sure[number as usize] = Some(value);
                }
            }
        }
        for (number, _) in pending {
            sure[number as usize] = None;
        }
        drop(disk);
        let file: Rc<dyn Layer> = layer(MemoryFile::new(&file.file().content()))?;
        self.check(file.clone()).await?;
        let disk = self.open(file, true, &base).await?;
        for (number, (seen, sure)) in self
            .values(&*disk)
            .await
            .map_err(told)?
            .iter()
            .zip(&sure)
            .enumerate()
        {
            if sure.is_some() && seen != sure {
                return Err(format!("sector {number} holds {seen:x?}, not {sure:x?}"));
            }
        }
        Ok(())
    }
}
