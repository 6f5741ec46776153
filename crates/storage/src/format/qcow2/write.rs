//! Writing, discarding, zeroing.

use std::io;

use caisson_memory::Pinned;

use super::{
    Freed, Qcow2,
    entry::{COPIED, Mapping, ZERO},
};
use crate::runtime::local::yield_now;

/// Ranges that are written where they are: from which byte of the request, host offset, how many bytes.
type InPlace = Vec<(usize, u64, usize)>;

impl Qcow2 {
    /// The clusters of a range of bytes.
    fn clusters(&self, at: u64, len: u64) -> (u64, u64) {
        (at >> self.cluster_bits, (at + len).div_ceil(self.cluster()))
    }

    /// Where the range is, if all of it may be written where it is.
    async fn in_place(&self, at: u64, len: u64) -> io::Result<Option<InPlace>> {
        let mut parts = Vec::with_capacity(1);
        let mut done = 0;
        while done < len {
            let here = at + done;
            let (mapping, run) = self.lookup(here, len - done).await?;
            let Mapping::Data { host, copied: true } = mapping else {
                return Ok(None);
            };
            let within = here & (self.cluster() - 1);
            parts.push((done as usize, host + within, run as usize));
            done += run;
        }
        Ok(Some(parts))
    }

    pub(super) async fn write_mapped(&self, at: u64, from: Pinned) -> io::Result<()> {
        self.writable()?;
        let len = from.len() as u64;
        let (first, end) = self.clusters(at, len);
        {
            let _lock = self.locks.lock(first, end, false).await;
            if let Some(parts) = self.in_place(at, len).await? {
                for (start, host, n) in parts {
                    let part = if n == from.len() {
                        from.clone()
                    } else {
                        from.slice(start, n)
                    };
                    self.file.write(host, part, false).await?;
                }
                return Ok(());
            }
        }
        {
            let _lock = self.locks.lock(first, end, true).await;
            let mut done = 0;
            while done < len {
                let rest = from.slice(done as usize, (len - done) as usize);
                done += self.write_some(at + done, rest).await?;
            }
        }
        if self.tables.crowded() {
            self.flush_all().await?;
        }
        Ok(())
    }

    /// Writes the beginning of `from` to clusters that are mapped alike; how many bytes.
    async fn write_some(&self, at: u64, from: Pinned) -> io::Result<u64> {
        let (mapping, run) = self.lookup(at, from.len() as u64).await?;
        let within = at & (self.cluster() - 1);
        if let Mapping::Data { host, copied: true } = mapping {
            let part = from.slice(0, run as usize);
            self.file.write(host + within, part, false).await?;
            return Ok(run);
        }
        let refcounts = self.refcounts()?;
        self.own_table(at).await?;
        // Where there was no table, a run goes on beyond it.
        let run = run.min(self.slice_end(at) - at);
        let wanted = (within + run).div_ceil(self.cluster());
        let kept = match mapping {
            Mapping::Zero {
                kept: Some((host, true)),
            } => Some(host),
            _ => None,
        };
        let (host, count, virgin) = match kept {
            Some(host) => (host, 1, false),
            None => refcounts.take(wanted).await?,
        };
        let run = run.min((count << self.cluster_bits) - within);
        let written = self
            .write_new(at, from.slice(0, run as usize), mapping, host, virgin)
            .await;
        let noted = match written {
            Ok(()) => {
                let bits = self.cluster_bits;
                let entry = |n| (host + (n << bits)) | COPIED;
                self.set_entries(at, count, entry).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = noted {
            if kept.is_none() {
                refcounts.give_back(host, count);
            }
            return Err(error);
        }
        if kept.is_none() {
            self.free_old(mapping, count);
        }
        Ok(run)
    }

    /// Writes data to new clusters, with what surrounds it in the first and the last of them.
    async fn write_new(
        &self,
        at: u64,
        from: Pinned,
        old: Mapping,
        host: u64,
        virgin: bool,
    ) -> io::Result<()> {
        let mask = self.cluster() - 1;
        let head = at & mask;
        let end = at + from.len() as u64;
        let tail = end.wrapping_neg() & mask;
        let nothing_below = match old {
            Mapping::Absent => self
                .backing
                .as_ref()
                .is_none_or(|backing| backing.size() <= at & !mask),
            Mapping::Zero { .. } => true,
            _ => false,
        };
        if virgin && nothing_below {
            return self.file.write(host + head, from, false).await;
        }
        let mut whole = Pinned::zeroed(head as usize);
        if head > 0 && !nothing_below {
            self.read_as(old, at & !mask, whole.clone()).await?;
        }
        whole = whole.followed_by(from);
        if tail > 0 {
            let memory = Pinned::zeroed(tail as usize);
            if !nothing_below {
                // The mapping's host range goes on for as many clusters as the run has.
                let last = match old {
                    Mapping::Data { host, copied } => Mapping::Data {
                        host: host + ((end & !mask) - (at & !mask)),
                        copied,
                    },
                    other => other,
                };
                self.read_as(last, end, memory.clone()).await?;
            }
            whole = whole.followed_by(memory);
        }
        self.file.write(host, whole, false).await
    }

    /// What `count` clusters were mapped to is free after the next flush.
    fn free_old(&self, old: Mapping, count: u64) {
        if let Some((host, len)) = old.range(self.cluster()) {
            let mut freed = self.freed.borrow_mut();
            for n in 0..count {
                freed.push(Freed {
                    host: host + (n << self.cluster_bits),
                    len,
                    table: false,
                });
            }
        }
    }

    pub(super) async fn discard_mapped(&self, at: u64, len: u64) -> io::Result<()> {
        self.writable()?;
        let end = at + len;
        let first = at.next_multiple_of(self.cluster());
        // The last cluster of the disk may be a part of one.
        let end = if end == self.size.get() {
            end.next_multiple_of(self.cluster())
        } else {
            end & !(self.cluster() - 1)
        };
        if first >= end {
            return Ok(());
        }
        let v3 = self.header.borrow().version >= 3;
        // Without an entry that says so, the backing file would show again.
        let entry = match (&self.backing, v3) {
            (None, _) => 0,
            (Some(_), true) => ZERO,
            (Some(_), false) => return Ok(()),
        };
        self.unmap(first, end, entry, false).await
    }

    /// Maps whole clusters to `entry` (nothing, or zeroes) and frees what was there. Absent clusters are only mapped if
    /// `absent_too`.
    async fn unmap(&self, first: u64, end: u64, entry: u64, absent_too: bool) -> io::Result<()> {
        let (a, b) = self.clusters(first, end - first);
        let _lock = self.locks.lock(a, b, true).await;
        let mut here = first;
        while here < end {
            if !absent_too && !self.has_table(here) {
                let (_, run) = self.lookup(here, end - here).await?;
                here += run;
                continue;
            }
            let (mapping, run) = self.lookup(here, end - here).await?;
            let count = run.div_ceil(self.cluster());
            let change = match mapping {
                Mapping::Absent => absent_too && entry != 0,
                Mapping::Zero { kept: None } => false,
                _ => true,
            };
            if change {
                self.own_table(here).await?;
                // A table that was only just made is not in the slices that `lookup` walked.
                let (_, again) = self.lookup(here, run).await?;
                let count = count.min(again.div_ceil(self.cluster()));
                self.set_entries(here, count, |_| entry).await?;
                self.free_old(mapping, count);
                here += count << self.cluster_bits;
                if self.tables.crowded() {
                    self.flush_all().await?;
                }
                yield_now().await;
            } else {
                here += count << self.cluster_bits;
            }
        }
        Ok(())
    }

    pub(super) async fn zero_mapped(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.writable()?;
        let end = at + len;
        let cluster = self.cluster();
        let first = at.next_multiple_of(cluster);
        let last = if end == self.size.get() {
            end.next_multiple_of(cluster)
        } else {
            end & !(cluster - 1)
        };
        if first >= last {
            return self.write_zero_bytes(at, len).await;
        }
        if first > at {
            self.write_zero_bytes(at, first - at).await?;
        }
        if end > last {
            self.write_zero_bytes(last, end - last).await?;
        }
        let v3 = self.header.borrow().version >= 3;
        match (&self.backing, v3) {
            _ if !unmap => self.zero_in_place(first, last).await,
            (None, _) => self.unmap(first, last, 0, false).await,
            (Some(_), true) => self.unmap(first, last, ZERO, true).await,
            (Some(_), false) => {
                let last = last.min(self.size.get());
                self.write_zero_bytes(first, last - first).await
            }
        }
    }

    /// Makes whole clusters read as zeroes and keeps those that there are.
    async fn zero_in_place(&self, first: u64, end: u64) -> io::Result<()> {
        let v3 = self.header.borrow().version >= 3;
        let end_of_disk = end.min(self.size.get());
        let mut here = first;
        while here < end_of_disk {
            let (mapping, run) = {
                let (a, b) = self.clusters(here, end_of_disk - here);
                let _lock = self.locks.lock(a, b, false).await;
                self.lookup(here, end_of_disk - here).await?
            };
            let reads_zero = match mapping {
                Mapping::Absent => self.backing.as_ref().is_none_or(|b| b.size() <= here),
                Mapping::Zero { .. } => true,
                _ => false,
            };
            if !reads_zero {
                let whole = run.next_multiple_of(self.cluster());
                match mapping {
                    Mapping::Absent | Mapping::Compressed { .. } if v3 => {
                        self.unmap(here, here + whole, ZERO, true).await?;
                    }
                    _ => self.write_zero_bytes(here, run).await?,
                }
            }
            here += run;
        }
        Ok(())
    }

    /// Writes zeroes, unless there are some.
    async fn write_zero_bytes(&self, at: u64, len: u64) -> io::Result<()> {
        let zeroes = Pinned::zeroed(len.min(1 << 20) as usize);
        let mut done = 0;
        while done < len {
            let here = at + done;
            let left = (len - done).min(zeroes.len() as u64);
            let (mapping, run) = {
                let (a, b) = self.clusters(here, left);
                let _lock = self.locks.lock(a, b, false).await;
                self.lookup(here, left).await?
            };
            let reads_zero = match mapping {
                Mapping::Absent => self.backing.as_ref().is_none_or(|b| b.size() <= here),
                Mapping::Zero { .. } => true,
                _ => false,
            };
            if !reads_zero {
                self.write_mapped(here, zeroes.slice(0, run as usize))
                    .await?;
            }
            done += run;
        }
        Ok(())
    }
}
