//! The DHCP server, with one lease (RFC 2131, options of RFC 2132).

use alloc::vec::Vec;
use core::net::Ipv4Addr;

use caisson_packet::MacAddress;

use crate::Config;

pub(crate) const SERVER_PORT: u16 = 67;
pub(crate) const CLIENT_PORT: u16 = 68;
const COOKIE: [u8; 4] = [0x63, 0x82, 0x53, 0x63];
const OPTIONS: usize = 240;
/// Seconds for which the address is the guest's; it may ask again.
const LEASE: u32 = 86400;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// What a client says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    header: &'a [u8; OPTIONS],
    kind: u8,
    /// The address that it asks for.
    requested: Option<Ipv4Addr>,
    /// The server that it has chosen.
    server: Option<Ipv4Addr>,
    pub(crate) mac: MacAddress,
}

impl<'a> Message<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, mut options) = bytes.split_first_chunk::<OPTIONS>()?;
        // A request of an Ethernet card.
        if header[..3] != [1, 1, 6] || header[236..] != COOKIE {
            return None;
        }
        let (mut kind, mut requested, mut server) = (None, None, None);
        loop {
            let (code, value) = match options {
                [] | [255, ..] => break,
                [0, rest @ ..] => {
                    options = rest;
                    continue;
                }
                [code, len, rest @ ..] => {
                    let (value, rest) = rest.split_at_checked((*len).into())?;
                    options = rest;
                    (*code, value)
                }
                [_] => return None,
            };
            let address = || <[u8; 4]>::try_from(value).ok().map(Ipv4Addr::from);
            match code {
                50 => requested = address(),
                53 => kind = value.first().copied(),
                54 => server = address(),
                _ => {}
            }
        }
        let mac = header.get(28..34)?.try_into().ok()?;
        let current: [u8; 4] = header.get(12..16)?.try_into().ok()?;
        if current != [0; 4] {
            requested = requested.or(Some(current.into()));
        }
        Some(Self {
            header,
            kind: kind?,
            requested,
            server,
            mac: MacAddress(mac),
        })
    }

    /// The answer, and whether it goes to everybody.
    pub(crate) fn answer(&self, config: &Config) -> Option<(Vec<u8>, bool)> {
        let kind = match self.kind {
            DISCOVER => OFFER,
            REQUEST if self.server.is_some_and(|server| server != config.gateway) => return None,
            REQUEST if self.requested == Some(config.guest) => ACK,
            REQUEST => NAK,
            INFORM => ACK,
            _ => return None,
        };
        let mut out = self.header.to_vec();
        out.get_mut(0..4)?.copy_from_slice(&[2, 1, 6, 0]);
        // Seconds; the flags stay.
        out.get_mut(8..10)?.fill(0);
        if kind == NAK {
            out.get_mut(12..16)?.fill(0);
        }
        let offered = match kind {
            NAK => Ipv4Addr::UNSPECIFIED,
            _ if self.kind == INFORM => Ipv4Addr::UNSPECIFIED,
            _ => config.guest,
        };
        out.get_mut(16..20)?.copy_from_slice(&offered.octets());
        out.get_mut(20..24)?
            .copy_from_slice(&config.gateway.octets());
        // Relay, server name and file.
        out.get_mut(24..28)?.fill(0);
        out.get_mut(44..236)?.fill(0);
        let mut option = |code: u8, value: &[u8]| {
            out.extend([code, value.len() as u8]);
            out.extend(value);
        };
        option(53, &[kind]);
        option(54, &config.gateway.octets());
        if kind != NAK {
            if self.kind != INFORM {
                option(51, &LEASE.to_be_bytes());
            }
            option(1, &config.mask().to_be_bytes());
            option(3, &config.gateway.octets());
            option(6, &config.name_server.octets());
            option(26, &config.mtu.to_be_bytes());
        }
        out.push(255);
        // Old clients want at least so much (RFC 1542 §2.1).
        out.resize(out.len().max(300), 0);
        let broadcast = kind == NAK || self.header[10] & 0x80 != 0;
        Some((out, broadcast))
    }
}
