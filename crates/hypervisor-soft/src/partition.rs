//! A partition of the software CPU.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use caisson_hypervisor::{
    HypervisorError, Msi, Partition, PartitionConfig, PartitionPower, Vcpu, x86::CpuidTable,
};
use caisson_lapic::Message;
use caisson_memory::{GuestMemory, Vtl};
use caisson_x86_cpu::state::request;

use crate::{
    clock,
    counters::Counters,
    exec_memory::ExecMemory,
    hypervisor::MAX_VCPUS,
    shared::{DeviceWrites, MemoryMap, Shared},
    tier::Tier,
    timer,
    vcpu::SoftVcpu,
};

/// See [`Partition`].
pub(crate) struct SoftPartition {
    shared: Arc<Shared>,
    /// Watches each memory table that the partition gets, the same one at each reset.
    device_writes: Arc<DeviceWrites>,
    /// A bit per vCPU that was created.
    created: AtomicU64,
}

impl SoftPartition {
    pub(crate) fn new(
        config: PartitionConfig,
        tier: Tier,
        counters: Option<Arc<Counters>>,
    ) -> Result<Self, HypervisorError> {
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return Err(HypervisorError::TooManyVcpus {
                backend: "soft",
                asked: config.vcpus,
                limit: MAX_VCPUS,
            });
        }
        let thunks = ExecMemory::new().map_err(|e| HypervisorError::Host {
            what: "mapping executable memory for the software CPU",
            reason: e.to_string(),
        })?;
        let cpuid = match config.cpuid {
            Some(t) => t,
            None => crate::vcpu::cpuid::host_table(config.vcpus, clock::host_tsc_hz()),
        };
        let phys_bits = match cpuid.get(0x8000_0008, 0)[0] as u8 {
            0 => 36,
            n => n.clamp(36, 52),
        };
        let shared = Arc::new(Shared::new(
            config.memory,
            config.vcpus,
            cpuid,
            clock::Clock::new(config.tsc_hz),
            thunks,
            phys_bits,
            (tier, counters),
        ));
        let device_writes = Arc::new(DeviceWrites(Arc::downgrade(&shared)));
        shared
            .memory
            .load()
            .memory
            .watch_writes(device_writes.clone());
        timer::spawn(&shared).map_err(|e| HypervisorError::Host {
            what: "starting the timer thread",
            reason: e.to_string(),
        })?;
        Ok(Self {
            shared,
            device_writes,
            created: AtomicU64::new(0),
        })
    }

    /// See [`Partition::create_vcpu`].
    pub(crate) fn vcpu(&self, index: u32) -> Result<SoftVcpu, HypervisorError> {
        let count = self.shared.vcpus.len() as u32;
        if index >= count {
            return Err(HypervisorError::TooManyVcpus {
                backend: "soft",
                asked: index.saturating_add(1),
                limit: count,
            });
        }
        let bit = 1 << index;
        if self.created.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
            return Err(HypervisorError::State(format!(
                "vCPU {index} exists already"
            )));
        }
        SoftVcpu::new(self.shared.clone(), index)
    }

    fn only_vtl0(vtl: Vtl) -> bool {
        vtl == Vtl::VTL0
    }
}

impl Drop for SoftPartition {
    fn drop(&mut self) {
        self.shared.timers.stop();
    }
}

impl Partition for SoftPartition {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError> {
        Ok(Box::new(self.vcpu(index)?))
    }

    fn set_memory(&self, vtl: Vtl, memory: GuestMemory) -> Result<(), HypervisorError> {
        if !Self::only_vtl0(vtl) {
            return Err(HypervisorError::State(
                "this partition has no trust levels but VTL0".into(),
            ));
        }
        let code = crate::code_map::CodeMap::new(&memory);
        memory.watch_writes(self.device_writes.clone());
        self.shared
            .memory
            .store(Arc::new(MemoryMap { memory, code }));
        self.shared.memory_generation.fetch_add(1, Ordering::SeqCst);
        for v in &self.shared.vcpus {
            v.request(request::CODE);
        }
        Ok(())
    }

    fn raise_msi(&self, vtl: Vtl, msi: Msi) {
        if Self::only_vtl0(vtl)
            && let Some(m) = Message::from_msi(msi.address, msi.data)
        {
            self.shared.deliver(&m, None);
        }
    }

    fn set_extint(&self, vtl: Vtl, asserted: bool) {
        if Self::only_vtl0(vtl)
            && let Some(m) = self.shared.apic.mailbox(0)
            && m.set_lint0(asserted)
        {
            self.shared.vcpus[0].request(request::EVENT);
        }
    }

    fn raise_nmi(&self, vtl: Vtl) {
        if !Self::only_vtl0(vtl) {
            return;
        }
        for i in 0..self.shared.vcpus.len() {
            if self.shared.apic.mailbox(i).is_some_and(|m| m.pulse_lint1()) {
                self.shared.vcpus[i].request(request::EVENT);
            }
        }
    }

    fn cpuid(&self) -> &CpuidTable {
        &self.shared.cpuid
    }

    fn tsc_hz(&self) -> u64 {
        self.shared.clock.hz()
    }

    fn set_clock_running(&self, running: bool) {
        self.shared.clock.set_running(running);
    }

    fn now_ns(&self) -> u64 {
        self.shared.clock.nanos()
    }

    fn power(&self) -> PartitionPower<'_> {
        PartitionPower::default()
    }
}
