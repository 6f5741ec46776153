//! What is known of the disk: sizes, and the parent of a differencing image.

use super::header::{Region, guid, guid_at, le16, le32, le64};
use crate::{
    format::{FormatError, refused},
    layer::{Guid, Layer, read_bytes},
};

pub(super) const FILE_PARAMETERS: u128 = 0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b;
pub(super) const DISK_SIZE: u128 = 0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8;
pub(super) const DISK_ID: u128 = 0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746;
pub(super) const LOGICAL_SECTOR: u128 = 0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f;
pub(super) const PHYSICAL_SECTOR: u128 = 0xcda3_48c7_445d_4471_9cc9_e988_5251_c556;
pub(super) const PARENT_LOCATOR: u128 = 0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c;
pub(super) const VHDX_PARENT: u128 = 0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913;

/// Bytes of the table of items; items follow it.
pub(super) const TABLE_LEN: usize = 64 << 10;
/// The most items of a table.
const MAX_ITEMS: usize = 2047;
/// The longest item that is read, in bytes.
const MAX_ITEM: u64 = 1 << 20;
/// The largest disk that the format has, in bytes: 64 TiB.
pub const MAX_SIZE: u64 = 64 << 40;

/// Bits of the file parameters.
pub(super) const FIXED: u32 = 1;
pub(super) const HAS_PARENT: u32 = 2;
/// Bits of an item.
pub(super) const IS_DISK: u32 = 2;
pub(super) const IS_REQUIRED: u32 = 4;

/// The parent of a differencing image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// What the parent is known by: another one means that it was changed since.
    pub linkage: Guid,
    /// Its path relative to the image, if it is said.
    pub path: Option<String>,
}

/// What the metadata says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes of a block.
    pub block: u64,
    /// Whether all blocks are there from the beginning.
    pub fixed: bool,
    /// Bytes of a sector.
    pub logical_sector: u32,
    /// The parent of a differencing image.
    pub parent: Option<Parent>,
    /// Where in the file the size stands.
    pub(super) size_at: u64,
}

impl Metadata {
    pub(super) async fn read(file: &dyn Layer, region: Region) -> Result<Self, FormatError> {
        let table = read_bytes(file, region.offset, TABLE_LEN).await?;
        let count: usize = le16(&table, 10).into();
        if !table.starts_with(b"metadata") || count > MAX_ITEMS {
            return Err(refused("its metadata is damaged"));
        }
        let (mut parameters, mut size, mut sector, mut locator) = (None, None, None, None);
        let mut size_at = 0;
        for entry in table[32..].chunks_exact(32).take(count) {
            let (offset, len) = (u64::from(le32(entry, 16)), u64::from(le32(entry, 20)));
            let flags = le32(entry, 24);
            let id = guid_at(entry, 0);
            let is = |known: u128| id == guid(known);
            // A user's item of the same name is another one.
            let user = flags & 1 != 0;
            let slot = if !user && is(FILE_PARAMETERS) {
                &mut parameters
            } else if !user && is(DISK_SIZE) {
                size_at = region.offset + offset;
                &mut size
            } else if !user && is(LOGICAL_SECTOR) {
                &mut sector
            } else if !user && is(PARENT_LOCATOR) {
                &mut locator
            } else if !user && (is(DISK_ID) || is(PHYSICAL_SECTOR)) || flags & IS_REQUIRED == 0 {
                continue;
            } else {
                return Err(refused(
                    "its metadata has a required item that is not known",
                ));
            };
            if offset < TABLE_LEN as u64 || len == 0 || len > MAX_ITEM || offset + len > region.len
            {
                return Err(refused("an item of its metadata is not within the region"));
            }
            let bytes = read_bytes(file, region.offset + offset, len as usize).await?;
            if slot.replace(bytes).is_some() {
                return Err(refused("an item of its metadata is there twice"));
            }
        }
        let missing = |what: &str| refused(format!("its metadata does not say its {what}"));
        let parameters = parameters
            .filter(|bytes| bytes.len() >= 8)
            .ok_or_else(|| missing("parameters"))?;
        let size = size
            .filter(|bytes| bytes.len() >= 8)
            .ok_or_else(|| missing("size"))?;
        let sector = sector
            .filter(|bytes| bytes.len() >= 4)
            .ok_or_else(|| missing("sectors"))?;
        let (block, flags) = (u64::from(le32(&parameters, 0)), le32(&parameters, 4));
        let (size, logical_sector) = (le64(&size, 0), le32(&sector, 0));
        if !block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) {
            return Err(refused(format!("its blocks have {block} bytes")));
        }
        if !matches!(logical_sector, 512 | 4096) {
            return Err(refused(format!("its sectors have {logical_sector} bytes")));
        }
        if size > MAX_SIZE || !size.is_multiple_of(logical_sector.into()) {
            return Err(refused(format!("its disk has {size} bytes")));
        }
        if !size_at.is_multiple_of(8) {
            return Err(refused("its metadata is damaged"));
        }
        let parent = if flags & HAS_PARENT != 0 {
            let locator = locator.ok_or_else(|| missing("parent"))?;
            Some(parent(&locator)?)
        } else {
            None
        };
        Ok(Self {
            size,
            block,
            fixed: flags & FIXED != 0,
            logical_sector,
            parent,
            size_at,
        })
    }

    /// Payload blocks for each block of sector bitmaps.
    pub(super) fn ratio(&self) -> u64 {
        (u64::from(self.logical_sector) << 23) / self.block
    }

    /// Blocks of the disk.
    pub(super) fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// Entries of the table of blocks.
    pub(super) fn entries(&self) -> u64 {
        let blocks = self.blocks();
        if self.parent.is_some() {
            blocks.div_ceil(self.ratio()) * (self.ratio() + 1)
        } else {
            blocks + blocks.saturating_sub(1) / self.ratio()
        }
    }

    /// The entry of a payload block.
    pub(super) fn entry(&self, block: u64) -> usize {
        (block + block / self.ratio()) as usize
    }

    /// The entry of the sector bitmap of a payload block.
    pub(super) fn bitmap_entry(&self, block: u64) -> usize {
        let chunk = block / self.ratio();
        (chunk * (self.ratio() + 1) + self.ratio()) as usize
    }
}

fn utf16(bytes: &[u8]) -> Option<String> {
    let words: Vec<u16> = bytes.chunks_exact(2).map(|b| le16(b, 0)).collect();
    String::from_utf16(&words).ok()
}

/// Parses a parent locator ([MS-VHDX] §2.6.2.6).
fn parent(bytes: &[u8]) -> Result<Parent, FormatError> {
    let damaged = || refused("its parent locator is damaged");
    if guid_at(bytes, 0) != guid(VHDX_PARENT) {
        return Err(refused("its parent is of a kind that is not known"));
    }
    let count: usize = le16(bytes, 18).into();
    let (mut linkage, mut path) = (None, None);
    let entries = bytes.get(20..).unwrap_or_default();
    for entry in entries.chunks_exact(12).take(count) {
        let text = |offset: usize, len: u16| {
            let bytes = bytes.get(offset..offset.checked_add(len.into())?)?;
            utf16(bytes)
        };
        let key = text(le32(entry, 0) as usize, le16(entry, 8)).ok_or_else(damaged)?;
        let value = text(le32(entry, 4) as usize, le16(entry, 10)).ok_or_else(damaged)?;
        match &*key {
            "parent_linkage" => linkage = Some(parse_guid(&value).ok_or_else(damaged)?),
            "relative_path" => path = Some(value.replace('\\', "/")),
            _ => {}
        }
    }
    if path.as_ref().is_some_and(|path| path.contains('\0')) {
        return Err(damaged());
    }
    let linkage = linkage.ok_or_else(damaged)?;
    Ok(Parent { linkage, path })
}

/// A GUID as text, in braces.
pub(super) fn guid_text(id: &Guid) -> String {
    let value = u128::from_be_bytes(guid(u128::from_be_bytes(*id)));
    let hex = format!("{value:032x}");
    format!(
        "{{{}-{}-{}-{}-{}}}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

fn parse_guid(text: &str) -> Option<Guid> {
    let text = text.strip_prefix('{')?.strip_suffix('}')?;
    let digits: String = text.chars().filter(|&c| c != '-').collect();
    let hex = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    let value = hex.then(|| u128::from_str_radix(&digits, 16).ok())??;
    Some(guid(value))
}
