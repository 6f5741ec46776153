//! Internal snapshots, of images that nobody else uses meanwhile.

use std::{
    collections::HashSet,
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use super::{
    Qcow2,
    entry::{COPIED, Mapping, OFFSET},
    header::{MAX_SNAPSHOTS, be32, be64},
};
use crate::{
    error::corrupt,
    layer::{read_bytes, write_bytes},
    runtime::local::yield_now,
};

/// The longest snapshot table, in bytes.
const MAX_TABLE: u64 = 16 << 20;

/// A snapshot in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// A number, as text.
    pub id: String,
    /// The name that somebody gave it.
    pub name: String,
    /// When it was made, in seconds since 1970.
    pub seconds: u32,
    /// Bytes of machine state that it has besides.
    pub vm_state: u64,
    /// Size of the disk then, in bytes.
    pub disk_size: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    /// The entry as it is in the table.
    raw: Vec<u8>,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Qcow2 {
    /// The snapshots in the image.
    ///
    /// # Errors
    /// The table is damaged, or the host's.
    pub async fn snapshots(&self) -> io::Result<Vec<SnapshotInfo>> {
        Ok(self.read_snapshots().await?.0)
    }

    pub(super) async fn snapshot_table_len(&self) -> io::Result<u64> {
        Ok(self.read_snapshots().await?.1)
    }

    async fn read_snapshots(&self) -> io::Result<(Vec<SnapshotInfo>, u64)> {
        let header = self.header();
        let mut found = Vec::new();
        let mut at = 0u64;
        for _ in 0..header.snapshots {
            let offset = header.snapshots_offset + at;
            if offset + 40 > self.file.size() || at > MAX_TABLE {
                return Err(corrupt("the snapshot table is damaged"));
            }
            let head = read_bytes(&*self.file, offset, 40).await?;
            let be16 = |at: usize| u64::from(be32(&head, at) >> 16);
            let (id_len, name_len) = (be16(12), be16(14));
            let extra_len = u64::from(be32(&head, 36));
            let len = (40 + extra_len + id_len + name_len).next_multiple_of(8);
            if extra_len > 1024 || at + len > MAX_TABLE {
                return Err(corrupt("the snapshot table is damaged"));
            }
            let raw = read_bytes(&*self.file, offset, len as usize).await?;
            let extra = &raw[40..40 + extra_len as usize];
            let id = 40 + extra_len as usize;
            let name = id + id_len as usize;
            let l1_entries = be32(&raw, 8);
            let l1_offset = be64(&raw, 0);
            let l1_end = l1_offset.checked_add(u64::from(l1_entries) * 8);
            let within = l1_end.is_some_and(|end| end <= self.file.size());
            if !within || !l1_offset.is_multiple_of(self.cluster()) {
                return Err(corrupt("a snapshot's L1 table is impossible"));
            }
            found.push(SnapshotInfo {
                id: text(&raw[id..name]),
                name: text(&raw[name..name + name_len as usize]),
                seconds: be32(&raw, 16),
                vm_state: if extra.len() >= 8 {
                    be64(extra, 0)
                } else {
                    be32(&raw, 32).into()
                },
                disk_size: if extra.len() >= 16 {
                    be64(extra, 8)
                } else {
                    header.size
                },
                l1_offset,
                l1_entries,
                raw,
            });
            at += len;
        }
        Ok((found, at))
    }

    async fn snapshot_named(&self, name: &str) -> io::Result<(Vec<SnapshotInfo>, usize)> {
        let all = self.snapshots().await?;
        let by_name = all.iter().position(|s| s.name == name);
        let index = by_name.or_else(|| all.iter().position(|s| s.id == name));
        let index = index.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("there is no snapshot \"{name}\""),
            )
        })?;
        Ok((all, index))
    }

    /// Makes a snapshot of the disk as it is.
    ///
    /// # Errors
    /// The name is taken, a refcount cannot count any more, or the host's.
    pub async fn create_snapshot(&self, name: &str) -> io::Result<()> {
        self.writable()?;
        let refuse = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        let all = self.snapshots().await?;
        if name.is_empty() || name.len() > 255 {
            return refuse("a snapshot's name has 1 to 255 bytes".into());
        }
        if all.iter().any(|s| s.name == name) {
            return refuse(format!("there is a snapshot \"{name}\" already"));
        }
        if all.len() as u32 >= MAX_SNAPSHOTS {
            return refuse(format!("an image has {MAX_SNAPSHOTS} snapshots at most"));
        }
        if self.header.borrow().refcount_max() < 2 {
            return refuse("its refcounts cannot count to 2".into());
        }
        self.flush_all().await?;
        let active = self.l1.borrow().clone();
        let refcounts = self.refcounts()?;
        // First the counts, so that a crash leaves leaks.
        self.count_tree(&active, 1).await?;
        refcounts.write_dirty().await?;
        self.file.flush().await?;
        self.clear_flags(&active).await?;
        let shared: Vec<u64> = active.iter().map(|&entry| Self::shared(entry)).collect();
        let mut bytes: Vec<u8> = shared.iter().flat_map(|e| e.to_be_bytes()).collect();
        let clusters = (bytes.len() as u64).div_ceil(self.cluster()).max(1);
        bytes.resize((clusters << self.cluster_bits) as usize, 0);
        let l1_offset = refcounts.take_run(clusters).await?;
        write_bytes(&*self.file, l1_offset, &bytes).await?;
        let id = all.iter().filter_map(|s| s.id.parse::<u64>().ok()).max();
        let id = (id.unwrap_or(0) + 1).to_string();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let mut raw = Vec::new();
        raw.extend(l1_offset.to_be_bytes());
        raw.extend((active.len() as u32).to_be_bytes());
        raw.extend((id.len() as u16).to_be_bytes());
        raw.extend((name.len() as u16).to_be_bytes());
        raw.extend((now.as_secs() as u32).to_be_bytes());
        raw.extend(now.subsec_nanos().to_be_bytes());
        raw.extend(0u64.to_be_bytes());
        raw.extend(0u32.to_be_bytes());
        raw.extend(24u32.to_be_bytes());
        raw.extend(0u64.to_be_bytes());
        raw.extend(self.size.get().to_be_bytes());
        // No count of instructions.
        raw.extend(u64::MAX.to_be_bytes());
        raw.extend(id.as_bytes());
        raw.extend(name.as_bytes());
        raw.resize(raw.len().next_multiple_of(8), 0);
        let mut entries: Vec<Vec<u8>> = all.into_iter().map(|s| s.raw).collect();
        entries.push(raw);
        self.write_snapshots(entries).await
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// There is none of that name, or the host's.
    pub async fn delete_snapshot(&self, name: &str) -> io::Result<()> {
        self.writable()?;
        let (mut all, index) = self.snapshot_named(name).await?;
        let gone = all.remove(index);
        self.flush_all().await?;
        self.write_snapshots(all.into_iter().map(|s| s.raw).collect())
            .await?;
        let l1 = self
            .read_table(gone.l1_offset, gone.l1_entries as usize)
            .await?;
        self.drop_tree(&l1, gone.l1_offset).await
    }

    /// Makes the disk what it was at a snapshot.
    ///
    /// # Errors
    /// There is none of that name, or the host's.
    pub async fn apply_snapshot(&self, name: &str) -> io::Result<()> {
        self.writable()?;
        let (all, index) = self.snapshot_named(name).await?;
        let snapshot = &all[index];
        self.flush_all().await?;
        let refcounts = self.refcounts()?;
        let l1 = self
            .read_table(snapshot.l1_offset, snapshot.l1_entries as usize)
            .await?;
        let needed = self.header.borrow().l1_needed(snapshot.disk_size) as usize;
        if l1.len() < needed {
            return Err(corrupt("a snapshot's L1 table is too short for its disk"));
        }
        let l1: Vec<u64> = l1.iter().map(|&entry| Self::shared(entry)).collect();
        self.count_tree(&l1, 1).await?;
        refcounts.write_dirty().await?;
        let clusters = (l1.len() as u64 * 8).div_ceil(self.cluster()).max(1);
        let offset = refcounts.take_run(clusters).await?;
        let mut bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize((clusters << self.cluster_bits) as usize, 0);
        write_bytes(&*self.file, offset, &bytes).await?;
        self.file.flush().await?;
        let (old, old_offset) = (self.l1.borrow().clone(), self.header.borrow().l1_offset);
        self.change_header(|header| {
            header.l1_offset = offset;
            header.l1_entries = l1.len() as u32;
            header.size = snapshot.disk_size;
        })
        .await?;
        self.size.set(snapshot.disk_size);
        *self.l1.borrow_mut() = l1;
        self.tables.clear();
        self.drop_tree(&old, old_offset).await
    }

    /// Writes another snapshot table and makes it the image's.
    async fn write_snapshots(&self, entries: Vec<Vec<u8>>) -> io::Result<()> {
        let refcounts = self.refcounts()?;
        let count = entries.len() as u32;
        let bytes = entries.concat();
        let old_offset = self.header.borrow().snapshots_offset;
        let old_len = self.snapshot_table_len().await?;
        let offset = if count == 0 {
            0
        } else {
            let clusters = (bytes.len() as u64).div_ceil(self.cluster());
            let offset = refcounts.take_run(clusters).await?;
            write_bytes(&*self.file, offset, &bytes).await?;
            offset
        };
        self.file.flush().await?;
        self.change_header(|header| {
            header.snapshots = count;
            header.snapshots_offset = offset;
        })
        .await?;
        if old_len > 0 {
            let last = (old_offset + old_len).div_ceil(self.cluster());
            for number in old_offset >> self.cluster_bits..last {
                refcounts.add(number, -1).await?;
            }
            refcounts.write_dirty().await?;
            self.file.flush().await?;
        }
        Ok(())
    }

    /// A tree is not used any more: counts down, and sets the flags of what only the disk uses now.
    async fn drop_tree(&self, l1: &[u64], l1_offset: u64) -> io::Result<()> {
        let refcounts = self.refcounts()?;
        self.count_tree(l1, -1).await?;
        let clusters = (l1.len() as u64 * 8).div_ceil(self.cluster());
        for n in 0..clusters {
            refcounts
                .add((l1_offset >> self.cluster_bits) + n, -1)
                .await?;
        }
        refcounts.write_dirty().await?;
        self.file.flush().await?;
        self.set_flags().await
    }

    /// Changes the refcounts of all that a tree uses by `by`.
    async fn count_tree(&self, l1: &[u64], by: i64) -> io::Result<()> {
        let refcounts = self.refcounts()?;
        let header = self.header();
        let mut seen = HashSet::new();
        for table in l1.iter().map(|entry| entry & OFFSET).filter(|&t| t != 0) {
            if !seen.insert(table) || !table.is_multiple_of(self.cluster()) {
                return Err(corrupt(format!("an L2 table is at {table:#x}")));
            }
            let words = self
                .read_table(table, (self.cluster() / 8) as usize)
                .await?;
            for word in words {
                let mapping = Mapping::decode(&header, word, None)?;
                if let Some((host, len)) = mapping.range(self.cluster()) {
                    let last = (host + len - 1) >> self.cluster_bits;
                    for number in host >> self.cluster_bits..=last {
                        refcounts.add(number, by).await?;
                    }
                }
            }
            refcounts.add(table >> self.cluster_bits, by).await?;
            yield_now().await;
        }
        Ok(())
    }

    /// Nothing of the disk is used by it alone any more.
    async fn clear_flags(&self, l1: &[u64]) -> io::Result<()> {
        for table in l1.iter().map(|entry| entry & OFFSET).filter(|&t| t != 0) {
            let mut bytes = read_bytes(&*self.file, table, self.cluster() as usize).await?;
            for word in bytes.chunks_exact_mut(8) {
                word[0] &= 0x7f;
            }
            write_bytes(&*self.file, table, &bytes).await?;
        }
        let shared: Vec<u64> = l1.iter().map(|&entry| Self::shared(entry)).collect();
        self.write_l1(&shared).await?;
        self.tables.clear();
        self.file.flush().await
    }

    /// Sets the flags of what the disk uses alone.
    async fn set_flags(&self) -> io::Result<()> {
        let refcounts = self.refcounts()?;
        let header = self.header();
        let mut l1 = self.l1.borrow().clone();
        for entry in &mut l1 {
            let table = *entry & OFFSET;
            if table == 0 {
                continue;
            }
            let once = refcounts.get(table >> self.cluster_bits).await? == 1;
            *entry = table | if once { COPIED } else { 0 };
            let mut bytes = read_bytes(&*self.file, table, self.cluster() as usize).await?;
            let mut changed = false;
            for at in (0..bytes.len()).step_by(8) {
                let word = be64(&bytes, at);
                let mapping = Mapping::decode(&header, word, None)?;
                let (false, Some((host, _))) = (
                    matches!(mapping, Mapping::Compressed { .. }),
                    mapping.range(self.cluster()),
                ) else {
                    continue;
                };
                let once = refcounts.get(host >> self.cluster_bits).await? == 1;
                if once != (word & COPIED != 0) {
                    bytes[at] ^= 0x80;
                    changed = true;
                }
            }
            if changed {
                write_bytes(&*self.file, table, &bytes).await?;
            }
        }
        self.write_l1(&l1).await?;
        self.tables.clear();
        self.file.flush().await
    }
}
