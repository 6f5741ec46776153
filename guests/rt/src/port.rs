//! Port I/O.

use core::arch::asm;

/// COM1's base port.
pub const COM1: u16 = 0x3F8;
/// The debug console: bytes written appear at the VMM; reads give 0xE9.
pub const DEBUGCON: u16 = 0xE9;
/// The debug-exit device: writing `v` ends the VM with status `v << 1 | 1`.
pub const DEBUG_EXIT: u16 = 0xF4;

macro_rules! port_access {
    ($in:ident, $out:ident, $ty:ty, $reg:tt) => {
        #[doc = concat!("Reads a port as ", stringify!($ty), ".")]
        pub fn $in(port: u16) -> $ty {
            let value: $ty;
            // SAFETY: port reads do not touch memory that Rust knows.
            unsafe { asm!(concat!("in ", $reg, ", dx"), out($reg) value, in("dx") port, options(nomem, nostack, preserves_flags)) };
            value
        }
        #[doc = concat!("Writes a port as ", stringify!($ty), ".")]
        pub fn $out(port: u16, value: $ty) {
            // SAFETY: a guest's devices do not write memory that Rust knows.
            unsafe { asm!(concat!("out dx, ", $reg), in($reg) value, in("dx") port, options(nostack, preserves_flags)) };
        }
    };
}
port_access!(inb, outb, u8, "al");
port_access!(inw, outw, u16, "ax");
port_access!(inl, outl, u32, "eax");
