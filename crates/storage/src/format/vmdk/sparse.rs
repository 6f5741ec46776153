//! Sparse extents: grains, found by a directory of tables.

use std::{cell::RefCell, collections::HashMap, io, rc::Rc};

use caisson_memory::Pinned;
use flate2::{Decompress, FlushDecompress, Status};

use crate::{
    error::corrupt,
    format::{FormatError, refused},
    layer::{Layer, read_bytes},
};

/// What a sparse extent begins with.
pub(super) const SIGNATURE: &[u8] = b"KDMV";
const SECTOR: u64 = 512;
/// The directory is where a copy of the header at the end of the file says.
const AT_END: u64 = u64::MAX;
/// The largest grain, in sectors: 4 MiB.
const MAX_GRAIN: u64 = 8192;
/// The longest directory, in bytes.
const MAX_DIRECTORY: u64 = 64 << 20;
/// The most tables that are remembered.
const MAX_TABLES: usize = 4096;

const HAS_ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const HAS_MARKERS: u32 = 1 << 17;

fn le32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_le_bytes(field.unwrap_or_default())
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(field.unwrap_or_default())
}

/// The header of a sparse extent, its numbers checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the extent.
    pub size: u64,
    /// Bytes of a grain.
    pub grain: u64,
    /// Entries of a table.
    pub entries: u64,
    /// Where the directory is, in bytes.
    pub directory: u64,
    /// Where the description of the disk is, and how long, in bytes; no bytes if there is none.
    pub descriptor: (u64, u64),
    /// Whether grains are compressed.
    pub compressed: bool,
    /// Whether the entry 1 says that a grain is zeroes.
    pub zero_grains: bool,
}

impl Header {
    /// Parses a header.
    ///
    /// # Errors
    /// It is damaged, or has something that is not supported.
    pub fn parse(bytes: &[u8], file_size: u64) -> Result<Self, FormatError> {
        if !bytes.starts_with(SIGNATURE) || bytes.len() < 512 {
            return Err(refused("it does not begin as a VMDK does"));
        }
        let (version, flags) = (le32(bytes, 4), le32(bytes, 8));
        if !(1..=3).contains(&version) {
            return Err(refused(format!("its version {version} is not known")));
        }
        let (sectors, grain) = (le64(bytes, 12), le64(bytes, 20));
        if !grain.is_power_of_two() || grain > MAX_GRAIN {
            return Err(refused(format!("its grains have {grain} sectors")));
        }
        if sectors > 1 << 52 {
            return Err(refused(format!("it has {sectors} sectors")));
        }
        let entries = u64::from(le32(bytes, 44));
        if !(1..=512).contains(&entries) {
            return Err(refused(format!("its tables have {entries} entries")));
        }
        // What was sent as text has other ends of lines.
        if bytes[73..77] != *b"\n \r\n" {
            return Err(refused("it was damaged by a transfer as text"));
        }
        let compressed = flags & COMPRESSED != 0;
        let method = u16::from_le_bytes([bytes[77], bytes[78]]);
        if compressed && (method != 1 || flags & HAS_MARKERS == 0) {
            return Err(refused(format!("its compression {method} is not known")));
        }
        let bytes_at = |what: &str, sector: u64, len: u64| {
            let offset = sector.checked_mul(SECTOR);
            let end = offset.and_then(|offset| offset.checked_add(len));
            match (offset, end) {
                (Some(offset), Some(end)) if end <= file_size => Ok(offset),
                _ => Err(refused(format!("its {what} is not within the file"))),
            }
        };
        let header = Self {
            size: sectors * SECTOR,
            grain: grain * SECTOR,
            entries,
            directory: AT_END,
            descriptor: (0, 0),
            compressed,
            zero_grains: flags & HAS_ZERO_GRAINS != 0,
        };
        let directory_len = header.tables() * 4;
        if directory_len > MAX_DIRECTORY {
            return Err(refused("its directory is too long"));
        }
        let directory = match le64(bytes, 56) {
            AT_END => AT_END,
            sector => bytes_at("directory", sector, directory_len)?,
        };
        let descriptor_len = le64(bytes, 36).saturating_mul(SECTOR);
        let descriptor = match descriptor_len {
            0 => 0,
            len if len > super::descriptor::MAX_LEN => {
                return Err(refused("its description is too long"));
            }
            len => bytes_at("description", le64(bytes, 28), len)?,
        };
        Ok(Self {
            directory,
            descriptor: (descriptor, descriptor_len),
            ..header
        })
    }

    /// How many tables the directory has.
    fn tables(&self) -> u64 {
        self.size.div_ceil(self.grain * self.entries)
    }
}

/// What a grain is.
enum Grain {
    Absent,
    At(u64),
}

/// A sparse extent.
pub(super) struct Sparse {
    file: Rc<dyn Layer>,
    pub(super) header: Header,
    directory: Vec<u32>,
    tables: RefCell<HashMap<u32, Rc<Vec<u32>>>>,
    /// The compressed grain that was read last, by its number.
    unpacked: RefCell<Option<(u64, Rc<Vec<u8>>)>>,
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| le32(b, 0)).collect()
}

impl Sparse {
    pub(super) async fn open(file: Rc<dyn Layer>) -> Result<Self, FormatError> {
        let size = file.size();
        let first = read_bytes(&*file, 0, 512).await?;
        let mut header = Header::parse(&first, size)?;
        if header.directory == AT_END {
            let at = size
                .checked_sub(2 * SECTOR)
                .ok_or_else(|| refused("it is too short"))?;
            let last = read_bytes(&*file, at, 512).await?;
            let descriptor = header.descriptor;
            header = Header::parse(&last, size).map_err(|error| {
                refused(format!(
                    "it is not complete, or its end is damaged: {error}"
                ))
            })?;
            if header.directory == AT_END {
                return Err(refused("it does not say where its directory is"));
            }
            header.descriptor = descriptor;
        }
        let len = header.tables() as usize * 4;
        let directory = words(&read_bytes(&*file, header.directory, len).await?);
        Ok(Self {
            file,
            header,
            directory,
            tables: RefCell::default(),
            unpacked: RefCell::default(),
        })
    }

    async fn table(&self, sector: u32) -> io::Result<Rc<Vec<u32>>> {
        let known = self.tables.borrow().get(&sector).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let (at, len) = (u64::from(sector) * SECTOR, self.header.entries * 4);
        if at + len > self.file.size() {
            return Err(corrupt(format!(
                "a table at {at:#x} is not within the file"
            )));
        }
        let table = Rc::new(words(&read_bytes(&*self.file, at, len as usize).await?));
        let mut tables = self.tables.borrow_mut();
        if tables.len() >= MAX_TABLES {
            tables.clear();
        }
        tables.insert(sector, table.clone());
        Ok(table)
    }

    async fn grain(&self, number: u64) -> io::Result<Grain> {
        let (table, entry) = (number / self.header.entries, number % self.header.entries);
        let sector = self.directory.get(table as usize).copied().unwrap_or(0);
        if sector == 0 {
            return Ok(Grain::Absent);
        }
        let table = self.table(sector).await?;
        Ok(match table.get(entry as usize).copied().unwrap_or(0) {
            0 => Grain::Absent,
            1 if self.header.zero_grains => Grain::Absent,
            sector => Grain::At(u64::from(sector) * SECTOR),
        })
    }

    /// Whether there is data at `at`, and for how many of `len` bytes that goes on; not beyond a table.
    pub(super) async fn extent(&self, at: u64, len: u64) -> io::Result<(bool, u64)> {
        let grain = self.header.grain;
        let first = at / grain;
        let is = matches!(self.grain(first).await?, Grain::At(_));
        let last = (at + len).div_ceil(grain);
        let table_end = (first / self.header.entries + 1) * self.header.entries;
        let mut next = first + 1;
        while next < last.min(table_end) && matches!(self.grain(next).await?, Grain::At(_)) == is {
            next += 1;
        }
        Ok((is, (next * grain - at).min(len)))
    }

    /// Reads `into` from `at` on.
    pub(super) async fn read(&self, at: u64, into: Pinned) -> io::Result<()> {
        let grain = self.header.grain;
        let len = into.len() as u64;
        let mut done = 0;
        while done < len {
            let here = at + done;
            let (number, within) = (here / grain, here % grain);
            let run = (grain - within).min(len - done);
            let part = into.slice(done as usize, run as usize);
            match self.grain(number).await? {
                Grain::Absent => part.fill(0, part.len(), 0),
                Grain::At(host) if self.header.compressed => {
                    let bytes = self.unpack(number, host).await?;
                    part.write(0, &bytes[within as usize..(within + run) as usize]);
                }
                Grain::At(host) => {
                    // What was cut off is not zeroes.
                    if host + within + run > self.file.size() {
                        return Err(corrupt(format!(
                            "a grain at {host:#x} is not within the file"
                        )));
                    }
                    self.file.read(host + within, part).await?;
                }
            }
            done += run;
        }
        Ok(())
    }

    /// The content of a compressed grain: a marker with its first sector and its length, and a zlib stream (RFC 1950).
    async fn unpack(&self, number: u64, host: u64) -> io::Result<Rc<Vec<u8>>> {
        let last = self.unpacked.borrow().clone();
        if let Some((known, bytes)) = last
            && known == number
        {
            return Ok(bytes);
        }
        let damaged = || corrupt(format!("the compressed grain at {host:#x} is damaged"));
        let grain = self.header.grain;
        let marker = read_bytes(&*self.file, host, 12).await?;
        let (sector, len) = (le64(&marker, 0), u64::from(le32(&marker, 8)));
        if sector.checked_mul(SECTOR) != Some(number * grain)
            || len == 0
            || len > 2 * grain + SECTOR
            || host + 12 + len > self.file.size()
        {
            return Err(damaged());
        }
        let packed = read_bytes(&*self.file, host + 12, len as usize).await?;
        let mut bytes = vec![0; grain as usize];
        let mut stream = Decompress::new(true);
        let status = stream.decompress(&packed, &mut bytes, FlushDecompress::Finish);
        let status = status.map_err(|_| damaged())?;
        // The last grain may end with the disk.
        let needed = grain.min(self.header.size - number * grain);
        if status != Status::StreamEnd || stream.total_out() < needed {
            return Err(damaged());
        }
        let bytes = Rc::new(bytes);
        *self.unpacked.borrow_mut() = Some((number, bytes.clone()));
        Ok(bytes)
    }
}
