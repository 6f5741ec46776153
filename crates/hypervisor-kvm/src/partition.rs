//! A partition of KVM.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use caisson_hypervisor::{
    HypervisorError, Msi, Partition, PartitionConfig, PartitionPower, Vcpu,
    x86::{CpuidTable, Feature, same_tsc_frequency},
};
use caisson_hypervisor_soft::{Stepper, Steppers};
use caisson_memory::{GuestMemory, Vtl};
use kvm_bindings::{
    KVM_CAP_IOEVENTFD, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQFD, KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_msi,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use parking_lot::Mutex;

use crate::{
    cpuid,
    dirty::Log,
    events::EventPowers,
    memslots::Memslots,
    msr::{self, MsrList},
    probe,
    routes::{LEVEL_ROUTES, Routes, is_heard},
    sys,
    vcpu::{Cell, KvmVcpu, settle_pending},
};

/// Where processors without unrestricted guest mode get a page table and a task
/// state segment for real mode: below the APICs, where no memory is.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TASK_STATE: usize = 0xfeff_d000;

/// What the partition and its vCPUs share.
pub(crate) struct Shared {
    // Dropped in this order: the kernel's vCPUs before the memory that they use.
    pub(crate) cells: Vec<Arc<Cell>>,
    pub(crate) log: Log,
    pub(crate) vm: VmFd,
    pub(crate) memslots: Mutex<Memslots>,
    memory: Mutex<GuestMemory>,
    pub(crate) cpuid: CpuidTable,
    pub(crate) msrs: MsrList,
    /// The level of the 8259 pair's output.
    pub(crate) extint: AtomicBool,
    pub(crate) routes: Routes,
    /// Bytes of a vCPU's vector registers to the kernel.
    pub(crate) xsave_len: usize,
    /// Whether the kernel tells and takes a triple fault on its way.
    pub(crate) triple_fault_event: bool,
    steppers: Mutex<Option<Steppers>>,
}

impl Shared {
    /// The software CPU that helps vCPU `index` out.
    pub(crate) fn stepper(&self, index: u32) -> Result<Box<Stepper>, HypervisorError> {
        let mut steppers = self.steppers.lock();
        let steppers = match &mut *steppers {
            Some(steppers) => steppers,
            None => {
                let memory = self.memory.lock().clone();
                let count = self.cells.len() as u32;
                steppers.insert(Steppers::new(memory, count, self.cpuid.clone())?)
            }
        };
        steppers.stepper(index).map(Box::new)
    }
}

/// Machine time.
#[derive(Default)]
struct Stopwatch {
    passed: Duration,
    since: Option<Instant>,
}

impl Stopwatch {
    fn now(&self) -> Duration {
        self.passed + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// See [`Partition`].
pub(crate) struct KvmPartition {
    pub(crate) shared: Arc<Shared>,
    events: EventPowers,
    /// Which of the powers over events the kernel has.
    has_doorbells: bool,
    has_interrupt_events: bool,
    tsc_hz: u64,
    /// A bit per vCPU that was handed out.
    created: Vec<AtomicBool>,
    time: Mutex<Stopwatch>,
}

fn host<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> HypervisorError {
    move |e| HypervisorError::Host {
        what,
        reason: e.to_string(),
    }
}

impl KvmPartition {
    pub(crate) fn new(kvm: &Kvm, config: PartitionConfig) -> Result<Self, HypervisorError> {
        Self::on(kvm, config, probe::has_virtualisation())
    }

    /// On a host whose guests run on `hardware`, or are emulated in part.
    pub(crate) fn on(
        kvm: &Kvm,
        config: PartitionConfig,
        hardware: bool,
    ) -> Result<Self, HypervisorError> {
        sys::install_kick_signal();
        let vm = kvm
            .create_vm()
            .map_err(host("making a virtual machine of KVM"))?;
        // Before any vCPU exists.
        vm.set_identity_map_address(IDENTITY_MAP)
            .map_err(host("placing KVM's real-mode page table"))?;
        vm.set_tss_address(TASK_STATE)
            .map_err(host("placing KVM's real-mode task state segment"))?;
        enable(&vm, KVM_CAP_SPLIT_IRQCHIP, LEVEL_ROUTES.into())
            .map_err(host("asking KVM for local APICs"))?;
        let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(&vm, KVM_CAP_X2APIC_API, x2apic.into())
            .map_err(host("asking KVM for wide APIC ids"))?;
        let msrs = KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL;
        if let Err(error) = enable(&vm, KVM_CAP_X86_USER_SPACE_MSR, msrs.into()) {
            // Before Linux 5.10: MSRs that KVM does not know fault.
            tracing::debug!(%error, "no MSR exits");
        }
        let triple_fault_event = enable(&vm, KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1).is_ok();
        let log = Log::new(kvm, &vm, config.dirty, hardware)?;
        let mut memslots = Memslots::new(kvm.get_nr_memslots() as u32);
        memslots.set(&vm, &config.memory)?;

        let offered = cpuid::offers(kvm, config.vcpus, hardware)?;
        let cpuid = match config.cpuid {
            Some(table) => {
                let lacking = table.lacking(&offered);
                if !lacking.is_empty() {
                    return Err(HypervisorError::Processor {
                        backend: "kvm",
                        lacking,
                    });
                }
                if !hardware {
                    tracing::warn!(
                        "this host's KVM emulates the guest's kernel, and shows guests the features of the host's processor \
                         instead of those they were given"
                    );
                }
                table
            }
            None => offered,
        };
        let promised = |name| Feature::named(name).is_some_and(|feature| cpuid.has(feature));
        let hide_ibrs = promised("arch_capabilities") && !promised("spec_ctrl");
        let has = |cap: u32| vm.check_extension_raw(cap.into());
        let mut fds = Vec::new();
        for index in 0..config.vcpus {
            let fd = vm
                .create_vcpu(index.into())
                .map_err(host("making a vCPU of KVM"))?;
            fd.set_cpuid2(&cpuid::for_vcpu(&cpuid, index, config.vcpus)?)
                .map_err(host("giving a vCPU its CPUID"))?;
            if hide_ibrs && let Err(error) = msr::hide_ibrs(&fd) {
                tracing::debug!(%error, "IA32_ARCH_CAPABILITIES stays as it is");
            }
            log.add_vcpu(&fd)?;
            fds.push(fd);
        }
        let Some(first) = fds.first() else {
            return Err(HypervisorError::TooManyVcpus {
                backend: "kvm",
                asked: 0,
                limit: kvm.get_max_vcpus() as u32,
            });
        };
        let host_khz = first
            .get_tsc_khz()
            .map_err(host("asking for the TSC's frequency"))?;
        let khz = match config.tsc_hz {
            Some(hz) if !same_tsc_frequency(hz, u64::from(host_khz) * 1000) => {
                let khz = (hz / 1000) as u32;
                for fd in &fds {
                    fd.set_tsc_khz(khz).map_err(|e| {
                        HypervisorError::State(format!(
                            "this host's KVM cannot run the TSC at {khz} kHz instead of its own {host_khz} kHz: {e}"
                        ))
                    })?;
                }
                khz
            }
            _ => host_khz,
        };
        let msrs = MsrList::new(kvm, first)?;
        let created = fds.iter().map(|_| AtomicBool::new(false)).collect();
        let cells: io::Result<Vec<_>> = fds
            .into_iter()
            .map(|fd| Cell::new(fd).map(Arc::new))
            .collect();
        let (has_doorbells, has_interrupt_events) =
            (has(KVM_CAP_IOEVENTFD) > 0, has(KVM_CAP_IRQFD) > 0);
        let shared = Arc::new(Shared {
            cells: cells.map_err(host("mapping a vCPU's run page"))?,
            log,
            memslots: Mutex::new(memslots),
            memory: Mutex::new(config.memory),
            cpuid,
            msrs,
            extint: AtomicBool::new(false),
            routes: Routes::new(u32::try_from(has(KVM_CAP_IRQ_ROUTING)).unwrap_or(0)),
            xsave_len: (vm.check_extension_int(Cap::Xsave2).max(0) as usize).max(sys::XSAVE_LEN),
            triple_fault_event,
            steppers: Mutex::new(None),
            vm,
        });
        Ok(Self {
            created,
            events: EventPowers(shared.clone()),
            shared,
            has_doorbells,
            has_interrupt_events,
            tsc_hz: u64::from(khz) * 1000,
            time: Mutex::new(Stopwatch {
                passed: Duration::ZERO,
                since: Some(Instant::now()),
            }),
        })
    }
}

/// Switches a capability on.
pub(crate) fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    })
}

impl Partition for KvmPartition {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError> {
        let at = index as usize;
        let (Some(created), Some(cell)) = (self.created.get(at), self.shared.cells.get(at)) else {
            return Err(HypervisorError::TooManyVcpus {
                backend: "kvm",
                asked: index.saturating_add(1),
                limit: self.created.len() as u32,
            });
        };
        if created.swap(true, Ordering::SeqCst) {
            return Err(HypervisorError::State(format!(
                "vCPU {index} exists already"
            )));
        }
        let mut vcpu = KvmVcpu::new(self.shared.clone(), cell.clone(), index);
        vcpu.reset(Vtl::VTL0, false);
        Ok(Box::new(vcpu))
    }

    fn set_memory(&self, vtl: Vtl, memory: GuestMemory) -> Result<(), HypervisorError> {
        if vtl != Vtl::VTL0 {
            return Err(HypervisorError::State(
                "this partition has no trust levels but VTL0".into(),
            ));
        }
        let mut memslots = self.shared.memslots.lock();
        if memslots.logs_dirty() {
            // What was written goes with the memslots that go.
            self.shared.sync_dirty(&memslots);
        }
        memslots.set(&self.shared.vm, &memory)?;
        drop(memslots);
        *self.shared.memory.lock() = memory.clone();
        if let Some(steppers) = &*self.shared.steppers.lock() {
            steppers.set_memory(memory)?;
        }
        Ok(())
    }

    fn raise_msi(&self, vtl: Vtl, msi: Msi) {
        if vtl != Vtl::VTL0 || !is_heard(msi) {
            return;
        }
        self.shared.routes.announce(&self.shared.vm, msi);
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // Zero: nobody took it. A message that no APIC can have meant is an error to KVM.
        let _ = self.shared.vm.signal_msi(message);
    }

    fn set_extint(&self, vtl: Vtl, asserted: bool) {
        if vtl != Vtl::VTL0 {
            return;
        }
        let was = self.shared.extint.swap(asserted, Ordering::SeqCst);
        if asserted && !was {
            self.shared.cells[0].doorstep.call_out();
        }
    }

    fn raise_nmi(&self, vtl: Vtl) {
        if vtl == Vtl::VTL0 {
            for cell in &self.shared.cells {
                cell.doorstep.raise_nmi();
            }
        }
    }

    fn cpuid(&self) -> &CpuidTable {
        &self.shared.cpuid
    }

    fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    fn set_clock_running(&self, running: bool) {
        let mut time = self.time.lock();
        if running == time.since.is_some() {
            return;
        }
        let host_tsc = sys::host_tsc();
        if !running {
            time.passed = time.now();
            time.since = None;
        }
        for cell in &self.shared.cells {
            let mut kernel = cell.kernel.lock();
            let done = if running {
                if let Err(error) = settle_pending(&self.shared, &mut kernel) {
                    tracing::error!(%error, "KVM refuses the reset state");
                }
                kernel.release(host_tsc)
            } else {
                kernel.hold(host_tsc)
            };
            if let Err(error) = done {
                tracing::error!(%error, running, "KVM refuses a vCPU's clock");
            }
        }
        if running {
            time.since = Some(Instant::now());
        }
    }

    fn now_ns(&self) -> u64 {
        self.time.lock().now().as_nanos() as u64
    }

    fn power(&self) -> PartitionPower<'_> {
        let mut power = PartitionPower::default();
        power.dirty_log = Some(&*self.shared);
        power.backend_memory = Some(&*self.shared);
        if self.has_doorbells {
            power.doorbells = Some(&self.events);
        }
        if self.has_interrupt_events {
            power.interrupt_events = Some(&self.events);
        }
        power
    }
}
