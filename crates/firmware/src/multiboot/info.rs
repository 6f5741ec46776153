//! The Multiboot information structure (specification 3.3).

use alloc::{vec, vec::Vec};

use super::Placed;
use crate::{E820Kind, LoadError, layout, stage::Stage};

const MEM: u32 = 1 << 0;
const CMDLINE: u32 = 1 << 2;
const MODS: u32 = 1 << 3;
const MMAP: u32 = 1 << 6;
const LOADER_NAME: u32 = 1 << 9;
/// Up to and with the framebuffer fields, which stay zero.
const LEN: usize = 120;

/// Places the structure and all that it points to, below 4 GiB and lowest
/// first, so below 1 MiB as long as there is room.
pub(super) fn place(
    cmdline: &str,
    modules: &[Placed],
    stage: &mut Stage<'_, '_>,
) -> Result<u64, LoadError> {
    let map = stage.map();
    let cmdline = stage.string("command line", cmdline)?;
    let loader = stage.string("boot loader name", "Caisson")?;
    let mods = if modules.is_empty() {
        0
    } else {
        let list = modules
            .iter()
            .flat_map(|m| [m.range.start, m.range.end, m.string, 0]);
        let bytes: Vec<u8> = list.flat_map(low).collect();
        stage.structure("Multiboot module list", 16, false, bytes)?
    };
    let mut mmap = Vec::new();
    for e in map.e820() {
        // The size field does not count itself.
        mmap.extend(20u32.to_le_bytes());
        mmap.extend(e.range.start.to_le_bytes());
        mmap.extend(e.range.len().to_le_bytes());
        mmap.extend((e.kind as u32).to_le_bytes());
    }
    let mmap_len = mmap.len() as u64;
    let mmap = stage.structure("Multiboot memory map", 16, false, mmap)?;

    // In KiB: conventional memory, and extended memory up to its first hole.
    let lower = layout::EBDA.start >> 10;
    let upper = map
        .e820()
        .iter()
        .find(|e| e.kind == E820Kind::Usable && e.range.start == layout::EXTENDED_MEMORY)
        .map_or(0, |e| e.range.len() >> 10);

    let mut info = vec![0; LEN];
    let mut put = |at: usize, value: u64| info[at..at + 4].copy_from_slice(&low(value));
    put(0, (MEM | CMDLINE | MODS | MMAP | LOADER_NAME).into());
    put(4, lower);
    put(8, upper);
    put(16, cmdline);
    put(20, modules.len() as u64);
    put(24, mods);
    put(44, mmap_len);
    put(48, mmap);
    put(64, loader);
    stage.structure("Multiboot information", 16, false, info)
}

/// Everything placed here is below 4 GiB.
fn low(value: u64) -> [u8; 4] {
    (value as u32).to_le_bytes()
}
