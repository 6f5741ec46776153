//! Virtio devices: *Virtual I/O Device (VIRTIO) Version 1.3* (OASIS). Section numbers in this crate are of that text.
//!
//! | module | what | section |
//! |---|---|---|
//! | [`queue`] | split and packed virtqueues, the device's side | §2.6–2.8 |
//! | [`Facilities`] | status, features, configuration and queues of one device | §2.1–2.5, §3.1 |
//! | [`pci`] | the PCI transport, modern devices only | §4.1 |
//! | [`mmio`] | the memory-mapped transport, version 2 | §4.2 |
//! | [`net`] | network device | §5.1 |
//! | [`blk`] | block device | §5.2 |
//! | [`rng`] | entropy device | §5.4 |
//! | [`console`] | console device | §5.3 |
//!
//! A device implements [`VirtioDevice`] and knows no transport; a transport is a [`caisson_device::Device`] around it. A
//! driver that breaks the rules gets `DEVICE_NEEDS_RESET` (§2.1.2), and its device does nothing more until it is reset:
//! what went wrong is a [`Fault`], shown by `inspect`.
//!
//! Left out: legacy and transitional interfaces, channel I/O, `VIRTIO_F_NOTIFICATION_DATA`,
//! `VIRTIO_F_ACCESS_PLATFORM` (there is no IOMMU), shared memory regions and administration virtqueues.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

pub mod blk;
pub mod console;
mod device;
mod facilities;
mod fault;
pub mod feature;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(feature = "testing")]
pub mod testing;
mod transport;

pub use device::{DeviceKind, VirtioDevice};
pub use facilities::{Facilities, FacilitiesState, Polled, Queues, status};
pub use fault::Fault;
pub use transport::{mmio, pci};
