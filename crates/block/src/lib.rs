//! The attachment between a block device (virtio-blk, NVMe) and the storage behind it.
//!
//! A device knows nothing of files, threads or image formats. It has an `Arc<dyn` [`BlockBackend`]`>` and does this:
//!
//! 1. It reads [`BlockBackend::info`] for what it shows the guest: size, block sizes, read-only, discard.
//! 2. For each guest request it checks the guest's numbers, makes a [`Request`] from an [`Operation`], keeps the
//!    [`Completion`] and hands the request over with [`BlockBackend::submit`]. Nothing is copied: a read or write
//!    carries a [`GuestBuffer`], a scatter list of guest addresses with the view to reach them through.
//! 3. After a batch (all that one doorbell brought) it calls [`BlockBackend::kick`] once.
//! 4. In its poll it polls its completions, which are plain futures, and reports them to the
//!    guest in the order in which they come.
//! 5. It polls [`BlockBackend::poll_resized`] to hear of a new size.
//!
//! # What a device may assume
//!
//! - Each request is completed exactly once, by any thread, maybe before `submit` returns. A backend that drops one
//!   has a bug: the completion then yields [`BlockError::Abandoned`], and [`abandoned`] counts it, which tests look at.
//! - A backend checks ranges, alignment and read-only itself; a hostile request is an error, never a panic.
//! - Requests under way are not ordered, not even where they overlap. Who needs an order waits for the completion.
//! - [`Operation::Flush`] covers every write that was *completed* before the flush was submitted.
//! - A completed write may be lost in a power cut until a flush; a [`durable`](Operation::Write::durable) one may not.
//! - To drop a [`Completion`] gives up the answer only; the operation takes place. So a device that is reset or saved
//!   first waits until its completions came (*drain*): storage still writes to guest memory until then.
//!
//! # What a backend may assume
//!
//! - `submit` is called by any thread, and never again for the same request.
//! - The guest may change a buffer's bytes while the request is under way: storage must be right whatever it reads.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

mod backend;
mod buffer;
mod completion;
mod error;
mod request;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use backend::{BlockBackend, BlockInfo};
pub use buffer::{GuestBuffer, MAX_BUFFER_LEN, Segment};
pub use completion::{Completer, Completion, abandoned};
pub use error::BlockError;
pub use request::{Operation, Request};
