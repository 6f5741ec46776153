//! MSI-X: a table of messages and an array of pending bits in a memory range of the function (PCI Local Bus 3.0 §6.8.2).

use alloc::{vec, vec::Vec};

use caisson_device::{Msi, put_le};

use crate::config_space::ConfigSpace;

/// Its id in the list of capabilities.
pub(crate) const ID: u8 = 0x11;
/// Its bytes.
pub(crate) const LEN: usize = 12;
/// Bytes of a table entry.
pub(crate) const ENTRY: usize = 16;
/// The most vectors that a table can have.
pub(crate) const MAX_VECTORS: u16 = 2048;

const CONTROL: usize = 2;
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;
const VECTOR_MASK: u8 = 1;

/// Where a function has its MSI-X structures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixSpec {
    /// How many vectors, 1 to 2048.
    pub vectors: u16,
    /// The base address register of the range that holds both structures.
    pub bar: u8,
    /// Where the table is in it, a multiple of 8; 16 bytes per vector.
    pub table: u32,
    /// Where the pending bits are in it, a multiple of 8; 8 bytes per 64 vectors.
    pub pending: u32,
}

impl MsixSpec {
    /// Bytes of the table.
    pub(crate) fn table_len(&self) -> u64 {
        u64::from(self.vectors) * ENTRY as u64
    }

    /// Bytes of the pending bits.
    pub(crate) fn pending_len(&self) -> u64 {
        u64::from(self.vectors).div_ceil(64) * 8
    }
}

/// The capability, the table and the pending bits.
#[derive(Clone)]
pub(crate) struct Msix {
    pub(crate) spec: MsixSpec,
    at: usize,
    table: Vec<u8>,
    pending: Vec<u64>,
}

impl Msix {
    /// Puts the capability at `at`, after its id and next pointer.
    pub(crate) fn place(space: &mut ConfigSpace, at: usize, spec: MsixSpec) -> Self {
        let control = spec.vectors - 1;
        space.put(
            at + CONTROL,
            &control.to_le_bytes(),
            &(ENABLE | FUNCTION_MASK).to_le_bytes(),
        );
        space.put_fixed(at + 4, &(spec.table | u32::from(spec.bar)).to_le_bytes());
        space.put_fixed(at + 8, &(spec.pending | u32::from(spec.bar)).to_le_bytes());
        let mut msix = Self {
            spec,
            at,
            table: vec![0; usize::from(spec.vectors) * ENTRY],
            pending: vec![0; usize::from(spec.vectors).div_ceil(64)],
        };
        msix.reset();
        msix
    }

    pub(crate) fn reset(&mut self) {
        self.table.fill(0);
        for entry in self.table.chunks_exact_mut(ENTRY) {
            entry[12] = VECTOR_MASK;
        }
        self.pending.fill(0);
    }

    pub(crate) fn enabled(&self, space: &ConfigSpace) -> bool {
        space.u16(self.at + CONTROL) & ENABLE != 0
    }

    fn function_masked(&self, space: &ConfigSpace) -> bool {
        space.u16(self.at + CONTROL) & FUNCTION_MASK != 0
    }

    /// A read at `offset` of the range that holds the structures. Bytes of neither read as zeros.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = 0;
            if let Some(at) = within(at, self.spec.table, self.spec.table_len()) {
                *byte = self.table.get(at).copied().unwrap_or(0);
            } else if let Some(at) = within(at, self.spec.pending, self.spec.pending_len()) {
                let word = self.pending.get(at / 8).copied().unwrap_or(0);
                let mut bytes = [0; 8];
                put_le(&mut bytes, word);
                *byte = bytes[at % 8];
            }
        }
    }

    /// A write at `offset`. The pending bits cannot be written.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, value) in (offset..).zip(data) {
            let Some(at) = within(at, self.spec.table, self.spec.table_len()) else {
                continue;
            };
            // Of the vector control word only the mask bit is there; the address is one of four bytes.
            let mask = match at % ENTRY {
                0 => !0b11,
                12 => VECTOR_MASK,
                13..=15 => 0,
                _ => !0,
            };
            if let Some(byte) = self.table.get_mut(at) {
                *byte = value & mask;
            }
        }
    }

    fn entry(&self, vector: u16) -> Option<&[u8; ENTRY]> {
        let at = usize::from(vector) * ENTRY;
        self.table.get(at..)?.first_chunk()
    }

    /// What `vector` sends, unless it is masked or there is none.
    pub(crate) fn message(&self, space: &ConfigSpace, vector: u16) -> Option<Msi> {
        let entry = self.entry(vector)?;
        if self.function_masked(space) || entry[12] & VECTOR_MASK != 0 {
            return None;
        }
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = *entry;
        Some(Msi {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        })
    }

    pub(crate) fn set_pending(&mut self, vector: u16, pending: bool) {
        if vector >= self.spec.vectors {
            return;
        }
        if let Some(word) = self.pending.get_mut(usize::from(vector / 64)) {
            let bit = 1 << (vector % 64);
            *word = if pending { *word | bit } else { *word & !bit };
        }
    }

    /// The first pending vector from `from` on that is not masked.
    pub(crate) fn next_deliverable(&self, space: &ConfigSpace, from: u16) -> Option<(u16, Msi)> {
        if self.function_masked(space) || self.pending.iter().all(|word| *word == 0) {
            return None;
        }
        (from..self.spec.vectors)
            .filter(|vector| {
                let word = self.pending.get(usize::from(vector / 64));
                word.is_some_and(|word| word >> (vector % 64) & 1 != 0)
            })
            .find_map(|vector| Some((vector, self.message(space, vector)?)))
    }

    pub(crate) fn table(&self) -> &[u8] {
        &self.table
    }

    pub(crate) fn pending(&self) -> &[u64] {
        &self.pending
    }

    /// Takes over saved contents, if they have the right length.
    pub(crate) fn restore(&mut self, table: &[u8], pending: &[u64]) -> bool {
        if table.len() != self.table.len() || pending.len() != self.pending.len() {
            return false;
        }
        self.write(u64::from(self.spec.table), table);
        for vector in 0..self.spec.vectors {
            let word = pending.get(usize::from(vector / 64)).copied().unwrap_or(0);
            self.set_pending(vector, word >> (vector % 64) & 1 != 0);
        }
        true
    }
}

/// The index of `offset` in the `len` bytes from `start` on.
fn within(offset: u64, start: u32, len: u64) -> Option<usize> {
    let index = offset.checked_sub(u64::from(start))?;
    (index < len).then_some(index as usize)
}
