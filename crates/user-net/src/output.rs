//! Frames for the guest.

use alloc::{collections::VecDeque, vec::Vec};
use core::net::Ipv4Addr;

use caisson_packet::{
    Checksum, Frame, MacAddress, Offloads, Segmentation, SegmentationKind, complete,
};

use crate::{
    limits,
    wire::{self, ACK, ETHERNET, Ends, IPV4, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, PSH, SYN},
};

/// Where the sums of TCP and UDP lie in their headers.
const TCP_SUM: u16 = 16;
const UDP_SUM: u16 = 6;
const TRANSPORT: u16 = (ETHERNET + IPV4) as u16;

/// A TCP segment for the guest.
#[derive(Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub(crate) ends: Ends,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    /// In a SYN: the largest segment that we take, and how far our windows are shifted.
    pub(crate) options: Option<(u16, Option<u8>)>,
    pub(crate) payload: [&'a [u8]; 2],
    /// The largest segment that the guest takes.
    pub(crate) mss: u16,
}

/// Where frames for the guest wait.
pub(crate) struct Output {
    pub(crate) frames: VecDeque<Frame>,
    /// How many there is room for.
    pub(crate) room: usize,
    pub(crate) offloads: Offloads,
    pub(crate) router_mac: MacAddress,
    pub(crate) guest_mac: MacAddress,
    pub(crate) mtu: u16,
    /// Frames that were lost because too many waited.
    pub(crate) lost: u64,
}

impl Output {
    /// Whether bulk data may be added.
    pub(crate) fn has_room(&self) -> bool {
        self.frames.len() < self.room
    }

    /// The largest payload of a TCP segment for a guest that takes `mss`.
    pub(crate) fn largest(&self, mss: u16) -> usize {
        match self.offloads.tcp4 {
            true => usize::from(u16::MAX) - IPV4 - wire::TCP,
            false => mss.into(),
        }
    }

    pub(crate) fn push(&mut self, frame: Frame) {
        if self.frames.len() >= self.room.saturating_add(limits::FRAMES) {
            self.lost = self.lost.saturating_add(1);
            return;
        }
        self.frames.push_back(frame);
    }

    pub(crate) fn ethernet(&self, to: MacAddress, kind: u16, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ETHERNET + len);
        bytes.extend(to.0);
        bytes.extend(self.router_mac.0);
        bytes.extend(kind.to_be_bytes());
        bytes
    }

    fn ipv4(
        &self,
        to: MacAddress,
        ends: (Ipv4Addr, Ipv4Addr),
        protocol: u8,
        len: usize,
    ) -> Vec<u8> {
        let mut bytes = self.ethernet(to, wire::TYPE_IPV4, IPV4 + len);
        wire::push_ipv4(&mut bytes, ends, protocol, len);
        bytes
    }

    /// Leaves the sum open for a guest that takes it so, and completes it for others.
    fn summed(&self, mut bytes: Vec<u8>, offset: u16) -> Frame {
        let checksum = match self.offloads.checksum {
            true => Checksum::Partial {
                start: TRANSPORT,
                offset,
            },
            false => {
                complete(&mut bytes, TRANSPORT, offset);
                Checksum::Present
            }
        };
        Frame {
            bytes,
            checksum,
            segmentation: None,
        }
    }

    pub(crate) fn tcp(&mut self, segment: &Outgoing<'_>) {
        let [first, second] = segment.payload;
        let payload = first.len() + second.len();
        let mut options = [0; 8];
        let options = match segment.options {
            None => &options[..0],
            Some((mss, scale)) => {
                let [high, low] = mss.to_be_bytes();
                options[..4].copy_from_slice(&[2, 4, high, low]);
                match scale {
                    Some(scale) => {
                        options[4..].copy_from_slice(&[1, 3, 3, scale]);
                        &options[..]
                    }
                    None => &options[..4],
                }
            }
        };
        let len = wire::TCP + options.len() + payload;
        let Ends { from, to } = segment.ends;
        let mut bytes = self.ipv4(self.guest_mac, (*from.ip(), *to.ip()), PROTOCOL_TCP, len);
        bytes.extend(from.port().to_be_bytes());
        bytes.extend(to.port().to_be_bytes());
        bytes.extend(segment.seq.to_be_bytes());
        bytes.extend(segment.ack.to_be_bytes());
        let push = if payload > 0 { PSH } else { 0 };
        let offset = ((wire::TCP + options.len()) / 4) as u8;
        bytes.extend([offset << 4, segment.flags | push]);
        bytes.extend(segment.window.to_be_bytes());
        let sum = wire::pseudo_sum(*from.ip(), *to.ip(), PROTOCOL_TCP, len).fold();
        bytes.extend(sum.to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend(options);
        bytes.extend(first);
        bytes.extend(second);
        let headers = bytes.len() - payload;
        let mut frame = self.summed(bytes, TCP_SUM);
        if payload > usize::from(segment.mss) {
            frame.segmentation = Some(Segmentation {
                kind: SegmentationKind::Tcp4,
                payload: segment.mss,
                headers: headers as u16,
            });
        }
        self.push(frame);
    }

    /// Ends a connection that there is no more of, or never was.
    pub(crate) fn reset(&mut self, ends: Ends, seq: u32, ack: Option<u32>) {
        let flags = wire::RST | if ack.is_some() { ACK } else { 0 };
        self.tcp(&Outgoing {
            ends,
            seq,
            ack: ack.unwrap_or(0),
            flags,
            window: 0,
            options: None,
            payload: [&[], &[]],
            mss: u16::MAX,
        });
    }

    /// Answers a segment of no connection (RFC 9293 §3.10.7.1).
    pub(crate) fn refuse(&mut self, ends: Ends, segment: &wire::Segment<'_>) {
        match (segment.has(wire::RST), segment.has(ACK)) {
            (true, _) => {}
            (_, true) => {
                let ack = segment
                    .has(SYN)
                    .then(|| segment.seq.wrapping_add(segment.len()));
                self.reset(ends, segment.ack, ack);
            }
            (_, false) => self.reset(ends, 0, Some(segment.seq.wrapping_add(segment.len()))),
        }
    }

    pub(crate) fn udp(&mut self, ends: Ends, payload: &[u8]) {
        self.udp_to(self.guest_mac, ends, payload);
    }

    pub(crate) fn udp_to(&mut self, mac: MacAddress, Ends { from, to }: Ends, payload: &[u8]) {
        let len = wire::UDP + payload.len();
        let mut bytes = self.ipv4(mac, (*from.ip(), *to.ip()), PROTOCOL_UDP, len);
        bytes.extend(from.port().to_be_bytes());
        bytes.extend(to.port().to_be_bytes());
        bytes.extend((len as u16).to_be_bytes());
        let sum = wire::pseudo_sum(*from.ip(), *to.ip(), PROTOCOL_UDP, len).fold();
        bytes.extend(sum.to_be_bytes());
        bytes.extend(payload);
        if IPV4 + len <= usize::from(self.mtu) {
            let frame = self.summed(bytes, UDP_SUM);
            self.push(frame);
            return;
        }
        // A datagram longer than a frame: in fragments, each complete in itself.
        complete(&mut bytes, TRANSPORT, UDP_SUM);
        self.fragments(&bytes);
    }

    /// Sends an IPv4 packet in a frame in pieces that fit (RFC 791 §3.2).
    fn fragments(&mut self, frame: &[u8]) {
        let Some((header, payload)) = frame.split_at_checked(ETHERNET + IPV4) else {
            return;
        };
        let piece = (usize::from(self.mtu) - IPV4) / 8 * 8;
        let id = (self.frames.len() as u16).wrapping_add(payload.len() as u16);
        for (index, part) in payload.chunks(piece.max(8)).enumerate() {
            let mut bytes = header.to_vec();
            let offset = (index * piece / 8) as u16;
            let more = if (index + 1) * piece < payload.len() {
                0x2000
            } else {
                0
            };
            let Some(ip) = bytes.get_mut(ETHERNET..) else {
                return;
            };
            ip[2..4].copy_from_slice(&((IPV4 + part.len()) as u16).to_be_bytes());
            ip[4..6].copy_from_slice(&id.to_be_bytes());
            ip[6..8].copy_from_slice(&(offset | more).to_be_bytes());
            ip[10..12].fill(0);
            let sum = caisson_packet::Sum::default().bytes(ip).finish();
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            bytes.extend(part);
            self.push(Frame::from(bytes));
        }
    }

    /// An ICMP message. `body` starts with its type and has no sum yet.
    pub(crate) fn icmp(&mut self, from: Ipv4Addr, to: Ipv4Addr, body: &[u8]) {
        let mut bytes = self.ipv4(self.guest_mac, (from, to), PROTOCOL_ICMP, body.len());
        bytes.extend(body);
        let sum = caisson_packet::Sum::default().bytes(body).finish();
        let at = ETHERNET + IPV4 + 2;
        if let Some(field) = bytes.get_mut(at..at + 2) {
            field.copy_from_slice(&sum.to_be_bytes());
        }
        self.push(Frame::from(bytes));
    }

    /// Says that what the guest sent in a datagram between `ends` (as it sent it) cannot be delivered: destination
    /// unreachable with `code` (RFC 792).
    pub(crate) fn unreachable(&mut self, from: Ipv4Addr, Ends { from: guest, to }: Ends, code: u8) {
        let mut body = alloc::vec![3, code, 0, 0, 0, 0, 0, 0];
        wire::push_ipv4(&mut body, (*guest.ip(), *to.ip()), PROTOCOL_UDP, wire::UDP);
        body.extend(guest.port().to_be_bytes());
        body.extend(to.port().to_be_bytes());
        body.extend([0, 8, 0, 0]);
        self.icmp(from, *guest.ip(), &body);
    }
}
