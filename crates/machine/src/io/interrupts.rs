//! What the vCPUs' local APICs need of the interrupt controllers.

use caisson_device::{Msi, MsiSink};
use caisson_hypervisor::Partition;
use caisson_memory::Vtl;
use std::sync::Arc;

/// The I/O APICs and the 8259 pair, as the local APICs see them.
pub(crate) trait InterruptControllers: Send + Sync {
    /// A local APIC finished the level-triggered interrupt `vector`.
    fn eoi(&self, vtl: Vtl, vector: u8);
    /// The interrupt acknowledge cycle: the 8259 pair's vector.
    fn acknowledge_pic(&self) -> u8;
}

/// Delivers MSIs of devices and of the I/O APIC to the partition's local APICs.
pub(crate) struct PartitionMsi(pub(crate) Arc<dyn Partition>);

impl MsiSink for PartitionMsi {
    fn send(&self, msi: Msi) {
        self.0.raise_msi(
            Vtl::VTL0,
            caisson_hypervisor::Msi {
                address: msi.address,
                data: msi.data,
            },
        );
    }
}
