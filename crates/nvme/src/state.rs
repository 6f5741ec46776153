//! The saved state.

use alloc::vec::Vec;

use caisson_device::{SaveState, StateError};
use caisson_pci::FunctionState;
use serde::{Deserialize, Serialize};

use crate::{
    controller::Shutdown,
    events::Events,
    features::Features,
    log::Counters,
    queue::{CompletionQueue, MAX_UNDER_WAY, SubmissionQueue},
};

/// What the host could have changed, and what it was told. Queue 0 of either kind is the admin queue.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ControllerState {
    /// `CC`.
    pub(crate) configuration: u32,
    /// `AQA`.
    pub(crate) admin_sizes: u32,
    /// `ASQ`.
    pub(crate) admin_submission: u64,
    /// `ACQ`.
    pub(crate) admin_completion: u64,
    /// Interrupts masked by `INTMS`.
    pub(crate) masked: u32,
    pub(crate) ready: bool,
    pub(crate) fatal: bool,
    /// The host has switched the controller off, and commands are still under way.
    pub(crate) resetting: bool,
    pub(crate) shutdown: Shutdown,
    pub(crate) submission: Vec<Option<SubmissionQueue>>,
    pub(crate) completion: Vec<Option<CompletionQueue>>,
    pub(crate) features: Features,
    pub(crate) events: Events,
    pub(crate) counters: Counters,
    /// The size that the host was told, in bytes.
    pub(crate) size: u64,
    /// Commands that the storage has answered and the host does not know of.
    pub(crate) done: Vec<Done>,
}

/// An answered command.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    pub(crate) queue: u16,
    pub(crate) command: u16,
    pub(crate) lba: u64,
    pub(crate) status: u16,
    pub(crate) result: u32,
    /// The queue that the command deletes; 0 for other commands.
    pub(crate) deletes: u16,
}

/// The record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NvmeState {
    pub(crate) function: FunctionState,
    pub(crate) controller: ControllerState,
}

impl SaveState for NvmeState {
    const ID: &'static str = "nvme";
    const VERSION: u16 = 1;
}

impl ControllerState {
    /// The state after power-on, with `queues` I/O queues of each kind.
    pub(crate) fn new(queues: u16, size: u64, write_cache: bool) -> Self {
        let places = usize::from(queues) + 1;
        Self {
            configuration: 0,
            admin_sizes: 0,
            admin_submission: 0,
            admin_completion: 0,
            masked: 0,
            ready: false,
            fatal: false,
            resetting: false,
            shutdown: Shutdown::Off,
            submission: alloc::vec![None; places],
            completion: alloc::vec![None; places],
            features: Features::new(write_cache),
            events: Events::default(),
            counters: Counters {
                power_cycles: 1,
                ..Counters::default()
            },
            size,
            done: Vec::new(),
        }
    }

    pub(crate) fn has_io_queues(&self) -> bool {
        let submission = self.submission.iter().skip(1).any(Option::is_some);
        submission || self.completion.iter().skip(1).any(Option::is_some)
    }

    /// Checks what is used as an index or a length later.
    pub(crate) fn checked(self, queues: u16) -> Result<Self, StateError> {
        let invalid = |what| StateError::Invalid {
            id: NvmeState::ID,
            what,
        };
        let places = usize::from(queues) + 1;
        if self.submission.len() != places || self.completion.len() != places {
            return Err(invalid("it has another number of queues"));
        }
        let vectors = queues + 1;
        let completion = |id: u16| matches!(self.completion.get(usize::from(id)), Some(Some(_)));
        let submission_is_possible =
            |queue: &SubmissionQueue| queue.is_possible() && completion(queue.completion);
        let mut submissions = self.submission.iter().flatten();
        let mut completions = self.completion.iter().flatten();
        if !submissions.all(submission_is_possible)
            || !completions.all(|queue| queue.is_possible(vectors))
        {
            return Err(invalid(
                "a queue is larger than it can be, or has no other half",
            ));
        }
        let there = |id: u16| matches!(self.submission.get(usize::from(id)), Some(Some(_)));
        let deletes = |id: u16| match self.submission.get(usize::from(id)) {
            Some(Some(queue)) => queue.deleting,
            _ => false,
        };
        let known = |done: &Done| there(done.queue) && (done.deletes == 0 || deletes(done.deletes));
        if self.done.len() > places * MAX_UNDER_WAY as usize || !self.done.iter().all(known) {
            return Err(invalid("a command is of no queue"));
        }
        if !self.events.is_possible() {
            return Err(invalid("more requests for events wait than may"));
        }
        if self.shutdown == Shutdown::Flushing {
            return Err(invalid("the storage was being flushed"));
        }
        Ok(self)
    }
}
