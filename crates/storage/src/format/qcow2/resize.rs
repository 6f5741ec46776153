//! Another size.

use std::io;

use super::{Freed, Qcow2, entry::COPIED, header::be64};
use crate::layer::{read_bytes, write_bytes};

impl Qcow2 {
    pub(super) async fn resize_to(&self, size: u64) -> io::Result<()> {
        self.writable()?;
        let refuse = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        self.header.borrow().check_size(size).map_err(refuse)?;
        if !size.is_multiple_of(512) {
            return Err(refuse("a size is a multiple of 512".into()));
        }
        let old = self.size.get();
        if size < old {
            // What is cut off must not come back when the disk grows again.
            self.zero_mapped(size, old - size, true).await?;
        } else if size > old {
            self.grow_l1(size).await?;
            // Beyond the old end there may be anything, in the last cluster and in the backing file.
            let edge = old.next_multiple_of(self.cluster());
            let below = self.backing.as_ref().map_or(0, |backing| backing.size());
            let hidden = edge.max(below).min(size).saturating_sub(old);
            if hidden > 0 {
                self.size.set(size);
                let zeroed = self.zero_mapped(old, hidden, true).await;
                self.size.set(old);
                zeroed?;
            }
        }
        self.flush_all().await?;
        self.change_header(|header| header.size = size).await?;
        self.size.set(size);
        Ok(())
    }

    /// Makes the L1 table long enough for `size` bytes.
    async fn grow_l1(&self, size: u64) -> io::Result<()> {
        let (needed, old_offset, old_entries) = {
            let header = self.header.borrow();
            (
                header.l1_needed(size),
                header.l1_offset,
                u64::from(header.l1_entries),
            )
        };
        if needed <= old_entries {
            return Ok(());
        }
        self.flush_all().await?;
        let refcounts = self.refcounts()?;
        let clusters = (needed * 8).div_ceil(self.cluster());
        let offset = refcounts.take_run(clusters).await?;
        let mut entries = self.l1.borrow().clone();
        entries.resize(needed as usize, 0);
        let mut bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize((clusters << self.cluster_bits) as usize, 0);
        write_bytes(&*self.file, offset, &bytes).await?;
        self.file.flush().await?;
        for n in 0..clusters {
            refcounts.mark_metadata(offset + (n << self.cluster_bits), true);
        }
        self.change_header(|header| {
            header.l1_offset = offset;
            header.l1_entries = needed as u32;
        })
        .await?;
        *self.l1.borrow_mut() = entries;
        if old_entries > 0 {
            self.freed.borrow_mut().push(Freed {
                host: old_offset,
                len: old_entries * 8,
                table: true,
            });
        }
        self.flush_all().await
    }

    /// The words of the table at `offset`, with `count` entries.
    pub(super) async fn read_table(&self, offset: u64, count: usize) -> io::Result<Vec<u64>> {
        let bytes = read_bytes(&*self.file, offset, count * 8).await?;
        Ok((0..count).map(|i| be64(&bytes, i * 8)).collect())
    }

    /// An entry without the claim to be the only one.
    pub(super) fn shared(entry: u64) -> u64 {
        entry & !COPIED
    }
}
