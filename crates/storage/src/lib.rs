//! Disks: the engine that reads and writes files, and the formats of images in them. No device is known here; a
//! device sees a [`Disk`], which is a [`caisson_block::BlockBackend`].
//!
//! A disk is a stack of [`Layer`]s that lives on one [`IoThread`]. At the bottom is a file ([`file::FileLayer`]), over
//! it a format, over it perhaps a throw-away layer. Guest memory is the buffer all the way down: a layer
//! that maps ranges hands on slices of the same [`Pinned`](caisson_memory::Pinned) memory.

#[cfg(not(target_os = "linux"))]
compile_error!("disks are there for hosts with Linux only");

mod disk;
pub mod error;
pub mod file;
pub mod format;
pub mod layer;
pub mod limit;
pub mod manage;
mod open;
pub mod runtime;
#[cfg(any(test, feature = "testing"))]
pub mod torture;

pub use disk::Disk;
pub use error::OpenError;
pub use format::Format;
pub use layer::{Content, Extent, Layer, Traits};
pub use limit::{LimitState, Limits, Rate, RateLimit};
pub use open::{BackingPolicy, DiskOptions, Ephemeral, open_image};
pub use runtime::{EngineKind, IoThread, Runtime};
