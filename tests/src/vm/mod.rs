//! A virtual machine in a test: started from a few values, watched through its consoles, ended by a time-out.
//!
//! Each machine lives in a process of its own and does not stay there: on its way it is saved, its process ends, and a
//! fresh one goes on from the files. That happens to every machine of every test, before its first instruction and at
//! a moment of chance; see [`Moves`].

mod compare;
mod console;
mod host;
mod process;
mod wire;

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, bail, ensure};
use caisson_config::{Cpu, DiskBus, HugePages, OnReboot, VirtioTransport};
use caisson_hypervisor::{Availability, Hypervisor};
use caisson_hypervisor_soft::{Soft, Tier};
use caisson_machine::{
    BootSpec, CpuSpec, HostEnd, Input, MachineSpec, MemorySpec, OnCrash, Outcome, SERIAL_PORTS,
    SerialInput,
};
use tempfile::TempDir;

pub use compare::differences;
pub use console::Console;
pub use host::serve;
use process::{Process, Sink};
pub use wire::NetDescription;
use wire::{Answer, Description, Port, Request};

const MIB: u64 = 1 << 20;
/// The latest moment of chance at which a machine moves, in milliseconds after its start.
const LATEST_MOVE: u64 = 400;
/// The least bytes that there have to be for machines on their way.
const ROOM: u64 = 4 << 30;

/// Every backend that works as meant on this host. A whole-VM test runs once on each.
pub fn backends() -> Vec<Arc<dyn Hypervisor>> {
    available(Availability::Usable)
}

/// Every backend that works on this host at all, however slowly.
pub fn all_backends() -> Vec<Arc<dyn Hypervisor>> {
    available(Availability::Slow)
}

fn available(least: Availability) -> Vec<Arc<dyn Hypervisor>> {
    let all: Vec<Arc<dyn Hypervisor>> = vec![
        Arc::new(Soft::default()),
        Arc::new(caisson_hypervisor_kvm::Kvm),
    ];
    let found: Vec<_> = all
        .into_iter()
        .filter(|backend| backend.probe().availability >= least)
        .collect();
    assert!(!found.is_empty(), "the software CPU works everywhere");
    found
}

/// The tiers that `backend` can run guest code on: the software CPU has two.
pub fn tiers(backend: &dyn Hypervisor) -> &'static [Tier] {
    if backend.name() == Soft::default().name() {
        &[Tier::Interpreted, Tier::Native]
    } else {
        &[Tier::Interpreted]
    }
}

/// What the environment asks for, so that every test can be run on the native tier.
fn usual_tier() -> Tier {
    match std::env::var("CAISSON_TEST_SOFT_TIER").as_deref() {
        Ok("1") => Tier::Native,
        _ => Tier::Interpreted,
    }
}

/// `backend`, or the software CPU that goes as far as `tier`.
fn at_tier(backend: Arc<dyn Hypervisor>, tier: Tier) -> Arc<dyn Hypervisor> {
    if tier == Tier::Native && tiers(&*backend).contains(&tier) {
        Arc::new(Soft::new(tier))
    } else {
        backend
    }
}

/// When a machine moves to a fresh process, besides before its first instruction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Moves {
    /// Once, at a moment of chance in its first half second.
    #[default]
    Chance,
    /// After each of these times, counted from the move before.
    After(Vec<Duration>),
}

impl Moves {
    fn times(&self) -> Vec<Duration> {
        match self {
            Self::Chance => {
                let chance = RandomState::new().build_hasher().finish() % LATEST_MOVE;
                vec![Duration::from_millis(chance)]
            }
            Self::After(times) => times.clone(),
        }
    }
}

/// What a test's machine is made of. The defaults suit small guests.
#[derive(Clone)]
pub struct VmSpec {
    /// What runs it.
    pub backend: Arc<dyn Hypervisor>,
    /// How far the software CPU goes, if it is that.
    pub tier: Tier,
    /// Kernel, initrd, command line.
    pub boot: BootSpec,
    /// vCPUs.
    pub cpus: u32,
    /// Which processor each is. A file is read when the machine is made, and again at each move.
    pub cpu: Cpu,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// What a reboot by the guest does.
    pub on_reboot: OnReboot,
    /// What a crash of the guest does.
    pub on_crash: OnCrash,
    /// What carries its virtio devices: it has an entropy device and a console then.
    pub virtio: Option<VirtioTransport>,
    /// A file with the content of its disk, if it has one. The disk is in memory; the file is written when the
    /// machine moves.
    pub disk: Option<PathBuf>,
    /// The device in front of that.
    pub disk_bus: DiskBus,
    /// The network that its card is in, if it has one.
    pub net: Option<NetDescription>,
    /// When it goes on in another process.
    pub moves: Moves,
}

impl VmSpec {
    /// One vCPU and 128 MiB for `kernel`; a reboot ends the machine.
    pub fn new(backend: &Arc<dyn Hypervisor>, kernel: Input) -> Self {
        Self {
            backend: backend.clone(),
            tier: usual_tier(),
            boot: BootSpec {
                kernel,
                initrd: None,
                modules: Vec::new(),
                cmdline: String::new(),
            },
            cpus: 1,
            cpu: Cpu::Host,
            memory_mib: 128,
            on_reboot: OnReboot::Stop,
            on_crash: OnCrash::End,
            virtio: None,
            disk: None,
            disk_bus: DiskBus::default(),
            net: None,
            moves: Moves::default(),
        }
    }

    /// The machine's own description, with `ends` at its serial ports and `debugcon` at its debug console.
    pub fn machine(
        &self,
        ends: [Option<Box<dyn HostEnd>>; SERIAL_PORTS],
        debugcon: Option<Box<dyn HostEnd>>,
    ) -> MachineSpec {
        MachineSpec {
            name: "test".into(),
            hypervisor: at_tier(self.backend.clone(), self.tier),
            vcpus: self.cpus,
            cpu: CpuSpec::open(&self.cpu).expect("the processor is described"),
            memory: MemorySpec {
                bytes: self.memory_mib * MIB,
                hugepages: HugePages::Auto,
            },
            boot: self.boot.clone(),
            serial: ends,
            debugcon,
            debug_exit: Some(0xf4),
            virtio: self.virtio.unwrap_or_default(),
            rng: self.virtio.is_some(),
            disks: Vec::new(),
            nets: Vec::new(),
            consoles: Vec::new(),
            on_reboot: self.on_reboot,
            on_crash: self.on_crash,
        }
    }

    /// What the process of the machine needs to know.
    fn description(&self, com2: bool) -> Description {
        let path = |input: &Input| input.path().to_owned();
        Description {
            backend: self.backend.name().into(),
            native: self.tier == Tier::Native,
            kernel: path(&self.boot.kernel),
            initrd: self.boot.initrd.as_ref().map(path),
            modules: self
                .boot
                .modules
                .iter()
                .map(|(module, line)| (path(module), line.clone()))
                .collect(),
            cmdline: self.boot.cmdline.clone(),
            cpus: self.cpus,
            cpu: self.cpu.to_string(),
            memory_mib: self.memory_mib,
            restart_on_reboot: self.on_reboot == OnReboot::Restart,
            restart_on_crash: self.on_crash == OnCrash::Restart,
            com2,
            virtio: self.virtio,
            disk: self.disk.clone(),
            disk_bus: self.disk_bus,
            net: self.net.clone().map(Box::new),
        }
    }
}

/// A folder for a machine on its way: in memory where there is room, because what is written to a disk is waited for.
fn waypoint() -> io::Result<TempDir> {
    const IN_MEMORY: &str = "/dev/shm";
    let room =
        rustix::fs::statvfs(IN_MEMORY).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    match room {
        ROOM.. => tempfile::tempdir_in(IN_MEMORY),
        _ => tempfile::tempdir(),
    }
}

/// A running machine.
pub struct Vm {
    inner: Arc<Inner>,
    /// What it prints on COM1.
    pub com1: Console,
    /// What it prints on the debug console.
    pub debugcon: Console,
    /// What it prints on its first virtio console.
    pub hvc0: Console,
}

/// What the test, the mover and the process's reader share.
struct Inner {
    spec: VmSpec,
    link: Mutex<Link>,
    outcome: Mutex<Option<Result<Outcome, String>>>,
    ended: Condvar,
    com1: Console,
    debugcon: Console,
    hvc0: Console,
    com2: Mutex<Option<Box<dyn HostEnd>>>,
}

/// Where the machine is now.
struct Link {
    process: Option<Process>,
    description: Description,
    folder: TempDir,
    moves: u32,
}

/// What a process sends goes to the consoles.
struct Receiver(Weak<Inner>);

impl Sink for Receiver {
    fn bytes(&self, port: Port, bytes: &[u8]) {
        let Some(inner) = self.0.upgrade() else {
            return;
        };
        match port {
            Port::Com1 => inner.com1.push(bytes),
            Port::Debugcon => inner.debugcon.push(bytes),
            Port::Hvc0 => inner.hvc0.push(bytes),
            Port::Com2 => {
                if let Some(end) = &mut *lock(&inner.com2) {
                    let _ = end.send(bytes);
                }
            }
        }
    }

    fn ended(&self, outcome: Outcome) {
        if let Some(inner) = self.0.upgrade() {
            inner.finish(Ok(outcome));
        }
    }

    fn hung_up(&self) {}
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn finish(&self, outcome: Result<Outcome, String>) {
        for console in [&self.com1, &self.debugcon, &self.hvc0] {
            console.close(format!("{outcome:?}"));
        }
        lock(&self.outcome).get_or_insert(outcome);
        self.ended.notify_all();
        // Outside of the lock: it may tell the test, which may ask.
        let end = lock(&self.com2).take();
        if let Some(mut end) = end {
            end.close();
        }
    }

    fn is_over(&self) -> bool {
        lock(&self.outcome).is_some()
    }

    fn ask(&self, request: Request) -> Result<Answer> {
        let mut link = lock(&self.link);
        let process = link
            .process
            .as_mut()
            .ok_or_else(|| anyhow!("it has no process"))?;
        process.ask(request)
    }

    fn type_bytes(&self, port: Port, bytes: &[u8]) -> Result<()> {
        let mut link = lock(&self.link);
        let process = link
            .process
            .as_mut()
            .ok_or_else(|| anyhow!("it has no process"))?;
        process.type_bytes(port, bytes)
    }

    /// Saves the machine, ends its process, and goes on in a fresh one, on the backend named `backend` if one is.
    /// `false` if it was over before.
    fn change_process(self: &Arc<Self>, backend: Option<&str>) -> Result<bool> {
        let mut link = lock(&self.link);
        let link = &mut *link;
        let number = link.moves;
        let folder = link.folder.path().join(number.to_string());
        let Some(mut process) = link.process.take() else {
            bail!("it has no process");
        };
        if let Err(error) = process.ask(Request::Leave(folder.clone())) {
            let over = error.to_string().contains("it has ended");
            link.process = Some(process);
            ensure!(over || self.is_over(), "cannot save the machine: {error}");
            return Ok(false);
        }
        process.finish()?;
        if let Some(backend) = backend {
            link.description.backend = backend.into();
        }
        let mut fresh = Process::spawn(Receiver(Arc::downgrade(self)))?;
        fresh.ask(Request::Restore(link.description.clone(), folder.clone()))?;
        std::fs::remove_dir_all(&folder)?;
        fresh.ask(Request::Start)?;
        link.process = Some(fresh);
        link.moves += 1;
        Ok(true)
    }
}

impl Vm {
    /// Starts the machine with `com2` at its second serial port.
    ///
    /// # Errors
    /// It cannot be made, moved or started.
    pub fn start_with(spec: &VmSpec, com2: Option<Box<dyn HostEnd>>) -> Result<Self> {
        let (com1, debugcon) = (Console::default(), Console::default());
        let hvc0 = Console::default();
        let description = spec.description(com2.is_some());
        let mut com2 = com2;
        let typed = com2.as_mut().map(|end| {
            let input = SerialInput::default();
            end.attach(input.clone());
            input
        });
        let inner = Arc::new(Inner {
            spec: spec.clone(),
            link: Mutex::new(Link {
                process: None,
                description: description.clone(),
                folder: waypoint()?,
                moves: 0,
            }),
            outcome: Mutex::default(),
            ended: Condvar::new(),
            com1: com1.clone(),
            debugcon: debugcon.clone(),
            hvc0: hvc0.clone(),
            com2: Mutex::new(com2),
        });
        let mut process = Process::spawn(Receiver(Arc::downgrade(&inner)))?;
        process.ask(Request::Make(description))?;
        lock(&inner.link).process = Some(process);
        inner.change_process(None)?;
        if let Some(typed) = typed {
            feed(typed, &inner)?;
        }
        follow(&inner)?;
        Ok(Self {
            inner,
            com1,
            debugcon,
            hvc0,
        })
    }

    /// Starts the machine.
    ///
    /// # Errors
    /// It cannot be made, moved or started.
    pub fn start(spec: &VmSpec) -> Result<Self> {
        Self::start_with(spec, None)
    }

    /// Types `text` at COM1.
    ///
    /// # Errors
    /// The machine's process is gone.
    pub fn type_text(&self, text: &str) -> Result<()> {
        self.inner.type_bytes(Port::Com1, text.as_bytes())
    }

    /// Types `text` at the first virtio console.
    ///
    /// # Errors
    /// The machine's process is gone.
    pub fn type_at_hvc0(&self, text: &str) -> Result<()> {
        self.inner.type_bytes(Port::Hvc0, text.as_bytes())
    }

    /// Tells the guest that its first virtio console has so many columns and rows.
    ///
    /// # Errors
    /// It is over.
    pub fn resize_hvc0(&self, columns: u16, rows: u16) -> Result<()> {
        self.inner.ask(Request::Resize(columns, rows)).map(drop)
    }

    /// What the machine shows of itself.
    ///
    /// # Errors
    /// Its process is gone.
    pub fn inspect(&self) -> Result<String> {
        match self.inner.ask(Request::Inspect)? {
            Answer::Text(text) => Ok(text),
            other => bail!("{other:?} is no text"),
        }
    }

    /// Waits for the machine's end.
    ///
    /// # Errors
    /// It does not end within `patience`. It is stopped then, and the error shows where it was.
    pub fn wait(&self, patience: Duration) -> Result<Outcome> {
        let deadline = Instant::now() + patience;
        let mut outcome = lock(&self.inner.outcome);
        loop {
            match &*outcome {
                Some(Ok(outcome)) => return Ok(outcome.clone()),
                Some(Err(why)) => bail!("{why}\n{}\n{}", self.com1, self.debugcon),
                None => {}
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                break;
            };
            outcome = self
                .inner
                .ended
                .wait_timeout(outcome, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(outcome);
        let state = match self.inner.ask(Request::Inspect) {
            Ok(Answer::Text(text)) => text,
            other => format!("{other:?}"),
        };
        let _ = self.stop();
        bail!(
            "the machine does not end within {patience:?}:\n{}\n{}\n{state}",
            self.com1,
            self.debugcon
        );
    }

    /// Saves the machine, ends its process and goes on in a fresh one.
    ///
    /// # Errors
    /// It is over, or something of it cannot be saved or restored, or comes back changed.
    pub fn change_process(&self) -> Result<()> {
        ensure!(self.inner.change_process(None)?, "the machine is over");
        Ok(())
    }

    /// Saves the machine, ends its process and goes on in a fresh one, run by `backend`.
    ///
    /// # Errors
    /// It is over, or something of it cannot be saved, or not restored there, or comes back changed.
    pub fn move_to(&self, backend: &Arc<dyn Hypervisor>) -> Result<()> {
        let moved = self.inner.change_process(Some(backend.name()))?;
        ensure!(moved, "the machine is over");
        Ok(())
    }

    /// How often it went on in a fresh process, the one before its first instruction among them.
    pub fn moves(&self) -> u32 {
        lock(&self.inner.link).moves
    }

    /// Pauses the machine.
    ///
    /// # Errors
    /// It is over.
    pub fn pause(&self) -> Result<()> {
        self.inner.ask(Request::Pause).map(drop)
    }

    /// Lets it run on.
    ///
    /// # Errors
    /// It is over.
    pub fn resume(&self) -> Result<()> {
        self.inner.ask(Request::Resume).map(drop)
    }

    /// Pulls the plug.
    ///
    /// # Errors
    /// Its process is gone.
    pub fn stop(&self) -> Result<()> {
        self.inner.ask(Request::Stop).map(drop)
    }

    /// Machine time in nanoseconds.
    ///
    /// # Errors
    /// Its process is gone.
    pub fn now_ns(&self) -> Result<u64> {
        match self.inner.ask(Request::Now)? {
            Answer::Now(now) => Ok(now),
            other => bail!("{other:?} is no time"),
        }
    }
}

/// Types what the end at COM2 sends, until the machine is over.
fn feed(typed: SerialInput, inner: &Arc<Inner>) -> Result<()> {
    let inner = Arc::downgrade(inner);
    thread::Builder::new().name("com2".into()).spawn(move || {
        while let Some(bytes) = typed.take() {
            let Some(inner) = inner.upgrade() else { return };
            if inner.is_over() || inner.type_bytes(Port::Com2, &bytes).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

/// Moves the machine when it is time.
fn follow(inner: &Arc<Inner>) -> Result<()> {
    let times = inner.spec.moves.times();
    let inner = Arc::downgrade(inner);
    thread::Builder::new().name("mover".into()).spawn(move || {
        for time in times {
            thread::sleep(time);
            let Some(inner) = inner.upgrade() else { return };
            match inner.change_process(None) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    return inner.finish(Err(format!("moved after {time:?}: {error:#}")));
                }
            }
        }
    })?;
    Ok(())
}
