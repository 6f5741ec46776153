//! The firmware configuration interface, through which firmware and kernels get ACPI tables, boot order, kernel and
//! the like (QEMU documentation, "QEMU Firmware Configuration (fw_cfg) Device"), with its DMA interface.
//!
//! Ports: 0x510 selector (16 bits), 0x511 data, 0x514 DMA address (big-endian; writing the lower half starts the
//! transfer). Items are given when the machine is built ([`Items`]); one that is declared writable has a fixed length.
//!
//! A transfer completes within the access that starts it. It copies at most the selected item and pads with at most
//! [`MAX_PADDING`] zeros, which bounds it by what the machine's owner supplied; a longer one ends with the error bit.

mod items;

use alloc::{vec, vec::Vec};

use caisson_device::{
    Access, AddressRange, Claim, Device, Inspector, Outcome, ResetKind, SaveState, StateError,
    StateRecord, le_value,
};
use caisson_memory::{Gpa, MemoryView};
use serde::{Deserialize, Serialize};

use items::Table;
pub use items::{FIRST_FILE, ItemData, ItemError, Items, MAX_FILE_NAME, keys};

/// The first of the ports.
pub const BASE: u16 = 0x510;

/// How many zeros a transfer adds after the end of an item.
pub const MAX_PADDING: u32 = 1 << 20;

const SELECTOR_AND_DATA: u32 = 0;
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// Bits of a DMA request's control word.
mod control {
    pub(super) const ERROR: u32 = 1 << 0;
    pub(super) const READ: u32 = 1 << 1;
    pub(super) const SKIP: u32 = 1 << 2;
    pub(super) const SELECT: u32 = 1 << 3;
    pub(super) const WRITE: u32 = 1 << 4;
    pub(super) const KEY_SHIFT: u32 = 16;
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct FwCfgState {
    key: u16,
    offset: u32,
    /// The upper half of the DMA address.
    dma_high: u32,
    /// The contents of the writable items by key.
    written: Vec<(u16, Vec<u8>)>,
}

impl SaveState for FwCfgState {
    const ID: &'static str = "fw-cfg";
    const VERSION: u16 = 1;
}

/// The firmware configuration device.
pub struct FwCfg {
    memory: MemoryView,
    table: Table,
    key: u16,
    offset: u32,
    dma_high: u32,
}

impl FwCfg {
    /// A device that offers `items` and transfers to and from `memory`.
    pub fn new(items: Items, memory: MemoryView) -> Self {
        Self {
            memory,
            table: items.finish(),
            key: 0,
            offset: 0,
            dma_high: 0,
        }
    }

    /// The contents of the file `name`, with what the guest wrote if it is writable.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.table.file(name)
    }

    fn select(&mut self, key: u16) {
        self.key = key;
        self.offset = 0;
    }

    fn advance(&mut self, len: u32) {
        self.offset = self.offset.saturating_add(len);
    }

    /// What is left of the selected item; empty past its end and when there is no such item.
    fn rest(&self) -> &[u8] {
        let item = self.table.get(self.key).unwrap_or(&[]);
        item.get(self.offset as usize..).unwrap_or(&[])
    }

    fn read_byte(&mut self) -> u8 {
        let byte = self.rest().first().copied().unwrap_or(0);
        self.advance(1);
        byte
    }

    fn write_dma_address(&mut self, offset: u64, data: &[u8]) {
        let low = match (offset, data.len()) {
            (0, 4) => {
                self.dma_high = big_endian(data) as u32;
                return;
            }
            (0, 8) => {
                self.dma_high = (big_endian(data) >> 32) as u32;
                big_endian(data) as u32
            }
            (4, 4) => big_endian(data) as u32,
            _ => return,
        };
        let request = u64::from(core::mem::take(&mut self.dma_high)) << 32 | u64::from(low);
        self.run_dma(Gpa(request));
    }

    /// Carries out the request at `request`: control, length and address, all big-endian. Its control word becomes 0,
    /// or the error bit. A request outside memory has no effect.
    fn run_dma(&mut self, request: Gpa) {
        let mut bytes = [0; 16];
        if self.memory.read(request, &mut bytes).is_err() {
            return;
        }
        let command = big_endian(&bytes[0..4]) as u32;
        let len = big_endian(&bytes[4..8]) as u32;
        let address = Gpa(big_endian(&bytes[8..16]));
        if command & control::SELECT != 0 {
            self.select((command >> control::KEY_SHIFT) as u16);
        }
        let done = if command & control::READ != 0 {
            self.dma_read(address, len)
        } else if command & control::WRITE != 0 {
            self.dma_write(address, len)
        } else {
            if command & control::SKIP != 0 {
                self.advance(len);
            }
            Some(())
        };
        let status = if done.is_some() { 0 } else { control::ERROR };
        // The request was readable a moment ago; if it is in ROM the guest does not get its answer.
        let _ = self.memory.write(request, &status.to_be_bytes());
    }

    fn dma_read(&mut self, address: Gpa, len: u32) -> Option<()> {
        let rest = self.rest();
        let copied = rest.len().min(len as usize);
        let padding = u64::from(len) - copied as u64;
        if padding > u64::from(MAX_PADDING) {
            return None;
        }
        self.memory.write(address, &rest[..copied]).ok()?;
        if padding > 0 {
            let after = address.0.checked_add(copied as u64)?;
            self.memory.fill(Gpa(after), padding, 0).ok()?;
        }
        self.advance(len);
        Some(())
    }

    fn dma_write(&mut self, address: Gpa, len: u32) -> Option<()> {
        let start = self.offset as usize;
        let end = start.checked_add(len as usize)?;
        let target = self.table.writable(self.key)?.get_mut(start..end)?;
        self.memory.read(address, target).ok()?;
        self.advance(len);
        Some(())
    }
}

fn big_endian(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Device for FwCfg {
    fn name(&self) -> &str {
        "fw-cfg"
    }

    fn claims(&self) -> Vec<Claim> {
        vec![
            Claim::new(AddressRange::pio(BASE, 2), "selector and data"),
            Claim::new(AddressRange::pio(BASE + 4, 8), "DMA address"),
        ]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        if at.region == SELECTOR_AND_DATA {
            if at.offset == 1 {
                at.read_each(data, |_| self.read_byte());
            }
        } else {
            at.read_each(data, |offset| DMA_SIGNATURE[offset as usize & 7]);
        }
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        if at.region != SELECTOR_AND_DATA {
            self.write_dma_address(at.offset, data);
        } else if at.offset == 0 && data.len() == 2 {
            self.select(le_value(data) as u16);
        }
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {
        self.select(0);
        self.dma_high = 0;
        self.table.reset();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        FwCfgState {
            key: self.key,
            offset: self.offset,
            dma_high: self.dma_high,
            written: self.table.written(),
        }
        .to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = FwCfgState::from_record(record)?;
        self.table
            .restore(state.written)
            .ok_or_else(|| FwCfgState::invalid("the machine offers other writable items"))?;
        self.key = state.key;
        self.offset = state.offset;
        self.dma_high = state.dma_high;
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .hex("selected", self.key)
            .u64("offset", self.offset);
        inspector.child("files", |inspector| {
            for (name, key, len) in self.table.files() {
                inspector.child(name, |inspector| {
                    inspector.hex("key", key).u64("bytes", len as u64);
                });
            }
        });
    }
}

#[cfg(test)]
mod tests;
