//! The storage behind a device.

use core::task::{Context, Poll};

use crate::{BlockError, Operation, Request};

/// What a disk is. All of it but [`BlockInfo::size`] stays for as long as the backend lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// Size in bytes, a multiple of [`BlockInfo::logical_block`].
    pub size: u64,
    /// The unit of every offset and length, in bytes: 512 or 4096.
    pub logical_block: u32,
    /// The unit that is written without reading first, in bytes: a power of two, at least the logical block.
    pub physical_block: u32,
    /// The length in bytes that reads and writes are best made of (a multiple of the physical block), 0 for no
    /// preference: an image's cluster.
    pub optimal_io: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The unit of space that a discard gives back, in bytes; `None` where discards have no effect.
    pub discard_granularity: Option<u32>,
    /// Whether completed writes may need a flush to be durable. A device shows its guest a write cache then.
    pub write_cache: bool,
}

impl BlockInfo {
    /// Whether `operation` makes sense on this disk: what every backend checks first.
    ///
    /// # Errors
    /// [`BlockError::ReadOnly`], [`BlockError::Unaligned`] or [`BlockError::OutOfRange`].
    pub fn check(&self, operation: &Operation) -> Result<(), BlockError> {
        if self.read_only && operation.writes() {
            return Err(BlockError::ReadOnly);
        }
        let Some((offset, len)) = operation.range() else {
            return Ok(());
        };
        let block = u64::from(self.logical_block.max(1));
        if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(BlockError::Unaligned);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(BlockError::OutOfRange),
        }
    }
}

/// Storage that a block device is put in front of. See the [crate] for what either side may assume.
pub trait BlockBackend: Send + Sync {
    /// What the disk is now.
    fn info(&self) -> BlockInfo;

    /// Takes a request. It may stay queued until [`BlockBackend::kick`]. Does not block.
    fn submit(&self, request: Request);

    /// A batch of requests is complete: what is queued is started. Spurious calls are harmless.
    fn kick(&self);

    /// Ready with the disk's size in bytes once that is another than `seen`. One task at a time may wait.
    fn poll_resized(&self, cx: &mut Context<'_>, seen: u64) -> Poll<u64>;
}
