//! A virtual machine in a test: started from a few values, watched through its consoles, ended by a time-out.

use std::{
    fmt,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use caisson_config::{HugePages, OnReboot};
use caisson_hypervisor::{Availability, Hypervisor};
use caisson_machine::{
    BootSpec, HostEnd, Input, Machine, MachineSpec, MemorySpec, OnCrash, Outcome, SERIAL_PORTS,
    SavedMachine, StreamEnd,
};
use caisson_memory::{Gpa, GuestMemory, MemoryView};

const MIB: u64 = 1 << 20;
/// How much of a console a failure shows, in bytes.
const TAIL: usize = 4000;

/// Every backend that works on this host. A whole-VM test runs once on each.
pub fn backends() -> Vec<Arc<dyn Hypervisor>> {
    let all: Vec<Arc<dyn Hypervisor>> = vec![Arc::new(caisson_hypervisor_soft::Soft)];
    let usable: Vec<_> = all
        .into_iter()
        .filter(|backend| backend.probe().availability > Availability::Absent)
        .collect();
    assert!(!usable.is_empty(), "the software CPU works everywhere");
    usable
}

/// What a guest printed, shared between the machine and the test.
#[derive(Clone, Default)]
pub struct Console(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Console {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    /// Everything so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock()).into_owned()
    }

    /// Waits until `text` has been printed at or after byte `from`. Gives the position behind it.
    ///
    /// # Errors
    /// It does not come within `patience`; the error shows the console's end.
    pub fn wait_for(&self, text: &str, from: usize, patience: Duration) -> Result<usize> {
        let deadline = Instant::now() + patience;
        let mut bytes = self.lock();
        loop {
            let found = bytes
                .get(from..)
                .and_then(|rest| rest.windows(text.len()).position(|w| w == text.as_bytes()));
            if let Some(at) = found {
                return Ok(from + at + text.len());
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                drop(bytes);
                bail!("{text:?} does not appear within {patience:?}:\n{self}");
            };
            bytes = self
                .0
                .1
                .wait_timeout(bytes, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().extend_from_slice(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Display for Console {
    /// The end of what was printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.lock();
        let start = bytes.len().saturating_sub(TAIL);
        writeln!(f, "--- console, {} bytes ---", bytes.len())?;
        f.write_str(&String::from_utf8_lossy(&bytes[start..]))
    }
}

/// What a test's machine is made of. The defaults suit small guests.
#[derive(Clone)]
pub struct VmSpec {
    /// What runs it.
    pub backend: Arc<dyn Hypervisor>,
    /// Kernel, initrd, command line.
    pub boot: BootSpec,
    /// vCPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// What a reboot by the guest does.
    pub on_reboot: OnReboot,
    /// What a crash of the guest does.
    pub on_crash: OnCrash,
}

impl VmSpec {
    /// One vCPU and 128 MiB for `kernel`; a reboot ends the machine.
    pub fn new(backend: &Arc<dyn Hypervisor>, kernel: Input) -> Self {
        Self {
            backend: backend.clone(),
            boot: BootSpec {
                kernel,
                initrd: None,
                modules: Vec::new(),
                cmdline: String::new(),
            },
            cpus: 1,
            memory_mib: 128,
            on_reboot: OnReboot::Stop,
            on_crash: OnCrash::End,
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
            hypervisor: self.backend.clone(),
            vcpus: self.cpus,
            memory: MemorySpec {
                bytes: self.memory_mib * MIB,
                hugepages: HugePages::Auto,
            },
            boot: self.boot.clone(),
            serial: ends,
            debugcon,
            debug_exit: Some(0xf4),
            on_reboot: self.on_reboot,
            on_crash: self.on_crash,
        }
    }
}

/// A running machine.
pub struct Vm {
    /// The machine.
    pub machine: Machine,
    /// What it prints on COM1.
    pub com1: Console,
    /// What it prints on the debug console.
    pub debugcon: Console,
}

impl Vm {
    /// Starts the machine with `com2` at its second serial port.
    ///
    /// # Errors
    /// It cannot be made or started.
    pub fn start_with(spec: &VmSpec, com2: Option<Box<dyn HostEnd>>) -> Result<Self> {
        let (com1, debugcon) = (Console::default(), Console::default());
        let ends = [Some(stream(&com1)), com2, None, None];
        let machine = Machine::new(spec.machine(ends, Some(stream(&debugcon))))?;
        machine.start()?;
        Ok(Self {
            machine,
            com1,
            debugcon,
        })
    }

    /// Starts the machine.
    ///
    /// # Errors
    /// It cannot be made or started.
    pub fn start(spec: &VmSpec) -> Result<Self> {
        Self::start_with(spec, None)
    }

    /// Types `text` at COM1.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn type_text(&self, text: &str) -> Result<()> {
        let input = self.machine.serial_input(0).context("there is a COM1")?;
        Ok(input.push(text.as_bytes())?)
    }

    /// Waits for the machine's end.
    ///
    /// # Errors
    /// It does not end within `patience`. It is stopped then, and the error shows where it was.
    pub fn wait(&self, patience: Duration) -> Result<Outcome> {
        if let Some(outcome) = self.machine.wait_for(patience) {
            return Ok(outcome);
        }
        let state = self.machine.inspect();
        self.machine.stop();
        bail!(
            "the machine does not end within {patience:?}:\n{}\n{}\n{state}",
            self.com1,
            self.debugcon
        );
    }

    /// Pauses the machine and makes it again in another from its saved state and memory; this one ends.
    ///
    /// # Errors
    /// It is not running, or something of it cannot be saved or restored, or comes back changed.
    pub fn transplant(self, spec: &VmSpec) -> Result<Self> {
        self.machine.pause()?;
        let saved = self.machine.save_state()?;
        let ends = [Some(stream(&self.com1)), None, None, None];
        let described = spec.machine(ends, Some(stream(&self.debugcon)));
        let machine = Machine::restore(described, &saved, |memory| {
            copy(self.machine.memory(), memory);
            Ok(())
        })?;
        same(&saved, &machine.save_state()?)?;
        machine.start()?;
        Ok(Self {
            machine,
            com1: self.com1.clone(),
            debugcon: self.debugcon.clone(),
        })
    }
}

fn stream(console: &Console) -> Box<dyn HostEnd> {
    Box::new(StreamEnd::new(console.clone()))
}

/// Copies all memory, leaving alone what is zero on both sides.
fn copy(from: &GuestMemory, to: &GuestMemory) {
    let mut piece = vec![0; MIB as usize];
    let (source, target) = (MemoryView::new(from.clone()), MemoryView::new(to.clone()));
    for region in from.regions() {
        let mut at = 0;
        while at < region.len() {
            let len = (region.len() - at).min(MIB);
            let piece = &mut piece[..len as usize];
            let gpa = Gpa(region.gpa().0 + at);
            source.read(gpa, piece).expect("the region is there");
            if piece.iter().any(|byte| *byte != 0) {
                target
                    .write(gpa, piece)
                    .expect("the machines have the same memory");
            }
            at += len;
        }
    }
}

/// Checks that nothing changed on the way through save and restore.
fn same(before: &SavedMachine, after: &SavedMachine) -> Result<()> {
    for ((name, record), (other, restored)) in before.parts().iter().zip(after.parts()) {
        if name != other || record != restored {
            bail!(
                "the state of \"{name}\" is not the same after save and restore:\n{record:x?}\n{restored:x?}"
            );
        }
    }
    anyhow::ensure!(
        before.parts().len() == after.parts().len(),
        "parts are missing"
    );
    Ok(())
}
