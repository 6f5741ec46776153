//! What can go wrong when a machine is made, saved or restored.

use std::{io, path::PathBuf};

use caisson_device::{ClaimError, StateError, TooManySources};
use caisson_hypervisor::{HypervisorError, x86::ProcessorError};
use caisson_memory::{MemoryError, TableError, host::HUGE_PAGES_REMEDY};

use crate::SnapshotError;

/// Why a machine could not be made or could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// More or fewer vCPUs than the backend runs.
    #[error("a machine with {asked} vCPUs cannot be made: \"{backend}\" runs 1 to {limit}")]
    Vcpus {
        /// Asked for.
        asked: u32,
        /// The backend's name.
        backend: &'static str,
        /// The most it runs.
        limit: u32,
    },
    /// A processor that the backend cannot give on this host.
    #[error("the backend \"{backend}\" cannot give guests the processor \"{cpu}\" on this host, which lacks: {}; \
        choose a lesser one, remove these with a file (see `caisson run --help`), or use --cpu host", lacking.join(", "))]
    Cpu {
        /// The processor as it was asked for.
        cpu: String,
        /// The backend's name.
        backend: &'static str,
        /// Everything that is not there.
        lacking: Vec<String>,
    },
    /// A described processor that cannot be.
    #[error("processor \"{cpu}\": {source}")]
    CpuDescription {
        /// The file.
        cpu: String,
        /// What is wrong with it.
        source: ProcessorError,
    },
    /// The file that describes the processor cannot be read, or does not make sense. The text names it.
    #[error("{0}")]
    CpuFile(String),
    /// More RAM than the host has.
    #[error(
        "{asked} MiB of guest memory are more than this host's {host} MiB; give the machine less"
    )]
    HostMemory {
        /// Asked for, in MiB.
        asked: u64,
        /// What the host has, in MiB.
        host: u64,
    },
    /// The amount of RAM cannot be laid out.
    #[error(transparent)]
    MemoryMap(#[from] caisson_firmware::MemoryMapError),
    /// The host refused the memory.
    #[error("cannot get {mib} MiB of guest memory from the host: {source}{}{}",
        if *.huge { "; " } else { "" }, if *.huge { HUGE_PAGES_REMEDY } else { "" })]
    Memory {
        /// Asked for, in MiB.
        mib: u64,
        /// Whether huge pages were asked for.
        huge: bool,
        /// What the host said.
        source: io::Error,
    },
    /// Two memory regions collide.
    #[error(transparent)]
    Table(#[from] TableError),
    /// An input file could not be read.
    #[error("cannot read the {what} \"{}\": {source}", path.display())]
    Input {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// An input file is larger than anything that a machine can load.
    #[error("the {what} \"{}\" has {mib} MiB, more than the machine's {ram} MiB of memory; give the machine more", path.display())]
    InputSize {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its size in MiB, rounded up.
        mib: u64,
        /// The machine's memory in MiB.
        ram: u64,
    },
    /// The kernel, or what goes with it, cannot be loaded.
    #[error("cannot start \"{}\": {source}", path.display())]
    Load {
        /// The kernel.
        path: PathBuf,
        /// Why not.
        source: caisson_firmware::LoadError,
    },
    /// The ACPI tables cannot be made.
    #[error("cannot describe the machine to its guest: {0}")]
    Tables(String),
    /// What was loaded does not fit into memory.
    #[error("cannot write the {what} to guest memory: {source}")]
    Import {
        /// What was being written.
        what: &'static str,
        /// Why not.
        source: MemoryError,
    },
    /// A device's addresses collide with another's.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// More devices than a bus carries.
    #[error("the {bus} carries at most {most} devices; give the machine fewer")]
    TooManyDevices {
        /// How many.
        most: u32,
        /// Which bus.
        bus: &'static str,
    },
    /// Storage does not answer.
    #[error("the storage behind \"{device}\" does not answer; see to it and try again")]
    Busy {
        /// The device that waits for it.
        device: String,
    },
    /// A PCI function that cannot be.
    #[error(transparent)]
    Pci(#[from] caisson_pci::SpecError),
    /// An interrupt line is over-subscribed.
    #[error(transparent)]
    Line(#[from] TooManySources),
    /// The backend refused.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// A host end of a serial port could not be opened.
    #[error("cannot open \"{}\" for {port}: {source}", path.display())]
    Serial {
        /// The port: `COM1`, `debugcon`.
        port: String,
        /// The file or socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Somebody else has the socket.
    #[error("the socket \"{}\" for {port} is in use by another process; choose another path", path.display())]
    SocketInUse {
        /// The port.
        port: String,
        /// The socket.
        path: PathBuf,
    },
    /// The description names standard input and output, but the caller gave none.
    #[error(
        "{port} is to use standard input and output, which are not available here; choose file=PATH, socket=PATH or null"
    )]
    NoStdio {
        /// The port.
        port: String,
    },
    /// The host refused a thread.
    #[error("cannot start the {role} thread: {source}")]
    Thread {
        /// What the thread is for.
        role: String,
        /// What the host said.
        source: io::Error,
    },
    /// Not possible in the machine's present phase.
    #[error("the machine cannot be {action}: it {phase}")]
    Phase {
        /// `paused`, `saved`…
        action: &'static str,
        /// `has ended`, `is running`…
        phase: &'static str,
    },
    /// A part's state cannot be saved or restored.
    #[error("{part}: {source}")]
    State {
        /// The device or vCPU.
        part: String,
        /// Why.
        source: StateError,
    },
    /// Saved state of another machine, or for another host.
    #[error("the saved machine cannot go on here: {}", .0.join("; "))]
    CannotRestore(Vec<String>),
    /// A file of a snapshot cannot be read or written.
    #[error("snapshot \"{}\": {source}", path.display())]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: SnapshotError,
    },
}
