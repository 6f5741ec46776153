//! The device's registers and one queue.

use crate::pci::{ENABLED, PAGE, bar, capability};
use caisson_guest_rt::memory::{fill, read, write};
use caisson_guest_rt::paging::frames;
use core::sync::atomic::{Ordering, fence};

pub const VERSION_1: u64 = 1 << 32;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const PACKED: u64 = 1 << 34;
pub const RING_RESET: u64 = 1 << 40;
/// `DEVICE_NEEDS_RESET`.
pub const NEEDS_RESET: u8 = 64;
/// Entries of the queue.
pub const SIZE: u16 = 8;
/// No MSI-X vector.
pub const NO_VECTOR: u16 = 0xFFFF;

/// Entropy device, set up.
pub struct Device {
    common: u64,
    notify: u64,
    pub isr: u64,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    /// Where buffers are.
    pub buffers: u64,
}

impl Device {
    /// Resets the device, negotiates `features` and enables its queue, with interrupts at `vector`.
    pub fn set_up(features: u64, vector: u16) -> Self {
        let structure = |kind| {
            let at = capability(9, Some(kind)).expect("a virtio structure");
            bar(read::<u8>(at + 4).into()) + u64::from(read::<u32>(at + 8))
        };
        write(PAGE + 4, ENABLED);
        let memory = frames(4, 4096);
        let this = Self {
            common: structure(1),
            notify: structure(2),
            isr: structure(3),
            descriptors: memory,
            driver: memory + 0x1000,
            device: memory + 0x2000,
            buffers: memory + 0x3000,
        };
        fill(memory, 0x4000, 0);
        this.set_status(0);
        this.set_status(1);
        this.set_status(3);
        for select in 0..2u32 {
            write(this.common + 8, select);
            write(this.common + 12, (features >> (32 * select)) as u32);
        }
        this.set_status(11);
        write(this.common + 0x10, NO_VECTOR);
        this.enable_queue(vector);
        this.set_status(15);
        this
    }

    pub fn enable_queue(&self, vector: u16) {
        write(self.common + 0x16, 0u16);
        write(self.common + 0x18, SIZE);
        write(self.common + 0x1A, vector);
        for (at, gpa) in [
            (0x20, self.descriptors),
            (0x28, self.driver),
            (0x30, self.device),
        ] {
            write(self.common + at, gpa as u32);
            write(self.common + at + 4, (gpa >> 32) as u32);
        }
        write(self.common + 0x1C, 1u16);
    }

    pub fn reset_queue(&self) {
        write(self.common + 0x16, 0u16);
        write(self.common + 0x3A, 1u16);
    }

    pub fn is_queue_enabled(&self) -> bool {
        read::<u16>(self.common + 0x1C) == 1
    }

    pub fn vector(&self) -> u16 {
        read(self.common + 0x1A)
    }

    pub fn set_status(&self, status: u8) {
        write(self.common + 0x14, status);
    }

    pub fn status(&self) -> u8 {
        read(self.common + 0x14)
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn descriptor(&self, table: u64, index: u16, gpa: u64, len: u32, words: [u16; 2]) {
        let at = table + 16 * u64::from(index);
        write(at, gpa);
        write(at + 8, len);
        write(at + 12, words[0]);
        fence(Ordering::SeqCst);
        write(at + 14, words[1]);
    }

    /// Makes descriptor `head` of a split ring the `count`-th buffer available, and notifies.
    pub fn offer(&self, head: u16, count: u16) {
        write(self.driver + 4 + 2 * u64::from((count - 1) % SIZE), head);
        fence(Ordering::SeqCst);
        write(self.driver + 2, count);
        self.notify();
    }

    /// How many buffers of a split ring were given back.
    pub fn used(&self) -> u16 {
        read(self.device + 2)
    }

    /// ID and length of the `count`-th buffer given back.
    pub fn used_element(&self, count: u16) -> (u32, u32) {
        let at = self.device + 4 + 8 * u64::from((count - 1) % SIZE);
        (read(at), read(at + 4))
    }

    pub fn notify(&self) {
        fence(Ordering::SeqCst);
        write(self.notify, 0u16);
    }
}
