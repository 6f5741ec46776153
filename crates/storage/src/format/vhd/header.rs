//! Footer and header of a VHD, and new images.

use std::{
    rc::Rc,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    format::{FormatError, refused},
    layer::{Guid, Layer, read_bytes, write_bytes},
};

pub(super) const SECTOR: u64 = 512;
/// Bytes of a block of a new image.
const BLOCK: u32 = 2 << 20;
/// The longest path of a parent, in bytes.
const MAX_PATH: u32 = 4096;
/// The most blocks of an image: a table of 64 MiB.
const MAX_BLOCKS: u32 = 1 << 24;
/// The largest disk that the format has, in bytes: 2040 GiB.
pub const MAX_SIZE: u64 = 2040 << 30;
/// The format counts seconds from 2000 on.
const EPOCH: u64 = 946_684_800;
/// An entry of the table for a block that is not there.
pub(super) const ABSENT: u32 = u32::MAX;

/// How a disk lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As it is, with a footer after it.
    Fixed,
    /// In blocks that are made when they are written.
    Dynamic {
        /// Where the table of blocks is.
        table: u64,
        /// How many blocks there may be.
        blocks: u32,
        /// Bytes of a block.
        block: u32,
    },
}

/// The parent of a differencing image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// What the parent is known by.
    pub id: Guid,
    /// Its path, relative to the image.
    pub path: String,
}

/// What footer and header say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Size of the disk in bytes.
    pub size: u64,
    /// How it lies in the file.
    pub kind: Kind,
    /// The parent of a differencing image.
    pub parent: Option<Parent>,
    /// Ranges of the file that no block may lie in: footers, header, table, paths of the parent.
    pub(super) taken: Vec<(u64, u64)>,
    /// The footer as it is.
    pub(super) footer: Vec<u8>,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_be_bytes(field.unwrap_or_default())
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// The complement of the sum of all bytes but the checksum's own, at `at`.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().fold(0u32, |sum, &b| sum.wrapping_add(b.into()));
    !sum(&bytes[..at]).wrapping_add(sum(&bytes[at + 4..]))
}

fn is_footer(bytes: &[u8]) -> bool {
    bytes.len() == 512 && bytes.starts_with(b"conectix") && be32(bytes, 64) == checksum(bytes, 64)
}

impl Shape {
    /// Reads footer and header of the image in `file`.
    pub(super) async fn read(file: &dyn Layer) -> Result<Self, FormatError> {
        let end = file.size();
        if end < SECTOR {
            return Err(refused("it is too short for a footer"));
        }
        // Old programs wrote footers of 511 bytes; those are not supported.
        let mut footer = read_bytes(file, end - SECTOR, 512).await?;
        let at_end = is_footer(&footer);
        if !at_end {
            // A dynamic image has a copy at its start, for when it was not closed.
            footer = read_bytes(file, 0, 512).await?;
            if !is_footer(&footer) || be32(&footer, 60) == 2 {
                return Err(refused("its footer is missing or damaged"));
            }
        }
        let offset = be64(&footer, 16);
        let dynamic = match be32(&footer, 60) {
            3 | 4 if offset.checked_add(1024).is_some_and(|e| e <= end) => {
                read_bytes(file, offset, 1024).await?
            }
            3 | 4 => return Err(refused("its header is beyond the file's end")),
            _ => Vec::new(),
        };
        let mut shape = Self::parse(&footer, &dynamic, end)?;
        if at_end {
            shape.taken.push((end - SECTOR, end));
        }
        if shape.parent.is_some() {
            shape.read_locators(file, &dynamic).await?;
        }
        Ok(shape)
    }

    /// Reads the parent's path where it is written relative to the image.
    async fn read_locators(&mut self, file: &dyn Layer, header: &[u8]) -> Result<(), FormatError> {
        for entry in header[576..768].chunks_exact(24) {
            let (len, offset) = (be32(entry, 8), be64(entry, 16));
            if be32(entry, 0) == 0 || len == 0 {
                continue;
            }
            let end = offset.checked_add(len.into());
            if len > MAX_PATH || end.is_none_or(|end| end > file.size()) {
                return Err(refused("a path of its parent is not within the file"));
            }
            self.taken.push((offset, offset + u64::from(len)));
            if entry.starts_with(b"W2ru") {
                let bytes = read_bytes(file, offset, len as usize).await?;
                let words = bytes
                    .chunks_exact(2)
                    .map(|b| u16::from_le_bytes([b[0], b[1]]));
                let path = text(words)?;
                if let Some(parent) = &mut self.parent {
                    parent.path = path;
                }
            }
        }
        Ok(())
    }

    /// Parses a footer and, of a dynamic image, its header, in a file of `file_size` bytes.
    pub fn parse(footer: &[u8], header: &[u8], file_size: u64) -> Result<Self, FormatError> {
        if !is_footer(footer) {
            return Err(refused("its footer is damaged"));
        }
        if be32(footer, 12) >> 16 != 1 {
            return Err(refused("its version is not known"));
        }
        let size = be64(footer, 48);
        if !size.is_multiple_of(SECTOR) || size > MAX_SIZE {
            return Err(refused(format!("its disk has {size} bytes")));
        }
        let kind = match be32(footer, 60) {
            2 if size + SECTOR <= file_size => Kind::Fixed,
            2 => return Err(refused("the file is shorter than its disk")),
            3 | 4 => Self::parse_dynamic(header, size, file_size)?,
            other => return Err(refused(format!("its kind {other} is not known"))),
        };
        let parent = (be32(footer, 60) == 4).then(|| {
            let words = header[64..576]
                .chunks_exact(2)
                .map(|b| u16::from_be_bytes([b[0], b[1]]));
            Ok::<_, FormatError>(Parent {
                id: header[40..56].try_into().unwrap_or_default(),
                path: text(words)?,
            })
        });
        let mut taken = Vec::new();
        if let Kind::Dynamic { table, blocks, .. } = kind {
            let header = be64(footer, 16);
            taken.push((0, SECTOR));
            taken.push((header, header + 1024));
            taken.push((table, table + u64::from(blocks) * 4));
        }
        Ok(Self {
            size,
            kind,
            parent: parent.transpose()?,
            taken,
            footer: footer.to_vec(),
        })
    }

    fn parse_dynamic(header: &[u8], size: u64, file_size: u64) -> Result<Kind, FormatError> {
        let sound = header.len() == 1024
            && header.starts_with(b"cxsparse")
            && be32(header, 36) == checksum(header, 36);
        if !sound {
            return Err(refused("its header is damaged"));
        }
        let (table, blocks, block) = (be64(header, 16), be32(header, 28), be32(header, 32));
        if !block.is_power_of_two() || !(4096..=256 << 20).contains(&block) {
            return Err(refused(format!("its blocks have {block} bytes")));
        }
        let end = table.checked_add(u64::from(blocks) * 4);
        if blocks > MAX_BLOCKS
            || !table.is_multiple_of(SECTOR)
            || table < SECTOR
            || end.is_none_or(|end| end > file_size)
        {
            return Err(refused("its table of blocks is not within the file"));
        }
        if u64::from(blocks) * u64::from(block) < size {
            return Err(refused("its table of blocks is too short for its disk"));
        }
        Ok(Kind::Dynamic {
            table,
            blocks,
            block,
        })
    }
}

/// A path in UTF-16 up to its end, with the slashes of this world.
fn text(words: impl Iterator<Item = u16>) -> Result<String, FormatError> {
    let words: Vec<u16> = words.take_while(|&word| word != 0).collect();
    let text = String::from_utf16(&words);
    let text = text.map_err(|_| refused("the path of its parent is not text"))?;
    Ok(text.replace('\\', "/"))
}

/// Cylinders, heads and sectors per track as the format's appendix has them.
fn geometry(size: u64) -> [u8; 4] {
    let total = (size / SECTOR).min(65_535 * 16 * 255);
    let (cylinders_heads, heads, sectors);
    if total >= 65_535 * 16 * 63 {
        (sectors, heads) = (255, 16);
        cylinders_heads = total / sectors;
    } else {
        let tracks = total / 17;
        let h = tracks.div_ceil(1024).max(4);
        if tracks < h * 1024 && h <= 16 {
            (sectors, heads, cylinders_heads) = (17, h, tracks);
        } else if total / 31 < 16 * 1024 {
            (sectors, heads, cylinders_heads) = (31, 16, total / 31);
        } else {
            (sectors, heads, cylinders_heads) = (63, 16, total / 63);
        }
    }
    let [high, low] = ((cylinders_heads / heads) as u16).to_be_bytes();
    [high, low, heads as u8, sectors as u8]
}

fn footer(size: u64, kind: u32) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default();
    let mut out = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"conectix");
    put(8, &2u32.to_be_bytes());
    put(12, &0x1_0000u32.to_be_bytes());
    let offset = if kind == 2 { u64::MAX } else { SECTOR };
    put(16, &offset.to_be_bytes());
    let stamp = now.as_secs().saturating_sub(EPOCH) as u32;
    put(24, &stamp.to_be_bytes());
    // Readers take the size from the geometry for some creators; for this one they take what is written.
    put(28, b"win ");
    put(32, &0xa_0000u32.to_be_bytes());
    put(36, b"Wi2k");
    put(40, &size.to_be_bytes());
    put(48, &size.to_be_bytes());
    put(56, &geometry(size));
    put(60, &kind.to_be_bytes());
    // An identity: differencing images would name it.
    let seed = now.as_nanos() ^ u128::from(std::process::id()) << 96;
    put(
        68,
        &seed
            .wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
            .to_be_bytes(),
    );
    let sum = checksum(&out, 64);
    out[64..68].copy_from_slice(&sum.to_be_bytes());
    out
}

/// A path relative to the image as Windows writes it.
fn path_bytes(path: &str) -> Result<Vec<u8>, FormatError> {
    let text = format!(".\\{}", path.replace('/', "\\"));
    let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    if bytes.len() > MAX_PATH as usize || path.is_empty() || path.contains('\0') {
        return Err(refused(
            "the parent's path is not one that the format can have",
        ));
    }
    Ok(bytes)
}

/// Makes an image of a disk of `size` bytes in `file`, which is empty.
///
/// # Errors
/// The format has no disk of this size, or the host's.
pub async fn create(
    file: &Rc<dyn Layer>,
    size: u64,
    dynamic: bool,
    parent: Option<&Parent>,
) -> Result<(), FormatError> {
    if size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
        return Err(refused("a disk has whole sectors and 2040G at most"));
    }
    let kind = match (dynamic, parent) {
        (false, None) => 2,
        (true, None) => 3,
        (true, Some(_)) => 4,
        (false, Some(_)) => return Err(refused("a fixed image has no parent")),
    };
    let foot = footer(size, kind);
    if !dynamic {
        file.resize(size).await?;
        write_bytes(&**file, size, &foot).await?;
        file.flush().await?;
        return Ok(());
    }
    let blocks = size.div_ceil(BLOCK.into()) as u32;
    let path = parent.map(|parent| path_bytes(&parent.path)).transpose()?;
    let path = path.unwrap_or_default();
    let table = (3 * SECTOR + path.len() as u64).next_multiple_of(SECTOR);
    let mut header = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"cxsparse");
    put(8, &u64::MAX.to_be_bytes());
    put(16, &table.to_be_bytes());
    put(24, &0x1_0000u32.to_be_bytes());
    put(28, &blocks.to_be_bytes());
    put(32, &BLOCK.to_be_bytes());
    if let Some(parent) = parent {
        put(40, &parent.id);
        let name = parent.path.rsplit('/').next().unwrap_or_default();
        let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
        // The path stands at its place in full.
        put(64, &name[..name.len().min(510)]);
        put(576, b"W2ru");
        let space = (path.len() as u32).next_multiple_of(SECTOR as u32);
        put(580, &space.to_be_bytes());
        put(584, &(path.len() as u32).to_be_bytes());
        put(592, &(3 * SECTOR).to_be_bytes());
    }
    let sum = checksum(&header, 36);
    header[36..40].copy_from_slice(&sum.to_be_bytes());
    let table_len = (u64::from(blocks) * 4).next_multiple_of(SECTOR).max(SECTOR);
    write_bytes(&**file, 0, &foot).await?;
    write_bytes(&**file, SECTOR, &header).await?;
    if !path.is_empty() {
        write_bytes(&**file, 3 * SECTOR, &path).await?;
    }
    write_bytes(&**file, table, &vec![0xff; table_len as usize]).await?;
    write_bytes(&**file, table + table_len, &foot).await?;
    file.flush().await?;
    Ok(())
}
