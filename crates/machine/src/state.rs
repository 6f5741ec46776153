//! Saving a machine and making it again from what was saved.

use caisson_device::{Clock, SaveState, StateError, StateRecord};
use caisson_hypervisor::x86::VcpuState;
use caisson_memory::{GuestMemory, Vtl};
use serde::{Deserialize, Serialize};

use crate::{Machine, MachineError, MachineSpec, Phase, pc};

/// Everything a paused machine is, but for the contents of its memory: one versioned record per part, in the order in
/// which they are restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedMachine {
    parts: Vec<(String, StateRecord)>,
}

impl SavedMachine {
    /// Takes parts that were read from elsewhere. They are checked when they are restored.
    pub fn from_parts(parts: Vec<(String, StateRecord)>) -> Self {
        Self { parts }
    }

    /// The parts' names and records.
    pub fn parts(&self) -> &[(String, StateRecord)] {
        &self.parts
    }

    /// The record of `part`.
    pub(crate) fn part(&self, part: &str) -> Result<&StateRecord, MachineError> {
        self.parts
            .iter()
            .find_map(|(name, record)| (name == part).then_some(record))
            .ok_or_else(|| {
                MachineError::Mismatch(format!("it has no \"{part}\", and this machine has one"))
            })
    }

    fn whole(&self) -> Result<WholeState, MachineError> {
        WholeState::from_record(self.part(WHOLE)?).map_err(|source| of(WHOLE, source))
    }
}

/// The part that describes the machine as a whole.
const WHOLE: &str = "machine";

/// What the machine itself has to keep.
#[derive(Debug, Serialize, Deserialize)]
struct WholeState {
    now_ns: u64,
    vcpus: u32,
    ram_bytes: u64,
}

impl SaveState for WholeState {
    const ID: &'static str = "machine";
    const VERSION: u16 = 1;
}

/// A vCPU's state in a record.
#[derive(Serialize, Deserialize)]
struct VcpuRecord(VcpuState);

impl SaveState for VcpuRecord {
    const ID: &'static str = "x86-vcpu";
    const VERSION: u16 = 1;
}

fn of(part: &str, source: StateError) -> MachineError {
    MachineError::State {
        part: part.into(),
        source,
    }
}

impl Machine {
    /// Saves all devices and vCPUs. Memory is the caller's to keep, see [`Machine::memory`].
    ///
    /// # Errors
    /// The machine is not paused, or a part cannot be saved now.
    pub fn save_state(&self) -> Result<SavedMachine, MachineError> {
        let shared = self.shared();
        let _phase = shared.phase_for("saved", &[Phase::Created, Phase::Paused])?;
        let whole = WholeState {
            now_ns: shared.clock.now(),
            vcpus: shared.vcpus.count(),
            ram_bytes: shared.memory.ram_size(),
        };
        let mut parts = vec![(
            WHOLE.to_owned(),
            whole.to_record().map_err(|source| of(WHOLE, source))?,
        )];
        for vcpu in shared.vcpus.parked() {
            let part = format!("vcpu{}", vcpu.index());
            let record = VcpuRecord(vcpu.state(Vtl::VTL0)?)
                .to_record()
                .map_err(|source| of(&part, source))?;
            parts.push((part, record));
        }
        for slot in shared.pc.devices() {
            let record = slot
                .lock()
                .save()
                .map_err(|source| of(slot.name(), source))?;
            parts.push((slot.name().to_string(), record));
        }
        Ok(SavedMachine { parts })
    }

    /// Makes a machine that goes on where `saved` was. `fill` puts the saved contents into its memory.
    ///
    /// # Errors
    /// As [`Machine::new`], and when `saved` does not fit the machine that `spec` describes.
    pub fn restore(
        spec: MachineSpec,
        saved: &SavedMachine,
        fill: impl FnOnce(&GuestMemory) -> Result<(), MachineError>,
    ) -> Result<Self, MachineError> {
        let machine = Self::assemble(spec)?;
        let shared = machine.shared();
        let whole = saved.whole()?;
        let differs = |what, theirs: u64, ours: u64| {
            Err(MachineError::Mismatch(format!(
                "it was saved with {theirs} {what}, and this machine has {ours}"
            )))
        };
        if whole.vcpus != shared.vcpus.count() {
            return differs("vCPUs", whole.vcpus.into(), shared.vcpus.count().into());
        }
        if whole.ram_bytes != shared.memory.ram_size() {
            return differs("bytes of memory", whole.ram_bytes, shared.memory.ram_size());
        }
        fill(&shared.memory)?;
        shared
            .partition
            .set_memory(Vtl::VTL0, shared.memory.clone())?;
        shared.clock.set(whole.now_ns);
        pc::restore(shared.pc.devices(), saved)?;
        for mut vcpu in shared.vcpus.parked() {
            let part = format!("vcpu{}", vcpu.index());
            let state =
                VcpuRecord::from_record(saved.part(&part)?).map_err(|source| of(&part, source))?;
            vcpu.reset(Vtl::VTL0, false);
            vcpu.set_state(Vtl::VTL0, &state.0)?;
        }
        // The vCPUs' time stamp counters may have moved the backend's clock.
        shared.clock.set(whole.now_ns);
        Ok(machine)
    }
}
