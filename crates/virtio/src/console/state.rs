//! The saved state of the console device.

use alloc::collections::VecDeque;

use caisson_device::{SaveState, StateError};
use serde::{Deserialize, Serialize};

use super::INPUT;
use crate::queue::Chain;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct ConsoleState {
    /// Input that the driver has had no buffers for.
    pub(super) input: VecDeque<u8>,
    /// A buffer of output was taken, and not all of it is sent.
    pub(super) sending: bool,
    /// That buffer.
    pub(super) chain: Chain,
    /// How much of it is sent.
    pub(super) sent: u64,
    pub(super) columns: u16,
    pub(super) rows: u16,
    pub(super) transmitted: u64,
    pub(super) received: u64,
}

impl SaveState for ConsoleState {
    const ID: &'static str = "virtio-console";
    const VERSION: u16 = 1;
}

impl ConsoleState {
    pub(super) fn checked(self, queue_size: u16) -> Result<Self, StateError> {
        let invalid = |what| StateError::Invalid { id: Self::ID, what };
        if self.input.len() > INPUT {
            return Err(invalid("more input waits than it holds"));
        }
        if self.sending
            && (!self.chain.is_possible(queue_size) || self.sent > self.chain.readable_len())
        {
            return Err(invalid("a request is larger than its queue"));
        }
        Ok(self)
    }
}
