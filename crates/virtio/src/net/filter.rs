//! Which frames the driver wants (§5.1.6.5.1 to §5.1.6.5.3).

use alloc::vec::Vec;

use caisson_packet::MacAddress;
use serde::{Deserialize, Serialize};

use super::config::{CTRL_RX, CTRL_VLAN};

/// How many addresses of each kind are kept. A driver that has more gets all frames of the kind.
pub(super) const MOST_ADDRESSES: usize = 64;
const WORDS: usize = 4096 / 64;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Filter {
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) all_unicast: bool,
    pub(super) no_multicast: bool,
    pub(super) no_unicast: bool,
    pub(super) no_broadcast: bool,
    /// `None` where the driver has more than are kept.
    pub(super) unicast: Option<Vec<[u8; 6]>>,
    pub(super) multicast: Option<Vec<[u8; 6]>>,
    /// A bit for each VLAN.
    pub(super) vlans: Vec<u64>,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            // Until the driver says otherwise (§5.1.6.5.1).
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
            vlans: alloc::vec![0; WORDS],
        }
    }
}

impl Filter {
    pub(super) fn is_possible(&self) -> bool {
        let fits = |table: &Option<Vec<_>>| {
            table
                .as_ref()
                .is_none_or(|table| table.len() <= MOST_ADDRESSES)
        };
        self.vlans.len() == WORDS && fits(&self.unicast) && fits(&self.multicast)
    }

    /// Lets VLAN `id` pass, or no longer. Returns whether there is such a VLAN.
    pub(super) fn set_vlan(&mut self, id: u16, pass: bool) -> bool {
        let Some(word) = self.vlans.get_mut(usize::from(id / 64)) else {
            return false;
        };
        match pass {
            true => *word |= 1 << (id % 64),
            false => *word &= !(1 << (id % 64)),
        }
        true
    }

    /// Whether the driver, which has accepted `features`, wants `frame`.
    pub(super) fn passes(&self, frame: &[u8], own: MacAddress, features: u64) -> bool {
        let Some((destination, rest)) = frame.split_first_chunk::<6>() else {
            return false;
        };
        if features & CTRL_VLAN != 0
            && let Some([0x81, 0x00, high, low]) = rest.get(6..10)
        {
            let id = u16::from_be_bytes([*high, *low]) & 0xfff;
            let word = self.vlans.get(usize::from(id / 64)).copied().unwrap_or(0);
            // Priority without a VLAN is in no filter.
            if id != 0 && word & 1 << (id % 64) == 0 {
                return false;
            }
        }
        if features & CTRL_RX == 0 || self.promiscuous {
            return true;
        }
        let listed = |table: &Option<Vec<[u8; 6]>>| {
            table
                .as_ref()
                .is_none_or(|table| table.contains(destination))
        };
        let to = MacAddress(*destination);
        if to == MacAddress::BROADCAST {
            return !self.no_broadcast;
        }
        match to.is_multicast() {
            true => self.all_multicast || !self.no_multicast && listed(&self.multicast),
            false => to == own || self.all_unicast || !self.no_unicast && listed(&self.unicast),
        }
    }
}
