//! An NVMe controller with one namespace: *NVM Express Base Specification, revision 1.4*. Section numbers in this crate
//! are of that text.
//!
//! | module | what | section |
//! |---|---|---|
//! | `controller` | the PCI function, enabling, shutdown, polling | §3.1, §7.6 |
//! | `registers` | controller registers and doorbells | §3.1 |
//! | `queue` | submission and completion queues | §4.1 |
//! | `admin`, `features`, `log`, `identify` | admin commands | §5 |
//! | `io` | NVM commands | §6 |
//! | `data` | PRPs and SGLs | §4.3, §4.4 |
//! | `events` | asynchronous events and errors | §5.2 |
//! | `state` | the saved state | |
//!
//! What a host finds: as many I/O queue pairs as asked for (up to [`MAX_QUEUES`]) of up to 1024 entries, a vector for
//! each, PRPs and SGLs, flush, FUA, write-zeroes, deallocate, a write cache that can be switched off, SMART and error
//! logs, and asynchronous events for doorbell errors and for a namespace that changes its size.
//!
//! Left out: memory pages other than 4 KiB, weighted round robin (queues take turns), namespace management, formatting,
//! firmware download, compare, write uncorrectable, fused commands, reservations, metadata, power states, a
//! controller memory buffer, and stopping a command that is under way (Abort succeeds without doing so, as §5.1 allows).
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

mod admin;
mod command;
mod controller;
mod data;
mod events;
mod features;
mod identify;
mod io;
mod log;
mod queue;
mod registers;
mod state;
#[cfg(feature = "testing")]
pub mod testing;

pub use controller::{MAX_QUEUES, Nvme, NvmeConfig, NvmeHandles};
