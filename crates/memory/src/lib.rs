//! Guest physical memory: regions, dirty tracking, safe access, per-VTL views.
//!
//! [`GuestMemory`] is an immutable table of [`Region`]s. Nobody but the
//! hypervisor backends touches it directly: devices hold a [`MemoryView`],
//! which is the memory as one virtual trust level may see it.
//!
//! The crate is `no_std`; the mappings themselves (memfd, huge pages) are made
//! by the `host` feature.
#![cfg_attr(not(feature = "host"), no_std)]
extern crate alloc;

mod access;
mod address;
mod dirty;
#[cfg(feature = "host")]
pub mod host;
mod pinned;
mod region;
mod view;
mod watch;

pub use address::{Gpa, PAGE_SHIFT, PAGE_SIZE, Vtl};
pub use dirty::DirtyBitmap;
pub use pinned::Pinned;
pub use region::{GuestMemory, MemoryError, Perms, Region, RegionKind, TableError};
pub use view::{MemoryView, VtlPermissions};
pub use watch::WriteWatch;
