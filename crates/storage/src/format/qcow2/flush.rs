//! Flushing: what was written becomes what is there after a power cut.

use std::io;

use super::{Freed, Qcow2, header::Header};
use crate::{
    layer::{Answer, write_bytes},
    runtime::local::join_all,
};

/// How many writes of a flush are under way at once.
const BATCH: usize = 64;

impl Qcow2 {
    /// Flushes; who asks while a flush is under way shares the next one.
    pub(super) async fn flush_all(&self) -> io::Result<()> {
        if !self.write {
            return Ok(());
        }
        let needed = self.flushes_begun.get() + 1;
        let _turn = self.flush_turn.pass().await;
        if self.flushes_done.get() >= needed {
            return Ok(());
        }
        self.writable()?;
        let number = self.flushes_begun.get() + 1;
        self.flushes_begun.set(number);
        match self.flush_once().await {
            Ok(()) => {
                self.flushes_done.set(number);
                Ok(())
            }
            Err(error) => {
                // What is in the file now is not known: a later flush cannot promise anything.
                self.broken.set(true);
                Err(error)
            }
        }
    }

    async fn flush_once(&self) -> io::Result<()> {
        // Entries that are set from here on belong to data that the first barrier does not cover.
        let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
        for slice in self.tables.dirty() {
            slice.dirty.set(false);
            writes.push((slice.offset, slice.encode()));
        }
        self.take_l1(&mut writes);
        let freed = std::mem::take(&mut *self.freed.borrow_mut());
        self.file.flush().await?;
        if writes.is_empty() && freed.is_empty() {
            return Ok(());
        }
        let refcounts = self.refcounts()?;
        let mut writes = writes.into_iter().peekable();
        while writes.peek().is_some() {
            let batch = writes.by_ref().take(BATCH);
            let batch = batch.map(|(offset, bytes)| -> Answer<'_> {
                Box::pin(async move { write_bytes(&*self.file, offset, &bytes).await })
            });
            for written in join_all(batch.collect()).await {
                written?;
            }
        }
        if refcounts.is_dirty() {
            refcounts.write_dirty().await?;
        }
        self.file.flush().await?;
        self.release(freed).await
    }

    /// The sectors of the L1 table that were changed.
    fn take_l1(&self, writes: &mut Vec<(u64, Vec<u8>)>) {
        let l1 = self.l1.borrow();
        let offset = self.header.borrow().l1_offset;
        let mut sectors: Vec<usize> = std::mem::take(&mut *self.l1_dirty.borrow_mut())
            .into_iter()
            .map(|index| index / 64)
            .collect();
        sectors.dedup();
        for sector in sectors {
            let from = sector * 64;
            let entries = &l1[from..l1.len().min(from + 64)];
            let bytes = entries.iter().flat_map(|entry| entry.to_be_bytes());
            writes.push((offset + from as u64 * 8, bytes.collect()));
        }
    }

    /// Gives back host ranges that nothing points to any more.
    async fn release(&self, freed: Vec<Freed>) -> io::Result<()> {
        if freed.is_empty() {
            return Ok(());
        }
        let refcounts = self.refcounts()?;
        *self.unpacked.borrow_mut() = None;
        let mut free: Vec<u64> = Vec::new();
        for Freed { host, len, table } in freed {
            let (first, end) = (
                host >> self.cluster_bits,
                (host + len).div_ceil(self.cluster()),
            );
            for number in first..end {
                if !table && refcounts.is_metadata(number << self.cluster_bits) {
                    // A table that was made where a wrong entry points. It stays.
                    tracing::warn!("cluster {number} is a table's and was freed as data");
                    continue;
                }
                match refcounts.get(number).await? {
                    // The image counted it wrongly. It stays as it is.
                    0 => tracing::warn!("cluster {number} was in use and not counted"),
                    1 => free.push(number),
                    _ => {
                        refcounts.add(number, -1).await?;
                    }
                }
            }
        }
        free.sort_unstable();
        free.dedup();
        let mut rest = &free[..];
        while let Some(&first) = rest.first() {
            let run = rest
                .iter()
                .enumerate()
                .take_while(|(n, number)| first + *n as u64 == **number)
                .count();
            let (at, len) = (
                first << self.cluster_bits,
                (run as u64) << self.cluster_bits,
            );
            // Before anybody can use them again. It is only space: an error changes nothing.
            if let Err(error) = self.file.discard(at, len).await {
                tracing::debug!("cannot give back {len} bytes: {error}");
            }
            rest = &rest[run..];
        }
        for number in free {
            refcounts.mark_metadata(number << self.cluster_bits, false);
            refcounts.add(number, -1).await?;
        }
        Ok(())
    }

    /// Changes the header in the file by way of `change`, in one write of its first sector.
    pub(super) async fn change_header(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let mut header = self.header();
        change(&mut header);
        let mut bytes = Vec::new();
        bytes.extend(header.size.to_be_bytes());
        bytes.extend(0u32.to_be_bytes());
        bytes.extend(header.l1_entries.to_be_bytes());
        bytes.extend(header.l1_offset.to_be_bytes());
        write_bytes(&*self.file, 24, &bytes).await?;
        let mut bytes = header.snapshots.to_be_bytes().to_vec();
        bytes.extend(header.snapshots_offset.to_be_bytes());
        write_bytes(&*self.file, 60, &bytes).await?;
        self.file.flush().await?;
        *self.header.borrow_mut() = header;
        Ok(())
    }
}
