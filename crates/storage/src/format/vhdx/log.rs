//! The log: changes of tables are in it before they are made, so that each is made completely or not at all.
//!
//! Each of our entries is a sequence by itself: it names itself as the tail. The flush that makes an entry durable comes
//! after one that made the changes of the entry before durable, which is not needed any more then.

use std::{collections::HashMap, io};

use super::header::{Region, checksum, guid_at, le32, le64};
use crate::{
    error::corrupt,
    layer::{Guid, Layer, read_bytes, write_bytes},
};

/// The unit of the log, and of what it changes.
pub(super) const SECTOR: u64 = 4096;
/// Descriptors in an entry's first sector, after its header.
const FIRST_DESCRIPTORS: u64 = 126;
/// Bytes whose checksum is taken when a log is searched, for each byte of the log. Sound logs need one.
const PATIENCE: u64 = 16;

/// An entry's header.
#[derive(Clone, Copy)]
struct Entry {
    at: u64,
    len: u64,
    tail: u64,
    sequence: u64,
    descriptors: u64,
    flushed: u64,
    last: u64,
}

/// A change that an entry tells.
enum Change {
    Data { at: u64, bytes: Vec<u8> },
    Zero { at: u64, len: u64 },
}

/// A log that is searched.
struct Search<'a> {
    bytes: &'a [u8],
    id: Guid,
    budget: u64,
    seen: HashMap<u64, Option<Entry>>,
}

impl Search<'_> {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// `len` bytes from `at` on; the end is followed by the beginning.
    fn part(&self, at: u64, len: u64) -> Vec<u8> {
        let at = (at % self.len()) as usize;
        let first = self.bytes.len().min(at + len as usize);
        let mut part = self.bytes[at..first].to_vec();
        part.extend(&self.bytes[..len as usize - part.len()]);
        part
    }

    /// The entry at `at`, if there is a sound one.
    fn entry(&mut self, at: u64) -> io::Result<Option<Entry>> {
        if let Some(known) = self.seen.get(&at) {
            return Ok(*known);
        }
        let found = self.parse(at)?;
        self.seen.insert(at, found);
        Ok(found)
    }

    fn parse(&mut self, at: u64) -> io::Result<Option<Entry>> {
        let head = &self.bytes[at as usize..at as usize + SECTOR as usize];
        let len = u64::from(le32(head, 8));
        let entry = Entry {
            at,
            len,
            tail: le32(head, 12).into(),
            sequence: le64(head, 16),
            descriptors: le32(head, 24).into(),
            flushed: le64(head, 48),
            last: le64(head, 56),
        };
        let plausible = head.starts_with(b"loge")
            && guid_at(head, 32) == self.id
            && len > 0
            && len.is_multiple_of(SECTOR)
            && len <= self.len()
            && entry.tail.is_multiple_of(SECTOR)
            && entry.tail < self.len()
            && entry.sequence > 0
            && descriptor_sectors(entry.descriptors) * SECTOR <= len;
        if !plausible {
            return Ok(None);
        }
        let sum = le32(head, 4);
        let spent = self.budget.checked_sub(len);
        self.budget = spent.ok_or_else(|| corrupt("its log consists of entries in entries"))?;
        let bytes = self.part(at, len);
        if sum != checksum(&bytes) || changes(&entry, &bytes).is_none() {
            return Ok(None);
        }
        Ok(Some(entry))
    }

    /// The entries that are to be replayed, in order.
    fn active(&mut self) -> io::Result<Vec<Entry>> {
        let mut best: Vec<Entry> = Vec::new();
        let mut tail = 0;
        while tail < self.len() {
            let mut sequence: Vec<Entry> = Vec::new();
            let mut at = tail;
            let mut covered = 0;
            while let Some(entry) = self.entry(at % self.len())? {
                let follows = sequence
                    .last()
                    .is_none_or(|last| last.sequence.checked_add(1) == Some(entry.sequence));
                covered += entry.len;
                if !follows || covered > self.len() {
                    break;
                }
                at += entry.len;
                sequence.push(entry);
            }
            if let Some(head) = sequence.last().copied()
                && best.last().is_none_or(|b| head.sequence > b.sequence)
                && let Some(from) = sequence.iter().position(|entry| entry.at == head.tail)
            {
                best = sequence.split_off(from);
            }
            tail = at.max(tail + SECTOR);
        }
        Ok(best)
    }
}

fn descriptor_sectors(count: u64) -> u64 {
    1 + count.saturating_sub(FIRST_DESCRIPTORS).div_ceil(128)
}

/// What an entry changes; `None` if it contradicts itself.
fn changes(entry: &Entry, bytes: &[u8]) -> Option<Vec<Change>> {
    let mut data = (descriptor_sectors(entry.descriptors) * SECTOR) as usize;
    let mut found = Vec::new();
    for n in 0..entry.descriptors as usize {
        let descriptor = bytes.get(64 + n * 32..96 + n * 32)?;
        let at = le64(descriptor, 16);
        if le64(descriptor, 24) != entry.sequence || !at.is_multiple_of(SECTOR) {
            return None;
        }
        match &descriptor[..4] {
            b"zero" => {
                let len = le64(descriptor, 8);
                at.checked_add(len).filter(|_| len.is_multiple_of(SECTOR))?;
                found.push(Change::Zero { at, len });
            }
            b"desc" => {
                let sector = bytes.get(data..data + SECTOR as usize)?;
                data += SECTOR as usize;
                let high = u64::from(le32(sector, 4));
                let low = u64::from(le32(sector, 4092));
                if !sector.starts_with(b"data") || high << 32 | low != entry.sequence {
                    return None;
                }
                at.checked_add(SECTOR)?;
                // The sector's own marks stand where these bytes belong.
                let mut bytes = descriptor[8..16].to_vec();
                bytes.extend(&sector[8..4092]);
                bytes.extend(&descriptor[4..8]);
                found.push(Change::Data { at, bytes });
            }
            _ => return None,
        }
    }
    Some(found)
}

/// Makes the changes that the log tells, to `file`. Nothing is flushed. Whether there were any.
pub(super) async fn replay(file: &dyn Layer, log: Region, id: Guid) -> io::Result<bool> {
    let bytes = read_bytes(file, log.offset, log.len as usize).await?;
    let mut search = Search {
        bytes: &bytes,
        id,
        budget: log.len * PATIENCE,
        seen: HashMap::new(),
    };
    let entries = search.active()?;
    let Some(head) = entries.last() else {
        return Ok(false);
    };
    if head.flushed > file.size() {
        return Err(corrupt("the file was cut off after its log was written"));
    }
    // A table is changed by the log; blocks are not.
    const SLACK: u64 = 1 << 36;
    if head.last > file.size().saturating_add(SLACK) {
        return Err(corrupt("its log tells of a file that is far longer"));
    }
    if head.last > file.size() {
        file.resize(head.last).await?;
    }
    let size = file.size();
    for entry in &entries {
        let part = search.part(entry.at, entry.len);
        for change in changes(entry, &part).unwrap_or_default() {
            match change {
                Change::Data { at, bytes } if at.saturating_add(SECTOR) <= size => {
                    write_bytes(file, at, &bytes).await?;
                }
                Change::Zero { at, len } => {
                    let len = len.min(size.saturating_sub(at));
                    if len > 0 {
                        file.write_zeroes(at, len, false).await?;
                    }
                }
                Change::Data { .. } => {
                    return Err(corrupt("its log changes what is beyond the file's end"));
                }
            }
        }
    }
    Ok(true)
}

/// Where in the log the next entry goes.
pub(super) struct Writer {
    region: Region,
    id: Guid,
    head: u64,
    sequence: u64,
}

impl Writer {
    /// A writer to an empty log, which the file's header knows by `id`.
    pub(super) fn new(region: Region, id: Guid) -> Self {
        Self {
            region,
            id,
            head: 0,
            sequence: 1,
        }
    }

    /// How many sectors one entry may change. The entry before must stay whole meanwhile.
    pub(super) fn capacity(&self) -> usize {
        (self.region.len / 2 / SECTOR - 1).min(FIRST_DESCRIPTORS) as usize
    }

    /// Writes an entry with new content for sectors of the file, which is `size` bytes long. It counts from the next flush
    /// on.
    pub(super) async fn write(
        &mut self,
        file: &dyn Layer,
        sectors: &[(u64, Vec<u8>)],
        size: u64,
    ) -> io::Result<()> {
        let len = (1 + sectors.len() as u64) * SECTOR;
        let mut bytes = vec![0; SECTOR as usize];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, b"loge");
        put(8, &(len as u32).to_le_bytes());
        put(12, &(self.head as u32).to_le_bytes());
        put(16, &self.sequence.to_le_bytes());
        put(24, &(sectors.len() as u32).to_le_bytes());
        put(32, &self.id);
        put(48, &size.to_le_bytes());
        put(56, &size.to_le_bytes());
        for (n, (at, content)) in sectors.iter().enumerate() {
            let place = 64 + n * 32;
            put(place, b"desc");
            put(place + 4, &content[4092..]);
            put(place + 8, &content[..8]);
            put(place + 16, &at.to_le_bytes());
            put(place + 24, &self.sequence.to_le_bytes());
        }
        for (_, content) in sectors {
            bytes.extend(b"data");
            bytes.extend(((self.sequence >> 32) as u32).to_le_bytes());
            bytes.extend(&content[8..4092]);
            bytes.extend((self.sequence as u32).to_le_bytes());
        }
        let sum = checksum(&bytes);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        let first = (self.region.len - self.head).min(len);
        let (now, wrapped) = bytes.split_at(first as usize);
        write_bytes(file, self.region.offset + self.head, now).await?;
        if !wrapped.is_empty() {
            write_bytes(file, self.region.offset, wrapped).await?;
        }
        self.head = (self.head + len) % self.region.len;
        self.sequence += 1;
        Ok(())
    }
}
