//! What every hypervisor backend offers and every machine relies on: the
//! traits ([`Hypervisor`] → [`Partition`] → [`Vcpu`]), the neutral x86 vCPU
//! state, exits, and the capability probe.
//!
//! A backend knows no device. Whatever a guest access means is asked of the
//! [`IoBus`] that [`Vcpu::run`] is given; what cannot be answered on the spot
//! comes back as an [`Exit`] and is completed separately, so that it can be
//! parked and saved.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

mod bus;
mod error;
mod event;
mod exit;
mod partition;
mod power;
mod probe;
mod vcpu;
pub mod x86;

pub use bus::{Access, BusAnswer, IoBus, NullBus, Space};
pub use error::HypervisorError;
pub use event::{
    Doorbell, DoorbellHandle, DoorbellMatch, Doorbells, Event, EventWaiter, Events, InterruptEvent,
    InterruptEvents, RawEvent,
};
pub use exit::{Completion, CrashReason, Exit, Pending};
pub use partition::{Msi, Partition, PartitionConfig};
pub use power::{BackendMemory, DirtyLog, DirtyMethod, PartitionPower};
pub use probe::{Availability, Hypervisor, Probe};
pub use vcpu::{KickHandle, Vcpu, VcpuStats};
