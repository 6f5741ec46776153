//! The attachment between a network device (virtio-net) and the network behind it.
//!
//! A device knows nothing of sockets, threads or taps. It has an `Arc<dyn` [`PacketBackend`]`>` and does this:
//!
//! 1. It reads [`PacketBackend::info`] for what it shows the guest, and says what the guest takes with
//!    [`PacketBackend::set_receive_offloads`].
//! 2. While [`PacketBackend::poll_send`] is ready it copies a frame of the guest's out of guest memory, once, and hands
//!    it over with [`PacketBackend::send`]; after a batch it calls [`PacketBackend::kick`].
//! 3. It takes frames for the guest with [`PacketBackend::poll_receive`] when the guest has buffers for them.
//! 4. [`PacketBackend::reset`] when the guest's driver starts anew.
//!
//! # What either side may assume
//!
//! - Frames may be lost, as on a wire; a backend loses none that the device has room for.
//! - A backend holds a bounded number of frames each way. A full one is not ready, and the guest's frames wait in its
//!   ring; a device that takes no frames has the backend stop reading from the network.
//! - A frame's bytes come from the guest: nothing about them has been checked but what [`Frame`] says.
//! - A frame for the guest has no checksum left open and is not longer than the guest takes, unless it accepted so.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

mod backend;
mod checksum;
mod frame;
mod mac;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use backend::{Offloads, PacketBackend, PacketInfo};
pub use checksum::{Sum, complete};
pub use frame::{Checksum, Frame, MAX_FRAME, Segmentation, SegmentationKind};
pub use mac::{MacAddress, MacError};
