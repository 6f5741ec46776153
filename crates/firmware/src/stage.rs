//! Finding room in guest memory while a kernel is being laid out.

use alloc::{borrow::Cow, format, string::String, vec, vec::Vec};

use caisson_memory::{Gpa, PAGE_SIZE, Vtl};

use crate::{
    BOOT_GDT, BootMode, GpaRange, LoadError, MemoryMap,
    elf::Elf,
    error::Size,
    import::{Import, ImportData, ImportList, PageKind},
    layout,
};

/// Below 4 GiB, where 32-bit addresses reach. Page 0 stays free: kernels take
/// address 0 for "none", and the BIOS data area is there.
pub(crate) const BELOW_4G: GpaRange = GpaRange {
    start: PAGE_SIZE,
    end: layout::HIGH_RAM,
};
/// Anywhere but page 0.
pub(crate) const ANYWHERE: GpaRange = GpaRange {
    start: PAGE_SIZE,
    end: u64::MAX,
};

/// Which end of the allowed range to search from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Search {
    Lowest,
    Highest,
}

/// The layout so far: what has been placed, and which usable RAM is left.
pub(crate) struct Stage<'a, 'm> {
    map: &'m MemoryMap,
    free: Vec<GpaRange>,
    imports: ImportList<'a>,
}

impl<'a, 'm> Stage<'a, 'm> {
    pub(crate) fn new(map: &'m MemoryMap) -> Self {
        Self {
            map,
            free: map.usable().collect(),
            imports: ImportList::new(),
        }
    }

    pub(crate) fn map(&self) -> &'m MemoryMap {
        self.map
    }

    pub(crate) fn into_imports(self) -> ImportList<'a> {
        self.imports
    }

    /// Whether all of `range` is usable RAM that nothing has claimed.
    pub(crate) fn is_free(&self, range: &GpaRange) -> bool {
        self.free.iter().any(|f| f.contains(range))
    }

    /// Takes `len` bytes at `gpa` away from later placements.
    pub(crate) fn claim(
        &mut self,
        what: &'static str,
        gpa: u64,
        len: u64,
    ) -> Result<GpaRange, LoadError> {
        let outside = |range| LoadError::OutsideRam {
            what,
            range,
            ram: self.map.ram_bytes(),
            usable: self.usable_text(),
        };
        let Some(range) = GpaRange::at(gpa, len) else {
            return Err(outside(GpaRange {
                start: gpa,
                end: u64::MAX,
            }));
        };
        if range.is_empty() {
            return Ok(range);
        }
        let Some(i) = self.free.iter().position(|f| f.contains(&range)) else {
            if self.map.is_usable(&range) {
                return Err(LoadError::Overlap { what, range });
            }
            return Err(outside(range));
        };
        let whole = self.free.remove(i);
        let rest = [
            GpaRange {
                start: whole.start,
                end: range.start,
            },
            GpaRange {
                start: range.end,
                end: whole.end,
            },
        ];
        let rest = rest.into_iter().filter(|r| !r.is_empty());
        self.free.splice(i..i, rest);
        Ok(range)
    }

    /// Claims room for `len` bytes at a multiple of `align` (a power of two) inside `within`.
    pub(crate) fn find(
        &mut self,
        what: &'static str,
        len: u64,
        align: u64,
        within: GpaRange,
        search: Search,
    ) -> Result<u64, LoadError> {
        let mut largest = 0;
        let fit = |free: &GpaRange| {
            let room = free.intersection(&within);
            if room.is_empty() {
                return None;
            }
            largest = largest.max(room.len());
            let gpa = match search {
                Search::Lowest => crate::bytes::align_up(room.start, align)?,
                Search::Highest => room.end.checked_sub(len)? & !(align - 1),
            };
            (gpa >= room.start && GpaRange::at(gpa, len)?.end <= room.end).then_some(gpa)
        };
        let found = match search {
            Search::Lowest => self.free.iter().find_map(fit),
            Search::Highest => self.free.iter().rev().find_map(fit),
        };
        let Some(gpa) = found else {
            return Err(LoadError::NoRoom {
                what,
                len,
                within,
                largest,
                ram: self.map.ram_bytes(),
            });
        };
        self.claim(what, gpa, len)?;
        Ok(gpa)
    }

    /// Imports contents into a range that has been claimed.
    pub(crate) fn import(
        &mut self,
        name: &'static str,
        gpa: u64,
        kind: PageKind,
        measured: bool,
        data: ImportData<'a>,
    ) -> Result<(), LoadError> {
        let import = Import {
            name,
            gpa: Gpa(gpa),
            vtl: Vtl::VTL0,
            kind,
            measured,
            data,
        };
        Ok(self.imports.push(self.map, import)?)
    }

    /// Imports what the author of the guest supplied into a claimed range.
    pub(crate) fn image(
        &mut self,
        name: &'static str,
        gpa: u64,
        data: impl Into<Cow<'a, [u8]>>,
    ) -> Result<(), LoadError> {
        self.import(
            name,
            gpa,
            PageKind::Image,
            true,
            ImportData::Bytes(data.into()),
        )
    }

    /// Claims room below 4 GiB, lowest first, for a structure that we make,
    /// and imports it. `measured` says that it depends on nothing but the files.
    pub(crate) fn structure(
        &mut self,
        name: &'static str,
        align: u64,
        measured: bool,
        data: Vec<u8>,
    ) -> Result<u64, LoadError> {
        let gpa = self.find(name, data.len() as u64, align, BELOW_4G, Search::Lowest)?;
        self.import(
            name,
            gpa,
            PageKind::Parameters,
            measured,
            ImportData::Bytes(data.into()),
        )?;
        Ok(gpa)
    }

    /// Places a NUL-terminated string of the guest's author below 4 GiB.
    pub(crate) fn string(&mut self, name: &'static str, text: &str) -> Result<u64, LoadError> {
        if let Some(at) = text.bytes().position(|b| b == 0) {
            return Err(LoadError::NulByte { what: name, at });
        }
        let mut bytes = Vec::with_capacity(text.len() + 1);
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
        // Aligned, so that the next structure is too whatever the length.
        let gpa = self.find(name, bytes.len() as u64, 16, BELOW_4G, Search::Lowest)?;
        self.image(name, gpa, bytes)?;
        Ok(gpa)
    }

    /// Places the boot GDT for `mode`.
    pub(crate) fn gdt(&mut self, mode: BootMode) -> Result<Option<u64>, LoadError> {
        let Some(table) = BOOT_GDT.for_mode(mode) else {
            return Ok(None);
        };
        let bytes = table.iter().flat_map(|d| d.to_le_bytes()).collect();
        self.structure("GDT", 16, true, bytes).map(Some)
    }

    /// Claims and imports the segments of `elf` at their load addresses.
    pub(crate) fn elf(&mut self, elf: &Elf<'a>) -> Result<(), LoadError> {
        for s in &elf.segments {
            self.claim("kernel", s.paddr, s.memsz)?;
            let len = s.data.len() as u64;
            self.image("kernel", s.paddr, s.data)?;
            let zero = ImportData::Zero(s.memsz - len);
            self.import("kernel bss", s.paddr + len, PageKind::Image, true, zero)?;
        }
        Ok(())
    }

    /// Says where conventional memory ends in the places where a BIOS does:
    /// the BIOS data area, unless the kernel is there, and the EBDA.
    pub(crate) fn bios_data_area(&mut self) -> Result<(), LoadError> {
        let ebda = layout::EBDA;
        let kib = (ebda.len() / 1024) as u8;
        self.import(
            "EBDA",
            ebda.start,
            PageKind::Parameters,
            true,
            ImportData::Bytes(vec![kib].into()),
        )?;
        let area = layout::BIOS_DATA_AREA;
        if !self.is_free(&area) {
            return Ok(());
        }
        let mut bytes = vec![0; area.len() as usize];
        // 40:0E, segment of the EBDA; 40:13, KiB of conventional memory.
        bytes[0x0e..0x10].copy_from_slice(&((ebda.start >> 4) as u16).to_le_bytes());
        bytes[0x13..0x15].copy_from_slice(&((ebda.start >> 10) as u16).to_le_bytes());
        self.claim("BIOS data area", area.start, area.len())?;
        self.import(
            "BIOS data area",
            area.start,
            PageKind::Parameters,
            true,
            ImportData::Bytes(bytes.into()),
        )
    }

    fn usable_text(&self) -> String {
        let mut text = String::new();
        for r in self.map.usable() {
            if !text.is_empty() {
                text.push_str(", ");
            }
            text.push_str(&format!("{r} ({})", Size(r.len())));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_split_the_free_ranges() {
        let map = MemoryMap::new(16 << 20, 40).unwrap();
        let mut s = Stage::new(&map);
        s.claim("a", 0x20_0000, 0x1000).unwrap();
        assert!(matches!(
            s.claim("b", 0x1f_f000, 0x2000),
            Err(LoadError::Overlap { .. })
        ));
        assert!(matches!(
            s.claim("b", 0xff_f000, 0x2000),
            Err(LoadError::OutsideRam { .. })
        ));
        assert!(matches!(
            s.claim("b", u64::MAX, 2),
            Err(LoadError::OutsideRam { .. })
        ));
        // Below: touching the first claim from either side is fine.
        s.claim("c", 0x1f_f000, 0x1000).unwrap();
        s.claim("d", 0x20_1000, 0x1000).unwrap();
        assert!(!s.is_free(&GpaRange {
            start: 0x20_0fff,
            end: 0x20_2001
        }));
    }

    #[test]
    fn finds_from_either_end() {
        let map = MemoryMap::new(16 << 20, 40).unwrap();
        let mut s = Stage::new(&map);
        let high = GpaRange {
            start: 0x10_0000,
            end: layout::HIGH_RAM,
        };
        assert_eq!(
            s.find("a", 10, 0x1000, high, Search::Lowest).unwrap(),
            0x10_0000
        );
        assert_eq!(
            s.find("b", 10, 0x1000, high, Search::Lowest).unwrap(),
            0x10_1000
        );
        assert_eq!(
            s.find("c", 0x1001, 0x1000, high, Search::Highest).unwrap(),
            0xff_e000
        );
        assert_eq!(s.find("d", 1, 1, high, Search::Highest).unwrap(), 0xff_ffff);
        assert_eq!(
            s.find("e", 1, 0x1000, BELOW_4G, Search::Lowest).unwrap(),
            0x1000
        );
        let e = s
            .find("f", 15 << 20, 0x1000, high, Search::Highest)
            .unwrap_err();
        assert!(matches!(e, LoadError::NoRoom { largest, .. } if largest < 15 << 20));
    }

    proptest::proptest! {
        /// Whatever is found is aligned, inside the allowed range and never overlaps.
        #[test]
        fn placements_never_overlap(wanted in proptest::collection::vec((1u64..0x40_0000, 0u32..13, proptest::bool::ANY), 1..40)) {
            let map = MemoryMap::new(32 << 20, 40).unwrap();
            let mut s = Stage::new(&map);
            let mut taken: Vec<GpaRange> = Vec::new();
            for (len, shift, top) in wanted {
                let search = if top { Search::Highest } else { Search::Lowest };
                let Ok(gpa) = s.find("x", len, 1 << shift, BELOW_4G, search) else { continue };
                let r = GpaRange::at(gpa, len).unwrap();
                assert_eq!(gpa % (1 << shift), 0);
                assert!(map.is_usable(&r));
                assert!(taken.iter().all(|t| t.intersection(&r).is_empty()));
                taken.push(r);
            }
        }
    }
}
