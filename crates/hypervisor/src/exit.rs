//! Why a vCPU stopped running.

use alloc::{boxed::Box, string::String, vec::Vec};

use caisson_memory::Gpa;

use crate::{Space, x86::Exception};

/// Why [`Vcpu::run`](crate::Vcpu::run) returned. A neutral value with the raw
/// facts: nothing in it borrows from the backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Exit {
    /// The kick handle was used. Nothing else happened.
    Kicked,
    /// The bus parked an access; complete it with [`Completion`].
    Pending(Pending),
    /// The vCPU executed HLT with nothing to wake it and the backend does not
    /// wait itself. Backends that wait inside `run` never return this.
    Halt,
    /// A triple fault, or shutdown by other means: the vCPU is dead until reset.
    Shutdown,
    /// A debug event that the host asked for (not the guest's own).
    Debug,
    /// The guest instruction budget is used up (deterministic runs).
    Budget,
    /// The backend cannot go on. Not the guest's fault.
    Failed(Box<CrashReason>),
}

/// An access that waits for its answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pending {
    /// A device register read of `len` bytes.
    Read {
        /// Ports or memory.
        space: Space,
        /// Address in that space.
        address: Gpa,
        /// 1 to 64.
        len: u8,
    },
    /// A device register write.
    Write {
        /// Ports or memory.
        space: Space,
        /// Address in that space.
        address: Gpa,
        /// What was written, 1 to 64 bytes.
        data: Vec<u8>,
    },
}

/// The answer to a [`Pending`] access.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Completion {
    /// The bytes of a read (padded with ones, or cut, to the access's length);
    /// for a write, that it is done.
    Value(Vec<u8>),
    /// The instruction faults instead.
    Fault(Exception),
    /// Somebody changed the registers; the access is forgotten.
    Abandoned,
    /// Ask the bus again.
    Retry,
}

/// What is known when a backend gives up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CrashReason {
    /// What happened, for a person.
    pub what: String,
    /// Guest RIP.
    pub rip: u64,
    /// The instruction's bytes, as far as known.
    pub instruction: Vec<u8>,
}
