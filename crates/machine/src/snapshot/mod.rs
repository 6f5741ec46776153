//! A machine in files: written by one process, continued by another.
//!
//! A snapshot is a folder:
//!
//! | file | holds |
//! |---|---|
//! | `state` | a versioned record of the machine and of each vCPU, device and port: see [`SavedMachine`] |
//! | `memory` | guest RAM, sparse: pages of zeros are holes |
//!
//! `state` is written last and put in place under its name at once, so a folder with one is complete. Both carry the
//! same number, so that files of different snapshots are not taken for one. Whoever restores maps `memory` privately:
//! no page is read before the guest touches it, what the guest writes stays in its process, and any number of machines
//! can go on from one snapshot. The file must not be changed while they run.

mod file;
mod ports;
mod ram;
mod state;
mod whole;

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use caisson_device::{SaveState, StateRecord};
use caisson_memory::host::Mapping;
use serde::{Deserialize, Serialize};

pub use file::SnapshotError;
pub use state::SavedMachine;
pub(crate) use whole::WholeState;

use crate::{Machine, MachineError, MachineSpec, host, machine::Start};

/// The file of all records.
const STATE: &str = "state";
/// The file of the guest's RAM.
const MEMORY: &str = "memory";
/// The longest `state` that is read, in bytes: far more than a machine has.
const STATE_LIMIT: u64 = 1 << 30;
/// The part that describes the snapshot itself.
const ABOUT: &str = "snapshot";

/// How guest time goes on in a restored machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Elapsed {
    /// Where it stood: the guest does not notice the time in between. Its own time of day is late by as much.
    #[default]
    Hidden,
    /// It jumps: clocks and TSC have gone on meanwhile, and timers that came due fire at once. Interrupts that a
    /// periodic timer would have raised in between are not made up for, and an APIC timer that counts down (instead
    /// of waiting for a deadline) goes on where it stood.
    Seen,
}

/// What is known of a snapshot besides the machine in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct About {
    /// The Caisson that wrote it.
    version: String,
    /// The backend that the machine ran on.
    backend: String,
    /// The machine's name.
    name: String,
    /// The host's time of day: nanoseconds since 1970.
    taken_ns: u64,
    /// What `memory` carries too.
    id: u128,
}

impl SaveState for About {
    const ID: &'static str = ABOUT;
    const VERSION: u16 = 1;
}

/// A snapshot that was opened: its records are read, its memory is not.
#[derive(Debug)]
pub struct Snapshot {
    folder: PathBuf,
    about: About,
    whole: WholeState,
    saved: SavedMachine,
    memory: File,
}

fn fail(path: &Path) -> impl FnOnce(SnapshotError) -> MachineError + '_ {
    move |source| MachineError::Snapshot {
        path: path.to_owned(),
        source,
    }
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

/// A number that no other snapshot has, as far as the host's randomness goes.
fn new_id() -> Result<u128, SnapshotError> {
    let mut bytes = [0; 16];
    host::random(&mut bytes)?;
    Ok(u128::from_le_bytes(bytes))
}

impl Snapshot {
    /// Opens the snapshot in `folder` and checks all of it but the contents of the memory.
    ///
    /// # Errors
    /// A file is missing, damaged, of another snapshot, or of a Caisson newer than this.
    pub fn open(folder: &Path) -> Result<Self, MachineError> {
        let path = folder.join(STATE);
        let bytes = read_state(&path).map_err(fail(&path))?;
        let mut saved = SavedMachine::decode(&bytes).map_err(fail(&path))?;
        let record = saved.part(ABOUT)?;
        let about = About::from_record(record).map_err(|source| state::of(ABOUT, source))?;
        saved.remove(ABOUT);
        let whole = saved.whole()?;
        let path = folder.join(MEMORY);
        let memory = File::open(&path)
            .map_err(SnapshotError::from)
            .and_then(|file| {
                ram::check(&file, whole.ram_bytes(), about.id)?;
                Ok(file)
            })
            .map_err(fail(&path))?;
        Ok(Self {
            folder: folder.to_owned(),
            about,
            whole,
            saved,
            memory,
        })
    }

    /// Reads all of the saved memory and compares it with its checksum.
    ///
    /// # Errors
    /// It is damaged, or cannot be read.
    pub fn verify_memory(&self) -> Result<(), MachineError> {
        ram::verify(&self.memory, self.whole.ram_bytes()).map_err(fail(&self.folder.join(MEMORY)))
    }

    /// The name that the machine had.
    pub fn name(&self) -> &str {
        &self.about.name
    }

    /// The backend that it ran on.
    pub fn backend(&self) -> &str {
        &self.about.backend
    }

    /// Its vCPUs.
    pub fn vcpus(&self) -> u32 {
        self.whole.vcpus
    }

    /// Its RAM in bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.whole.ram_bytes()
    }

    /// The records of the machine's parts.
    pub fn state(&self) -> &SavedMachine {
        &self.saved
    }
}

fn read_state(path: &Path) -> Result<Vec<u8>, SnapshotError> {
    let file = File::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => SnapshotError::Missing,
        _ => error.into(),
    })?;
    let mut bytes = Vec::new();
    file.take(STATE_LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > STATE_LIMIT {
        return Err(SnapshotError::TooLong);
    }
    Ok(bytes)
}

impl Machine {
    /// Saves the machine to `folder`, which is made if need be; a snapshot that is there is replaced. The machine
    /// stays as it is and can be resumed. Only the user can read what is written: it is the guest's memory.
    ///
    /// # Errors
    /// The machine is not paused, a part of it cannot be saved now, or the host refuses a file. What was in `folder`
    /// before is then no snapshot any more, but no half one either.
    pub fn save(&self, folder: &Path) -> Result<(), MachineError> {
        let shared = self.shared();
        let _phase = shared.settled("saved")?;
        let mut saved = state::collect(shared)?;
        let path = folder.join(MEMORY);
        let id = prepare(folder)
            .and_then(|()| {
                let id = new_id()?;
                let temporary = folder.join("memory.new");
                let file = create(&temporary)?;
                ram::write(&file, &shared.mapping, &shared.memory, id)?;
                fs::rename(&temporary, &path)?;
                Ok(id)
            })
            .map_err(fail(&path))?;
        let about = About {
            version: env!("CARGO_PKG_VERSION").into(),
            backend: shared.backend.into(),
            name: shared.name.clone(),
            taken_ns: now_ns(),
            id,
        };
        saved.insert_first(ABOUT, to_record(&about)?);
        let path = folder.join(STATE);
        put(folder, &saved.encode()).map_err(fail(&path))
    }

    /// Makes a machine that goes on where the one in `snapshot` was. It does not run yet.
    ///
    /// # Errors
    /// As [`Machine::new`], and [`MachineError::CannotRestore`] with all reasons when the snapshot does not fit the
    /// machine that `spec` describes, or this host.
    pub fn restore(
        spec: MachineSpec,
        snapshot: &Snapshot,
        elapsed: Elapsed,
    ) -> Result<Self, MachineError> {
        let passed = match elapsed {
            Elapsed::Hidden => 0,
            Elapsed::Seen => now_ns().saturating_sub(snapshot.about.taken_ns),
        };
        let path = snapshot.folder.join(MEMORY);
        let ram = snapshot
            .memory
            .try_clone()
            .and_then(|file| Mapping::private(file, snapshot.whole.ram_bytes()))
            .map_err(|error| fail(&path)(error.into()))?;
        state::resurrect(spec, &snapshot.saved, Start::Saved(ram), passed)
    }
}

fn to_record(state: &impl SaveState) -> Result<StateRecord, MachineError> {
    state.to_record().map_err(|source| state::of(ABOUT, source))
}

/// Makes the folder, and a snapshot in it no longer one.
fn prepare(folder: &Path) -> Result<(), SnapshotError> {
    host::private_folder(folder)?;
    match fs::remove_file(folder.join(STATE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// A new, empty file that only the user can read. An old one under the name may be in use by a machine.
fn create(path: &Path) -> io::Result<File> {
    let _ = fs::remove_file(path);
    host::private_file(path)
}

/// Writes `state` and gives it its name once it is on the disk.
fn put(folder: &Path, bytes: &[u8]) -> Result<(), SnapshotError> {
    let temporary = folder.join("state.new");
    let mut file = create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, folder.join(STATE))?;
    host::sync_folder(folder)?;
    Ok(())
}
