//! Which backends this host can use, and why not.

use alloc::{string::String, sync::Arc};

use crate::{HypervisorError, Partition, PartitionConfig, x86::CpuidTable};

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
    /// Why it cannot be used at all, as far as that can be told without
    /// running a guest. Takes microseconds.
    fn absence(&self) -> Option<Probe> {
        let probe = self.probe();
        (probe.availability == Availability::Absent).then_some(probe)
    }
    /// The most vCPUs a partition may have.
    fn max_vcpus(&self) -> u32;
    /// The most that this backend can give a guest with `vcpus` vCPUs on this host:
    /// every feature at once. Names, caches and topology are those that a guest
    /// gets by default.
    ///
    /// # Errors
    /// The backend is absent, or the host does not say.
    fn offers(&self, vcpus: u32) -> Result<CpuidTable, HypervisorError>;
    /// Begins, in the background, to ask the host for what [`Self::create_partition`] will need and
    /// what takes long. For callers that have something else to do first; never necessary.
    fn warm_up(&self) {}
    /// Makes a partition.
    ///
    /// # Errors
    /// The backend is absent, the configuration is beyond it (for the processor,
    /// [`HypervisorError::Processor`] with everything that is lacking), or the host
    /// is out of resources.
    fn create_partition(
        &self,
        config: PartitionConfig,
    ) -> Result<Arc<dyn Partition>, HypervisorError>;
}
