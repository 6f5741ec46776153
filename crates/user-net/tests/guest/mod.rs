//! A guest with a TCP/IP of somebody else's (smoltcp), wired to a router over a wire that loses, repeats and reorders.
#![allow(dead_code)]

use std::collections::VecDeque;

use caisson_packet::{Checksum, Frame, Offloads};
use caisson_user_net::{
    Config, Router,
    testing::{GUEST_MAC, PlainHost},
};
use smoltcp::{
    iface::{Config as InterfaceConfig, Interface, SocketHandle, SocketSet},
    phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::tcp,
    time::Instant,
    wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address},
};

const MILLISECOND: u64 = 1_000_000;

/// What goes wrong on the wire, each as one frame out of so many; 0 for never.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Trouble {
    pub(crate) loss: u32,
    pub(crate) repeat: u32,
    pub(crate) reorder: u32,
    pub(crate) seed: u64,
}

#[derive(Default)]
pub(crate) struct Wire {
    to_guest: VecDeque<Vec<u8>>,
    to_router: VecDeque<Vec<u8>>,
}

pub(crate) struct Received(Vec<u8>);
pub(crate) struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = vec![0; len];
        let result = f(&mut bytes);
        self.0.push_back(bytes);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        let frame = self.to_guest.pop_front()?;
        Some((Received(frame), Sending(&mut self.to_router)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        (self.to_router.len() < 64).then_some(Sending(&mut self.to_router))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.max_transmission_unit = 1514;
        capabilities.medium = Medium::Ethernet;
        capabilities
    }
}

pub(crate) struct Guest {
    pub(crate) router: Router,
    pub(crate) host: PlainHost,
    pub(crate) sockets: SocketSet<'static>,
    pub(crate) interface: Interface,
    pub(crate) wire: Wire,
    /// Nanoseconds.
    pub(crate) now: u64,
    pub(crate) trouble: Trouble,
    random: u64,
    /// The largest frame that the router sent.
    pub(crate) largest: usize,
}

impl Guest {
    pub(crate) fn new(config: Config, trouble: Trouble) -> Self {
        let mut wire = Wire::default();
        let mut options = InterfaceConfig::new(EthernetAddress(GUEST_MAC.0).into());
        options.random_seed = trouble.seed;
        let mut interface = Interface::new(options, &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let address = IpCidr::new(IpAddress::v4(10, 0, 2, 15), 24);
            addresses.push(address).unwrap();
        });
        let gateway = Ipv4Address::new(10, 0, 2, 2);
        interface
            .routes_mut()
            .add_default_ipv4_route(gateway)
            .unwrap();
        Self {
            router: Router::new(config),
            host: PlainHost::default(),
            sockets: SocketSet::new(vec![]),
            interface,
            wire,
            now: MILLISECOND,
            trouble,
            random: trouble.seed | 1,
            largest: 0,
        }
    }

    pub(crate) fn take_big_frames(&mut self) {
        self.router.set_offloads(Offloads {
            checksum: true,
            tcp4: true,
            ..Offloads::default()
        });
    }

    pub(crate) fn tcp(&mut self, buffer: usize) -> SocketHandle {
        let room = || tcp::SocketBuffer::new(vec![0; buffer]);
        self.sockets.add(tcp::Socket::new(room(), room()))
    }

    pub(crate) fn connect(&mut self, handle: SocketHandle, to: (IpAddress, u16), from: u16) {
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket.connect(self.interface.context(), to, from).unwrap();
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn chance(&mut self, one_of: u32) -> bool {
        // xorshift64.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        one_of > 0 && self.random.is_multiple_of(u64::from(one_of))
    }

    /// What the wire makes of frames.
    fn through(&mut self, frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let mut out: Vec<Vec<u8>> = Vec::new();
        for frame in frames {
            if self.chance(self.trouble.loss) {
                continue;
            }
            if self.chance(self.trouble.repeat) {
                out.push(frame.clone());
            }
            let at = match self.chance(self.trouble.reorder) && !out.is_empty() {
                true => out.len() - 1,
                false => out.len(),
            };
            out.insert(at, frame);
        }
        out
    }

    /// A millisecond passes; frames go both ways.
    pub(crate) fn step(&mut self) {
        self.now += MILLISECOND;
        let instant = Instant::from_millis((self.now / MILLISECOND) as i64);
        self.interface
            .poll(instant, &mut self.wire, &mut self.sockets);
        let sent = self.wire.to_router.drain(..).collect();
        for bytes in self.through(sent) {
            self.router
                .receive(&Frame::from(bytes), self.now, &mut self.host);
        }
        // Whoever has something to say is heard.
        let flows: Vec<_> = self.host.peers.keys().copied().collect();
        for flow in flows {
            self.router.on_ready(flow, true, self.now, &mut self.host);
        }
        self.router.on_timer(self.now, &mut self.host);
        self.router.set_room(64, false, self.now, &mut self.host);
        self.router.flush(self.now, &mut self.host);
        let mut frames = Vec::new();
        while let Some(frame) = self.router.take_frame() {
            self.largest = self.largest.max(frame.bytes.len());
            frames.extend(cut(frame));
        }
        let frames = self.through(frames);
        self.wire.to_guest.extend(frames);
    }

    /// Steps until `done`, at most so long that nothing can be under way any more.
    pub(crate) fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..200_000 {
            if done(self) {
                return;
            }
            self.step();
        }
        panic!("it never comes about: {:?}", self.router.counters());
    }
}

/// What a card makes of a frame that is left to it: segments with checksums (as RFC 9293 and 791 have them).
fn cut(frame: Frame) -> Vec<Vec<u8>> {
    let Checksum::Partial { start, offset } = frame.checksum else {
        return vec![frame.bytes];
    };
    let Some(cut) = frame.segmentation else {
        let mut bytes = frame.bytes;
        assert!(caisson_packet::complete(&mut bytes, start, offset));
        return vec![bytes];
    };
    let headers = usize::from(cut.headers);
    let (header, payload) = frame.bytes.split_at(headers);
    let pieces = payload.chunks(cut.payload.into());
    let last = pieces.len() - 1;
    let mut sent = 0u32;
    let mut out = Vec::new();
    for (index, piece) in pieces.enumerate() {
        let mut bytes = [header, piece].concat();
        let ip_len = (bytes.len() - 14) as u16;
        bytes[16..18].copy_from_slice(&ip_len.to_be_bytes());
        bytes[24..26].fill(0);
        let sum = caisson_packet::Sum::default()
            .bytes(&bytes[14..34])
            .finish();
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        let seq = u32::from_be_bytes(bytes[38..42].try_into().unwrap()).wrapping_add(sent);
        bytes[38..42].copy_from_slice(&seq.to_be_bytes());
        if index != last {
            // FIN and PSH belong to the last.
            bytes[47] &= !9;
        }
        let pseudo = caisson_packet::Sum::default()
            .bytes(&bytes[26..34])
            .word(6)
            .word((bytes.len() - 34) as u16);
        bytes[50..52].copy_from_slice(&pseudo.fold().to_be_bytes());
        assert!(caisson_packet::complete(&mut bytes, start, offset));
        sent += piece.len() as u32;
        out.push(bytes);
    }
    out
}

/// Bytes that do not repeat soon.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x1234_5678u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}
