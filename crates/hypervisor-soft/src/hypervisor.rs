//! The backend itself.

use std::sync::Arc;

use caisson_hypervisor::{
    Availability, Hypervisor, HypervisorError, Partition, PartitionConfig, Probe,
};

use crate::{exec_memory::ExecMemory, partition::SoftPartition};

/// The most vCPUs of a partition: one bit each in the code map.
pub const MAX_VCPUS: u32 = 64;

/// The software CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Soft;

impl Hypervisor for Soft {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn probe(&self) -> Probe {
        match ExecMemory::new() {
            Ok(_) => Probe {
                availability: Availability::Usable,
                reason: "software CPU; needs no virtualisation".into(),
                remedy: None,
            },
            Err(e) => Probe {
                availability: Availability::Absent,
                reason: format!("this host refuses executable memory ({e})"),
                remedy: Some("allow executable shared mappings for this process (a seccomp filter, SELinux or PaX policy denies them)".into()),
            },
        }
    }

    fn max_vcpus(&self) -> u32 {
        MAX_VCPUS
    }

    fn create_partition(
        &self,
        config: PartitionConfig,
    ) -> Result<Arc<dyn Partition>, HypervisorError> {
        Ok(Arc::new(SoftPartition::new(config)?))
    }
}
