//! The outer ends of devices with a port.

use caisson_chipset::uart::Uart;

use crate::{io::slot::Slot, serial::SerialDevice};

impl SerialDevice for Slot<Uart> {
    fn offer(&self, bytes: &[u8]) -> usize {
        self.lock().receive(bytes)
    }

    fn output_ready(&self) {
        self.lock().output_ready();
    }
}

/// A device that only sends. What it is sent is dropped.
pub(super) struct SendOnly;

impl SerialDevice for SendOnly {
    fn offer(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }

    fn output_ready(&self) {}
}
