//! A virtual machine from outside: made, started, held, looked at and ended.

use std::{
    sync::Arc,
    task::{Context, Wake, Waker},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use caisson_config::OnReboot;
use caisson_device::{Clock, ResetKind};
use caisson_firmware::{MemoryMap, layout};
use caisson_hypervisor::{Partition, PartitionConfig};
use caisson_memory::{GuestMemory, MemoryView, Vtl, host::Mapping};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    MachineError, MachineSpec, OnCrash, Outcome,
    boot::Boot,
    io::{
        bus::MachineBus,
        claims::Claims,
        clock::{HostWallClock, MachineClock},
        doorbells::DoorbellService,
        interrupts::PartitionMsi,
        worker::Worker,
    },
    pc::{self, Lint0, Pc, PcHandles, PcSpec, PortHandles},
    ram,
    run::{
        events::{Event, Events},
        gate::Gate,
        supervisor,
        vcpus::Vcpus,
    },
    serial::{HostEnd, OutputQueue, PanicWatch, Pump, SerialInput},
    snapshot::WholeState,
};

/// How long vCPUs get to leave guest code. They need microseconds; this only bounds a fault of ours.
const PARK_PATIENCE: Duration = Duration::from_secs(10);

/// How long storage gets to answer what it was asked before the machine was held.
const QUIET_PATIENCE: Duration = Duration::from_secs(60);

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Made, never run.
    Created,
    /// Its vCPUs run and its time passes.
    Running,
    /// Its vCPUs and its time stand still.
    Paused,
    /// Over. See [`Machine::wait`].
    Ended,
}

impl Phase {
    fn text(self) -> &'static str {
        match self {
            Self::Created => "has not been started",
            Self::Running => "is running",
            Self::Paused => "is paused",
            Self::Ended => "has ended",
        }
    }
}

/// A character port: the queue behind the device, the way in, and the host end until its thread takes it.
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) output: Arc<OutputQueue>,
    pub(crate) input: SerialInput,
    pub(crate) end: Mutex<Option<Box<dyn HostEnd>>>,
    pub(crate) patience: Option<Duration>,
}

impl Port {
    pub(crate) fn new(name: String, mut end: Box<dyn HostEnd>, watch: Option<PanicWatch>) -> Self {
        let input = SerialInput::default();
        end.attach(input.clone());
        let output = OutputQueue::new(watch);
        let patience = end.patience();
        let null = end.is_null();
        if null {
            output.abandon();
        }
        Self {
            name,
            output,
            input,
            patience,
            // Nobody needs no thread.
            end: Mutex::new((!null).then_some(end)),
        }
    }
}

/// Everything that the machine's threads share.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) backend: &'static str,
    pub(crate) phase: Mutex<Phase>,
    pub(crate) partition: Arc<dyn Partition>,
    pub(crate) memory: GuestMemory,
    /// What RAM lies in.
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) vcpus: Arc<Vcpus>,
    pub(crate) bus: MachineBus,
    pub(crate) pc: Pc,
    pub(crate) clock: Arc<MachineClock>,
    pub(crate) worker: Arc<Worker>,
    pub(crate) doorbells: Option<Arc<DoorbellService>>,
    pub(crate) gate: Gate,
    pub(crate) events: Arc<Events>,
    pub(crate) ports: Vec<Port>,
    pub(crate) boot: Boot,
    pub(crate) on_reboot: OnReboot,
    pub(crate) on_crash: OnCrash,
    pub(crate) resets: Mutex<u64>,
    outcome: Mutex<Option<Outcome>>,
    ended: Condvar,
}

/// What a machine's RAM holds at first.
pub(crate) enum Start {
    /// Zeros.
    New,
    /// What was saved.
    Saved(Arc<Mapping>),
}

/// A virtual machine. All methods may be called from any thread; dropping it ends it.
pub struct Machine {
    shared: Arc<Shared>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
}

impl Machine {
    /// Makes the machine: memory, vCPUs, devices, tables, and the kernel in its place. Nothing runs yet.
    ///
    /// # Errors
    /// Whatever of it cannot be had; see [`MachineError`].
    pub fn new(spec: MachineSpec) -> Result<Self, MachineError> {
        let machine = Self::assemble(spec, Start::New, None)?;
        let shared = &machine.shared;
        shared.pc.reset(ResetKind::PowerOn);
        shared.load()?;
        Ok(machine)
    }

    /// Makes the machine's parts, in no particular state; what a guest has learned of its processors and its time is
    /// as in `saved`.
    pub(crate) fn assemble(
        spec: MachineSpec,
        start: Start,
        saved: Option<&WholeState>,
    ) -> Result<Self, MachineError> {
        let backend = spec.hypervisor.name();
        let limit = spec.hypervisor.max_vcpus();
        if spec.vcpus == 0 || spec.vcpus > limit {
            return Err(MachineError::Vcpus {
                asked: spec.vcpus,
                backend,
                limit,
            });
        }
        let cpuid = match saved {
            Some(saved) => Some(saved.cpuid.clone()),
            None => spec
                .cpu
                .table(&*spec.hypervisor, spec.vcpus, spec.memory.bytes)?,
        };
        // How far the vCPUs reach is known once there is a partition.
        let map = MemoryMap::new(spec.memory.bytes, 52)?;
        let mapping = match start {
            Start::New => ram::allocate(&map, &spec.memory)?,
            Start::Saved(mapping) => mapping,
        };
        let memory = ram::table(&map, &mapping)?;
        let partition = spec.hypervisor.create_partition(PartitionConfig {
            vcpus: spec.vcpus,
            memory: memory.clone(),
            cpuid,
            tsc_hz: saved.map(|saved| saved.tsc_hz),
            dirty: Default::default(),
        })?;
        let mut map = MemoryMap::new(spec.memory.bytes, physical_address_bits(&*partition))?;
        partition.set_clock_running(false);

        let vcpus = (0..spec.vcpus)
            .map(|index| partition.create_vcpu(index))
            .collect::<Result<Vec<_>, _>>()?;
        let vcpus = Vcpus::new(vcpus);
        let events = Arc::new(Events::default());
        events.set_kicks(vcpus.kicks());
        let clock = Arc::new(MachineClock::new(partition.clone()));
        let worker = Worker::new();
        worker.set_clock_running(false);

        let (has_pci, has_virtio) = (spec.has_pci(), spec.has_virtio());
        let mut ports = Vec::new();
        let mut serial = [None; crate::SERIAL_PORTS];
        for (index, end) in spec.serial.into_iter().enumerate() {
            if let (Some(end), Some(place)) = (end, serial.get_mut(index)) {
                *place = Some(ports.len());
                let watch = (index == 0).then(PanicWatch::default);
                ports.push(Port::new(format!("com{}", index + 1), end, watch));
            }
        }
        let debugcon = spec.debugcon.map(|end| {
            ports.push(Port::new("debugcon".into(), end, None));
            ports.len() - 1
        });
        let mut consoles = Vec::new();
        for (index, end) in spec.consoles.into_iter().enumerate() {
            consoles.push(ports.len());
            ports.push(Port::new(format!("hvc{index}"), end, None));
        }
        if has_pci {
            map.reserve(layout::PCI_ECAM);
        }
        let pc_spec = PcSpec {
            vcpus: spec.vcpus,
            map: &map,
            serial,
            debugcon,
            debug_exit: spec.debug_exit,
            pci: has_pci,
            transport: spec.virtio,
            rng: spec.rng,
            disks: spec.disks,
            nets: spec.nets,
            consoles,
        };
        let claims = Arc::new(Claims::default());
        let doorbells = match has_virtio {
            true => DoorbellService::new(&partition),
            false => None,
        };
        let handles = PcHandles {
            msi: Arc::new(PartitionMsi(partition.clone())),
            intr: Arc::new(Lint0(partition.clone())),
            clock: clock.clone(),
            timers: worker.clone(),
            power: events.clone(),
            memory: MemoryView::new(memory.clone()),
            wall: Arc::new(HostWallClock),
            claims: claims.clone(),
            doorbells: doorbells.clone(),
            ports: (0..)
                .zip(&ports)
                .map(|(number, port)| PortHandles {
                    output: port.output.clone(),
                    room: worker.pump_waker(number),
                })
                .collect(),
        };
        let pc = pc::assemble(&pc_spec, &handles)?;
        let tables = pc::tables(&pc_spec, &pc, &*partition)?;
        claims.set(pc.address_map()?, pc.devices().to_vec());
        let bus = MachineBus::new(claims, pc.controllers());
        connect(&worker, &pc, &ports);

        let boot = Boot {
            spec: spec.boot,
            map,
            tables: tables.imports,
            rsdp: Some(tables.rsdp),
        };
        let shared = Arc::new(Shared {
            name: spec.name,
            backend,
            phase: Mutex::new(Phase::Created),
            partition,
            memory,
            mapping,
            vcpus,
            bus,
            pc,
            clock,
            worker,
            doorbells,
            gate: Gate::default(),
            events,
            ports,
            boot,
            on_reboot: spec.on_reboot,
            on_crash: spec.on_crash,
            resets: Mutex::new(0),
            outcome: Mutex::new(None),
            ended: Condvar::new(),
        });
        Ok(Self {
            shared,
            supervisor: Mutex::new(None),
        })
    }

    /// Starts the machine's threads and lets it run.
    ///
    /// # Errors
    /// It was started before, or the host refused a thread.
    pub fn start(&self) -> Result<(), MachineError> {
        let mut phase = self.shared.phase_for("started", &[Phase::Created])?;
        let supervisor = supervisor::start(&self.shared, &mut phase)?;
        *self.supervisor.lock() = Some(supervisor);
        Ok(())
    }

    /// Stops all vCPUs and the machine's time. Returns when they stand still. Pausing a paused machine does nothing.
    ///
    /// # Errors
    /// The machine is not running.
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut phase = self
            .shared
            .phase_for("paused", &[Phase::Running, Phase::Paused])?;
        self.shared.hold(&mut phase)
    }

    /// Lets a paused machine run on. Its guest does not notice that time has passed.
    ///
    /// # Errors
    /// The machine is neither paused nor running.
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut phase = self
            .shared
            .phase_for("resumed", &[Phase::Running, Phase::Paused])?;
        self.shared.go(&mut phase);
        Ok(())
    }

    /// Presses reset: the guest starts again from its kernel. A paused machine stays paused.
    ///
    /// # Errors
    /// The machine is neither paused nor running, or its kernel can no longer be read.
    pub fn reset(&self) -> Result<(), MachineError> {
        let mut phase = self
            .shared
            .phase_for("reset", &[Phase::Running, Phase::Paused])?;
        self.shared.restart(&mut phase, || {})
    }

    /// Presses the power button: the guest is asked to switch itself off, if it listens.
    ///
    /// # Errors
    /// The machine is not running.
    pub fn press_power_button(&self) -> Result<(), MachineError> {
        let _phase = self
            .shared
            .phase_for("asked to power off", &[Phase::Running])?;
        self.shared.pc.press_power_button();
        Ok(())
    }

    /// Pulls the plug. Returns at once; see [`wait`](Self::wait).
    pub fn stop(&self) {
        let phase = self.shared.phase.lock();
        if *phase == Phase::Created {
            self.shared.finish(phase, Outcome::Stopped);
        } else {
            drop(phase);
            self.shared.events.post(Event::Stop);
        }
    }

    /// Waits until the machine has ended, its threads are gone and its output has been delivered.
    pub fn wait(&self) -> Outcome {
        let mut outcome = self.shared.outcome.lock();
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            self.shared.ended.wait(&mut outcome);
        }
    }

    /// As [`wait`](Self::wait), but for at most `patience`.
    pub fn wait_for(&self, patience: Duration) -> Option<Outcome> {
        let deadline = Instant::now() + patience;
        let mut outcome = self.shared.outcome.lock();
        while outcome.is_none()
            && !self
                .shared
                .ended
                .wait_until(&mut outcome, deadline)
                .timed_out()
        {}
        outcome.clone()
    }

    /// What the machine is doing.
    pub fn phase(&self) -> Phase {
        *self.shared.phase.lock()
    }

    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The way to type at serial port `index` (0 is COM1), if the machine has it.
    pub fn serial_input(&self, index: usize) -> Option<SerialInput> {
        let name = format!("com{}", index + 1);
        self.shared
            .ports
            .iter()
            .find(|port| port.name == name)
            .map(|port| port.input.clone())
    }

    /// The way to type at virtio console `index`, if the machine has it.
    pub fn console_input(&self, index: usize) -> Option<SerialInput> {
        let name = format!("hvc{index}");
        let port = self.shared.ports.iter().find(|port| port.name == name);
        port.map(|port| port.input.clone())
    }

    /// Tells the guest that virtio console `index` now has this size, in characters. Without such a console nothing
    /// happens.
    pub fn resize_console(&self, index: usize, columns: u16, rows: u16) {
        let Some(_inside) = self.shared.gate.enter() else {
            return;
        };
        if let Some(console) = self.shared.pc.consoles().get(index) {
            console.set_size(columns, rows);
        }
    }

    /// The guest's memory. Only a paused guest leaves it alone.
    pub fn memory(&self) -> &GuestMemory {
        &self.shared.memory
    }

    /// Machine time in nanoseconds.
    pub fn now_ns(&self) -> u64 {
        self.shared.clock.now()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        if let Some(supervisor) = self.supervisor.lock().take() {
            let _ = supervisor.join();
        }
        self.shared.worker.forget_work();
    }
}

impl Shared {
    /// The phase, locked, if it is one of `allowed`.
    pub(crate) fn phase_for(
        &self,
        action: &'static str,
        allowed: &[Phase],
    ) -> Result<MutexGuard<'_, Phase>, MachineError> {
        let phase = self.phase.lock();
        if allowed.contains(&phase) {
            Ok(phase)
        } else {
            Err(MachineError::Phase {
                action,
                phase: phase.text(),
            })
        }
    }

    /// Parks the vCPUs, keeps other threads out of the devices, and stops time.
    pub(crate) fn hold(&self, phase: &mut Phase) -> Result<(), MachineError> {
        if *phase != Phase::Running {
            return Ok(());
        }
        if !self.vcpus.park(Some(Instant::now() + PARK_PATIENCE)) {
            self.events
                .post(Event::Crash("a vCPU does not stop".into()));
            return Err(MachineError::Phase {
                action: "held",
                phase: "has a vCPU that does not stop",
            });
        }
        self.gate.close();
        self.worker.set_clock_running(false);
        self.partition.set_clock_running(false);
        *phase = Phase::Paused;
        Ok(())
    }

    /// Waits until nothing outside of the devices touches memory for them any more. The machine stands still.
    pub(crate) fn quiesce(&self) -> Result<(), MachineError> {
        struct Unpark(thread::Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut cx = Context::from_waker(&waker);
        let deadline = Instant::now() + QUIET_PATIENCE;
        for slot in self.pc.devices() {
            while slot.lock().poll_quiet(&mut cx).is_pending() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(MachineError::Busy {
                        device: slot.name().to_string(),
                    });
                }
                thread::park_timeout(left);
            }
        }
        Ok(())
    }

    /// Lets time pass and vCPUs run.
    pub(crate) fn go(&self, phase: &mut Phase) {
        if *phase == Phase::Paused {
            self.partition.set_clock_running(true);
            self.worker.set_clock_running(true);
            self.gate.open();
            // What was done while the machine stood still has not been reported.
            self.worker.wake_devices();
            self.vcpus.run();
            *phase = Phase::Running;
        }
    }

    /// Puts kernel and tables into memory and the first vCPU at their entry. The vCPUs stand still.
    pub(crate) fn load(&self) -> Result<(), MachineError> {
        let boot = self.boot.load(&MemoryView::new(self.memory.clone()))?;
        // What vCPUs remember of the old contents (translated code) is to be forgotten.
        self.partition.set_memory(Vtl::VTL0, self.memory.clone())?;
        for mut vcpu in self.vcpus.parked() {
            vcpu.reset(Vtl::VTL0, false);
            if vcpu.index() == 0 {
                let mut state = vcpu.state(Vtl::VTL0)?;
                boot.apply(&mut state);
                vcpu.set_state(Vtl::VTL0, &state)?;
            }
        }
        Ok(())
    }

    /// Resets everything and starts the guest again, or leaves it paused if it was. `before` is called while
    /// everything stands still.
    pub(crate) fn restart(
        &self,
        phase: &mut Phase,
        before: impl FnOnce(),
    ) -> Result<(), MachineError> {
        let was = *phase;
        self.hold(phase)?;
        self.quiesce()?;
        self.pc.reset(ResetKind::System);
        for port in &self.ports {
            port.output.reset_watch();
        }
        self.load()?;
        *self.resets.lock() += 1;
        before();
        if was == Phase::Running {
            self.go(phase);
        }
        Ok(())
    }

    /// Whether the guest's kernel said that it panics.
    pub(crate) fn panic_message(&self) -> Option<String> {
        self.ports
            .iter()
            .find_map(|port| port.output.panic_message())
    }

    /// The machine is over.
    pub(crate) fn finish(&self, mut phase: MutexGuard<'_, Phase>, outcome: Outcome) {
        *phase = Phase::Ended;
        drop(phase);
        self.outcome.lock().get_or_insert(outcome);
        self.ended.notify_all();
    }

    /// Spawns one of the machine's threads. A panic in it ends the machine instead of leaving it hanging.
    pub(crate) fn spawn(
        self: &Arc<Self>,
        role: String,
        body: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> Result<JoinHandle<()>, MachineError> {
        let shared = self.clone();
        let what = role.clone();
        thread::Builder::new()
            .name(role.clone())
            .spawn(move || {
                let run = std::panic::AssertUnwindSafe(|| body(&shared));
                if let Err(payload) = std::panic::catch_unwind(run) {
                    shared.events.post(Event::Crash(format!(
                        "panic in the {what} thread: {}",
                        panic_text(&*payload)
                    )));
                }
            })
            .map_err(|source| MachineError::Thread { role, source })
    }
}

/// What a panic said.
pub(crate) fn panic_text(payload: &(dyn core::any::Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Wires the ports to their devices, and both to the worker.
fn connect(worker: &Arc<Worker>, pc: &Pc, ports: &[Port]) {
    let mut pumps = Vec::new();
    for (number, (port, device)) in (0..).zip(ports.iter().zip(pc.ports())) {
        let (on_room, on_push) = (worker.pump_waker(number), worker.pump_waker(number));
        port.output.on_room(move || on_room.wake_by_ref());
        port.input.on_push(move || on_push.wake_by_ref());
        pumps.push(Pump::new(
            port.input.clone(),
            port.output.clone(),
            device.clone(),
        ));
    }
    worker.set_work(pc.devices().to_vec(), pumps);
}

/// MAXPHYADDR (Intel SDM Vol. 2, CPUID leaf 8000_0008H), 36 where the leaf is missing.
fn physical_address_bits(partition: &dyn Partition) -> u8 {
    match partition.cpuid().get(0x8000_0008, 0)[0] & 0xff {
        0 => 36,
        bits => bits as u8,
    }
}
