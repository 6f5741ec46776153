//! Virtqueues, the device's side (§2.6).
//!
//! [`Queue`] is one enabled virtqueue of either format. It takes buffers that the driver made available
//! ([`Queue::pop`]), gives them back ([`Queue::complete`]), and decides which notifications are worth sending
//! ([`Queue::flush`]). Rings are in guest memory, which the driver may change at any time: every value is read once and
//! checked, and work per buffer is bounded.

mod access;
mod chain;
mod packed;
mod reorder;
mod ring;
mod split;

pub use chain::{Chain, Segment};
pub use ring::{Queue, QueueState, RingFeatures, RingPlace};

/// The largest size of a queue (§2.6).
pub const MAX_SIZE: u16 = 32768;
/// The most segments of one buffer. Drivers stay far below; without indirect descriptors it is the queue's size.
pub const MAX_SEGMENTS: usize = 1024;
