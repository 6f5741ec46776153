//! A virtual processor.

use alloc::sync::Arc;

use caisson_memory::Vtl;
use serde::Serialize;

use crate::{Completion, Exit, HypervisorError, IoBus, x86::VcpuState};

/// A virtual processor. Owned by one thread at a time; everything that other
/// threads may do to it goes through its [`KickHandle`] and the
/// [`Partition`](crate::Partition).
///
/// Order of calls: any of `state`/`set_state` while not running; `run` until it
/// returns; after [`Exit::Pending`] either `complete` then `run`, or `state`
/// (which says that an access is pending) to save it as it stands.
pub trait Vcpu: Send {
    /// Its index, from zero.
    fn index(&self) -> u32;

    /// Runs guest code until something must be decided outside. Waits inside
    /// while the guest is halted (HLT, wait-for-SIPI): only a kick, an
    /// interrupt or a timer ends that.
    fn run(&mut self, bus: &dyn IoBus) -> Exit;

    /// Answers the pending access of the last [`Exit::Pending`].
    ///
    /// # Errors
    /// There is none.
    fn complete(&mut self, completion: Completion) -> Result<(), HypervisorError>;

    /// All architectural state of trust level `vtl`.
    ///
    /// # Errors
    /// The host refused, or the level does not exist.
    fn state(&self, vtl: Vtl) -> Result<VcpuState, HypervisorError>;

    /// Replaces all architectural state of `vtl`.
    ///
    /// # Errors
    /// State that no processor can be in, or that needs a feature that this
    /// host lacks; the old state is then unchanged.
    fn set_state(&mut self, vtl: Vtl, state: &VcpuState) -> Result<(), HypervisorError>;

    /// Power-on reset (`init = false`) or INIT.
    fn reset(&mut self, vtl: Vtl, init: bool);

    /// A handle by which any thread makes `run` return [`Exit::Kicked`] soon,
    /// also when called just before `run`.
    fn kick_handle(&self) -> Arc<dyn KickHandle>;

    /// What it did so far.
    fn stats(&self) -> VcpuStats;
}

/// Makes a vCPU leave [`Vcpu::run`].
pub trait KickHandle: Send + Sync {
    /// Asks the vCPU to return [`Exit::Kicked`]. Never blocks.
    fn kick(&self);
}

/// Counters of one vCPU since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct VcpuStats {
    /// Guest instructions retired, where the backend can count them.
    pub instructions: Option<u64>,
    /// Device register reads and writes (MMIO).
    pub mmio: u64,
    /// Port reads and writes.
    pub pio: u64,
    /// Times it went to sleep in HLT.
    pub halts: u64,
    /// Interrupts taken.
    pub interrupts: u64,
    /// Exceptions delivered to the guest.
    pub exceptions: u64,
    /// Code blocks built, where the backend builds any.
    pub blocks_built: u64,
    /// Times guest code was thrown away because it was written to.
    pub code_invalidations: u64,
    /// Misses of the software TLB, where there is one.
    pub tlb_misses: u64,
    /// TLB flushes asked by the guest.
    pub tlb_flushes: u64,
    /// Instructions that the host's hypervisor gave up on and the software CPU
    /// executed in its stead.
    pub emulated: u64,
}
