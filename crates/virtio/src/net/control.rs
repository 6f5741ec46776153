//! Commands of the control queue (§5.1.6.5).

use caisson_packet::MacAddress;

use super::{
    CONTROL, Net,
    config::{
        CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, CTRL_RX_EXTRA, CTRL_VLAN, CTRL_VQ,
        ECN_FREE_OFFLOADS,
    },
    filter::MOST_ADDRESSES,
};
use crate::{Fault, Queues};

const OK: u8 = 0;
const ERROR: u8 = 1;
/// The longest command: two tables of addresses, each with as many as a page holds.
const LONGEST: u64 = 2 + 2 * (4 + 4096);
/// Commands per call.
const BUDGET: usize = 16;

impl Net {
    /// Carries out commands.
    pub(super) fn control(&mut self, queues: &mut Queues<'_>) -> Result<(), Fault> {
        if self.state.features & CTRL_VQ == 0 {
            return Ok(());
        }
        let memory = |error| Fault::Memory {
            queue: CONTROL,
            error,
        };
        for _ in 0..BUDGET {
            if !queues.pop(CONTROL, &mut self.chain)? {
                return Ok(());
            }
            if self.chain.writable_len() == 0 {
                return Err(Fault::Request {
                    queue: CONTROL,
                    what: "a command with no room for its answer",
                });
            }
            let len = self.chain.readable_len().min(LONGEST);
            let mut command = alloc::vec![0; len as usize];
            self.chain
                .read(queues.memory(), 0, &mut command)
                .map_err(memory)?;
            let answer = match self.obey(&command) {
                Some(()) => OK,
                None => ERROR,
            };
            self.chain
                .write(queues.memory(), 0, &[answer])
                .map_err(memory)?;
            queues.complete(CONTROL, &self.chain, 1)?;
        }
        Ok(())
    }

    /// Carries out one command; `None` if it is none.
    fn obey(&mut self, command: &[u8]) -> Option<()> {
        let features = self.state.features;
        let needs = |feature: u64| (features & feature != 0).then_some(());
        let filter = &mut self.state.filter;
        match command {
            [0, what, switch] => {
                needs(CTRL_RX)?;
                if *what >= 2 {
                    needs(CTRL_RX_EXTRA)?;
                }
                let mode = match what {
                    0 => &mut filter.promiscuous,
                    1 => &mut filter.all_multicast,
                    2 => &mut filter.all_unicast,
                    3 => &mut filter.no_multicast,
                    4 => &mut filter.no_unicast,
                    5 => &mut filter.no_broadcast,
                    _ => return None,
                };
                *mode = *switch != 0;
            }
            [1, 0, tables @ ..] => {
                needs(CTRL_RX)?;
                let (unicast, rest) = addresses(tables)?;
                let (multicast, []) = addresses(rest)? else {
                    return None;
                };
                let kept =
                    |table: &[[u8; 6]]| (table.len() <= MOST_ADDRESSES).then(|| table.to_vec());
                filter.unicast = kept(unicast);
                filter.multicast = kept(multicast);
            }
            [1, 1, address @ ..] => {
                needs(CTRL_MAC_ADDR)?;
                let address = MacAddress(address.try_into().ok()?);
                if address.is_multicast() {
                    return None;
                }
                self.state.mac = address;
            }
            [2, what @ (0 | 1), low, high] => {
                needs(CTRL_VLAN)?;
                if !filter.set_vlan(u16::from_le_bytes([*low, *high]), *what == 0) {
                    return None;
                }
            }
            [3, 0] => self.state.announce = false,
            [5, 0, wanted @ ..] => {
                needs(CTRL_GUEST_OFFLOADS)?;
                let wanted = u64::from_le_bytes(wanted.try_into().ok()?);
                if wanted & !(features & ECN_FREE_OFFLOADS) != 0 {
                    return None;
                }
                self.state.guest_offloads = wanted;
                self.tell_offloads();
            }
            _ => return None,
        }
        Some(())
    }
}

/// A table of addresses, and what follows it.
fn addresses(bytes: &[u8]) -> Option<(&[[u8; 6]], &[u8])> {
    let (count, rest) = bytes.split_first_chunk()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (table, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let (table, _) = table.as_chunks();
    Some((table, rest))
}
