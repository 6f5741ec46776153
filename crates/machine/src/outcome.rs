//! How a machine ended.

use core::fmt;

use serde::{Deserialize, Serialize};

/// Why a machine is no longer running. There is exactly one per machine; it never changes once it is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset, and [`OnReboot::Stop`](caisson_config::OnReboot::Stop) is in force.
    Reset,
    /// The guest wrote *v* to its debug-exit port; this is 2*v* + 1, as an exit status never zero.
    DebugExit(u32),
    /// Somebody outside called [`Machine::stop`](crate::Machine::stop).
    Stopped,
    /// The guest's kernel gave up and then asked for a reset. Carries the kernel's own last words.
    Panic(String),
    /// A vCPU could not deliver an exception, nor the double fault that follows (Intel SDM Vol. 3, "Double Fault
    /// Exception"), and [`OnCrash::End`](crate::OnCrash::End) is in force.
    TripleFault(Fault),
    /// The machine itself could not go on: a fault of the backend or of Caisson, not of the guest.
    Crash(String),
}

/// Where a vCPU was when it triple-faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The vCPU.
    pub vcpu: u32,
    /// Its instruction pointer.
    pub rip: u64,
    /// The last page-fault address.
    pub cr2: u64,
    /// The page-table base.
    pub cr3: u64,
}

impl Outcome {
    /// Whether the guest or the machine ended by accident rather than by somebody's wish.
    pub fn is_crash(&self) -> bool {
        matches!(self, Self::Panic(_) | Self::TripleFault(_) | Self::Crash(_))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reboot"),
            Self::DebugExit(value) => {
                write!(f, "the guest ended the machine with value {value:#x}")
            }
            Self::Stopped => f.write_str("the machine was stopped"),
            Self::Panic(message) => write!(f, "the guest's kernel panicked: {message}"),
            Self::TripleFault(fault) => write!(
                f,
                "vCPU {} triple-faulted at RIP {:#x} (CR2 {:#x}, CR3 {:#x})",
                fault.vcpu, fault.rip, fault.cr2, fault.cr3
            ),
            Self::Crash(what) => write!(f, "the machine failed: {what}"),
        }
    }
}
