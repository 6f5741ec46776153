//! Writing one structure: formatted part, then strings (6.1).

use alloc::{string::String, vec::Vec};

/// A structure under construction.
pub(super) struct Structure {
    formatted: Vec<u8>,
    strings: Vec<String>,
}

impl Structure {
    /// Begins a structure with its type and handle.
    pub(super) fn new(kind: u8, handle: u16) -> Self {
        let mut formatted = alloc::vec![kind, 0];
        formatted.extend(handle.to_le_bytes());
        Self {
            formatted,
            strings: Vec::new(),
        }
    }

    /// A field that holds the number of a string, or zero if it is empty.
    pub(super) fn string(mut self, s: &str) -> Self {
        if s.is_empty() {
            return self.u8(0);
        }
        self.strings.push(s.into());
        let number = self.strings.len() as u8;
        self.u8(number)
    }

    pub(super) fn u8(self, v: u8) -> Self {
        self.bytes(&[v])
    }

    pub(super) fn u16(self, v: u16) -> Self {
        self.bytes(&v.to_le_bytes())
    }

    pub(super) fn u32(self, v: u32) -> Self {
        self.bytes(&v.to_le_bytes())
    }

    pub(super) fn u64(self, v: u64) -> Self {
        self.bytes(&v.to_le_bytes())
    }

    /// Fields as they are.
    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.formatted.extend_from_slice(bytes);
        self
    }

    /// Appends the finished structure to the table.
    pub(super) fn finish(mut self, table: &mut Vec<u8>) {
        // No structure here is longer than 255 bytes.
        self.formatted[1] = self.formatted.len() as u8;
        table.append(&mut self.formatted);
        for s in &self.strings {
            table.extend(s.bytes());
            table.push(0);
        }
        if self.strings.is_empty() {
            table.push(0);
        }
        table.push(0);
    }
}
