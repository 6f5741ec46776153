//! Where a function is.

use core::fmt;

/// Bytes of one function's configuration page in the ECAM window (PCI Express Base 5.0 §7.2.2).
pub const FUNCTION_PAGE: u64 = 4096;
/// Bytes of one bus in the ECAM window: 32 devices of 8 functions.
pub const ECAM_BUS_LEN: u64 = 256 * FUNCTION_PAGE;

/// Device and function number on bus 0; by default 00:00.0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FunctionAddress {
    device: u8,
    function: u8,
}

impl FunctionAddress {
    /// Device 0 to 31, function 0 to 7; `None` for numbers beyond.
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 {
            Some(Self { device, function })
        } else {
            None
        }
    }

    /// The device number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.device
    }

    /// The function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.function
    }

    /// The distance of its configuration page from the start of the ECAM window.
    pub const fn ecam_offset(self) -> u64 {
        (self.device as u64) << 15 | (self.function as u64) << 12
    }
}

impl fmt::Display for FunctionAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.device, self.function)
    }
}

/// Which of a device's four interrupt pins a function drives (PCI Local Bus 3.0 §2.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum InterruptPin {
    /// INTA#, what a device with one function uses.
    A = 1,
    /// INTB#.
    B = 2,
    /// INTC#.
    C = 3,
    /// INTD#.
    D = 4,
}
