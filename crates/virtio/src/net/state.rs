//! The saved state of the network device.

use alloc::vec::Vec;

use caisson_device::{SaveState, StateError};
use caisson_packet::MacAddress;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{QUEUE_SIZE, config::ECN_FREE_OFFLOADS, filter::Filter};
use crate::queue::Chain;

/// The most that a backend has to remember, in bytes.
const MOST_BACKEND: usize = 1 << 20;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct NetState {
    #[serde(serialize_with = "write_mac", deserialize_with = "read_mac")]
    pub(super) mac: MacAddress,
    /// What the driver has accepted.
    pub(super) features: u64,
    /// What of it that is about received frames is switched on.
    pub(super) guest_offloads: u64,
    /// The driver is asked to announce itself.
    pub(super) announce: bool,
    pub(super) filter: Filter,
    /// Receive buffers that were taken and are empty.
    pub(super) held: Vec<Chain>,
    pub(super) sent: Counters,
    pub(super) received: Counters,
    /// What the backend remembers; only here while the device is saved.
    pub(super) backend: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Counters {
    pub(super) frames: u64,
    pub(super) bytes: u64,
    pub(super) dropped: u64,
    pub(super) filtered: u64,
}

impl Counters {
    pub(super) fn count(&mut self, bytes: usize) {
        self.frames = self.frames.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes as u64);
    }
}

fn write_mac<S: Serializer>(mac: &MacAddress, serializer: S) -> Result<S::Ok, S::Error> {
    mac.0.serialize(serializer)
}

fn read_mac<'de, D: Deserializer<'de>>(deserializer: D) -> Result<MacAddress, D::Error> {
    Deserialize::deserialize(deserializer).map(MacAddress)
}

impl SaveState for NetState {
    const ID: &'static str = "virtio-net";
    const VERSION: u16 = 1;
}

impl NetState {
    pub(super) fn new(mac: MacAddress) -> Self {
        Self {
            mac,
            features: 0,
            guest_offloads: 0,
            announce: false,
            filter: Filter::default(),
            held: Vec::new(),
            sent: Counters::default(),
            received: Counters::default(),
            backend: Vec::new(),
        }
    }

    pub(super) fn checked(self) -> Result<Self, StateError> {
        let invalid = |what| Err(StateError::Invalid { id: Self::ID, what });
        if self.held.len() > usize::from(QUEUE_SIZE)
            || !self
                .held
                .iter()
                .all(|chain| chain.is_possible(QUEUE_SIZE) && chain.writable_len() > 0)
        {
            return invalid("it holds buffers that its queue cannot have");
        }
        if self.guest_offloads & !(self.features & ECN_FREE_OFFLOADS) != 0 {
            return invalid("offloads are switched on that were not agreed on");
        }
        if !self.filter.is_possible() || self.backend.len() > MOST_BACKEND {
            return invalid("its tables are too long");
        }
        Ok(self)
    }
}
