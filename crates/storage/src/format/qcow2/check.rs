//! Checking an image's tables against its refcounts, and repairing the latter.

use std::{collections::BTreeMap, io};

use super::{
    Qcow2,
    entry::{COPIED, Mapping, OFFSET},
    header::{CORRUPT, DIRTY, be64},
    refcount::Refcounts,
};
use crate::{
    error::corrupt,
    layer::{read_bytes, write_bytes},
    runtime::local::yield_now,
};

/// The most clusters of a file that is checked: the counts are in memory.
const MAX_CLUSTERS: u64 = 1 << 30;

/// The most problems that are told one by one.
const MAX_MESSAGES: usize = 100;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Things that are wrong and may destroy data when the image is written to.
    pub corruptions: u64,
    /// Clusters that are counted and not used: lost space.
    pub leaks: u64,
    /// How many of both were put right.
    pub repaired: u64,
    /// Clusters of the disk that have data.
    pub allocated_clusters: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Of those with data, how many are compressed.
    pub compressed_clusters: u64,
    /// The first problems, one line each.
    pub messages: Vec<String>,
}

impl CheckReport {
    fn corruption(&mut self, message: String) {
        self.corruptions += 1;
        self.say(message);
    }

    fn say(&mut self, message: String) {
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(message);
        }
    }
}

/// How often each cluster is used.
struct Uses {
    counts: Vec<u32>,
    cluster_bits: u32,
}

impl Uses {
    fn of(&self, number: u64) -> u64 {
        let count = self.counts.get(number as usize).copied();
        count.unwrap_or(0).into()
    }

    /// Counts a range `times` times; `false` if it is not within the file.
    fn count(&mut self, host: u64, len: u64, times: u32) -> bool {
        let first = host >> self.cluster_bits;
        let last = host.saturating_add(len.max(1) - 1) >> self.cluster_bits;
        if last >= self.counts.len() as u64 {
            return false;
        }
        for count in &mut self.counts[first as usize..=last as usize] {
            *count = count.saturating_add(times);
        }
        true
    }
}

impl Qcow2 {
    /// Checks all tables. With `repair`, refcounts and the flags that depend on them are put right; what tables point to
    /// is not.
    ///
    /// # Errors
    /// The host's, or a file that is too long.
    pub async fn check(&self, repair: bool) -> io::Result<CheckReport> {
        let header = self.header();
        let refcounts = self.refcounts()?;
        let mut report = CheckReport {
            total_clusters: header.size.div_ceil(header.cluster()),
            ..CheckReport::default()
        };
        let clusters = self.file.size().div_ceil(self.cluster());
        if clusters > MAX_CLUSTERS {
            return Err(corrupt("the file has too many clusters to be checked"));
        }
        let mut uses = Uses {
            counts: vec![0; clusters as usize],
            cluster_bits: self.cluster_bits,
        };
        let mut fixed = |what: &str, offset: u64, len: u64| {
            if len > 0 && !uses.count(offset, len, 1) {
                report.corruption(format!(
                    "the {what} at {offset:#x} is beyond the file's end"
                ));
            }
        };
        fixed("header", 0, 1);
        let table = u64::from(header.refcount_table_clusters) << self.cluster_bits;
        fixed("refcount table", header.refcount_table_offset, table);
        for block in refcounts.block_offsets() {
            fixed("refcount block", block, self.cluster());
        }
        let snapshots = self.snapshots().await?;
        let len = self.snapshot_table_len().await?;
        fixed("snapshot table", header.snapshots_offset, len);
        let active = self.l1.borrow().clone();
        let l1_len = u64::from(header.l1_entries) * 8;
        fixed("L1 table", header.l1_offset, l1_len);
        // Snapshots share tables: each is looked at once, and counts as often as it is used.
        let mut tables: BTreeMap<u64, (u32, bool)> = BTreeMap::new();
        let mut add = |l1: &[u64], active: bool| {
            for table in l1.iter().map(|entry| entry & OFFSET).filter(|&t| t != 0) {
                let uses = tables.entry(table).or_default();
                uses.0 = uses.0.saturating_add(1);
                uses.1 |= active;
            }
        };
        add(&active, true);
        for snapshot in &snapshots {
            let len = u64::from(snapshot.l1_entries) * 8;
            let first = (snapshot.l1_offset >> self.cluster_bits) as usize;
            let taken = uses.counts.get(first).is_some_and(|&count| count > 0);
            if len > 0 && (taken || !uses.count(snapshot.l1_offset, len, 1)) {
                report.corruption(format!("snapshot {} has no L1 table", snapshot.id));
                continue;
            }
            let entries = snapshot.l1_entries as usize;
            add(&self.read_table(snapshot.l1_offset, entries).await?, false);
        }
        for (table, (times, active)) in tables {
            self.count_table(table, times, active, &mut uses, &mut report)
                .await?;
        }
        let broken_tables = report.corruptions;
        let wrong = self
            .compare(&uses, refcounts, &mut report, repair, header.bitmaps)
            .await?;
        if repair && wrong > 0 {
            refcounts.write_dirty().await?;
            self.file.flush().await?;
        }
        self.check_flags(&active, refcounts, &mut report, repair)
            .await?;
        if header.incompatible & DIRTY != 0 {
            report.say("the refcounts were not written completely (dirty)".into());
        }
        if repair && broken_tables == 0 && header.incompatible & (DIRTY | CORRUPT) != 0 {
            self.header.borrow_mut().incompatible &= !(DIRTY | CORRUPT);
            self.write_features().await?;
        }
        Ok(report)
    }

    /// Puts the refcounts right that were written late.
    pub(super) async fn repair_refcounts(&self) -> io::Result<()> {
        let report = self.check(true).await?;
        let left = (report.corruptions + report.leaks).saturating_sub(report.repaired);
        if left > 0 {
            let first = report.messages.first().cloned().unwrap_or_default();
            return Err(corrupt(format!(
                "its refcounts were not written completely and cannot be repaired: {first}"
            )));
        }
        Ok(())
    }

    /// Counts what the L2 table at `table` uses, which is itself used `times` times.
    async fn count_table(
        &self,
        table: u64,
        times: u32,
        active: bool,
        uses: &mut Uses,
        report: &mut CheckReport,
    ) -> io::Result<()> {
        let header = self.header();
        let words = (header.entry_size() / 8) as usize;
        if !table.is_multiple_of(self.cluster()) || !uses.count(table, self.cluster(), times) {
            report.corruption(format!("an L2 table is at {table:#x}"));
            return Ok(());
        }
        let bytes = read_bytes(&*self.file, table, self.cluster() as usize).await?;
        for at in (0..bytes.len()).step_by(8 * words) {
            let bitmap = (words == 2).then(|| be64(&bytes, at + 8));
            let mapping = match Mapping::decode(&header, be64(&bytes, at), bitmap) {
                Ok(mapping) => mapping,
                Err(error) => {
                    report.corruption(error.to_string());
                    continue;
                }
            };
            let Some((host, len)) = mapping.range(self.cluster()) else {
                continue;
            };
            if !uses.count(host, len, times) {
                report.corruption(format!("a cluster is at {host:#x}, beyond the file's end"));
            }
            if active {
                report.allocated_clusters += 1;
                report.compressed_clusters +=
                    u64::from(matches!(mapping, Mapping::Compressed { .. }));
            }
        }
        yield_now().await;
        Ok(())
    }

    /// Compares counts with uses; how many differ.
    async fn compare(
        &self,
        uses: &Uses,
        refcounts: &Refcounts,
        report: &mut CheckReport,
        repair: bool,
        bitmaps: bool,
    ) -> io::Result<u64> {
        let clusters = uses.counts.len() as u64;
        let end = clusters.max(refcounts.counted_end());
        let mut wrong = 0;
        let mut number = 0;
        while number < end {
            if number >= clusters && !refcounts.has_block(number) {
                number = refcounts.next_block(number);
                continue;
            }
            let used = uses.of(number) + u64::from(refcounts.is_made(number));
            let counted = refcounts.get(number).await?;
            if counted != used {
                wrong += 1;
                if counted < used {
                    report.corruption(format!(
                        "cluster {number} is used {used} times and counted {counted} times"
                    ));
                } else if bitmaps {
                    // Bitmaps use clusters that are not looked at here.
                    wrong -= 1;
                    number += 1;
                    continue;
                } else {
                    report.leaks += 1;
                    report.say(format!(
                        "cluster {number} is counted {counted} times and used {used} times (leak)"
                    ));
                }
                if repair {
                    if used > 0 && !refcounts.has_block(number) {
                        let in_use = |number| uses.of(number) > 0;
                        refcounts.make_block_for(number, &in_use).await?;
                    }
                    refcounts.force(number, used).await?;
                    report.repaired += 1;
                }
            }
            number += 1;
            if number.is_multiple_of(1 << 16) {
                yield_now().await;
            }
        }
        Ok(wrong)
    }

    /// Compares the flags of what is used once with the refcounts.
    async fn check_flags(
        &self,
        l1: &[u64],
        refcounts: &Refcounts,
        report: &mut CheckReport,
        repair: bool,
    ) -> io::Result<()> {
        let header = self.header();
        let words = (header.entry_size() / 8) as usize;
        let mut fixed_l1 = l1.to_vec();
        for (index, &entry) in l1.iter().enumerate() {
            let table = entry & OFFSET;
            if table == 0 || !table.is_multiple_of(self.cluster()) {
                continue;
            }
            let once = refcounts.get(table >> self.cluster_bits).await? == 1;
            if once != (entry & COPIED != 0) {
                report.corruption(format!("L1 entry {index} has the wrong flag"));
                report.repaired += u64::from(repair);
                fixed_l1[index] = if once {
                    entry | COPIED
                } else {
                    entry & !COPIED
                };
            }
            let mut bytes = read_bytes(&*self.file, table, self.cluster() as usize).await?;
            let mut changed = false;
            for at in (0..bytes.len()).step_by(8 * words) {
                let word = be64(&bytes, at);
                let bitmap = (words == 2).then(|| be64(&bytes, at + 8));
                let mapping = Mapping::decode(&header, word, bitmap);
                let host = match mapping {
                    Ok(Mapping::Compressed { .. }) | Err(_) => continue,
                    Ok(mapping) => match mapping.range(self.cluster()) {
                        Some((host, _)) => host,
                        None => continue,
                    },
                };
                let once = refcounts.get(host >> self.cluster_bits).await? == 1;
                if once != (word & COPIED != 0) {
                    report.corruption(format!("the L2 entry of {host:#x} has the wrong flag"));
                    report.repaired += u64::from(repair);
                    changed = true;
                    bytes[at] ^= 0x80;
                }
            }
            if repair && changed {
                write_bytes(&*self.file, table, &bytes).await?;
            }
            yield_now().await;
        }
        if repair && fixed_l1 != l1 {
            self.write_l1(&fixed_l1).await?;
        }
        if repair {
            self.file.flush().await?;
            self.tables.clear();
        }
        Ok(())
    }

    /// Writes the L1 table where it is.
    pub(super) async fn write_l1(&self, entries: &[u64]) -> io::Result<()> {
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
        let offset = self.header.borrow().l1_offset;
        write_bytes(&*self.file, offset, &bytes).await?;
        *self.l1.borrow_mut() = entries.to_vec();
        Ok(())
    }
}
