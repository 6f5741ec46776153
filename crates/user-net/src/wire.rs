//! Headers of Ethernet, IPv4, TCP and UDP, read and checked.

use core::net::{Ipv4Addr, SocketAddrV4};

use caisson_packet::Sum;

pub(crate) const ETHERNET: usize = 14;
pub(crate) const IPV4: usize = 20;
pub(crate) const TCP: usize = 20;
pub(crate) const UDP: usize = 8;

pub(crate) const TYPE_IPV4: u16 = 0x0800;
pub(crate) const TYPE_ARP: u16 = 0x0806;
pub(crate) const PROTOCOL_ICMP: u8 = 1;
pub(crate) const PROTOCOL_TCP: u8 = 6;
pub(crate) const PROTOCOL_UDP: u8 = 17;

/// Flags of a TCP segment.
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes(field.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at + 4)?;
    Some(u32::from_be_bytes(field.try_into().ok()?))
}

/// An IPv4 packet that is no fragment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ipv4<'a> {
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
    pub(crate) protocol: u8,
    pub(crate) payload: &'a [u8],
}

impl<'a> Ipv4<'a> {
    /// `None` for what is no whole packet: wrong lengths, a wrong sum, a fragment, a source route.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let first = *bytes.first()?;
        let header_len = usize::from(first & 15) * 4;
        let total = usize::from(be16(bytes, 2)?);
        if first >> 4 != 4 || header_len < IPV4 || total < header_len {
            return None;
        }
        let header = bytes.get(..header_len)?;
        let payload = bytes.get(header_len..total)?;
        // More fragments, or one that is not the first.
        if be16(bytes, 6)? & 0x3fff != 0 || Sum::default().bytes(header).finish() != 0 {
            return None;
        }
        if has_source_route(header.get(IPV4..)?) {
            return None;
        }
        Some(Self {
            source: be32(bytes, 12)?.into(),
            destination: be32(bytes, 16)?.into(),
            protocol: *bytes.get(9)?,
            payload,
        })
    }

    /// The sum over the pseudo-header of a transport protocol.
    pub(crate) fn pseudo_sum(&self) -> Sum {
        pseudo_sum(
            self.source,
            self.destination,
            self.protocol,
            self.payload.len(),
        )
    }
}

/// The sum over the pseudo-header of a transport protocol.
pub(crate) fn pseudo_sum(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, len: usize) -> Sum {
    Sum::default()
        .bytes(&from.octets())
        .bytes(&to.octets())
        .word(protocol.into())
        .word(len as u16)
}

/// Loose and strict source routes (RFC 791 §3.1), which nobody honest sends.
fn has_source_route(mut options: &[u8]) -> bool {
    loop {
        match options {
            [] | [0, ..] => return false,
            [1, rest @ ..] => options = rest,
            [131 | 137, ..] => return true,
            [_, len, ..] if usize::from(*len) >= 2 => {
                options = options.get(usize::from(*len)..).unwrap_or_default();
            }
            _ => return false,
        }
    }
}

/// A TCP segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'a> {
    pub(crate) source: u16,
    pub(crate) destination: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    /// The largest segment that the sender takes, in a SYN.
    pub(crate) mss: Option<u16>,
    /// How far its windows are shifted, in a SYN.
    pub(crate) scale: Option<u8>,
    pub(crate) payload: &'a [u8],
}

impl<'a> Segment<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header_len = usize::from(*bytes.get(12)? >> 4) * 4;
        if header_len < TCP {
            return None;
        }
        let flags = *bytes.get(13)?;
        let mut options = bytes.get(TCP..header_len)?;
        let (mut mss, mut scale) = (None, None);
        let is_syn = flags & SYN != 0;
        loop {
            match options {
                _ if !is_syn => break,
                [2, 4, high, low, ..] => mss = Some(u16::from_be_bytes([*high, *low])),
                [3, 3, shift, ..] => scale = Some((*shift).min(14)),
                _ => {}
            }
            options = match options {
                [] | [0, ..] => break,
                [1, rest @ ..] => rest,
                [_, len, ..] if usize::from(*len) >= 2 => {
                    options.get(usize::from(*len)..).unwrap_or_default()
                }
                _ => break,
            };
        }
        Some(Self {
            source: be16(bytes, 0)?,
            destination: be16(bytes, 2)?,
            seq: be32(bytes, 4)?,
            ack: be32(bytes, 8)?,
            flags,
            window: be16(bytes, 14)?,
            mss,
            scale,
            payload: bytes.get(header_len..)?,
        })
    }

    /// How much of the sequence it takes.
    pub(crate) fn len(&self) -> u32 {
        let flags = u32::from(self.flags & SYN != 0) + u32::from(self.flags & FIN != 0);
        self.payload.len() as u32 + flags
    }

    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// A UDP datagram, or several of one flow that are to be cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Datagram<'a> {
    pub(crate) source: u16,
    pub(crate) destination: u16,
    /// 0 where there is none.
    pub(crate) checksum: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> Datagram<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let len = usize::from(be16(bytes, 4)?);
        Some(Self {
            source: be16(bytes, 0)?,
            destination: be16(bytes, 2)?,
            checksum: be16(bytes, 6)?,
            payload: bytes.get(UDP..len)?,
        })
    }
}

/// Puts an IPv4 header without options in front of a payload of `len` bytes.
pub(crate) fn push_ipv4(
    out: &mut alloc::vec::Vec<u8>,
    (from, to): (Ipv4Addr, Ipv4Addr),
    protocol: u8,
    len: usize,
) {
    let start = out.len();
    // No fragments, and a time to live as hosts have it.
    out.extend([0x45, 0]);
    out.extend(((IPV4 + len) as u16).to_be_bytes());
    out.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    out.extend(from.octets());
    out.extend(to.octets());
    let sum = Sum::default()
        .bytes(out.get(start..).unwrap_or_default())
        .finish();
    if let Some(field) = out.get_mut(start + 10..start + 12) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
}

/// The two ends of a packet that goes to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ends {
    pub(crate) from: SocketAddrV4,
    pub(crate) to: SocketAddrV4,
}
