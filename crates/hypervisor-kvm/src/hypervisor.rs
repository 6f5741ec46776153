//! The backend itself.

use std::sync::Arc;

use caisson_hypervisor::{
    Hypervisor, HypervisorError, Partition, PartitionConfig, Probe, x86::CpuidTable,
};

use crate::{cpuid, partition::KvmPartition, probe};

/// The most vCPUs with 8-bit APIC ids; 255 is broadcast. KVM runs more, but their
/// guests would need x2APIC entries in the MADT, and interrupt messages with
/// wider destinations: interrupt remapping, or KVM's paravirtual extension of
/// MSI addresses, which guests of other backends would not have.
const MAX_VCPUS: u32 = 254;

/// KVM through `/dev/kvm`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kvm;

impl Hypervisor for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn probe(&self) -> Probe {
        probe::probe()
    }

    fn absence(&self) -> Option<Probe> {
        probe::open().err().map(Into::into)
    }

    fn max_vcpus(&self) -> u32 {
        kvm_ioctls::Kvm::new().map_or(MAX_VCPUS, |kvm| (kvm.get_max_vcpus() as u32).min(MAX_VCPUS))
    }

    fn offers(&self, vcpus: u32) -> Result<CpuidTable, HypervisorError> {
        cpuid::offers(&open()?, vcpus, probe::has_virtualisation())
    }

    fn warm_up(&self) {
        let asking = std::thread::Builder::new().name("kvm-cpuid".into());
        // It is asked again by whoever needs it, who gets the error too.
        let _ = asking.spawn(|| open().and_then(|kvm| cpuid::entries(&kvm)));
    }

    fn create_partition(
        &self,
        config: PartitionConfig,
    ) -> Result<Arc<dyn Partition>, HypervisorError> {
        let kvm = open()?;
        let limit = self.max_vcpus();
        if config.vcpus == 0 || config.vcpus > limit {
            return Err(HypervisorError::TooManyVcpus {
                backend: "kvm",
                asked: config.vcpus,
                limit,
            });
        }
        Ok(Arc::new(KvmPartition::new(&kvm, config)?))
    }
}

fn open() -> Result<kvm_ioctls::Kvm, HypervisorError> {
    probe::open().map_err(|refusal| HypervisorError::Unavailable {
        backend: "kvm",
        reason: refusal.to_string(),
    })
}
