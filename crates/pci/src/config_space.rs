//! The 256 bytes of a function's configuration space.

/// Bytes that a conventional function has.
pub(crate) const LEN: usize = 256;

/// Bytes with a mask that says which bits the guest may write. All registers of a function are here, also those of its
/// capabilities; what they mean is looked up in them.
#[derive(Clone)]
pub(crate) struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    initial: [u8; LEN],
}

impl ConfigSpace {
    pub(crate) fn new() -> Self {
        Self {
            bytes: [0; LEN],
            writable: [0; LEN],
            initial: [0; LEN],
        }
    }

    /// Defines the bytes at `offset`: what they are after a reset, and which bits can be written.
    pub(crate) fn put(&mut self, offset: usize, value: &[u8], writable: &[u8]) {
        for (index, (value, mask)) in (offset..).zip(value.iter().zip(writable)) {
            if let (Some(byte), Some(initial), Some(writable)) = (
                self.bytes.get_mut(index),
                self.initial.get_mut(index),
                self.writable.get_mut(index),
            ) {
                (*byte, *initial, *writable) = (*value, *value, *mask);
            }
        }
    }

    /// Defines bytes that cannot be written.
    pub(crate) fn put_fixed(&mut self, offset: usize, value: &[u8]) {
        for (index, value) in (offset..).zip(value) {
            self.put(index, &[*value], &[0]);
        }
    }

    pub(crate) fn u8(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    pub(crate) fn u16(&self, offset: usize) -> u16 {
        u16::from(self.u8(offset)) | u16::from(self.u8(offset + 1)) << 8
    }

    pub(crate) fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// Sets bits in a byte that the guest only reads.
    pub(crate) fn set_bits(&mut self, offset: usize, bits: u8, on: bool) {
        if let Some(byte) = self.bytes.get_mut(offset) {
            *byte = if on { *byte | bits } else { *byte & !bits };
        }
    }

    /// Sets four bytes that the guest only reads.
    pub(crate) fn set_u32(&mut self, offset: usize, value: u32) {
        for (index, byte) in (offset..).zip(value.to_le_bytes()) {
            self.set_bits(index, !0, false);
            self.set_bits(index, byte, true);
        }
    }

    /// A guest's read; what is past the end reads as zeros.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in (offset..).zip(data) {
            *byte = usize::try_from(index).map_or(0, |index| self.u8(index));
        }
    }

    /// A guest's write: bits that are fixed stay.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        for (index, value) in (offset..).zip(data) {
            let index = usize::try_from(index).unwrap_or(LEN);
            let mask = self.writable.get(index).copied().unwrap_or(0);
            if let Some(byte) = self.bytes.get_mut(index) {
                *byte = *byte & !mask | *value & mask;
            }
        }
    }

    pub(crate) fn reset(&mut self) {
        self.bytes = self.initial;
    }

    pub(crate) fn bytes(&self) -> &[u8; LEN] {
        &self.bytes
    }

    /// Takes over the bits that a guest could have written; the others are as after a reset.
    pub(crate) fn restore(&mut self, bytes: &[u8; LEN]) {
        self.reset();
        self.write(0, bytes);
    }
}
