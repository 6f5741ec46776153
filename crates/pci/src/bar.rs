//! Base address registers (PCI Local Bus 3.0 §6.2.5.1).

use caisson_device::{AddressRange, Space};

use crate::config_space::ConfigSpace;

/// Offset of the first base address register.
pub(crate) const FIRST: usize = 0x10;
/// How many a function has.
pub(crate) const COUNT: usize = 6;

/// What a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports, below 0x10000.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere. The next register holds the upper half of the address.
    Memory64,
}

/// One base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// Which register, 0 to 5.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Bytes: a power of two, at least 16 for memory and 4 for ports.
    pub size: u64,
    /// Where it is after a reset, as firmware would have placed it; a multiple of the size. Nothing answers there before
    /// the guest sets the enable bit in the command register.
    pub address: u64,
    /// What it is, for messages and `inspect`.
    pub label: &'static str,
}

impl BarSpec {
    /// The register's offset in configuration space.
    pub(crate) fn offset(&self) -> usize {
        FIRST + 4 * usize::from(self.index)
    }

    /// How many registers it takes.
    pub(crate) fn registers(&self) -> usize {
        if self.kind == BarKind::Memory64 { 2 } else { 1 }
    }

    /// What is wrong with it, for a person.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        let (least, most) = match self.kind {
            BarKind::Io => (4, 256),
            BarKind::Memory32 => (16, 1 << 31),
            BarKind::Memory64 => (16, 1 << 62),
        };
        if usize::from(self.index) + self.registers() > COUNT {
            return Err("a function has six base address registers");
        }
        if !self.size.is_power_of_two() || self.size < least || self.size > most {
            return Err(
                "a range is a power of two: 4 to 256 ports, or 16 bytes of memory and more",
            );
        }
        let end = match self.kind {
            BarKind::Io => 1 << 16,
            BarKind::Memory32 => 1 << 32,
            BarKind::Memory64 => u64::MAX,
        };
        match self.address.checked_add(self.size) {
            Some(last) if self.address.is_multiple_of(self.size) && last <= end => Ok(()),
            _ => Err("a range is placed at a multiple of its size and ends within its space"),
        }
    }

    /// Puts the register into `space`: the type bits, and which bits of the address can be written.
    pub(crate) fn place(&self, space: &mut ConfigSpace) {
        let (kind, fixed) = match self.kind {
            BarKind::Io => (0b01, 0b11),
            BarKind::Memory32 => (0b0000, 0b1111),
            BarKind::Memory64 => (0b0100, 0b1111),
        };
        let writable = !(self.size - 1) & !fixed;
        let value = self.address | kind;
        match self.kind {
            // The upper half of an I/O register is wired to zero: there are only 64 Ki ports.
            BarKind::Io => space.put(
                self.offset(),
                &(value as u32).to_le_bytes(),
                &(writable as u32 & 0xffff).to_le_bytes(),
            ),
            BarKind::Memory32 => space.put(
                self.offset(),
                &(value as u32).to_le_bytes(),
                &(writable as u32).to_le_bytes(),
            ),
            BarKind::Memory64 => {
                space.put(self.offset(), &value.to_le_bytes(), &writable.to_le_bytes());
            }
        }
    }

    /// The range that the register's present value means; `None` for one that no access can hit.
    pub(crate) fn range(&self, space: &ConfigSpace) -> Option<AddressRange> {
        let low = u64::from(space.u32(self.offset()));
        let range = match self.kind {
            BarKind::Io => AddressRange {
                space: Space::Pio,
                base: low & 0xfffc,
                len: self.size,
            },
            BarKind::Memory32 => AddressRange::mmio(low & !0xf, self.size),
            BarKind::Memory64 => {
                let high = u64::from(space.u32(self.offset() + 4));
                AddressRange::mmio((high << 32 | low) & !0xf, self.size)
            }
        };
        range.last().map(|_| range)
    }
}
