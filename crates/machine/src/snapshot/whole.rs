//! The record of the machine as a whole, and what stands against restoring it here.

use caisson_device::{SaveState, StateError};
use caisson_hypervisor::x86::CpuidTable;
use serde::{Deserialize, Serialize};

use crate::{MachineSpec, machine::Shared};

/// What the kernel takes at most (KVM_MAX_CPUID_ENTRIES), and more than any processor has.
const MAX_CPUID: usize = 256;
/// More than a table of RAM has in any machine.
const MAX_RANGES: usize = 1024;

/// What the machine itself has to keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WholeState {
    /// Machine time.
    pub(crate) now_ns: u64,
    pub(crate) vcpus: u32,
    /// Where RAM lies: address and length, in the order of the file.
    pub(crate) ram: Vec<(u64, u64)>,
    /// How often the guest was reset.
    pub(crate) resets: u64,
    /// The frequency of the guest's TSC.
    pub(crate) tsc_hz: u64,
    /// What the guest found when it looked.
    pub(crate) cpuid: CpuidTable,
}

impl SaveState for WholeState {
    const ID: &'static str = "machine";
    const VERSION: u16 = 1;
}

impl WholeState {
    pub(super) fn of(shared: &Shared) -> Self {
        Self {
            now_ns: caisson_device::Clock::now(&*shared.clock),
            vcpus: shared.vcpus.count(),
            ram: shared
                .memory
                .regions()
                .iter()
                .map(|region| (region.gpa().0, region.len()))
                .collect(),
            resets: *shared.resets.lock(),
            tsc_hz: shared.partition.tsc_hz(),
            cpuid: shared.partition.cpuid().clone(),
        }
    }

    /// Checks what can be checked without a machine.
    pub(super) fn checked(self) -> Result<Self, StateError> {
        let mut end = 0;
        for &(gpa, len) in &self.ram {
            let next = gpa.checked_add(len);
            if gpa < end || len == 0 || gpa % 4096 != 0 || len % 4096 != 0 || next.is_none() {
                return Err(Self::invalid("its memory overlaps or is not in pages"));
            }
            end = next.unwrap_or(u64::MAX);
        }
        if self.ram.is_empty() || self.ram.len() > MAX_RANGES {
            return Err(Self::invalid("it has no memory, or too many pieces of it"));
        }
        if self.cpuid.entries().len() > MAX_CPUID {
            return Err(Self::invalid(
                "its CPUID has more leaves than a processor's",
            ));
        }
        if !(1_000_000..=100_000_000_000).contains(&self.tsc_hz) {
            return Err(Self::invalid("its TSC has no possible frequency"));
        }
        Ok(self)
    }

    /// RAM in bytes; after [`WholeState::checked`] never more than the address space.
    pub(crate) fn ram_bytes(&self) -> u64 {
        self.ram.iter().map(|(_, len)| len).sum()
    }

    /// Why this machine is not the one that `spec` describes, or cannot be on this host: all reasons, for a person.
    pub(super) fn obstacles(&self, spec: &MachineSpec) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.vcpus != spec.vcpus {
            reasons.push(format!(
                "it was saved with {} vCPUs, and this machine has {}",
                self.vcpus, spec.vcpus
            ));
        }
        let limit = spec.hypervisor.max_vcpus();
        if self.vcpus > limit {
            reasons.push(format!(
                "it has {} vCPUs, and \"{}\" runs at most {limit}",
                self.vcpus,
                spec.hypervisor.name()
            ));
        } else if let Ok(offered) = spec.hypervisor.offers(self.vcpus) {
            // A backend that does not say refuses the machine itself.
            let lacking = self.cpuid.lacking(&offered);
            if !lacking.is_empty() {
                reasons.push(format!(
                    "its guest has seen a processor that \"{}\" cannot give on this host, which lacks: {}",
                    spec.hypervisor.name(),
                    lacking.join(", ")
                ));
            }
        }
        if self.ram_bytes() != spec.memory.bytes {
            reasons.push(format!(
                "it was saved with {} bytes of memory, and this machine has {}",
                self.ram_bytes(),
                spec.memory.bytes
            ));
        }
        reasons
    }
}
