//! A host made of plain data, and what a hostile guest sends: for tests and fuzz targets.

use alloc::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    vec::Vec,
};
use core::net::{Ipv4Addr, SocketAddrV4};

use caisson_packet::{Checksum, Frame, MacAddress, Offloads, Segmentation, SegmentationKind, Sum};

use crate::{Config, Denied, FlowId, Host, HostError, Router, limits, wire};

/// The far end of a connection or a flow.
#[derive(Debug)]
pub struct Peer {
    /// Where it is.
    pub to: SocketAddrV4,
    /// `Some(true)` once it has answered, `Some(false)` if it refused.
    pub answered: Option<bool>,
    /// What the guest sent.
    pub received: Vec<u8>,
    /// How much of it the peer takes in all.
    pub takes: usize,
    /// What it sends to the guest: bytes, or one datagram each.
    pub sends: VecDeque<Vec<u8>>,
    /// Nothing more will come from it.
    pub ended: bool,
    /// The connection broke.
    pub broken: bool,
    /// The guest sends nothing more.
    pub shut: bool,
    /// Datagrams that were sent.
    pub datagrams: Vec<Vec<u8>>,
}

/// A host whose peers a test plays.
#[derive(Debug, Default)]
pub struct PlainHost {
    /// All that were connected to and not closed.
    pub peers: BTreeMap<FlowId, Peer>,
    /// All that were closed, and whether with a failure.
    pub closed: Vec<(FlowId, Peer, bool)>,
    /// What the guest was kept from.
    pub denied: Vec<Denied>,
    /// Whom to ask for names.
    pub resolver: Option<SocketAddrV4>,
    /// The host's own addresses.
    pub own: BTreeSet<Ipv4Addr>,
    /// Datagrams sent from forwards: which, to whom, what.
    pub forwarded: Vec<(u16, SocketAddrV4, Vec<u8>)>,
    /// Nobody answers at once; a test does it.
    pub is_slow: bool,
    /// There are no sockets.
    pub is_exhausted: bool,
}

impl Peer {
    /// A peer at `to` that takes everything.
    pub fn new(to: SocketAddrV4) -> Self {
        Self {
            to,
            answered: Some(true),
            received: Vec::new(),
            takes: usize::MAX,
            sends: VecDeque::new(),
            ended: false,
            broken: false,
            shut: false,
            datagrams: Vec::new(),
        }
    }
}

impl PlainHost {
    fn begin(&mut self, flow: FlowId, to: SocketAddrV4) -> Result<(), HostError> {
        if self.is_exhausted {
            return Err(HostError::Failed);
        }
        let mut peer = Peer::new(to);
        peer.answered = (!self.is_slow).then_some(true);
        let old = self.peers.insert(flow, peer);
        assert!(old.is_none(), "a flow is begun once");
        Ok(())
    }

    fn peer(&mut self, flow: FlowId) -> &mut Peer {
        self.peers.get_mut(&flow).expect("the flow is open")
    }

    /// The only open flow.
    ///
    /// # Panics
    /// When there is none, or several.
    pub fn only(&mut self) -> (FlowId, &mut Peer) {
        assert_eq!(self.peers.len(), 1);
        let (id, peer) = self.peers.iter_mut().next().expect("one");
        (*id, peer)
    }
}

impl Host for PlainHost {
    fn tcp_connect(&mut self, flow: FlowId, to: SocketAddrV4) -> Result<(), HostError> {
        self.begin(flow, to)
    }

    fn tcp_connected(&mut self, flow: FlowId) -> Result<bool, HostError> {
        match self.peer(flow).answered {
            None => Ok(false),
            Some(true) => Ok(true),
            Some(false) => Err(HostError::Refused),
        }
    }

    fn tcp_send(&mut self, flow: FlowId, data: &[u8]) -> Result<usize, HostError> {
        let peer = self.peer(flow);
        assert!(!peer.shut, "nothing follows the end");
        if peer.broken {
            return Err(HostError::Reset);
        }
        let count = data
            .len()
            .min(peer.takes.saturating_sub(peer.received.len()));
        peer.received.extend(data.iter().take(count));
        Ok(count)
    }

    fn tcp_receive(&mut self, flow: FlowId, data: &mut [u8]) -> Result<Option<usize>, HostError> {
        let peer = self.peer(flow);
        if peer.broken {
            return Err(HostError::Reset);
        }
        let Some(mut piece) = peer.sends.pop_front() else {
            return Ok(peer.ended.then_some(0));
        };
        let count = piece.len().min(data.len());
        data[..count].copy_from_slice(&piece[..count]);
        let rest = piece.split_off(count);
        if !rest.is_empty() {
            peer.sends.push_front(rest);
        }
        Ok(Some(count))
    }

    fn tcp_shutdown(&mut self, flow: FlowId) {
        let peer = self.peer(flow);
        assert!(!peer.shut, "there is one end");
        peer.shut = true;
    }

    fn udp_open(&mut self, flow: FlowId, to: SocketAddrV4) -> Result<(), HostError> {
        self.begin(flow, to)
    }

    fn udp_send(&mut self, flow: FlowId, data: &[u8], size: usize) -> Result<(), HostError> {
        let peer = self.peer(flow);
        if core::mem::take(&mut peer.broken) {
            return Err(HostError::Refused);
        }
        match data.is_empty() {
            true => peer.datagrams.push(Vec::new()),
            false => peer.datagrams.extend(data.chunks(size).map(<[u8]>::to_vec)),
        }
        Ok(())
    }

    fn udp_receive(&mut self, flow: FlowId, data: &mut [u8]) -> Result<Option<usize>, HostError> {
        let peer = self.peer(flow);
        if core::mem::take(&mut peer.broken) {
            return Err(HostError::Refused);
        }
        Ok(peer.sends.pop_front().map(|piece| {
            let count = piece.len().min(data.len());
            data[..count].copy_from_slice(&piece[..count]);
            count
        }))
    }

    fn forward_send(&mut self, forward: u16, to: SocketAddrV4, data: &[u8]) {
        self.forwarded.push((forward, to, data.to_vec()));
    }

    fn close(&mut self, flow: FlowId, abort: bool) {
        // A flow of a forward has no socket of its own.
        if let Some(peer) = self.peers.remove(&flow) {
            self.closed.push((flow, peer, abort));
        }
    }

    fn resolver(&mut self) -> Option<SocketAddrV4> {
        self.resolver
    }

    fn is_own(&mut self, address: Ipv4Addr) -> bool {
        self.own.contains(&address)
    }

    fn denied(&mut self, denied: Denied) {
        self.denied.push(denied);
    }
}

/// An Ethernet frame of the guest's with an IPv4 packet between `ends`, whose transport part is `payload` with its
/// checksum at `sum` to be filled in.
pub fn guest_frame(
    config: &Config,
    protocol: u8,
    (from, to): (Ipv4Addr, Ipv4Addr),
    payload: &[u8],
    sum: Option<usize>,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(config.router_mac.0);
    bytes.extend(config.guest_mac.0);
    bytes.extend(wire::TYPE_IPV4.to_be_bytes());
    wire::push_ipv4(&mut bytes, (from, to), protocol, payload.len());
    let at = bytes.len();
    bytes.extend(payload);
    if let Some(sum) = sum {
        let pseudo = match protocol {
            wire::PROTOCOL_ICMP => Sum::default(),
            _ => wire::pseudo_sum(from, to, protocol, payload.len()),
        };
        let field = at + sum..at + sum + 2;
        if let Some(place) = bytes.get_mut(field.clone()) {
            place.fill(0);
        }
        let value = pseudo.bytes(&bytes[at..]).finish();
        if let Some(place) = bytes.get_mut(field) {
            place.copy_from_slice(&value.to_be_bytes());
        }
    }
    bytes
}

struct Input<'a>(core::slice::Iter<'a, u8>);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        self.0.by_ref().take(count).copied().collect()
    }
}

/// Sends a router whatever `input` says: frames, well formed and not, events of the host, time, moves through saved
/// state.
///
/// # Panics
/// When the router does, calls the host as it must not, or holds more than it may.
pub fn exercise_router(input: &[u8]) {
    let mut input = Input(input.iter());
    let mut config = Config::default();
    let switches = input.byte();
    config.host_access = switches & 1 != 0;
    if switches & 2 != 0 {
        config.policy.deny = alloc::vec!["*".parse().expect("a rule")];
        config.policy.allow = alloc::vec!["*.test:80".parse().expect("a rule")];
    }
    let mut host = PlainHost {
        resolver: (switches & 4 != 0).then(|| SocketAddrV4::new(Ipv4Addr::LOCALHOST, 53)),
        is_slow: switches & 8 != 0,
        ..PlainHost::default()
    };
    let mut router = Router::new(config.clone());
    let offloads = switches & 16 != 0;
    router.set_offloads(Offloads {
        checksum: offloads,
        tcp4: offloads,
        ..Offloads::default()
    });
    let mut now = 0u64;
    // What the router said last to each of the guest's ports: its sequence number and what it expects.
    let mut heard: BTreeMap<u16, (u32, u32)> = BTreeMap::new();
    while input.0.len() > 0 {
        let kind = input.byte();
        match kind {
            0..20 => {
                let count = usize::from(input.byte());
                router.receive(&Frame::from(input.bytes(count)), now, &mut host);
            }
            20..120 => {
                let frame = structured(&mut input, &config, &heard);
                router.receive(&frame, now, &mut host);
            }
            120..160 => router.flush(now, &mut host),
            160..200 => play_host(&mut input, &mut router, &mut host, now),
            200..220 => {
                now += u64::from(input.word()) * 10_000_000;
                router.on_timer(now, &mut host);
                assert!(router.next_deadline().is_none_or(|at| at > now));
            }
            220..235 => {
                let room = usize::from(input.byte());
                router.set_room(room, room & 1 != 0, now, &mut host);
            }
            235..240 => {
                let peer = SocketAddrV4::new(Ipv4Addr::LOCALHOST, input.word());
                let port = input.word() | 1;
                if let Some(id) = router.accept(peer, port, now, &mut host) {
                    host.peers.insert(id, Peer::new(peer));
                }
                router.forward_datagram(0, peer, port, &input.bytes(20), now, &mut host);
            }
            240..245 => router.reset(&mut host),
            245..250 => {
                let count = input.byte().into();
                router.restore(&input.bytes(count));
                router.end_restored();
            }
            _ => {
                let saved = router.save();
                let mut other = Router::new(config.clone());
                other.restore(&saved);
                assert_eq!(other.save(), saved);
                other.end_restored();
            }
        }
        while let Some(frame) = router.take_frame() {
            note(&frame, &mut heard);
        }
        let (tcp, udp) = router.flow_counts();
        assert!(tcp <= limits::TCP && udp <= limits::UDP && router.held() <= limits::POOL);
        assert!(host.peers.len() <= tcp + udp, "no socket is forgotten");
        host.closed.clear();
        host.denied.clear();
        host.forwarded.clear();
    }
    router.reset(&mut host);
    assert_eq!(router.held(), 0);
    assert!(host.peers.is_empty());
}

/// Remembers where the router is in a connection.
fn note(frame: &Frame, heard: &mut BTreeMap<u16, (u32, u32)>) {
    assert!(frame.bytes.len() <= caisson_packet::MAX_FRAME);
    if let Checksum::Partial { start, offset } = frame.checksum {
        assert!(usize::from(start) + usize::from(offset) + 2 <= frame.bytes.len());
    }
    if let Some(packet) = frame.bytes.get(14..).and_then(wire::Ipv4::parse)
        && packet.protocol == wire::PROTOCOL_TCP
        && let Some(segment) = wire::Segment::parse(packet.payload)
    {
        let seq = segment.seq.wrapping_add(segment.len());
        heard.insert(segment.destination, (segment.ack, seq));
    }
}

/// A frame that gets past the first checks.
fn structured(input: &mut Input<'_>, config: &Config, heard: &BTreeMap<u16, (u32, u32)>) -> Frame {
    let what = input.byte();
    let to = match what & 7 {
        0..4 => Ipv4Addr::new(192, 0, 2, what & 3),
        4 => config.gateway,
        5 => config.name_server,
        6 => Ipv4Addr::BROADCAST,
        _ => Ipv4Addr::new(10, 0, 2, input.byte()),
    };
    let port = 1000 + u16::from(input.byte() & 3);
    let remote: u16 = match input.byte() {
        0..80 => 80,
        80..120 => 53,
        120..160 => 67,
        other => other.into(),
    };
    let mut payload = Vec::new();
    payload.extend(port.to_be_bytes());
    payload.extend(remote.to_be_bytes());
    let (protocol, sum) = match what >> 4 {
        0..11 => {
            let (seq, ack) = heard.get(&port).copied().unwrap_or((0, 0));
            let shift = |input: &mut Input<'_>| match input.byte() {
                0..180 => 0u32,
                other => u32::from(other).wrapping_sub(200),
            };
            payload.extend(seq.wrapping_add(shift(input)).to_be_bytes());
            payload.extend(ack.wrapping_sub(shift(input)).to_be_bytes());
            let options = input.byte() & 3;
            payload.extend([(5 + options) << 4, input.byte()]);
            payload.extend(input.word().to_be_bytes());
            payload.extend([0; 4]);
            payload.extend(input.bytes(usize::from(options) * 4));
            (wire::PROTOCOL_TCP, 16)
        }
        11..15 => {
            payload.extend([0; 4]);
            (wire::PROTOCOL_UDP, 6)
        }
        _ => {
            payload = alloc::vec![8, 0, 0, 0];
            (wire::PROTOCOL_ICMP, 2)
        }
    };
    let count = input.byte().into();
    payload.extend(input.bytes(count));
    if what & 8 != 0 {
        payload.resize(payload.len() + usize::from(input.word()) / 4, what);
    }
    if protocol == wire::PROTOCOL_UDP {
        let len = payload.len() as u16;
        payload[4..6].copy_from_slice(&len.to_be_bytes());
    }
    let bytes = guest_frame(config, protocol, (config.guest, to), &payload, Some(sum));
    let mut frame = Frame::from(bytes);
    if input.byte() & 15 == 0 {
        frame.checksum = Checksum::Verified;
        frame.segmentation = Some(Segmentation {
            kind: SegmentationKind::Udp,
            payload: u16::from(input.byte()),
            headers: 42,
        });
    }
    frame
}

/// Something happens at the host.
fn play_host(input: &mut Input<'_>, router: &mut Router, host: &mut PlainHost, now: u64) {
    let count = host.peers.len().max(1);
    let Some((id, peer)) = host.peers.iter_mut().nth(usize::from(input.byte()) % count) else {
        return;
    };
    let id = *id;
    match input.byte() {
        0..50 => peer.answered = Some(true),
        50..60 => peer.answered = Some(false),
        60..140 => {
            let data = alloc::vec![1; usize::from(input.word())];
            if !data.is_empty() && !peer.ended {
                peer.sends.push_back(data);
            }
        }
        140..160 => peer.ended = true,
        160..170 => peer.broken = true,
        170..200 => peer.takes = peer.received.len() + usize::from(input.word()),
        200..220 => {
            let count = input.byte().into();
            let data = input.bytes(count);
            peer.sends.push_back(data.into_iter().chain([0]).collect());
        }
        _ => {}
    }
    router.on_ready(id, true, now, host);
}

/// The guest's card in these tests.
pub const GUEST_MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
