//! The backend itself.

use std::sync::Arc;

use caisson_hypervisor::{
    Availability, Hypervisor, HypervisorError, Partition, PartitionConfig, Probe, x86::CpuidTable,
};

use crate::{counters::Counters, exec_memory::ExecMemory, partition::SoftPartition, tier::Tier};

/// The most vCPUs of a partition: one bit each in the code map.
pub const MAX_VCPUS: u32 = 64;

/// The software CPU.
#[derive(Clone, Debug, Default)]
pub struct Soft {
    tier: Tier,
    counters: Option<Arc<Counters>>,
}

impl Soft {
    /// One that goes as far as `tier`.
    pub const fn new(tier: Tier) -> Self {
        Self {
            tier,
            counters: None,
        }
    }

    /// The same, with vCPUs that report to `counters`.
    #[must_use]
    pub fn counting(self, counters: Arc<Counters>) -> Self {
        Self {
            counters: Some(counters),
            ..self
        }
    }
}

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

    fn offers(&self, vcpus: u32) -> Result<CpuidTable, HypervisorError> {
        Ok(crate::vcpu::cpuid::most(vcpus, crate::clock::host_tsc_hz()))
    }

    fn warm_up(&self) {
        // It is asked again by whoever needs it, and then answers at once or is waited for.
        let _ = std::thread::Builder::new()
            .name("tsc".into())
            .spawn(crate::clock::host_tsc_hz);
    }

    fn create_partition(
        &self,
        config: PartitionConfig,
    ) -> Result<Arc<dyn Partition>, HypervisorError> {
        if let Some(table) = &config.cpuid {
            let lacking = table.lacking(&self.offers(config.vcpus)?);
            if !lacking.is_empty() {
                return Err(HypervisorError::Processor {
                    backend: "soft",
                    lacking,
                });
            }
        }
        Ok(Arc::new(SoftPartition::new(
            config,
            self.tier,
            self.counters.clone(),
        )?))
    }
}
