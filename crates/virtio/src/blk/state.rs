//! The saved state of the block device.

use alloc::vec::Vec;

use caisson_device::{SaveState, StateError};
use serde::{Deserialize, Serialize};

use super::{QUEUE_SIZE, request::OK};
use crate::queue::Chain;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct BlkState {
    /// The size that the driver was told.
    pub(super) size: u64,
    pub(super) write_back: bool,
    /// The driver has accepted to flush.
    pub(super) can_flush: bool,
    /// Requests that the storage has answered and the driver does not know of.
    pub(super) done: Vec<Done>,
    pub(super) requests: u64,
    pub(super) errors: u64,
}

/// An answered request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Done {
    pub(super) queue: u16,
    pub(super) chain: Chain,
    pub(super) written: u32,
    pub(super) status: u8,
}

impl SaveState for BlkState {
    const ID: &'static str = "virtio-blk";
    const VERSION: u16 = 1;
}

impl BlkState {
    pub(super) fn new(size: u64, write_back: bool) -> Self {
        Self {
            size,
            write_back,
            can_flush: false,
            done: Vec::new(),
            requests: 0,
            errors: 0,
        }
    }

    pub(super) fn count(&mut self, status: u8) {
        self.requests = self.requests.saturating_add(1);
        self.errors = self.errors.saturating_add(u64::from(status != OK));
    }

    pub(super) fn checked(self, queues: u16) -> Result<Self, StateError> {
        let most = usize::from(queues) * usize::from(QUEUE_SIZE);
        let possible = self.done.len() <= most
            && self.done.iter().all(|done| {
                done.queue < queues
                    && done.chain.is_possible(QUEUE_SIZE)
                    && done.chain.writable_len() > 0
            });
        match possible {
            true => Ok(self),
            false => Err(StateError::Invalid {
                id: Self::ID,
                what: "a request is larger than its queue",
            }),
        }
    }
}
