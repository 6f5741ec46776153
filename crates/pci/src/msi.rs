//! The MSI capability: 64-bit addresses and a mask per vector (PCI Local Bus 3.0 §6.8.1).

use caisson_device::Msi;

use crate::config_space::ConfigSpace;

/// Its id in the list of capabilities.
pub(crate) const ID: u8 = 0x05;
/// Its bytes.
pub(crate) const LEN: usize = 24;

const CONTROL: usize = 2;
const ADDRESS: usize = 4;
const DATA: usize = 12;
const MASK: usize = 16;
const PENDING: usize = 20;
const ENABLE: u16 = 1;

/// Where the capability is and how many vectors the function asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MsiCapability {
    at: usize,
    vectors: u8,
}

impl MsiCapability {
    /// Puts the capability for `vectors` (a power of two up to 32) at `at`, after its id and next pointer.
    pub(crate) fn place(space: &mut ConfigSpace, at: usize, vectors: u8) -> Self {
        let log = vectors.trailing_zeros() as u16;
        // 64-bit address, per-vector masking, and how many vectors are asked for.
        let control = 1 << 7 | 1 << 8 | log << 1;
        let writable = ENABLE | 0b111 << 4;
        space.put(
            at + CONTROL,
            &control.to_le_bytes(),
            &u16::to_le_bytes(writable),
        );
        space.put(at + ADDRESS, &[0; 8], &(!0b11u64).to_le_bytes());
        space.put(at + DATA, &[0; 2], &[!0; 2]);
        let mask = (1u64 << vectors) - 1;
        space.put(at + MASK, &[0; 4], &(mask as u32).to_le_bytes());
        space.put(at + PENDING, &[0; 4], &[0; 4]);
        Self { at, vectors }
    }

    pub(crate) fn enabled(&self, space: &ConfigSpace) -> bool {
        space.u16(self.at + CONTROL) & ENABLE != 0
    }

    /// How many vectors the guest has given, never more than were asked for.
    fn given(&self, space: &ConfigSpace) -> u32 {
        let log = u32::from(space.u16(self.at + CONTROL) >> 4 & 0b111);
        (1 << log.min(5)).min(u32::from(self.vectors))
    }

    /// What a signal of `vector` sends. Vectors that the guest did not give share those that it did.
    pub(crate) fn message(&self, space: &ConfigSpace, vector: u16) -> (u32, Msi) {
        let given = self.given(space);
        let vector = u32::from(vector) % given;
        let address = u64::from(space.u32(self.at + ADDRESS))
            | u64::from(space.u32(self.at + ADDRESS + 4)) << 32;
        let data = u32::from(space.u16(self.at + DATA)) & !(given - 1) | vector;
        (vector, Msi { address, data })
    }

    pub(crate) fn masked(&self, space: &ConfigSpace, vector: u32) -> bool {
        space.u32(self.at + MASK) >> (vector & 31) & 1 != 0
    }

    pub(crate) fn pending(&self, space: &ConfigSpace) -> u32 {
        space.u32(self.at + PENDING)
    }

    pub(crate) fn set_pending(&self, space: &mut ConfigSpace, pending: u32) {
        space.set_u32(self.at + PENDING, pending);
    }
}
