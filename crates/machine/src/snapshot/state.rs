//! A machine as records, and a machine made from them.

use std::collections::BTreeSet;

use caisson_device::{SaveState, StateError, StateRecord};
use caisson_hypervisor::x86::{MsrEntry, VcpuState};
use caisson_memory::{GuestMemory, Vtl};
use serde::{Deserialize, Serialize};

use super::{WholeState, ports};
use crate::{
    Machine, MachineError, MachineSpec, Phase,
    machine::{Shared, Start},
};

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
const SECOND: u128 = 1_000_000_000;

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

    /// The state of vCPU `index`.
    ///
    /// # Errors
    /// There is none, or it does not decode.
    pub fn vcpu(&self, index: u32) -> Result<VcpuState, MachineError> {
        let part = vcpu_part(index);
        let record = VcpuRecord::from_record(self.part(&part)?);
        Ok(record.map_err(|source| of(&part, source))?.0)
    }

    /// The record of `part`.
    pub(crate) fn part(&self, part: &str) -> Result<&StateRecord, MachineError> {
        self.parts
            .iter()
            .find_map(|(name, record)| (name == part).then_some(record))
            .ok_or_else(|| {
                MachineError::CannotRestore(vec![format!(
                    "it has no \"{part}\", and this machine has one"
                )])
            })
    }

    pub(super) fn remove(&mut self, part: &str) {
        self.parts.retain(|(name, _)| name != part);
    }

    pub(super) fn insert_first(&mut self, part: &str, record: StateRecord) {
        self.parts.insert(0, (part.to_owned(), record));
    }

    pub(super) fn whole(&self) -> Result<WholeState, MachineError> {
        WholeState::from_record(self.part(WHOLE)?)
            .and_then(WholeState::checked)
            .map_err(|source| of(WHOLE, source))
    }
}

/// The part that describes the machine as a whole.
const WHOLE: &str = "machine";

fn vcpu_part(index: u32) -> String {
    format!("vcpu{index}")
}

/// A vCPU's state in a record.
#[derive(Serialize, Deserialize)]
struct VcpuRecord(VcpuState);

impl SaveState for VcpuRecord {
    const ID: &'static str = "x86-vcpu";
    const VERSION: u16 = 1;
}

pub(super) fn of(part: &str, source: StateError) -> MachineError {
    MachineError::State {
        part: part.into(),
        source,
    }
}

/// All records of a machine that stands still.
pub(super) fn collect(shared: &Shared) -> Result<SavedMachine, MachineError> {
    shared.quiesce()?;
    let mut parts = Vec::new();
    let mut add = |part: String, record: Result<StateRecord, StateError>| {
        let record = record.map_err(|source| of(&part, source))?;
        parts.push((part, record));
        Ok::<_, MachineError>(())
    };
    add(WHOLE.into(), WholeState::of(shared).to_record())?;
    for vcpu in shared.vcpus.parked() {
        let state = VcpuRecord(vcpu.state(Vtl::VTL0)?);
        add(vcpu_part(vcpu.index()), state.to_record())?;
    }
    for slot in shared.pc.devices() {
        add(slot.name().to_string(), slot.lock().save())?;
    }
    for port in &shared.ports {
        add(ports::part(port), ports::save(port))?;
    }
    Ok(SavedMachine { parts })
}

/// Makes the machine that `spec` describes and gives it the state in `saved`, `passed_ns` later.
pub(super) fn resurrect(
    spec: MachineSpec,
    saved: &SavedMachine,
    start: Start,
    passed_ns: u64,
) -> Result<Machine, MachineError> {
    let whole = saved.whole()?;
    let reasons = whole.obstacles(&spec);
    if !reasons.is_empty() {
        return Err(MachineError::CannotRestore(reasons));
    }
    let machine = Machine::assemble(spec, start, Some(&whole))?;
    let shared = machine.shared();
    let reasons = differences(shared, &whole, saved);
    if !reasons.is_empty() {
        return Err(MachineError::CannotRestore(reasons));
    }
    let now = whole.now_ns.saturating_add(passed_ns);
    shared.clock.set(now);
    for slot in shared.pc.devices() {
        let restored = slot.lock().restore(saved.part(slot.name())?);
        restored.map_err(|source| of(slot.name(), source))?;
    }
    let ticks = u128::from(passed_ns) * u128::from(whole.tsc_hz) / SECOND;
    for mut vcpu in shared.vcpus.parked() {
        let mut state = saved.vcpu(vcpu.index())?;
        for MsrEntry { value, .. } in state.msrs.iter_mut().filter(|msr| msr.index == TSC) {
            *value = value.wrapping_add(ticks as u64);
        }
        vcpu.reset(Vtl::VTL0, false);
        vcpu.set_state(Vtl::VTL0, &state)?;
    }
    for port in &shared.ports {
        let part = ports::part(port);
        let restored = ports::restore(port, saved.part(&part)?);
        restored.map_err(|source| of(&part, source))?;
    }
    *shared.resets.lock() = whole.resets;
    // The vCPUs' time stamp counters may have moved the backend's clock.
    shared.clock.set(now);
    Ok(machine)
}

/// What the machine that was made has otherwise than the one that was saved.
fn differences(shared: &Shared, whole: &WholeState, saved: &SavedMachine) -> Vec<String> {
    let mut reasons = Vec::new();
    let ram: Vec<(u64, u64)> = shared
        .memory
        .regions()
        .iter()
        .map(|region| (region.gpa().0, region.len()))
        .collect();
    if ram != whole.ram {
        reasons.push("its memory lies at other addresses than this machine's".into());
    }
    let theirs: BTreeSet<&str> = saved.parts.iter().map(|(name, _)| name.as_str()).collect();
    let ours: Vec<String> = core::iter::once(WHOLE.to_owned())
        .chain((0..shared.vcpus.count()).map(vcpu_part))
        .chain(
            shared
                .pc
                .devices()
                .iter()
                .map(|slot| slot.name().to_string()),
        )
        .chain(shared.ports.iter().map(ports::part))
        .collect();
    let ours: BTreeSet<&str> = ours.iter().map(String::as_str).collect();
    for part in ours.difference(&theirs) {
        reasons.push(format!("it has no \"{part}\", and this machine has one"));
    }
    for part in theirs.difference(&ours) {
        reasons.push(format!("it has \"{part}\", and this machine has none"));
    }
    reasons
}

impl Machine {
    /// Saves all devices and vCPUs. Memory is the caller's to keep, see [`Machine::memory`]; [`Machine::save`] keeps
    /// both in files.
    ///
    /// # Errors
    /// The machine is not paused, or a part cannot be saved now.
    pub fn save_state(&self) -> Result<SavedMachine, MachineError> {
        let shared = self.shared();
        let _phase = shared.settled("saved")?;
        collect(shared)
    }

    /// Makes a machine that goes on where `saved` was. `fill` puts the saved contents into its memory, which is new.
    ///
    /// # Errors
    /// As [`Machine::restore`].
    pub fn restore_state(
        spec: MachineSpec,
        saved: &SavedMachine,
        fill: impl FnOnce(&GuestMemory) -> Result<(), MachineError>,
    ) -> Result<Self, MachineError> {
        let machine = resurrect(spec, saved, Start::New, 0)?;
        let shared = machine.shared();
        fill(&shared.memory)?;
        // What the backend knows of the contents before (translated code) is to be forgotten.
        shared
            .partition
            .set_memory(Vtl::VTL0, shared.memory.clone())?;
        Ok(machine)
    }
}

impl Shared {
    /// The phase, locked, of a machine that stands still and that nothing is about to end or restart.
    pub(super) fn settled(
        &self,
        action: &'static str,
    ) -> Result<parking_lot::MutexGuard<'_, Phase>, MachineError> {
        loop {
            let phase = self.phase_for(action, &[Phase::Created, Phase::Paused])?;
            if !self.events.waiting() {
                return Ok(phase);
            }
            // A vCPU has asked for a reset or power-off just before it was parked: the supervisor deals with it first.
            drop(phase);
            std::thread::sleep(core::time::Duration::from_millis(1));
        }
    }
}
