//! What is saved of the network: enough to end the guest's connections where they no longer are.

use alloc::vec::Vec;
use core::net::SocketAddrV4;

use serde::{Deserialize, Serialize};

use crate::{limits, wire::Ends};

/// A connection that was open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedFlow {
    guest: ([u8; 4], u16),
    remote: ([u8; 4], u16),
    pub(crate) seq: u32,
    pub(crate) ack: u32,
}

impl SavedFlow {
    pub(crate) fn new(ends: (SocketAddrV4, SocketAddrV4), numbers: (u32, u32)) -> Self {
        let plain = |address: SocketAddrV4| (address.ip().octets(), address.port());
        Self {
            guest: plain(ends.0),
            remote: plain(ends.1),
            seq: numbers.0,
            ack: numbers.1,
        }
    }

    pub(crate) fn ends(&self) -> Ends {
        let address = |(octets, port): ([u8; 4], u16)| SocketAddrV4::new(octets.into(), port);
        Ends {
            from: address(self.remote),
            to: address(self.guest),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedRouter {
    version: u8,
    /// The card that the guest was heard under.
    pub(crate) guest_mac: [u8; 6],
    pub(crate) flows: Vec<SavedFlow>,
}

const VERSION: u8 = 1;

impl SavedRouter {
    pub(crate) fn new(guest_mac: [u8; 6], flows: Vec<SavedFlow>) -> Self {
        Self {
            version: VERSION,
            guest_mac,
            flows,
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        postcard::to_allocvec(self).unwrap_or_default()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let saved: Self = postcard::from_bytes(bytes).ok()?;
        (saved.version == VERSION && saved.flows.len() <= limits::TCP).then_some(saved)
    }
}
