//! The vCPU threads: one per vCPU, each either running guest code or parked.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use caisson_hypervisor::{Completion, Exit, IoBus, KickHandle, Vcpu, VcpuStats};
use caisson_memory::Vtl;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::events::{Event, Events};
use crate::{Fault, io::worker::Worker};

/// How often a vCPU that has not parked yet is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(20);
/// How long a vCPU whose backend does not wait in HLT itself sleeps between looks.
const HALT_POLL: Duration = Duration::from_micros(500);
/// How long a parked access waits for its device before the vCPU looks whether it is to park as well.
const RETRY_POLL: Duration = Duration::from_millis(10);

/// What the vCPU threads are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Wanted {
    #[default]
    Park,
    Run,
    End,
}

#[derive(Default)]
struct State {
    wanted: Wanted,
    running: u32,
}

/// One vCPU and what is kept about it.
struct Cell {
    vcpu: Mutex<Box<dyn Vcpu>>,
    kick: Arc<dyn KickHandle>,
    stats: Mutex<VcpuStats>,
    exits: [AtomicU64; EXIT_KINDS.len()],
}

/// The kinds of exit, in the order they are counted in.
pub(crate) const EXIT_KINDS: [&str; 4] = ["kicked", "pending", "halt", "other"];

/// All vCPUs of a machine, and the switch that parks and runs them together.
pub(crate) struct Vcpus {
    cells: Vec<Cell>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The counters of one vCPU, as of its last exit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VcpuReport {
    pub(crate) stats: VcpuStats,
    /// In the order of [`EXIT_KINDS`].
    pub(crate) exits: [u64; EXIT_KINDS.len()],
}

impl Vcpus {
    /// Takes the vCPUs, in the order of their indices. They are parked.
    pub(crate) fn new(vcpus: Vec<Box<dyn Vcpu>>) -> Arc<Self> {
        let cells = vcpus
            .into_iter()
            .map(|vcpu| Cell {
                kick: vcpu.kick_handle(),
                stats: Mutex::new(vcpu.stats()),
                vcpu: Mutex::new(vcpu),
                exits: Default::default(),
            })
            .collect();
        Arc::new(Self {
            cells,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    pub(crate) fn count(&self) -> u32 {
        self.cells.len() as u32
    }

    pub(crate) fn kicks(&self) -> Vec<Arc<dyn KickHandle>> {
        self.cells.iter().map(|cell| cell.kick.clone()).collect()
    }

    /// The vCPUs themselves, which must be parked.
    pub(crate) fn parked(&self) -> impl Iterator<Item = MutexGuard<'_, Box<dyn Vcpu>>> {
        self.cells.iter().map(|cell| cell.vcpu.lock())
    }

    /// Lets them run.
    pub(crate) fn run(&self) {
        let mut state = self.state.lock();
        if state.wanted == Wanted::Park {
            state.wanted = Wanted::Run;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Makes them leave guest code and waits until all have, at most until `deadline`. Returns whether they have.
    pub(crate) fn park(&self, deadline: Option<Instant>) -> bool {
        self.switch(Wanted::Park, deadline)
    }

    /// Ends the threads. They are gone from guest code when this returns `true`.
    pub(crate) fn end(&self, deadline: Option<Instant>) -> bool {
        self.switch(Wanted::End, deadline)
    }

    fn switch(&self, wanted: Wanted, deadline: Option<Instant>) -> bool {
        let mut state = self.state.lock();
        if state.wanted != Wanted::End {
            state.wanted = wanted;
        }
        self.changed.notify_all();
        while state.running > 0 {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return false;
            }
            for cell in &self.cells {
                cell.kick.kick();
            }
            self.changed.wait_for(&mut state, KICK_AGAIN);
        }
        true
    }

    /// The counters of each vCPU. Running vCPUs are made to publish theirs, at most for `patience`.
    pub(crate) fn report(&self, patience: Duration) -> Vec<VcpuReport> {
        let before: Vec<u64> = self.cells.iter().map(Cell::exit_count).collect();
        if self.state.lock().running > 0 {
            for cell in &self.cells {
                cell.kick.kick();
            }
            let deadline = Instant::now() + patience;
            while Instant::now() < deadline
                && self.state.lock().running > 0
                && self
                    .cells
                    .iter()
                    .zip(&before)
                    .any(|(cell, before)| cell.exit_count() == *before)
            {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        self.cells
            .iter()
            .map(|cell| VcpuReport {
                stats: *cell.stats.lock(),
                exits: core::array::from_fn(|kind| cell.exits[kind].load(Ordering::Relaxed)),
            })
            .collect()
    }

    /// Waits until vCPUs may run. `false` when the thread is to end.
    fn enter(&self) -> bool {
        let mut state = self.state.lock();
        loop {
            match state.wanted {
                Wanted::Run => {
                    state.running += 1;
                    return true;
                }
                Wanted::Park => self.changed.wait(&mut state),
                Wanted::End => return false,
            }
        }
    }

    fn leave(&self) {
        self.state.lock().running -= 1;
        self.changed.notify_all();
    }

    /// The body of the thread of vCPU `index`. A panic in it is the caller's to report.
    pub(crate) fn thread(&self, index: u32, bus: &dyn IoBus, worker: &Worker, events: &Events) {
        /// Counts a vCPU as parked again, however its turn ended.
        struct Turn<'a>(&'a Vcpus);
        impl Drop for Turn<'_> {
            fn drop(&mut self) {
                self.0.leave();
            }
        }

        let Some(cell) = self.cells.get(index as usize) else {
            return;
        };
        while self.enter() {
            let turn = Turn(self);
            let next = cell.turn(index, bus, worker, events);
            drop(turn);
            match next {
                Next::Continue => {}
                Next::Hold => self.hold(events),
                Next::Sleep => std::thread::sleep(HALT_POLL),
            }
        }
    }

    /// Waits until something else is wanted or the event that stopped this vCPU has been dealt with.
    fn hold(&self, events: &Events) {
        let mut state = self.state.lock();
        while state.wanted == Wanted::Run && events.waiting() {
            self.changed.wait_for(&mut state, KICK_AGAIN);
        }
    }
}

/// What a vCPU thread does after a turn.
enum Next {
    Continue,
    /// An event ends or restarts the machine: no more guest code until then.
    Hold,
    Sleep,
}

impl Cell {
    fn exit_count(&self) -> u64 {
        self.exits
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .sum()
    }

    fn turn(&self, index: u32, bus: &dyn IoBus, worker: &Worker, events: &Events) -> Next {
        let mut vcpu = self.vcpu.lock();
        let progress = worker.progress();
        let exit = vcpu.run(bus);
        *self.stats.lock() = vcpu.stats();
        let kind = match exit {
            Exit::Kicked => 0,
            Exit::Pending(_) => 1,
            Exit::Halt => 2,
            _ => 3,
        };
        self.exits[kind].fetch_add(1, Ordering::Relaxed);
        match exit {
            Exit::Kicked => {
                if events.waiting() {
                    Next::Hold
                } else {
                    Next::Continue
                }
            }
            Exit::Halt => Next::Sleep,
            Exit::Pending(_) => {
                worker.wait_for_progress(progress, RETRY_POLL);
                match vcpu.complete(Completion::Retry) {
                    Ok(()) => Next::Continue,
                    Err(error) => {
                        events.post(Event::Crash(format!("vCPU {index}: {error}")));
                        Next::Hold
                    }
                }
            }
            Exit::Shutdown => {
                let state = vcpu.state(Vtl::VTL0).unwrap_or_default();
                events.post(Event::TripleFault(Fault {
                    vcpu: index,
                    rip: state.gprs.rip,
                    cr2: state.cr2,
                    cr3: state.cr3,
                }));
                Next::Hold
            }
            Exit::Failed(reason) => {
                events.post(Event::Crash(format!(
                    "vCPU {index} at RIP {:#x}: {} (instruction bytes {:02x?})",
                    reason.rip, reason.what, reason.instruction
                )));
                Next::Hold
            }
            Exit::Debug | Exit::Budget => {
                events.post(Event::Crash(format!(
                    "vCPU {index} stopped for a debugger that is not there"
                )));
                Next::Hold
            }
        }
    }
}
