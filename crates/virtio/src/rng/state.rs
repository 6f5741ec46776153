//! The saved state of the entropy device.

use caisson_device::{SaveState, StateError};
use serde::{Deserialize, Serialize};

use crate::queue::Chain;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct RngState {
    /// A buffer was taken and waits for the source: it is asked again after a restore.
    pub(super) waiting: bool,
    /// That buffer.
    pub(super) chain: Chain,
    /// How many bytes were given out.
    pub(super) given: u64,
}

impl SaveState for RngState {
    const ID: &'static str = "virtio-rng";
    const VERSION: u16 = 1;
}

impl RngState {
    pub(super) fn checked(self, queue_size: u16) -> Result<Self, StateError> {
        if self.waiting && !self.chain.is_possible(queue_size) {
            return Err(StateError::Invalid {
                id: Self::ID,
                what: "a request is larger than its queue",
            });
        }
        Ok(self)
    }
}
