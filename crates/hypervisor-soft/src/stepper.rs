//! One instruction at a time on behalf of another backend, whose own emulator
//! gave up on it.

use std::sync::Arc;

use caisson_hypervisor::{
    HypervisorError, IoBus, Partition, PartitionConfig, Pending,
    x86::{CpuidTable, VcpuState},
};
use caisson_memory::{GuestMemory, Vtl};

use crate::{partition::SoftPartition, tier::Tier, vcpu::SoftVcpu};

/// The software CPUs that help the vCPUs of one partition out. They work on the
/// same memory; atomic instructions are atomic towards vCPUs in the guest.
pub struct Steppers {
    partition: Arc<SoftPartition>,
}

/// A software CPU for one vCPU of another backend.
pub struct Stepper {
    vcpu: SoftVcpu,
    _partition: Arc<SoftPartition>,
}

/// How a step ended.
#[derive(Debug)]
pub enum StepEnd {
    /// The instruction retired, or an exception that it raised was delivered.
    Done(Box<VcpuState>),
    /// The bus parked an access; nothing of the instruction has happened.
    Pending(Pending),
    /// A triple fault.
    Shutdown,
    /// The software CPU cannot execute it either.
    Failed(String),
}

impl Steppers {
    /// For `vcpus` vCPUs on `memory` that see `cpuid`.
    ///
    /// # Errors
    /// The host gives no executable memory.
    pub fn new(
        memory: GuestMemory,
        vcpus: u32,
        cpuid: CpuidTable,
    ) -> Result<Self, HypervisorError> {
        let config = PartitionConfig {
            vcpus,
            memory,
            cpuid: Some(cpuid),
            tsc_hz: None,
            dirty: Default::default(),
        };
        let partition = SoftPartition::new(config, Tier::Interpreted, None)?;
        // States that are set bring their own time.
        partition.set_clock_running(false);
        Ok(Self {
            partition: Arc::new(partition),
        })
    }

    /// The one for vCPU `index`.
    ///
    /// # Errors
    /// There is one already, or no such vCPU.
    pub fn stepper(&self, index: u32) -> Result<Stepper, HypervisorError> {
        Ok(Stepper {
            vcpu: self.partition.vcpu(index)?,
            _partition: self.partition.clone(),
        })
    }

    /// Replaces the memory table.
    ///
    /// # Errors
    /// As [`Partition::set_memory`].
    pub fn set_memory(&self, memory: GuestMemory) -> Result<(), HypervisorError> {
        self.partition.set_memory(Vtl::VTL0, memory)
    }
}

impl Stepper {
    /// Executes one instruction from `state` on. Device accesses go to `bus`;
    /// interrupts are not looked at.
    ///
    /// # Errors
    /// `state` is impossible, or uses what the software CPU does not have.
    pub fn step(&mut self, state: &VcpuState, bus: &dyn IoBus) -> Result<StepEnd, HypervisorError> {
        self.vcpu.step(state, bus)
    }
}
