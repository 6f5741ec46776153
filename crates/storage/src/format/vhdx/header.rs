//! The beginning of a file: two headers, of which the newer counts, and the table of regions.

use crate::{
    format::{FormatError, refused},
    layer::{Guid, Layer, read_bytes},
};

pub(super) const MIB: u64 = 1 << 20;
/// What a file begins with.
pub(super) const SIGNATURE: &[u8; 8] = b"vhdxfile";
/// Where the headers are.
pub(super) const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
/// Where the copies of the region table are.
pub(super) const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes of a header.
pub(super) const HEADER_LEN: usize = 4096;
/// Bytes of a region table.
pub(super) const REGION_TABLE_LEN: usize = 64 << 10;
/// The longest log that is read, in bytes: it is in memory while it is replayed.
pub(super) const MAX_LOG: u64 = 32 << 20;
/// The longest table of blocks that is read, in bytes.
pub(super) const MAX_TABLE: u64 = 64 << 20;

pub(super) const BAT_REGION: u128 = 0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08;
pub(super) const METADATA_REGION: u128 = 0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e;

/// The bytes of a GUID that is written as `value` in hexadecimal digits. The first three fields lie the other way round.
pub(super) fn guid(value: u128) -> Guid {
    let mut bytes = value.to_be_bytes();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

/// A GUID by chance (version 4).
pub(super) fn random_guid() -> std::io::Result<Guid> {
    let mut bytes = [0; 16];
    let n = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    if n != bytes.len() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    bytes[7] = bytes[7] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(bytes)
}

pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    let field = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
    u16::from_le_bytes(field.unwrap_or_default())
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_le_bytes(field.unwrap_or_default())
}

pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(field.unwrap_or_default())
}

pub(super) fn guid_at(bytes: &[u8], at: usize) -> Guid {
    let field = bytes.get(at..at + 16).and_then(|b| b.try_into().ok());
    field.unwrap_or_default()
}

/// The checksum of `bytes`, whose own four bytes at offset 4 count as zeroes.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let (head, rest) = bytes.split_at(bytes.len().min(4));
    let sum = crc32c::crc32c_append(crc32c::crc32c(head), &[0; 4]);
    crc32c::crc32c_append(sum, rest.get(4..).unwrap_or_default())
}

/// A header ([MS-VHDX] §2.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) sequence: u64,
    pub(super) file_write: Guid,
    pub(super) data_write: Guid,
    /// Zeroes if the log is empty.
    pub(super) log: Guid,
    pub(super) log_len: u64,
    pub(super) log_offset: u64,
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_LEN];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"head");
        put(8, &self.sequence.to_le_bytes());
        put(16, &self.file_write);
        put(32, &self.data_write);
        put(48, &self.log);
        put(66, &1u16.to_le_bytes());
        put(68, &(self.log_len as u32).to_le_bytes());
        put(72, &self.log_offset.to_le_bytes());
        let sum = checksum(&out);
        out[4..8].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// `None` for one that was not written completely.
    fn parse(bytes: &[u8]) -> Result<Option<Self>, FormatError> {
        if bytes.len() != HEADER_LEN
            || !bytes.starts_with(b"head")
            || le32(bytes, 4) != checksum(bytes)
        {
            return Ok(None);
        }
        let (log_version, version) = (le16(bytes, 64), le16(bytes, 66));
        let header = Self {
            sequence: le64(bytes, 8),
            file_write: guid_at(bytes, 16),
            data_write: guid_at(bytes, 32),
            log: guid_at(bytes, 48),
            log_len: le32(bytes, 68).into(),
            log_offset: le64(bytes, 72),
        };
        if version != 1 {
            return Err(refused(format!("its version {version} is not known")));
        }
        if header.log != [0; 16] && log_version != 0 {
            return Err(refused(format!(
                "its log's version {log_version} is not known"
            )));
        }
        Ok(Some(header))
    }
}

/// A range of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Region {
    fn check(self, what: &str, file_size: u64) -> Result<Self, FormatError> {
        let end = self.offset.checked_add(self.len);
        if self.len == 0
            || !self.offset.is_multiple_of(MIB)
            || !self.len.is_multiple_of(MIB)
            || self.offset < MIB
            || end.is_none_or(|end| end > file_size)
        {
            return Err(refused(format!(
                "its {what} at {:#x} is not within the file",
                self.offset
            )));
        }
        Ok(self)
    }

    pub(super) fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

/// What the beginning of a file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) header: Header,
    /// Which of the headers it is.
    pub(super) slot: usize,
    pub(super) log: Region,
    pub(super) bat: Region,
    pub(super) metadata: Region,
}

impl Layout {
    pub(super) async fn read(file: &dyn Layer) -> Result<Self, FormatError> {
        let end = REGION_TABLES[1] as usize + REGION_TABLE_LEN;
        let head = read_bytes(file, 0, end).await?;
        Self::parse(&head, file.size())
    }

    /// Parses what is before the end of the region tables, in a file of `file_size` bytes.
    pub(super) fn parse(head: &[u8], file_size: u64) -> Result<Self, FormatError> {
        if !head.starts_with(SIGNATURE) {
            return Err(refused("it does not begin as a VHDX does"));
        }
        if file_size >= 1 << 56 {
            return Err(refused("the file is too long"));
        }
        let mut newest: Option<(usize, Header)> = None;
        for (slot, at) in HEADERS.into_iter().enumerate() {
            let bytes = head.get(at as usize..at as usize + HEADER_LEN);
            let Some(header) = Header::parse(bytes.unwrap_or_default())? else {
                continue;
            };
            if newest.is_none_or(|(_, other)| header.sequence > other.sequence) {
                newest = Some((slot, header));
            }
        }
        let (slot, header) = newest.ok_or_else(|| refused("both of its headers are damaged"))?;
        let log = Region {
            offset: header.log_offset,
            len: header.log_len,
        };
        let log = log.check("log", file_size)?;
        if log.len > MAX_LOG {
            return Err(refused(format!("its log is {} bytes long", log.len)));
        }
        let table = REGION_TABLES
            .into_iter()
            .filter_map(|at| head.get(at as usize..at as usize + REGION_TABLE_LEN))
            .find(|bytes| bytes.starts_with(b"regi") && le32(bytes, 4) == checksum(bytes));
        let table = table.ok_or_else(|| refused("both of its region tables are damaged"))?;
        let (mut bat, mut metadata) = (None, None);
        let count = le32(table, 8) as usize;
        if count > 2047 {
            return Err(refused(format!("it has {count} regions")));
        }
        for entry in table[16..].chunks_exact(32).take(count) {
            let region = Region {
                offset: le64(entry, 16),
                len: le32(entry, 24).into(),
            };
            let id = guid_at(entry, 0);
            let (slot, what) = if id == guid(BAT_REGION) {
                (&mut bat, "table of blocks")
            } else if id == guid(METADATA_REGION) {
                (&mut metadata, "metadata")
            } else if le32(entry, 28) & 1 != 0 {
                return Err(refused("it has a required region that is not known"));
            } else {
                continue;
            };
            if slot.replace(region.check(what, file_size)?).is_some() {
                return Err(refused(format!("its {what} is there twice")));
            }
        }
        let bat = bat.ok_or_else(|| refused("it has no table of blocks"))?;
        let metadata = metadata.ok_or_else(|| refused("it has no metadata"))?;
        if bat.overlaps(metadata) || bat.overlaps(log) || metadata.overlaps(log) {
            return Err(refused("two of its regions lie over each other"));
        }
        Ok(Self {
            header,
            slot,
            log,
            bat,
            metadata,
        })
    }

    /// The ranges that no block may lie in.
    pub(super) fn taken(&self) -> [Region; 4] {
        let head = Region {
            offset: 0,
            len: MIB,
        };
        [head, self.log, self.bat, self.metadata]
    }
}
