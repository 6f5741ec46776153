//! What a driver did that it must not.

use caisson_memory::MemoryError;

/// A rule that the driver broke. The device needs a reset then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// A ring, a table or a buffer where there is no memory that allows the access.
    #[error("queue {queue}: {error}")]
    Memory {
        /// Which queue.
        queue: u16,
        /// The access.
        error: MemoryError,
    },
    /// A queue size that is zero, too large, or no power of two for a split ring.
    #[error("queue {queue} cannot have {size} entries")]
    QueueSize {
        /// Which queue.
        queue: u16,
        /// The size asked for.
        size: u16,
    },
    /// A ring part that is not aligned as §2.7 and §2.8.10 want it, or runs past the end of memory addresses.
    #[error("queue {queue}: a part of its ring at {address:#x} is not aligned or has no room")]
    RingAddress {
        /// Which queue.
        queue: u16,
        /// Where the part was to be.
        address: u64,
    },
    /// More buffers made available than the queue has entries (§2.7.13.3).
    #[error("queue {queue}: more buffers are available than it has entries")]
    TooManyAvailable {
        /// Which queue.
        queue: u16,
    },
    /// A descriptor number that the table does not have.
    #[error("queue {queue}: there is no descriptor {index}")]
    DescriptorIndex {
        /// Which queue.
        queue: u16,
        /// The number.
        index: u16,
    },
    /// A chain longer than the device takes, or one that loops.
    #[error("queue {queue}: a chain of descriptors does not end")]
    ChainTooLong {
        /// Which queue.
        queue: u16,
    },
    /// Indirect descriptors that were not negotiated, within another indirect table, followed by a further descriptor,
    /// or with a table whose length is no multiple of 16 or zero (§2.7.5.3.1).
    #[error("queue {queue}: an indirect descriptor where none may be")]
    Indirect {
        /// Which queue.
        queue: u16,
    },
    /// A device-readable descriptor after a device-writable one (§2.7.4.2).
    #[error("queue {queue}: a readable descriptor follows a writable one")]
    Order {
        /// Which queue.
        queue: u16,
    },
    /// A buffer that does not have the form that the device's requests have.
    #[error("queue {queue}: {what}")]
    Request {
        /// Which queue.
        queue: u16,
        /// What is wrong.
        what: &'static str,
    },
    /// The device itself cannot go on.
    #[error("{0}")]
    Device(&'static str),
}
