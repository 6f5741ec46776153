//! One access of a vCPU to a device, and the ranges of addresses that devices answer.

use core::fmt;

/// The address space of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Space {
    /// Guest physical addresses, 64 bits.
    Mmio,
    /// x86 I/O ports, 0 to 0xFFFF.
    Pio,
}

impl Space {
    /// The last address of the space.
    pub const fn last_address(self) -> u64 {
        match self {
            Space::Mmio => u64::MAX,
            Space::Pio => 0xFFFF,
        }
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Space::Mmio => "memory",
            Space::Pio => "port",
        })
    }
}

/// A non-empty run of addresses in one space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressRange {
    /// The space the addresses are in.
    pub space: Space,
    /// The first address.
    pub base: u64,
    /// How many addresses, at least 1 in a valid range.
    pub len: u64,
}

impl AddressRange {
    /// A range of guest physical addresses.
    pub const fn mmio(base: u64, len: u64) -> Self {
        Self {
            space: Space::Mmio,
            base,
            len,
        }
    }

    /// A range of I/O ports.
    pub const fn pio(base: u16, len: u16) -> Self {
        Self {
            space: Space::Pio,
            base: base as u64,
            len: len as u64,
        }
    }

    /// The last address of the range; `None` when the range is empty or runs past the end of its space.
    pub const fn last(&self) -> Option<u64> {
        if self.len == 0 {
            return None;
        }
        match self.base.checked_add(self.len - 1) {
            Some(last) if last <= self.space.last_address() => Some(last),
            _ => None,
        }
    }

    /// Whether `address` is in the range.
    pub const fn contains(&self, address: u64) -> bool {
        address >= self.base && address - self.base < self.len
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.last() {
            Some(last) => write!(f, "{} range {:#x}-{:#x}", self.space, self.base, last),
            None => write!(
                f,
                "{} range {:#x} of {:#x} addresses",
                self.space, self.base, self.len
            ),
        }
    }
}

/// Where an access hits a device.
///
/// An access covers one to eight bytes and lies entirely within one claim: an access that straddles claims reaches
/// each of them as a separate access. So a device must cope with *every* length from 1 to 8, at every alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The space of the access.
    pub space: Space,
    /// The absolute address of the first byte.
    pub address: u64,
    /// Which of the device's claims was hit: the index into what [`crate::Device::claims`] returned.
    pub region: u32,
    /// The distance of the first byte from the base of that claim.
    pub offset: u64,
}

impl Access {
    /// Answers a read of a device with byte-wide registers: each byte is read on its own, lowest address first.
    pub fn read_each(&self, data: &mut [u8], mut read: impl FnMut(u64) -> u8) {
        for (offset, byte) in (self.offset..).zip(data) {
            *byte = read(offset);
        }
    }

    /// Splits a write to a device with byte-wide registers: each byte is written on its own, lowest address first.
    pub fn write_each(&self, data: &[u8], mut write: impl FnMut(u64, u8)) {
        for (offset, byte) in (self.offset..).zip(data) {
            write(offset, *byte);
        }
    }
}

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// The access took effect; after a read the buffer holds the answer.
    Done,
    /// The device cannot answer yet and the access had no effect. The caller parks the vCPU and issues the same
    /// access again after the device's next [`crate::Device::poll`] or [`crate::Device::timer`]. Because a parked
    /// access leaves nothing in the device, both can be saved at any time.
    Retry,
}

/// The little-endian value of up to eight bytes; bytes past the eighth are ignored.
pub fn le_value(data: &[u8]) -> u64 {
    data.iter()
        .take(8)
        .rev()
        .fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

/// Fills `data` with the little-endian bytes of `value`; bytes past the eighth are zero.
pub fn put_le(data: &mut [u8], value: u64) {
    let bytes = value.to_le_bytes();
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = bytes.get(index).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{string::ToString, vec::Vec};

    #[test]
    fn last_refuses_empty_and_overlong_ranges() {
        assert_eq!(AddressRange::pio(0x60, 1).last(), Some(0x60));
        assert_eq!(AddressRange::pio(0xFFFF, 1).last(), Some(0xFFFF));
        assert_eq!(AddressRange::pio(0xFFFF, 2).last(), None);
        assert_eq!(AddressRange::mmio(5, 0).last(), None);
        assert_eq!(AddressRange::mmio(u64::MAX, 1).last(), Some(u64::MAX));
        assert_eq!(AddressRange::mmio(u64::MAX, 2).last(), None);
        assert_eq!(AddressRange::mmio(0, u64::MAX).last(), Some(u64::MAX - 1));
    }

    #[test]
    fn ranges_print_in_the_terms_of_their_space() {
        assert_eq!(
            AddressRange::pio(0x3f8, 8).to_string(),
            "port range 0x3f8-0x3ff"
        );
        assert_eq!(
            AddressRange::mmio(0x1000, 0x10).to_string(),
            "memory range 0x1000-0x100f"
        );
    }

    #[test]
    fn values_round_trip_at_each_width() {
        for len in 1..=8 {
            let mut data = [0u8; 8];
            put_le(&mut data[..len], 0x8877_6655_4433_2211);
            let mask = if len == 8 {
                u64::MAX
            } else {
                (1 << (len * 8)) - 1
            };
            assert_eq!(le_value(&data[..len]), 0x8877_6655_4433_2211 & mask);
        }
    }

    #[test]
    fn byte_wide_registers_see_each_byte_in_order() {
        let at = Access {
            space: Space::Pio,
            address: 0x3f9,
            region: 0,
            offset: 1,
        };
        let mut seen = Vec::new();
        at.write_each(&[7, 8], |offset, value| seen.push((offset, value)));
        assert_eq!(seen, [(1, 7), (2, 8)]);
        let mut data = [0; 3];
        at.read_each(&mut data, |offset| offset as u8 * 2);
        assert_eq!(data, [2, 4, 6]);
    }
}
