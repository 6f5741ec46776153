//! What a device may ask for.

use crate::{BlockError, Completer, Completion, GuestBuffer, completion};

/// One operation on a disk. Offsets and lengths are in bytes and multiples of
/// [`BlockInfo::logical_block`](crate::BlockInfo::logical_block).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Operation {
    /// Reads `buffer.len()` bytes into guest memory. After an error the buffer's bytes are undefined.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where to.
        buffer: GuestBuffer,
    },
    /// Writes `buffer.len()` bytes from guest memory. After an error, or a power cut before it is durable, each
    /// logical block of the range has its old or its new content.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where from.
        buffer: GuestBuffer,
        /// Completed only when it is durable (FUA), whatever the disk's cache mode.
        durable: bool,
    },
    /// Makes every write, discard and write-zeroes durable that was completed before.
    Flush,
    /// The range's content is not needed any more: it then reads as anything that was there or zeroes, and the host
    /// gets the space back where it can.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// The range reads as zeroes from then on.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Whether the host may take the space back. Without it the range stays allocated, so that a later write to it
        /// does not fail for want of space.
        unmap: bool,
        /// As in [`Operation::Write`].
        durable: bool,
    },
}

impl Operation {
    /// Offset and length on the disk; `None` for [`Operation::Flush`].
    pub fn range(&self) -> Option<(u64, u64)> {
        match self {
            Self::Read { offset, buffer } | Self::Write { offset, buffer, .. } => {
                Some((*offset, buffer.len()))
            }
            Self::Discard { offset, len } | Self::WriteZeroes { offset, len, .. } => {
                Some((*offset, *len))
            }
            Self::Flush => None,
        }
    }

    /// Whether it changes the disk.
    pub fn writes(&self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::Discard { .. } | Self::WriteZeroes { .. }
        )
    }
}

/// An operation together with the duty to complete it.
#[derive(Debug)]
#[must_use = "a request must be completed"]
pub struct Request {
    operation: Operation,
    completer: Completer,
}

impl Request {
    /// A request for `operation`, and where its answer arrives.
    pub fn new(operation: Operation) -> (Self, Completion) {
        let (completer, completion) = completion::pair();
        (
            Self {
                operation,
                completer,
            },
            completion,
        )
    }

    /// What is asked.
    pub fn operation(&self) -> &Operation {
        &self.operation
    }

    /// What is asked, and the duty to answer.
    pub fn into_parts(self) -> (Operation, Completer) {
        (self.operation, self.completer)
    }

    /// Answers.
    pub fn complete(self, outcome: Result<(), BlockError>) {
        self.completer.complete(outcome);
    }
}
