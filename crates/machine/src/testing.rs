//! A hypervisor whose vCPUs follow a script instead of guest code, for tests of everything around them.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use caisson_hypervisor::{
    Access, Availability, BusAnswer, Completion, CrashReason, Exit, Hypervisor, HypervisorError,
    IoBus, KickHandle, Msi, Partition, PartitionConfig, PartitionPower, Pending, Probe, Space,
    Vcpu, VcpuStats,
    x86::{CpuidTable, RunState, VcpuState},
};
use caisson_memory::{Gpa, GuestMemory, Vtl};
use parking_lot::{Condvar, Mutex};

use crate::{BootSpec, CpuSpec, Input, MachineSpec, MemorySpec, OnCrash, SERIAL_PORTS};

/// One thing that a scripted vCPU does.
pub(crate) enum Step {
    Out(u16, Vec<u8>),
    /// Reads a port into the log.
    In(u16, usize),
    /// Reads device memory into the log.
    Load(u64, usize),
    Store(u64, Vec<u8>),
    /// Reads a port until one of these bits is set.
    Until(u16, u8),
    Shutdown,
    Fail,
    Panic,
}

/// A backend whose first vCPU does what the script says, and again after each reset.
pub(crate) struct Scripted {
    script: Vec<Step>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    log: Mutex<Vec<Vec<u8>>>,
    logged: Condvar,
    msis: Mutex<Vec<Msi>>,
    extint: AtomicBool,
    clock: Mutex<Stopwatch>,
}

#[derive(Default)]
struct Stopwatch {
    passed: Duration,
    since: Option<Instant>,
}

impl Scripted {
    pub(crate) fn new(script: Vec<Step>) -> Arc<Self> {
        Arc::new(Self {
            script,
            shared: Arc::default(),
        })
    }

    /// Waits until the script has read `count` times.
    pub(crate) fn wait_for_log(&self, count: usize) -> Vec<Vec<u8>> {
        let mut log = self.shared.log.lock();
        while log.len() < count {
            assert!(
                !self
                    .shared
                    .logged
                    .wait_for(&mut log, Duration::from_secs(60))
                    .timed_out(),
                "{log:x?}"
            );
        }
        log.clone()
    }

    pub(crate) fn msis(&self) -> Vec<Msi> {
        self.shared.msis.lock().clone()
    }

    pub(crate) fn extint(&self) -> bool {
        self.shared.extint.load(Ordering::SeqCst)
    }
}

/// A backend handed to a machine.
struct Handle(Arc<Scripted>);

impl Hypervisor for Handle {
    fn name(&self) -> &'static str {
        "scripted"
    }
    fn probe(&self) -> Probe {
        Probe {
            availability: Availability::Usable,
            reason: "a test".into(),
            remedy: None,
        }
    }
    fn max_vcpus(&self) -> u32 {
        8
    }
    fn offers(&self, _: u32) -> Result<CpuidTable, HypervisorError> {
        Ok(CpuidTable::default())
    }
    fn create_partition(&self, _: PartitionConfig) -> Result<Arc<dyn Partition>, HypervisorError> {
        Ok(Arc::new(ScriptedPartition {
            backend: self.0.clone(),
            cpuid: CpuidTable::default(),
        }))
    }
}

struct ScriptedPartition {
    backend: Arc<Scripted>,
    cpuid: CpuidTable,
}

impl Partition for ScriptedPartition {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError> {
        Ok(Box::new(ScriptedVcpu {
            index,
            backend: self.backend.clone(),
            steps: VecDeque::new(),
            kick: Arc::default(),
            state: VcpuState::default(),
            stats: VcpuStats::default(),
        }))
    }
    fn set_memory(&self, _: Vtl, _: GuestMemory) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn raise_msi(&self, _: Vtl, msi: Msi) {
        self.backend.shared.msis.lock().push(msi);
    }
    fn set_extint(&self, _: Vtl, asserted: bool) {
        self.backend.shared.extint.store(asserted, Ordering::SeqCst);
    }
    fn raise_nmi(&self, _: Vtl) {}
    fn cpuid(&self) -> &CpuidTable {
        &self.cpuid
    }
    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }
    fn set_clock_running(&self, running: bool) {
        let mut clock = self.backend.shared.clock.lock();
        match (running, clock.since) {
            (true, None) => clock.since = Some(Instant::now()),
            (false, Some(since)) => {
                clock.passed += since.elapsed();
                clock.since = None;
            }
            _ => {}
        }
    }
    fn now_ns(&self) -> u64 {
        let clock = self.backend.shared.clock.lock();
        (clock.passed + clock.since.map_or(Duration::ZERO, |since| since.elapsed())).as_nanos()
            as u64
    }
    fn power(&self) -> PartitionPower<'_> {
        PartitionPower::default()
    }
}

#[derive(Default)]
struct Kick {
    kicked: Mutex<bool>,
    changed: Condvar,
}

impl Kick {
    /// Waits for a kick and takes it.
    fn wait(&self, at_most: Option<Duration>) -> bool {
        let mut kicked = self.kicked.lock();
        let deadline = at_most.map(|at_most| Instant::now() + at_most);
        while !*kicked {
            match deadline {
                Some(deadline) => {
                    if self.changed.wait_until(&mut kicked, deadline).timed_out() {
                        return false;
                    }
                }
                None => self.changed.wait(&mut kicked),
            }
        }
        core::mem::take(&mut *kicked)
    }
}

impl KickHandle for Kick {
    fn kick(&self) {
        *self.kicked.lock() = true;
        self.changed.notify_all();
    }
}

struct ScriptedVcpu {
    index: u32,
    backend: Arc<Scripted>,
    /// The indices of the steps left.
    steps: VecDeque<usize>,
    kick: Arc<Kick>,
    state: VcpuState,
    stats: VcpuStats,
}

impl ScriptedVcpu {
    fn access(&self, space: Space, address: u64) -> Access {
        Access {
            vtl: Vtl::VTL0,
            vcpu: self.index,
            space,
            address: Gpa(address),
        }
    }

    fn log(&self, bytes: Vec<u8>) {
        self.backend.shared.log.lock().push(bytes);
        self.backend.shared.logged.notify_all();
    }

    /// Performs an access; `Some` when it is to be tried again.
    fn perform(
        &mut self,
        bus: &dyn IoBus,
        space: Space,
        address: u64,
        write: Option<&[u8]>,
        len: usize,
    ) -> Option<Exit> {
        match space {
            Space::Mmio => self.stats.mmio += 1,
            Space::Pio => self.stats.pio += 1,
        }
        let access = self.access(space, address);
        match write {
            Some(data) => (bus.write(access, data) == BusAnswer::Park).then(|| {
                Exit::Pending(Pending::Write {
                    space,
                    address: Gpa(address),
                    data: data.to_vec(),
                })
            }),
            None => {
                let mut data = vec![0; len];
                if bus.read(access, &mut data) == BusAnswer::Park {
                    return Some(Exit::Pending(Pending::Read {
                        space,
                        address: Gpa(address),
                        len: len as u8,
                    }));
                }
                self.log(data);
                None
            }
        }
    }
}

impl Vcpu for ScriptedVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self, bus: &dyn IoBus) -> Exit {
        let backend = self.backend.clone();
        while let Some(step) = self.steps.pop_front() {
            let parked = match &backend.script[step] {
                Step::Out(port, data) => {
                    self.perform(bus, Space::Pio, (*port).into(), Some(data), 0)
                }
                Step::In(port, len) => self.perform(bus, Space::Pio, (*port).into(), None, *len),
                Step::Load(address, len) => self.perform(bus, Space::Mmio, *address, None, *len),
                Step::Store(address, data) => {
                    self.perform(bus, Space::Mmio, *address, Some(data), 0)
                }
                Step::Until(port, bits) => {
                    let mut data = [0];
                    let answer = bus.read(self.access(Space::Pio, (*port).into()), &mut data);
                    if answer != BusAnswer::Done || data[0] & bits == 0 {
                        self.steps.push_front(step);
                        std::thread::sleep(Duration::from_micros(100));
                    }
                    None
                }
                Step::Shutdown => {
                    self.state.run_state = RunState::Shutdown;
                    return Exit::Shutdown;
                }
                Step::Fail => {
                    return Exit::Failed(Box::new(CrashReason {
                        what: "the script says so".into(),
                        rip: 0x1234,
                        instruction: vec![0x0f, 0x0b],
                    }));
                }
                Step::Panic => panic!("the script says so"),
            };
            if let Some(exit) = parked {
                self.steps.push_front(step);
                return exit;
            }
            if self.kick.wait(Some(Duration::ZERO)) {
                return Exit::Kicked;
            }
        }
        self.kick.wait(None);
        Exit::Kicked
    }

    fn complete(&mut self, _: Completion) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn state(&self, _: Vtl) -> Result<VcpuState, HypervisorError> {
        Ok(self.state.clone())
    }
    fn set_state(&mut self, _: Vtl, state: &VcpuState) -> Result<(), HypervisorError> {
        self.state = state.clone();
        self.steps = if self.index == 0 {
            (0..self.backend.script.len()).collect()
        } else {
            VecDeque::new()
        };
        Ok(())
    }
    fn reset(&mut self, _: Vtl, _: bool) {
        self.state = VcpuState::default();
        self.steps.clear();
    }
    fn kick_handle(&self) -> Arc<dyn KickHandle> {
        self.kick.clone()
    }
    fn stats(&self) -> VcpuStats {
        self.stats
    }
}

/// A host end that keeps what it gets.
#[derive(Clone, Default)]
pub(crate) struct Collected(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Collected {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.0.lock().clone()
    }
}

impl std::io::Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.0.lock().extend_from_slice(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A Multiboot kernel of one instruction, loaded at 1 MiB.
pub(crate) fn kernel() -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    let (magic, flags) = (0x1bad_b002u32, 0x1_0000u32);
    let check = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let len = 64;
    let words = [
        magic,
        flags,
        check,
        BASE,
        BASE,
        BASE + len,
        BASE + len,
        BASE + 32,
    ];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(len as usize, 0xf4);
    bytes
}

/// A backend whose vCPUs do nothing.
pub(crate) fn scripted_hypervisor() -> Arc<dyn Hypervisor> {
    Arc::new(Handle(Scripted::new(Vec::new())))
}

/// A machine whose first vCPU follows `script`.
pub(crate) fn spec(backend: &Arc<Scripted>) -> MachineSpec {
    MachineSpec {
        name: "test".into(),
        hypervisor: Arc::new(Handle(backend.clone())),
        vcpus: 1,
        cpu: CpuSpec::host(),
        memory: MemorySpec {
            bytes: 4 << 20,
            hugepages: caisson_config::HugePages::Off,
        },
        boot: BootSpec {
            kernel: Input::bytes("kernel", kernel()),
            initrd: None,
            modules: Vec::new(),
            cmdline: String::new(),
        },
        serial: [const { None }; SERIAL_PORTS],
        debugcon: None,
        debug_exit: Some(0xf4),
        virtio: Default::default(),
        rng: false,
        disks: Vec::new(),
        nets: Vec::new(),
        consoles: Vec::new(),
        on_reboot: caisson_config::OnReboot::Restart,
        on_crash: OnCrash::End,
    }
}
