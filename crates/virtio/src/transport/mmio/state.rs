//! The saved state of a memory-mapped virtio device.

use caisson_device::SaveState;
use serde::{Deserialize, Serialize};

use crate::FacilitiesState;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct MmioState {
    pub(super) facilities: FacilitiesState,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) queue_select: u32,
    pub(super) interrupt_status: u32,
}

impl SaveState for MmioState {
    const ID: &'static str = "virtio-mmio";
    const VERSION: u16 = 1;
}
