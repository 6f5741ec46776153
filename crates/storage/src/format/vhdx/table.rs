//! The table of blocks (*BAT*), and bitmaps of sectors.

use std::{cell::RefCell, collections::HashMap, io, rc::Rc};

use super::{
    header::{Layout, MAX_TABLE, MIB, Region, le64},
    metadata::Metadata,
};
use crate::{
    error::corrupt,
    format::{FormatError, refused},
    layer::{Layer, read_bytes},
};

/// The most bitmaps that are remembered.
const MAX_BITMAPS: usize = 32;

/// What of a block there is. The numbers are those of the format; others read as zeroes and are not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum State {
    /// Nothing: the parent shows.
    Absent = 0,
    /// Zeroes.
    Zero = 2,
    /// All of it.
    Full = 6,
    /// What a bitmap says; the parent shows in between.
    Partial = 7,
}

impl State {
    pub(super) fn of(entry: u64) -> Self {
        match entry & 7 {
            0 => Self::Absent,
            6 => Self::Full,
            7 => Self::Partial,
            _ => Self::Zero,
        }
    }
}

/// The offset in an entry.
pub(super) fn offset(entry: u64) -> u64 {
    entry & !(MIB - 1)
}

/// Reads the table, and finds where the next block goes.
pub(super) async fn load(
    file: &dyn Layer,
    layout: &Layout,
    metadata: &Metadata,
) -> Result<(Vec<u64>, u64), FormatError> {
    let len = metadata.entries() * 8;
    if len > layout.bat.len {
        return Err(refused("its table of blocks is too short for its disk"));
    }
    if len > MAX_TABLE {
        return Err(refused("its table of blocks is too long; convert it"));
    }
    let bytes = read_bytes(file, layout.bat.offset, len as usize).await?;
    let table: Vec<u64> = bytes.chunks_exact(8).map(|b| le64(b, 0)).collect();
    let mut ranges: Vec<Region> = Vec::new();
    let size = file.size();
    let mut add = |number: usize, len: u64| {
        let entry = table.get(number).copied().unwrap_or(0);
        let region = Region {
            offset: offset(entry),
            len,
        };
        if region.offset < MIB || region.offset >= size {
            return Err(refused(format!(
                "a block at {:#x} is not within the file",
                region.offset
            )));
        }
        ranges.push(region);
        Ok(())
    };
    let differs = metadata.parent.is_some();
    let mut chunk = None;
    for block in 0..metadata.blocks() {
        let number = metadata.entry(block);
        match State::of(table[number]) {
            State::Full => add(number, metadata.block)?,
            State::Partial if differs => {
                add(number, metadata.block)?;
                let bitmap = metadata.bitmap_entry(block);
                if table.get(bitmap).is_none_or(|entry| entry & 7 != 6) {
                    return Err(refused("a block has no bitmap of its sectors"));
                }
                if chunk.replace(bitmap) != Some(bitmap) {
                    add(bitmap, MIB)?;
                }
            }
            State::Partial => return Err(refused("a block refers to a parent, and there is none")),
            State::Absent | State::Zero => {}
        }
    }
    ranges.extend(layout.taken());
    ranges.sort_unstable_by_key(|region| region.offset);
    if ranges.windows(2).any(|pair| pair[0].end() > pair[1].offset) {
        return Err(refused(
            "two blocks, or a block and a table, lie over each other",
        ));
    }
    let last = ranges.last().map_or(0, |region| region.end());
    Ok((table, last.max(size).next_multiple_of(MIB)))
}

/// Bitmaps of sectors, as they are in the file. They do not change: blocks that are written become whole.
#[derive(Default)]
pub(super) struct Bitmaps {
    known: RefCell<HashMap<u64, Rc<Vec<u8>>>>,
}

impl Bitmaps {
    /// The bitmap at `offset`.
    pub(super) async fn at(&self, file: &dyn Layer, offset: u64) -> io::Result<Rc<Vec<u8>>> {
        if offset == 0 {
            return Err(corrupt("a block has no bitmap of its sectors"));
        }
        let known = self.known.borrow().get(&offset).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let bits = Rc::new(read_bytes(file, offset, MIB as usize).await?);
        let mut known = self.known.borrow_mut();
        if known.len() >= MAX_BITMAPS {
            known.clear();
        }
        known.insert(offset, bits.clone());
        Ok(bits)
    }
}
