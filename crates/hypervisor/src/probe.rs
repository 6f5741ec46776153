//! Which backends this host can use, and why not.

use alloc::{string::String, sync::Arc};

use crate::{HypervisorError, Partition, PartitionConfig};

/// How well a backend works on this host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Availability {
    /// It cannot be used.
    Absent,
    /// It works, but another backend is likely to be faster.
    Slow,
    /// It works as meant.
    Usable,
}

/// The answer of [`Hypervisor::probe`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Probe {
    /// Whether it works.
    pub availability: Availability,
    /// Why, in a sentence for a person.
    pub reason: String,
    /// What to do about it, where there is anything to do.
    pub remedy: Option<String>,
}

/// A backend.
pub trait Hypervisor: Send + Sync {
    /// The name that `--accel` takes.
    fn name(&self) -> &'static str;
    /// Whether it works here. Takes about a millisecond at most.
    fn probe(&self) -> Probe;
    /// The most vCPUs a partition may have.
    fn max_vcpus(&self) -> u32;
    /// Makes a partition.
    ///
    /// # Errors
    /// The backend is absent, the configuration is beyond it, or the host is
    /// out of resources.
    fn create_partition(
        &self,
        config: PartitionConfig,
    ) -> Result<Arc<dyn Partition>, HypervisorError>;
}
