//! PCI functions as their guest sees them.
//!
//! Sources: PCI Local Bus Specification 3.0; PCI Express Base Specification 5.0 §7 for the memory-mapped configuration
//! mechanism (ECAM).
//!
//! | module | what |
//! |---|---|
//! | [`Function`] | configuration space, base address registers, INTx, MSI and MSI-X of one function |
//! | [`HostBridge`] | the function 00:00.0 |
//! | [`FunctionAddress`] | where a function is on the bus |
//!
//! A device with a PCI interface owns a [`Function`] and hands it the accesses to its configuration page and to the
//! MSI-X structures. The page is an ordinary claim of the device in the ECAM window, so the bus finds it as it finds any
//! other range, without a bridge in between; what the guest places with base address registers is published through
//! [`caisson_device::ClaimSink`].
//!
//! Left out: buses other than bus 0, bridges and hot-plug; expansion ROMs; power management, PCI Express and other
//! extended capabilities; parity and system errors. A function behaves as a conventional device on the root bus.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

mod address;
mod bar;
mod config_space;
mod function;
mod host_bridge;
mod msi;
mod msix;
mod state;
#[cfg(feature = "testing")]
pub mod testing;

pub use address::{ECAM_BUS_LEN, FUNCTION_PAGE, FunctionAddress, InterruptPin};
pub use bar::{BarKind, BarSpec};
pub use function::{
    Capability, Function, FunctionHandles, FunctionSpec, Identity, Place, SpecError,
};
pub use host_bridge::HostBridge;
pub use msix::MsixSpec;
pub use state::FunctionState;
