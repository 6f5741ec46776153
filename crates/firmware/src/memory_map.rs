//! The guest physical address map of a PC and its E820 description.

use alloc::vec::Vec;
use core::fmt;

use caisson_memory::PAGE_SIZE;

use crate::error::Size;

/// Fixed addresses of the PC memory map. Everything that places RAM, ROM,
/// tables or MMIO below 4 GiB takes them from here.
pub mod layout {
    use super::GpaRange;

    /// BIOS data area, which real-mode software and some kernels read.
    pub const BIOS_DATA_AREA: GpaRange = GpaRange {
        start: 0x400,
        end: 0x500,
    };
    /// Extended BIOS data area: the last KiB of conventional memory.
    pub const EBDA: GpaRange = GpaRange {
        start: 0x9_fc00,
        end: 0xa_0000,
    };
    /// Video memory and adapter ROMs on a PC; backed by RAM here but not
    /// offered to the guest.
    pub const ADAPTER_HOLE: GpaRange = GpaRange {
        start: 0xa_0000,
        end: 0xe_0000,
    };
    /// Where the ACPI tables go: inside the range that is searched for the
    /// RSDP on 16-byte boundaries (ACPI 6.5, 5.2.5.1).
    pub const ACPI_TABLES: GpaRange = GpaRange {
        start: 0xe_0000,
        end: 0xf_0000,
    };
    /// Where the SMBIOS entry point and structures go: the range searched for
    /// the anchor string (SMBIOS 3.7, 5.2).
    pub const SMBIOS: GpaRange = GpaRange {
        start: 0xf_0000,
        end: 0x10_0000,
    };
    /// First byte of extended memory.
    pub const EXTENDED_MEMORY: u64 = 0x10_0000;
    /// RAM below 4 GiB ends here at the latest; the rest continues at [`HIGH_RAM`].
    pub const LOW_RAM_LIMIT: u64 = 0xc000_0000;
    /// Addresses below 4 GiB for PCI BARs and the configuration window.
    pub const PCI_HOLE: GpaRange = GpaRange {
        start: LOW_RAM_LIMIT,
        end: IOAPIC,
    };
    /// Addresses for 32-bit memory ranges of PCI functions.
    pub const PCI_MEMORY: GpaRange = GpaRange {
        start: LOW_RAM_LIMIT,
        end: 0xe000_0000,
    };
    /// The PCI configuration window (ECAM): room for 256 buses.
    pub const PCI_ECAM: GpaRange = GpaRange {
        start: 0xe000_0000,
        end: 0xf000_0000,
    };
    /// Registers of virtio devices without PCI, a page each.
    pub const VIRTIO_MMIO: GpaRange = GpaRange {
        start: 0xf000_0000,
        end: 0xf010_0000,
    };
    /// How many bytes of addresses above RAM there are for 64-bit memory ranges of PCI functions, at most.
    pub const PCI_MEMORY_HIGH_LEN: u64 = 64 << 30;
    /// The I/O APIC's registers.
    pub const IOAPIC: u64 = 0xfec0_0000;
    /// Reset value of the local APIC base.
    pub const LAPIC: u64 = 0xfee0_0000;
    /// RAM that does not fit below the hole starts here.
    pub const HIGH_RAM: u64 = 1 << 32;
    /// The least RAM a machine may have: real-mode memory and the ROM area.
    pub const MIN_RAM: u64 = 0x10_0000;
}

/// A half-open range of guest physical addresses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpaRange {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
}

impl GpaRange {
    /// The range of `len` bytes at `start`, or `None` where it would pass 2^64.
    pub const fn at(start: u64, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// Length in bytes.
    pub const fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether the range holds no address.
    pub const fn is_empty(&self) -> bool {
        self.end <= self.start
    }

    /// Whether `other` lies wholly inside.
    pub const fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The addresses in both.
    pub(crate) fn intersection(&self, other: &Self) -> Self {
        Self {
            start: self.start.max(other.start),
            end: self.end.min(other.end),
        }
    }
}

impl fmt::Display for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

impl fmt::Debug for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Type of an E820 range (ACPI 6.5, table 15.1). The numbers are also those of
/// PVH and Multiboot memory maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum E820Kind {
    /// RAM that the guest may use.
    Usable = 1,
    /// Not for the guest to use.
    Reserved = 2,
    /// ACPI tables; usable once they have been read.
    AcpiReclaimable = 3,
    /// To be kept across sleep states.
    AcpiNvs = 4,
    /// Defective memory.
    Unusable = 5,
}

/// One range of the memory map as the guest is told it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct E820Entry {
    /// The addresses.
    pub range: GpaRange,
    /// What they are.
    pub kind: E820Kind,
}

/// Why a memory map could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryMapError {
    /// Less RAM than a PC can start with.
    #[error("{ram} of memory is less than a PC needs: give the machine at least {min}",
        ram = Size(*.ram), min = Size(layout::MIN_RAM))]
    TooSmall {
        /// Bytes asked for.
        ram: u64,
    },
    /// Not whole pages.
    #[error("{0} bytes of memory are not a whole number of 4096-byte pages")]
    Unaligned(u64),
    /// More than the vCPUs can address.
    #[error("{ram} of memory ends at address {end:#x}, past what a vCPU with {phys_bits} physical \
        address bits can reach: give the machine at most {max}", ram = Size(*.ram), max = Size(*.max))]
    TooLarge {
        /// Bytes asked for.
        ram: u64,
        /// Where the last byte of RAM would end.
        end: u128,
        /// Width of a guest physical address.
        phys_bits: u8,
        /// The most RAM that fits.
        max: u64,
    },
}

/// Where RAM is, and what the guest is told about it.
///
/// RAM starts at 0 and continues at 4 GiB what does not fit below
/// [`layout::LOW_RAM_LIMIT`]. The adapter and BIOS areas below 1 MiB are backed
/// by RAM too (the tables live there) but reserved in the E820 map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    ram_bytes: u64,
    reach: u64,
    backing: Vec<GpaRange>,
    e820: Vec<E820Entry>,
}

impl MemoryMap {
    /// The map of a machine with `ram_bytes` of RAM whose vCPUs have
    /// `phys_bits` bits of physical address.
    ///
    /// # Errors
    /// RAM below 1 MiB, not in whole pages, or past the reach of `phys_bits`.
    pub fn new(ram_bytes: u64, phys_bits: u8) -> Result<Self, MemoryMapError> {
        if ram_bytes < layout::MIN_RAM {
            return Err(MemoryMapError::TooSmall { ram: ram_bytes });
        }
        if !ram_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryMapError::Unaligned(ram_bytes));
        }
        let low = ram_bytes.min(layout::LOW_RAM_LIMIT);
        let high = ram_bytes - low;
        let end = if high == 0 {
            u128::from(low)
        } else {
            u128::from(layout::HIGH_RAM) + u128::from(high)
        };
        // 52 is the architecture's limit (SDM vol. 3A, 4.1.4).
        let reach = 1u64 << phys_bits.clamp(32, 52);
        if end > u128::from(reach) {
            let max = layout::LOW_RAM_LIMIT + (reach - layout::HIGH_RAM);
            return Err(MemoryMapError::TooLarge {
                ram: ram_bytes,
                end,
                phys_bits,
                max,
            });
        }

        let mut backing = alloc::vec![GpaRange { start: 0, end: low }];
        let mut e820 = Vec::new();
        let mut tell = |start, end, kind| {
            if start < end {
                e820.push(E820Entry {
                    range: GpaRange { start, end },
                    kind,
                });
            }
        };
        tell(0, layout::EBDA.start, E820Kind::Usable);
        tell(layout::EBDA.start, layout::EBDA.end, E820Kind::Reserved);
        // From the tables to 1 MiB. The adapter hole before it is left out, as
        // on a PC, where it is not memory.
        tell(
            layout::ACPI_TABLES.start,
            layout::SMBIOS.end,
            E820Kind::Reserved,
        );
        tell(layout::EXTENDED_MEMORY, low, E820Kind::Usable);
        if high > 0 {
            let range = GpaRange {
                start: layout::HIGH_RAM,
                end: layout::HIGH_RAM + high,
            };
            tell(range.start, range.end, E820Kind::Usable);
            backing.push(range);
        }
        Ok(Self {
            ram_bytes,
            reach,
            backing,
            e820,
        })
    }

    /// Tells the guest that `range`, which is no RAM, is taken.
    pub fn reserve(&mut self, range: GpaRange) {
        let kind = E820Kind::Reserved;
        let at = self
            .e820
            .partition_point(|entry| entry.range.start < range.start);
        self.e820.insert(at, E820Entry { range, kind });
    }

    /// Addresses for 64-bit memory ranges of PCI functions: above RAM, from a multiple of 4 GiB on. `None` where the
    /// vCPUs do not reach that far.
    pub fn pci_memory_high(&self) -> Option<GpaRange> {
        let start = self
            .end()
            .max(layout::HIGH_RAM)
            .checked_next_multiple_of(layout::HIGH_RAM)?;
        let end = start
            .saturating_add(layout::PCI_MEMORY_HIGH_LEN)
            .min(self.reach);
        (start < end).then_some(GpaRange { start, end })
    }

    /// How much RAM the machine has, in bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    /// The ranges that must be backed by memory, in address order: one, or two
    /// where there is RAM above 4 GiB.
    pub fn backing(&self) -> &[GpaRange] {
        &self.backing
    }

    /// What the guest is told, in address order, without overlaps.
    pub fn e820(&self) -> &[E820Entry] {
        &self.e820
    }

    /// The ranges that the guest and a loader may use.
    pub fn usable(&self) -> impl Iterator<Item = GpaRange> + '_ {
        self.e820
            .iter()
            .filter(|e| e.kind == E820Kind::Usable)
            .map(|e| e.range)
    }

    /// Whether all of `range` is backed by memory.
    pub fn is_backed(&self, range: &GpaRange) -> bool {
        self.backing.iter().any(|b| b.contains(range))
    }

    /// Whether all of `range` is RAM that the guest may use.
    pub fn is_usable(&self, range: &GpaRange) -> bool {
        self.usable().any(|b| b.contains(range))
    }

    /// One past the last byte of RAM.
    pub fn end(&self) -> u64 {
        self.backing.last().map_or(0, |b| b.end)
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn one_mebibyte_is_conventional_memory_only() {
        let m = MemoryMap::new(MIB, 40).unwrap();
        let usable: Vec<_> = m.usable().collect();
        assert_eq!(
            usable,
            [GpaRange {
                start: 0,
                end: 0x9_fc00
            }]
        );
        assert_eq!(m.backing(), [GpaRange { start: 0, end: MIB }]);
    }

    #[test]
    fn windows_for_pci_are_apart_from_ram_and_within_reach() {
        let window = |ram, bits| {
            let map = MemoryMap::new(ram, bits).unwrap();
            map.pci_memory_high()
                .map(|window| (window.start / GIB, window.end / GIB))
        };
        assert_eq!(window(GIB, 40), Some((4, 68)));
        assert_eq!(window(6 * GIB, 40), Some((8, 72)));
        assert_eq!(window(6 * GIB, 36), Some((8, 64)));
        assert_eq!(window(GIB, 32), None);
        let mut map = MemoryMap::new(6 * GIB, 40).unwrap();
        map.reserve(layout::PCI_ECAM);
        let starts: Vec<_> = map.e820().iter().map(|entry| entry.range.start).collect();
        assert!(starts.is_sorted());
        assert!(!map.is_usable(&layout::PCI_ECAM));
        let parts = [layout::PCI_MEMORY, layout::PCI_ECAM, layout::VIRTIO_MMIO];
        assert!(parts.iter().all(|part| layout::PCI_HOLE.contains(part)));
        assert!(parts.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }

    #[test]
    fn ram_continues_above_the_hole() {
        let m = MemoryMap::new(6 * GIB, 40).unwrap();
        assert_eq!(
            m.backing(),
            [
                GpaRange {
                    start: 0,
                    end: 3 * GIB
                },
                GpaRange {
                    start: 4 * GIB,
                    end: 7 * GIB
                }
            ]
        );
        assert_eq!(m.end(), 7 * GIB);
        let m = MemoryMap::new(3 * GIB, 40).unwrap();
        assert_eq!(m.backing().len(), 1);
        let m = MemoryMap::new(3 * GIB + 4096, 40).unwrap();
        assert_eq!(
            m.backing()[1],
            GpaRange {
                start: 4 * GIB,
                end: 4 * GIB + 4096
            }
        );
    }

    #[test]
    fn refuses_what_cannot_be_with_numbers() {
        let e = MemoryMap::new(MIB - 4096, 40).unwrap_err().to_string();
        assert!(e.contains("1020 KiB") && e.contains("1 MiB"), "{e}");
        assert_eq!(
            MemoryMap::new(2 * MIB + 1, 40),
            Err(MemoryMapError::Unaligned(2 * MIB + 1))
        );
        assert!(MemoryMap::new((1 << 40) - GIB, 40).is_ok());
        let e = MemoryMap::new(1 << 40, 40).unwrap_err().to_string();
        assert!(
            e.contains("40 physical address bits") && e.contains("1023 GiB"),
            "{e}"
        );
        assert!(MemoryMap::new(!4095, 64).is_err());
    }

    #[test]
    fn terabytes_fit_in_wide_machines() {
        assert_eq!(MemoryMap::new(8 << 40, 46).unwrap().ram_bytes(), 8 << 40);
    }

    proptest::proptest! {
        /// Every byte of RAM is backed once, E820 ranges are sorted, do not
        /// overlap, and what they call usable is backed.
        #[test]
        fn map_is_consistent(pages in 256u64..(1 << 34)) {
            let m = MemoryMap::new(pages * PAGE_SIZE, 48).unwrap();
            assert_eq!(m.backing().iter().map(GpaRange::len).sum::<u64>(), pages * PAGE_SIZE);
            for pair in m.e820().windows(2) {
                assert!(pair[0].range.end <= pair[1].range.start);
            }
            for r in m.usable() {
                assert!(!r.is_empty() && m.is_backed(&r));
                assert!(r.intersection(&layout::PCI_HOLE).is_empty());
                assert!(r.intersection(&layout::ACPI_TABLES).is_empty());
            }
        }
    }
}
