//! How virtio devices are attached.

use serde::{Deserialize, Serialize};

use crate::options::shorthand;

/// What carries a machine's virtio devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", remote = "Self")]
pub enum VirtioTransport {
    /// A PCI bus, which the machine has if there is a device for it.
    #[default]
    Pci,
    /// Memory-mapped registers and an interrupt line each, without PCI: for small kernels.
    Mmio,
}

shorthand!(VirtioTransport);
