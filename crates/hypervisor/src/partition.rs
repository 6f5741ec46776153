//! A machine's share of a hypervisor.

use alloc::boxed::Box;

use caisson_memory::{GuestMemory, Vtl};

use crate::{DirtyMethod, HypervisorError, PartitionPower, Vcpu, x86::CpuidTable};

/// A message-signalled interrupt (Intel SDM Vol. 3 §11.11).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Msi {
    /// 0xFEE0_0000-based address; destination and modes. Bits 63:32 carry the
    /// upper destination bits in the extended format.
    pub address: u64,
    /// Vector, delivery mode, trigger.
    pub data: u32,
}

/// What a partition is made from.
#[derive(Clone)]
pub struct PartitionConfig {
    /// Number of vCPUs, at least 1. vCPU `n` has APIC id `n`.
    pub vcpus: u32,
    /// All memory.
    pub memory: GuestMemory,
    /// CPUID as the guest sees it, before per-vCPU leaves (APIC ids) are
    /// filled in. It must not promise more than [`Hypervisor::offers`](crate::Hypervisor::offers).
    /// `None` takes the backend's own default, the host's processor.
    pub cpuid: Option<CpuidTable>,
    /// Frequency that the guest's TSC is to have, in Hz; `None` is the host's.
    pub tsc_hz: Option<u64>,
    /// How to note written pages, where there is a choice: it has to be made
    /// before any vCPU exists. [`DirtyLog::method`](crate::DirtyLog::method)
    /// tells what came of it.
    pub dirty: DirtyMethod,
}

impl PartitionConfig {
    /// `vcpus` vCPUs and `memory`; the rest as the backend has it.
    pub fn new(vcpus: u32, memory: GuestMemory) -> Self {
        Self {
            vcpus,
            memory,
            cpuid: None,
            tsc_hz: None,
            dirty: DirtyMethod::default(),
        }
    }
}

/// One virtual machine of a backend. Shared by all threads of the machine.
pub trait Partition: Send + Sync {
    /// Creates vCPU `index` (0 is the boot processor). Each can be created once.
    ///
    /// # Errors
    /// An index out of range or taken, or the host out of resources.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError>;

    /// Replaces the memory table (hot-plug, ROM shadowing).
    ///
    /// # Errors
    /// Regions that the backend cannot map.
    fn set_memory(&self, vtl: Vtl, memory: GuestMemory) -> Result<(), HypervisorError>;

    /// Delivers an MSI, as the I/O APIC and devices do. Never blocks; what the
    /// APICs would ignore is ignored.
    fn raise_msi(&self, vtl: Vtl, msi: Msi);

    /// The level of the 8259 pair's INTR output, which goes to the boot
    /// processor's LINT0.
    fn set_extint(&self, vtl: Vtl, asserted: bool);

    /// The level of the NMI input (LINT1) of every vCPU: a rising edge counts.
    fn raise_nmi(&self, vtl: Vtl);

    /// The CPUID table that guests see.
    fn cpuid(&self) -> &CpuidTable;

    /// Frequency of the guest's TSC in Hz.
    fn tsc_hz(&self) -> u64;

    /// Stops or continues guest time (TSC and APIC timers). While stopped, no
    /// vCPU may run. Time stopped is time the guest never sees.
    fn set_clock_running(&self, running: bool);

    /// Guest nanoseconds since the partition was made, without stopped time.
    fn now_ns(&self) -> u64;

    /// A power that not every backend has.
    fn power(&self) -> PartitionPower<'_>;
}
