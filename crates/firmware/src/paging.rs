//! The page tables that a 64-bit kernel is entered with.

use alloc::vec::Vec;

use caisson_memory::PAGE_SIZE;

use crate::{
    LoadError,
    import::{ImportData, PageKind},
    stage::{BELOW_4G, Search, Stage},
};

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
/// Page directories: one per GiB.
const DIRECTORIES: u64 = 4;
const LARGE_PAGE: u64 = 2 << 20;

/// Places tables that map the first 4 GiB to themselves, writable and
/// executable, in 2 MiB pages (SDM vol. 3A, 4.5); every CPU with long mode has
/// those. Returns the value for CR3.
///
/// 4 GiB is enough wherever the initrd and the rest of RAM are: Linux maps what
/// it touches beyond that by itself.
pub(crate) fn identity_map(stage: &mut Stage<'_, '_>) -> Result<u64, LoadError> {
    let name = "boot page tables";
    let len = (2 + DIRECTORIES) * PAGE_SIZE;
    let pml4 = stage.find(name, len, PAGE_SIZE, BELOW_4G, Search::Lowest)?;
    let pdpt = pml4 + PAGE_SIZE;
    let first_directory = pdpt + PAGE_SIZE;

    let mut tables = Vec::with_capacity(len as usize);
    let mut table = |entry: &dyn Fn(u64) -> u64| {
        for i in 0..ENTRIES {
            tables.extend_from_slice(&entry(i).to_le_bytes());
        }
    };
    table(&|i| if i == 0 { pdpt | PRESENT_WRITABLE } else { 0 });
    table(&|i| {
        if i < DIRECTORIES {
            (first_directory + i * PAGE_SIZE) | PRESENT_WRITABLE
        } else {
            0
        }
    });
    for d in 0..DIRECTORIES {
        table(&|i| ((d * ENTRIES + i) * LARGE_PAGE) | LARGE | PRESENT_WRITABLE);
    }
    stage.import(
        name,
        pml4,
        PageKind::Parameters,
        true,
        ImportData::Bytes(tables.into()),
    )?;
    Ok(pml4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryMap;

    #[test]
    fn every_address_below_4_gib_maps_to_itself() {
        let map = MemoryMap::new(1 << 20, 40).unwrap();
        let mut stage = Stage::new(&map);
        let cr3 = identity_map(&mut stage).unwrap();
        let imports = stage.into_imports();
        let entry = |table: u64, i: u64| {
            let mut b = [0; 8];
            imports.read(table + i * 8, &mut b);
            u64::from_le_bytes(b)
        };
        for gva in [0u64, 0x1000, 0x1f_ffff, 0x20_0000, 0xbfff_ffff, 0xffff_ffff] {
            let pml4e = entry(cr3, gva >> 39);
            let pdpte = entry(pml4e & !0xfff, gva >> 30 & 511);
            let pde = entry(pdpte & !0xfff, gva >> 21 & 511);
            assert_eq!((pml4e & 0xfff, pdpte & 0xfff, pde & 0xfff), (3, 3, 0x83));
            assert_eq!((pde & !0xfff) + (gva & 0x1f_ffff), gva);
        }
        assert_eq!(entry(entry(cr3, 0) & !0xfff, 4), 0);
    }
}
