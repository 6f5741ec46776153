//! I/O APIC access.

use crate::memory::{read, write};

/// Physical address of the only I/O APIC.
pub const BASE: u64 = 0xFEC0_0000;
/// Redirection entry: level triggered.
pub const LEVEL: u64 = 1 << 15;
/// Redirection entry: active low.
pub const ACTIVE_LOW: u64 = 1 << 13;
/// Redirection entry: remote IRR (read only).
pub const REMOTE_IRR: u64 = 1 << 14;
/// Redirection entry: delivery pending (read only).
pub const DELIVERY_STATUS: u64 = 1 << 12;
/// Redirection entry: masked.
pub const MASKED: u64 = 1 << 16;

/// Reads a register through the index window.
pub fn get(index: u32) -> u32 {
    write(BASE, index);
    read(BASE + 0x10)
}

/// Writes a register through the index window.
pub fn set(index: u32, value: u32) {
    write(BASE, index);
    write(BASE + 0x10, value);
}

/// Number of inputs.
pub fn pins() -> u32 {
    (get(1) >> 16 & 0xFF) + 1
}

/// Reads a redirection entry.
pub fn entry(pin: u32) -> u64 {
    u64::from(get(0x10 + pin * 2)) | u64::from(get(0x11 + pin * 2)) << 32
}

/// Writes a redirection entry, destination first so that an unmasked entry is whole.
pub fn set_entry(pin: u32, value: u64) {
    set(0x11 + pin * 2, (value >> 32) as u32);
    set(0x10 + pin * 2, value as u32);
}

/// Masks both legacy interrupt controllers.
pub fn mask_pics() {
    crate::port::outb(0x21, 0xFF);
    crate::port::outb(0xA1, 0xFF);
}
