//! The zero page, `struct boot_params`.

use alloc::{vec, vec::Vec};

use super::header;
use crate::{GpaRange, MemoryMap};

/// Room for entries in the page's E820 table.
const E820_MAX: usize = 128;

/// What the page says.
pub(super) struct Contents<'c> {
    /// From 0x1f1 on, as the kernel file has it.
    pub setup_header: &'c [u8],
    /// Guest physical address of the command line.
    pub cmdline: u64,
    /// Where the initrd is.
    pub initrd: Option<GpaRange>,
    /// Guest physical address of the RSDP.
    pub acpi_rsdp: Option<u64>,
    /// The machine's memory.
    pub memory_map: &'c MemoryMap,
}

/// Builds the page. All that is not set stays zero, which for the screen
/// information means that there is no screen.
pub(super) fn build(c: &Contents<'_>) -> Vec<u8> {
    let mut page = vec![0u8; caisson_memory::PAGE_SIZE as usize];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    let low = |v: u64| (v as u32).to_le_bytes();
    let high = |v: u64| ((v >> 32) as u32).to_le_bytes();

    put(
        header::START,
        &c.setup_header[..c.setup_header.len().min(header::LIMIT - header::START)],
    );
    // vid_mode: normal. type_of_loader: none of the registered ones.
    put(0x1fa, &0xffffu16.to_le_bytes());
    put(0x210, &[0xff]);
    put(0x228, &low(c.cmdline));
    put(0x0c8, &high(c.cmdline));
    let initrd = c.initrd.unwrap_or(GpaRange { start: 0, end: 0 });
    put(0x218, &low(initrd.start));
    put(0x21c, &low(initrd.len()));
    put(0x0c0, &high(initrd.start));
    put(0x0c4, &high(initrd.len()));
    put(0x070, &c.acpi_rsdp.unwrap_or(0).to_le_bytes());

    let e820 = &c.memory_map.e820()[..c.memory_map.e820().len().min(E820_MAX)];
    put(0x1e8, &[e820.len() as u8]);
    for (i, entry) in e820.iter().enumerate() {
        let at = 0x2d0 + i * 20;
        put(at, &entry.range.start.to_le_bytes());
        put(at + 8, &entry.range.len().to_le_bytes());
        put(at + 16, &(entry.kind as u32).to_le_bytes());
    }
    page
}
