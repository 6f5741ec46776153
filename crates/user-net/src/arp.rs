//! Questions for addresses of cards (RFC 826), of Ethernet and IPv4.

use alloc::vec::Vec;
use core::net::Ipv4Addr;

use caisson_packet::MacAddress;

/// Hardware type, protocol type, lengths, and the operation "request".
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];

/// Somebody asks who has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) mac: MacAddress,
    pub(crate) asker: Ipv4Addr,
    pub(crate) wanted: Ipv4Addr,
}

impl Request {
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(&REQUEST)?;
        let (mac, rest) = rest.split_first_chunk()?;
        let (asker, rest) = rest.split_first_chunk::<4>()?;
        let wanted: &[u8; 4] = rest.get(6..10)?.try_into().ok()?;
        Some(Self {
            mac: MacAddress(*mac),
            asker: (*asker).into(),
            wanted: (*wanted).into(),
        })
    }

    /// The answer that `mac` has it, behind the Ethernet header.
    pub(crate) fn push_answer(&self, out: &mut Vec<u8>, mac: MacAddress) {
        let (kind, _) = REQUEST.split_at(7);
        out.extend(kind);
        out.push(2);
        out.extend(mac.0);
        out.extend(self.wanted.octets());
        out.extend(self.mac.0);
        out.extend(self.asker.octets());
    }
}
