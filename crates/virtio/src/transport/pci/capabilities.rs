//! The capabilities by which a driver finds the registers (§4.1.4).

use alloc::vec::Vec;

use caisson_pci::{Capability, Function};

use super::{COMMON, DEVICE, ISR, NOTIFY, NOTIFY_STEP, REGISTERS_BAR};

/// A vendor's own capability.
const VENDOR_SPECIFIC: u8 = 0x09;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
/// Where `bar`, `offset`, `length` and what follows them are in the capability.
const BAR: u64 = 4;
const OFFSET: u64 = 8;
const LENGTH: u64 = 12;
const DATA: u64 = 16;

/// The capabilities of a device with `queues` queues.
pub(super) fn list(queues: u16) -> (Vec<Capability>, ConfigWindow) {
    let notify_len = NOTIFY_STEP * u64::from(queues);
    let capabilities = alloc::vec![
        capability(COMMON_CFG, COMMON, super::common_config::LEN, &[]),
        capability(ISR_CFG, ISR, 1, &[]),
        capability(DEVICE_CFG, DEVICE, 0x1000, &[]),
        capability(
            NOTIFY_CFG,
            NOTIFY,
            notify_len,
            &(NOTIFY_STEP as u32).to_le_bytes()
        ),
        Capability {
            // The guest chooses register, offset and length.
            writable: [&[0, 0, 0xff, 0, 0, 0][..], &[0xff; 8]].concat(),
            ..capability(PCI_CFG, 0, 0, &[0; 4])
        },
    ];
    let window = ConfigWindow {
        index: capabilities.len() - 1,
        at: None,
    };
    (capabilities, window)
}

/// `struct virtio_pci_cap` after its first two bytes, and `rest` behind it.
fn capability(kind: u8, offset: u64, len: u64, rest: &[u8]) -> Capability {
    let whole = 16 + rest.len() as u8;
    let mut body = alloc::vec![whole, kind, REGISTERS_BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(rest);
    Capability {
        id: VENDOR_SPECIFIC,
        body,
        writable: Vec::new(),
    }
}

/// The window into the ranges through configuration space (§4.1.4.9).
pub(super) struct ConfigWindow {
    index: usize,
    at: Option<u64>,
}

impl ConfigWindow {
    pub(super) fn located(self, function: &Function) -> Self {
        Self {
            at: function.capability_offset(self.index),
            ..self
        }
    }

    /// The access that one of `len` bytes at `offset` of configuration space stands for, if it is one to the window's
    /// data: register, offset and length.
    pub(super) fn access(
        &self,
        function: &Function,
        offset: u64,
        len: usize,
    ) -> Option<(u8, u64, usize)> {
        let at = self.at.filter(|at| at + DATA == offset)?;
        let word = |offset| {
            let mut bytes = [0; 4];
            function.read_config(at + offset, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let (bar, target, length) = (word(BAR) as u8, word(OFFSET), word(LENGTH));
        let sound = matches!(length, 1 | 2 | 4) && target.is_multiple_of(length);
        (sound && length as usize <= len).then_some((bar, target.into(), length as usize))
    }
}
