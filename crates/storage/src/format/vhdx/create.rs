//! New images.

use std::rc::Rc;

use super::{
    header::{
        BAT_REGION, HEADERS, Header, MAX_TABLE, METADATA_REGION, MIB, REGION_TABLE_LEN,
        REGION_TABLES, SIGNATURE, checksum, guid, random_guid,
    },
    metadata::{
        DISK_ID, DISK_SIZE, FILE_PARAMETERS, FIXED, HAS_PARENT, IS_DISK, IS_REQUIRED,
        LOGICAL_SECTOR, MAX_SIZE, Metadata, PARENT_LOCATOR, PHYSICAL_SECTOR, Parent, TABLE_LEN,
        VHDX_PARENT, guid_text,
    },
    table::State,
};
use crate::{
    format::{FormatError, refused},
    layer::{Guid, Layer, write_bytes},
};

/// Where the log of a new image is: after the headers.
const LOG: u64 = MIB;
/// Where the metadata is.
const METADATA: u64 = 2 * MIB;
/// Where the table of blocks is.
const BAT: u64 = 3 * MIB;

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of the logical sector.
    pub size: u64,
    /// Bytes of a block: a power of two, 1 MiB to 256 MiB.
    pub block: u32,
    /// Bytes of a sector: 512 or 4096.
    pub logical_sector: u32,
    /// Whether all blocks are there from the beginning.
    pub fixed: bool,
    /// The parent: its relative path, and what it is known by ([`Layer::identity`]).
    pub parent: Option<(String, Guid)>,
}

impl CreateOptions {
    /// A dynamic disk of `size` bytes, with everything else as is usual.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            block: 2 << 20,
            logical_sector: 512,
            fixed: false,
            parent: None,
        }
    }
}

fn words(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn locator(path: &str, linkage: &Guid) -> Vec<u8> {
    let path = path.replace('/', "\\");
    let pairs = [
        ("parent_linkage", guid_text(linkage)),
        ("relative_path", path),
    ];
    let mut out = guid(VHDX_PARENT).to_vec();
    out.extend([0; 2]);
    out.extend((pairs.len() as u16).to_le_bytes());
    let mut texts: Vec<u8> = Vec::new();
    let first = 20 + 12 * pairs.len();
    for (key, value) in pairs {
        let (key, value) = (words(key), words(&value));
        out.extend(((first + texts.len()) as u32).to_le_bytes());
        texts.extend(&key);
        out.extend(((first + texts.len()) as u32).to_le_bytes());
        texts.extend(&value);
        out.extend((key.len() as u16).to_le_bytes());
        out.extend((value.len() as u16).to_le_bytes());
    }
    out.extend(texts);
    out
}

/// Makes an image in `file`, which is empty.
///
/// # Errors
/// The options contradict each other, or the host's.
pub async fn create(file: &Rc<dyn Layer>, options: &CreateOptions) -> Result<(), FormatError> {
    let block = u64::from(options.block);
    if !options.block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) {
        return Err(refused("a block is a power of two from 1 MiB to 256 MiB"));
    }
    if !matches!(options.logical_sector, 512 | 4096) {
        return Err(refused("a sector has 512 or 4096 bytes"));
    }
    if options.size > MAX_SIZE || !options.size.is_multiple_of(options.logical_sector.into()) {
        return Err(refused("a disk has whole sectors and 64T at most"));
    }
    if options.fixed && options.parent.is_some() {
        return Err(refused("a fixed image has no parent"));
    }
    let parent = options.parent.as_ref().map(|(path, linkage)| Parent {
        linkage: *linkage,
        path: Some(path.clone()),
    });
    let metadata = Metadata {
        size: options.size,
        block,
        fixed: options.fixed,
        logical_sector: options.logical_sector,
        parent,
        size_at: 0,
    };
    let bat_len = (metadata.entries() * 8).next_multiple_of(MIB).max(MIB);
    if bat_len > MAX_TABLE {
        return Err(refused("the disk is too large for blocks of this size"));
    }
    let header = Header {
        sequence: 1,
        file_write: random_guid()?,
        data_write: random_guid()?,
        log: [0; 16],
        log_len: METADATA - LOG,
        log_offset: LOG,
    };
    let mut table = vec![0; REGION_TABLE_LEN];
    table[..4].copy_from_slice(b"regi");
    table[8..12].copy_from_slice(&2u32.to_le_bytes());
    let regions = [(BAT_REGION, BAT, bat_len), (METADATA_REGION, METADATA, MIB)];
    for (n, (id, offset, len)) in regions.into_iter().enumerate() {
        let entry = &mut table[16 + n * 32..48 + n * 32];
        entry[..16].copy_from_slice(&guid(id));
        entry[16..24].copy_from_slice(&offset.to_le_bytes());
        entry[24..28].copy_from_slice(&(len as u32).to_le_bytes());
        entry[28..32].copy_from_slice(&1u32.to_le_bytes());
    }
    let sum = checksum(&table);
    table[4..8].copy_from_slice(&sum.to_le_bytes());

    let mut end = BAT + bat_len;
    if options.fixed {
        let mut entries = vec![0u64; metadata.entries() as usize];
        for index in 0..metadata.blocks() {
            entries[metadata.entry(index)] = end | State::Full as u64;
            end += block;
        }
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
        write_bytes(&**file, BAT, &bytes).await?;
    }
    file.resize(end).await?;
    write_bytes(&**file, METADATA, &items(options, &metadata)?).await?;
    for at in REGION_TABLES {
        write_bytes(&**file, at, &table).await?;
    }
    for (n, at) in HEADERS.into_iter().enumerate() {
        let header = Header {
            sequence: n as u64 + 1,
            ..header
        };
        write_bytes(&**file, at, &header.encode()).await?;
    }
    let mut first = SIGNATURE.to_vec();
    first.extend(words("Caisson"));
    write_bytes(&**file, 0, &first).await?;
    file.flush().await?;
    Ok(())
}

/// The metadata's table and items.
fn items(options: &CreateOptions, metadata: &Metadata) -> Result<Vec<u8>, FormatError> {
    let mut flags = 0;
    if options.fixed {
        flags |= FIXED;
    }
    if options.parent.is_some() {
        flags |= HAS_PARENT;
    }
    let mut parameters = options.block.to_le_bytes().to_vec();
    parameters.extend(u32::to_le_bytes(flags));
    let disk = IS_DISK | IS_REQUIRED;
    let mut items = vec![
        (FILE_PARAMETERS, parameters, IS_REQUIRED),
        (DISK_SIZE, metadata.size.to_le_bytes().to_vec(), disk),
        (DISK_ID, random_guid()?.to_vec(), disk),
        (
            LOGICAL_SECTOR,
            metadata.logical_sector.to_le_bytes().to_vec(),
            disk,
        ),
        (PHYSICAL_SECTOR, 4096u32.to_le_bytes().to_vec(), disk),
    ];
    if let Some((path, linkage)) = &options.parent {
        if path.is_empty() || path.len() > 4096 || path.contains('\0') {
            return Err(refused("the parent's path is too long"));
        }
        items.push((PARENT_LOCATOR, locator(path, linkage), IS_REQUIRED));
    }
    let mut out = vec![0; TABLE_LEN];
    out[..8].copy_from_slice(b"metadata");
    out[10..12].copy_from_slice(&(items.len() as u16).to_le_bytes());
    for (n, (id, bytes, flags)) in items.into_iter().enumerate() {
        let offset = out.len() as u32;
        let entry = &mut out[32 + n * 32..64 + n * 32];
        entry[..16].copy_from_slice(&guid(id));
        entry[16..20].copy_from_slice(&offset.to_le_bytes());
        entry[20..24].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        entry[24..28].copy_from_slice(&flags.to_le_bytes());
        out.extend(bytes);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    Ok(out)
}
