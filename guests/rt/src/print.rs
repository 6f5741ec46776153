//! Text output to the debug console and COM1.

use crate::port::{COM1, DEBUGCON, inb, outb};
use core::fmt;

/// A sink for formatted text.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for b in s.bytes() {
            outb(DEBUGCON, b);
            serial(b);
        }
        Ok(())
    }
}

/// Sends one byte through COM1, waiting a bounded time for room.
fn serial(byte: u8) {
    for _ in 0..10_000 {
        if inb(COM1 + 5) & 0x20 != 0 {
            break;
        }
    }
    outb(COM1, byte);
}

/// Prints formatted text.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => {{
        use core::fmt::Write;
        let _ = write!($crate::print::Console, $($arg)*);
    }};
}

/// Prints formatted text and a line end.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => {{
        $crate::print!($($arg)*);
        $crate::print!("\n");
    }};
}
