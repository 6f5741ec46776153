//! The saved state of a virtio PCI function and the device behind it.

use caisson_device::{SaveState, StateError};
use caisson_pci::FunctionState;
use serde::{Deserialize, Serialize};

use crate::FacilitiesState;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PciState {
    pub(super) function: FunctionState,
    pub(super) facilities: FacilitiesState,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) queue_select: u16,
    pub(super) config_vector: u16,
    pub(super) queue_vectors: alloc::vec::Vec<u16>,
    pub(super) isr: u8,
}

impl SaveState for PciState {
    const ID: &'static str = "virtio-pci";
    const VERSION: u16 = 1;
}

impl PciState {
    pub(super) fn invalid(what: &'static str) -> StateError {
        StateError::Invalid { id: Self::ID, what }
    }
}
