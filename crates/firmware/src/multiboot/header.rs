//! The Multiboot header (specification 3.1).

use alloc::format;

use super::corrupt;
use crate::{LoadError, bytes::u32_at};

const MAGIC: u32 = 0x1bad_b002;
/// The header is wholly inside so many bytes from the start of the file.
const SEARCH: usize = 8192;
/// Required features (bits 0 to 15) that are known: page-aligned modules,
/// memory information, video mode.
const KNOWN: u32 = 0b111;
const REQUIRED: u32 = 0xffff;
/// The address fields are valid.
const ADDRESS_FIELDS: u32 = 1 << 16;

/// A header in a file.
pub(crate) struct Header {
    /// Where in the file.
    offset: u64,
    flags: u32,
}

/// What the address fields ask for, checked against each other.
pub(super) struct Addresses {
    /// First byte of the file to load.
    pub file_offset: u64,
    /// Where it goes.
    pub load_addr: u64,
    /// How many bytes.
    pub load_len: u64,
    /// How many zero bytes follow.
    pub bss_len: u64,
    /// Entry point.
    pub entry: u64,
}

/// Finds the header: 4-byte aligned, checksummed.
pub(crate) fn find(file: &[u8]) -> Option<Header> {
    let head = &file[..file.len().min(SEARCH)];
    (0..head.len() as u64).step_by(4).find_map(|offset| {
        if u32_at(head, offset)? != MAGIC {
            return None;
        }
        let flags = u32_at(head, offset + 4)?;
        let checksum = u32_at(head, offset + 8)?;
        let sum = MAGIC.wrapping_add(flags).wrapping_add(checksum);
        (sum == 0).then_some(Header { offset, flags })
    })
}

impl Header {
    /// The lowest feature bit that a loader must understand and this one does not.
    pub(super) fn unknown_requirement(&self) -> Option<u32> {
        let unknown = self.flags & REQUIRED & !KNOWN;
        (unknown != 0).then(|| unknown.trailing_zeros())
    }

    /// The address fields, if the header has them. They take precedence over ELF headers.
    pub(super) fn addresses(&self, file: &[u8]) -> Result<Option<Addresses>, LoadError> {
        if self.flags & ADDRESS_FIELDS == 0 {
            return Ok(None);
        }
        let mut fields = [0u64; 5];
        for (i, field) in fields.iter_mut().enumerate() {
            let at = self.offset + 12 + i as u64 * 4;
            *field = u32_at(file, at)
                .map(u64::from)
                .ok_or(LoadError::Truncated {
                    kind: super::KIND,
                    what: "the Multiboot header",
                    needed: self.offset + 32,
                    have: file.len() as u64,
                })?;
        }
        let [header_addr, load_addr, load_end, bss_end, entry] = fields;
        let Some(before) = header_addr.checked_sub(load_addr) else {
            return Err(corrupt(format!(
                "its load address {load_addr:#x} is above the address {header_addr:#x} of the header in it"
            )));
        };
        let Some(file_offset) = self.offset.checked_sub(before) else {
            return Err(corrupt(format!(
                "its header is at {:#x} in the file and {before:#x} into what is loaded, which would start before the file",
                self.offset
            )));
        };
        let load_len = match load_end {
            0 => (file.len() as u64).saturating_sub(file_offset),
            end => end.checked_sub(load_addr).ok_or_else(|| {
                corrupt(format!(
                    "what it loads starts at {load_addr:#x} and ends at {end:#x}"
                ))
            })?,
        };
        let bss_len = match bss_end {
            0 => 0,
            end => end.checked_sub(load_addr + load_len).ok_or_else(|| {
                corrupt(format!(
                    "its bss ends at {end:#x}, before it starts at {:#x}",
                    load_addr + load_len
                ))
            })?,
        };
        Ok(Some(Addresses {
            file_offset,
            load_addr,
            load_len,
            bss_len,
            entry,
        }))
    }
}
