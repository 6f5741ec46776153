//! What can go wrong between a machine and its backend.

use alloc::{string::String, vec::Vec};

use caisson_memory::Gpa;

/// An error of a backend. The text names the thing, the cause and, where there
/// is one, the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HypervisorError {
    /// The backend is not usable on this host.
    #[error("{backend} cannot be used here: {reason}")]
    Unavailable {
        /// The backend's name as `--accel` takes it.
        backend: &'static str,
        /// Why, and the remedy.
        reason: String,
    },
    /// More vCPUs than the backend can run.
    #[error("{asked} vCPUs asked, but {backend} runs at most {limit}")]
    TooManyVcpus {
        /// The backend's name.
        backend: &'static str,
        /// Asked for.
        asked: u32,
        /// Allowed.
        limit: u32,
    },
    /// A processor that this host's backend cannot give: everything that it lacks.
    #[error("{backend} cannot give a guest this processor on this host, which lacks: {}", lacking.join(", "))]
    Processor {
        /// The backend's name.
        backend: &'static str,
        /// See [`CpuidTable::lacking`](crate::x86::CpuidTable::lacking).
        lacking: Vec<String>,
    },
    /// A memory region could not be mapped.
    #[error("cannot map guest memory at {gpa}: {reason}")]
    Map {
        /// Where it was to go.
        gpa: Gpa,
        /// Why not.
        reason: String,
    },
    /// State that this backend or host cannot hold.
    #[error("vCPU state cannot be set: {0}")]
    State(String),
    /// The host refused a resource.
    #[error("{what}: {reason}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        reason: String,
    },
}
