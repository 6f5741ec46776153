//! What happens to each frame, and to each event of the host.

use alloc::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    string::String,
    vec::Vec,
};
use core::net::{Ipv4Addr, SocketAddrV4};

use caisson_packet::{Checksum, Frame, MacAddress, Offloads, SegmentationKind};

use crate::{
    Config, Denied, FlowId, GATEWAY_NAME, Host, HostError, Protocol,
    arp::Request,
    dhcp, dns,
    flows::{Flow, FlowKey, Flows},
    limits,
    output::Output,
    policy::Action,
    state::{SavedFlow, SavedRouter},
    tcp::{Cx, Next, Tcp},
    udp::{Udp, Way},
    wire::{self, ACK, Datagram, Ends, Ipv4, RST, SYN, Segment},
};

const SECOND: u64 = 1_000_000_000;
const DNS_PORT: u16 = 53;
/// How much longer than it holds an address is remembered under a name, at least.
const NAME_GRACE: u64 = 60 * SECOND;
/// Unreachable: no such port, and administratively prohibited (RFC 792, RFC 1812 §5.2.7.1).
const NO_PORT: u8 = 3;
const NO_HOST: u8 = 1;
const PROHIBITED: u8 = 13;
/// The most events of one flow's socket that are worked off at once.
const DATAGRAMS: usize = 64;

/// What passed, and what did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames of the guest's that were no packet for a router: malformed, fragments, of unknown protocols.
    pub ignored: u64,
    /// Packets with a wrong checksum.
    pub damaged: u64,
    /// Connections, flows and names that were denied.
    pub denied: u64,
    /// Connections that there was no room for.
    pub refused: u64,
    /// Connections and flows that were begun.
    pub flows: u64,
    /// Frames for the guest that were lost because too many waited.
    pub lost: u64,
}

/// The router. See the [crate].
///
/// Each call carries the time, in nanoseconds from any beginning, and the host. After a batch of frames comes
/// [`Router::flush`]; after anything, what is to be sent to the guest comes out of [`Router::take_frame`].
pub struct Router {
    config: Config,
    flows: Flows,
    half_open: usize,
    out: Output,
    pool: usize,
    scratch: Vec<u8>,
    /// Flows that owe the guest an acknowledgement.
    due: BTreeSet<FlowId>,
    /// Flows that had no room for frames.
    stalled: VecDeque<FlowId>,
    /// Names under which the guest knows an address, and until when.
    names: BTreeMap<Ipv4Addr, Vec<(String, u64)>>,
    guest_is_slow: bool,
    /// Connections of another router's that are to be ended.
    ending: Vec<SavedFlow>,
    counters: Counters,
}

impl Router {
    /// A router without any flow.
    pub fn new(config: Config) -> Self {
        let out = Output {
            frames: VecDeque::new(),
            room: usize::MAX / 2,
            offloads: Offloads::default(),
            router_mac: config.router_mac,
            guest_mac: config.guest_mac,
            mtu: config.mtu.clamp(1280, 65521),
            lost: 0,
        };
        Self {
            config,
            flows: Flows::default(),
            half_open: 0,
            out,
            pool: limits::POOL,
            scratch: Vec::new(),
            due: BTreeSet::new(),
            stalled: VecDeque::new(),
            names: BTreeMap::new(),
            guest_is_slow: false,
            ending: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// The network.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What passed so far.
    pub fn counters(&self) -> Counters {
        Counters {
            lost: self.out.lost,
            ..self.counters
        }
    }

    /// How many TCP connections and UDP flows there are.
    pub fn flow_counts(&self) -> (usize, usize) {
        (self.flows.tcp, self.flows.udp)
    }

    /// Bytes that wait in connections.
    pub fn held(&self) -> usize {
        limits::POOL - self.pool
    }

    /// Says what the guest accepts.
    pub fn set_offloads(&mut self, offloads: Offloads) {
        self.out.offloads = offloads;
    }

    /// The next frame for the guest.
    pub fn take_frame(&mut self) -> Option<Frame> {
        self.out.frames.pop_front()
    }

    /// Whether flows wait for room for frames.
    pub fn is_stalled(&self) -> bool {
        !self.stalled.is_empty()
    }

    /// When [`Router::on_timer`] is to be called.
    pub fn next_deadline(&self) -> Option<u64> {
        self.flows.next_deadline()
    }

    /// Says how many frames there is room for, and whether frames from before still wait for the guest: then nothing is
    /// sent again. Flows that waited for room go on.
    pub fn set_room(&mut self, room: usize, guest_is_slow: bool, now: u64, host: &mut dyn Host) {
        self.out.room = room;
        self.guest_is_slow = guest_is_slow;
        for _ in 0..self.stalled.len() {
            if !self.out.has_room() {
                break;
            }
            if let Some(id) = self.stalled.pop_front() {
                self.with_tcp(id, now, host, |tcp, cx| tcp.progress(cx));
            }
        }
    }

    /// A frame of the guest's.
    pub fn receive(&mut self, frame: &Frame, now: u64, host: &mut dyn Host) {
        if self.route_frame(frame, now, host).is_none() {
            self.counters.ignored = self.counters.ignored.saturating_add(1);
        }
    }

    fn route_frame(&mut self, frame: &Frame, now: u64, host: &mut dyn Host) -> Option<()> {
        let (header, packet) = frame.bytes.split_at_checked(wire::ETHERNET)?;
        let source = MacAddress(header.get(6..12)?.try_into().ok()?);
        let destination = MacAddress(header.get(..6)?.try_into().ok()?);
        if destination != self.config.router_mac && !destination.is_multicast()
            || source.is_multicast()
        {
            return None;
        }
        match u16::from_be_bytes(header.get(12..14)?.try_into().ok()?) {
            wire::TYPE_ARP => self.on_arp(packet),
            wire::TYPE_IPV4 => {
                let packet = Ipv4::parse(packet)?;
                self.on_ipv4(frame, source, &packet, now, host)
            }
            _ => None,
        }
    }

    fn on_arp(&mut self, packet: &[u8]) -> Option<()> {
        let request = Request::parse(packet)?;
        if request.wanted != self.config.gateway && request.wanted != self.config.name_server {
            return None;
        }
        if self.config.is_guests(request.asker) {
            self.out.guest_mac = request.mac;
        }
        let mut bytes = self.out.ethernet(request.mac, wire::TYPE_ARP, 28);
        request.push_answer(&mut bytes, self.config.router_mac);
        self.out.push(Frame::from(bytes));
        Some(())
    }

    fn on_ipv4(
        &mut self,
        frame: &Frame,
        mac: MacAddress,
        packet: &Ipv4<'_>,
        now: u64,
        host: &mut dyn Host,
    ) -> Option<()> {
        let is_dhcp = packet.protocol == wire::PROTOCOL_UDP
            && (packet.destination == Ipv4Addr::BROADCAST
                || packet.destination == self.config.gateway);
        if is_dhcp
            && let Some(datagram) = Datagram::parse(packet.payload)
            && datagram.destination == dhcp::SERVER_PORT
        {
            return self.on_dhcp(mac, datagram.payload);
        }
        if !self.config.is_guests(packet.source) {
            return None;
        }
        self.out.guest_mac = mac;
        let sum = || packet.pseudo_sum().bytes(packet.payload).finish();
        match packet.protocol {
            wire::PROTOCOL_TCP => {
                if frame.checksum == Checksum::Present && sum() != 0 {
                    return self.damaged();
                }
                let segment = Segment::parse(packet.payload)?;
                self.on_tcp(packet, &segment, now, host);
                Some(())
            }
            wire::PROTOCOL_UDP => {
                let datagram = Datagram::parse(packet.payload)?;
                if frame.checksum == Checksum::Present && datagram.checksum != 0 && sum() != 0 {
                    return self.damaged();
                }
                let size = match frame.segmentation {
                    Some(cut) if cut.kind == SegmentationKind::Udp => usize::from(cut.payload),
                    _ => datagram.payload.len(),
                };
                self.on_udp(packet, &datagram, size.max(1), now, host);
                Some(())
            }
            wire::PROTOCOL_ICMP => self.on_icmp(packet),
            _ => None,
        }
    }

    fn damaged(&mut self) -> Option<()> {
        self.counters.damaged = self.counters.damaged.saturating_add(1);
        Some(())
    }

    fn on_dhcp(&mut self, mac: MacAddress, payload: &[u8]) -> Option<()> {
        let message = dhcp::Message::parse(payload)?;
        let (answer, broadcast) = message.answer(&self.config)?;
        self.out.guest_mac = mac;
        let (to, mac) = match broadcast {
            true => (Ipv4Addr::BROADCAST, MacAddress::BROADCAST),
            false => (self.config.guest, message.mac),
        };
        let ends = Ends {
            from: SocketAddrV4::new(self.config.gateway, dhcp::SERVER_PORT),
            to: SocketAddrV4::new(to, dhcp::CLIENT_PORT),
        };
        self.out.udp_to(mac, ends, &answer);
        Some(())
    }

    /// Echo by the router and the name server (RFC 792).
    fn on_icmp(&mut self, packet: &Ipv4<'_>) -> Option<()> {
        let here = packet.destination == self.config.gateway
            || packet.destination == self.config.name_server;
        let [8, 0, _, _, rest @ ..] = packet.payload else {
            return None;
        };
        if !here
            || caisson_packet::Sum::default()
                .bytes(packet.payload)
                .finish()
                != 0
        {
            return None;
        }
        let mut body = alloc::vec![0; 4];
        body.extend(rest);
        self.out.icmp(packet.destination, packet.source, &body);
        Some(())
    }

    /// Where on the host what the guest sends to `remote` goes.
    fn route(
        &mut self,
        protocol: Protocol,
        remote: SocketAddrV4,
        now: u64,
        host: &mut dyn Host,
    ) -> Option<SocketAddrV4> {
        let (address, port) = (*remote.ip(), remote.port());
        if address == self.config.name_server {
            // Over TCP nobody looks at the names.
            let unseen = protocol == Protocol::Tcp && !self.config.policy.is_open();
            return match port == DNS_PORT && !unseen {
                true => host.resolver(),
                false => None,
            };
        }
        let names: Vec<&str> = self
            .names
            .get(&address)
            .into_iter()
            .flatten()
            .filter(|(_, until)| *until > now)
            .map(|(name, _)| name.as_str())
            .collect();
        let gateway = [GATEWAY_NAME];
        let names = match address == self.config.gateway {
            true => &gateway[..],
            false => &names[..],
        };
        if self.config.policy.decide(address, port, names) == Action::Deny {
            return None;
        }
        if address == self.config.gateway {
            let loopback = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
            return self.config.host_access.then_some(loopback);
        }
        let [first, ..] = address.octets();
        let special = first == 0
            || first >= 224
            || address.is_loopback()
            || address.is_link_local()
            || self.config.is_inside(address)
            || port == 0;
        if special || !self.config.host_access && host.is_own(address) {
            return None;
        }
        Some(remote)
    }

    fn deny(&mut self, protocol: Protocol, remote: SocketAddrV4, host: &mut dyn Host) {
        self.counters.denied = self.counters.denied.saturating_add(1);
        host.denied(Denied::Address(protocol, remote));
    }

    fn on_tcp(&mut self, packet: &Ipv4<'_>, segment: &Segment<'_>, now: u64, host: &mut dyn Host) {
        let guest = SocketAddrV4::new(packet.source, segment.source);
        let remote = SocketAddrV4::new(packet.destination, segment.destination);
        let key = FlowKey {
            protocol: Protocol::Tcp,
            guest,
            remote,
        };
        let ends = Ends {
            from: remote,
            to: guest,
        };
        let is_new = segment.flags & (SYN | ACK | RST) == SYN;
        if let Some(id) = self.flows.find(&key) {
            let mut closed = false;
            self.with_tcp(id, now, host, |tcp, cx| {
                closed = is_new && tcp.is_closed();
                match closed {
                    true => Next::Forget,
                    false => tcp.on_segment(cx, segment),
                }
            });
            if !closed {
                return;
            }
        }
        if !is_new {
            self.out.refuse(ends, segment);
            return;
        }
        let Some(to) = self.route(Protocol::Tcp, remote, now, host) else {
            self.deny(Protocol::Tcp, remote, host);
            self.out.refuse(ends, segment);
            return;
        };
        if self.flows.tcp >= limits::TCP || self.half_open >= limits::HALF_OPEN {
            self.counters.refused = self.counters.refused.saturating_add(1);
            self.out.refuse(ends, segment);
            return;
        }
        let id = self.flows.insert(key);
        if host.tcp_connect(id, to).is_err() {
            self.flows.remove(id);
            self.out.refuse(ends, segment);
            return;
        }
        self.begin_tcp(id, now, host, |cx| Tcp::from_guest(ends, segment, cx));
    }

    fn begin_tcp(
        &mut self,
        id: FlowId,
        now: u64,
        host: &mut dyn Host,
        make: impl FnOnce(&mut Cx<'_>) -> Tcp,
    ) {
        self.counters.flows = self.counters.flows.saturating_add(1);
        self.half_open += 1;
        let tcp = make(&mut Cx {
            id,
            now,
            host,
            out: &mut self.out,
            pool: &mut self.pool,
            scratch: &mut self.scratch,
        });
        let deadline = tcp.deadline();
        self.flows.put(id, Flow::Tcp(tcp), deadline);
    }

    /// The host has a connection from `peer` for the guest's `port`. The guest is asked; the flow's events are told from
    /// now on. `None` if there is no room.
    pub fn accept(
        &mut self,
        peer: SocketAddrV4,
        port: u16,
        now: u64,
        host: &mut dyn Host,
    ) -> Option<FlowId> {
        if self.flows.tcp >= limits::TCP || self.half_open >= limits::HALF_OPEN {
            self.counters.refused = self.counters.refused.saturating_add(1);
            return None;
        }
        let key = self.inward_key(Protocol::Tcp, peer, port)?;
        let ends = Ends {
            from: key.remote,
            to: key.guest,
        };
        let id = self.flows.insert(key);
        self.begin_tcp(id, now, host, |cx| Tcp::from_host(ends, cx));
        Some(id)
    }

    /// A free pair of addresses for what comes from `peer`: the peer's own where the guest can answer it, else the
    /// router's.
    fn inward_key(&self, protocol: Protocol, peer: SocketAddrV4, port: u16) -> Option<FlowKey> {
        let own = !peer.ip().is_loopback() && !self.config.is_inside(*peer.ip());
        let address = if own { *peer.ip() } else { self.config.gateway };
        let mut key = FlowKey {
            protocol,
            guest: SocketAddrV4::new(self.config.guest, port),
            remote: SocketAddrV4::new(address, peer.port().max(1)),
        };
        for _ in 0..256 {
            if self.flows.find(&key).is_none() {
                return Some(key);
            }
            key.remote
                .set_port(key.remote.port().checked_add(1).unwrap_or(1024));
        }
        None
    }

    /// Works on a TCP flow with `work`.
    fn with_tcp(
        &mut self,
        id: FlowId,
        now: u64,
        host: &mut dyn Host,
        work: impl FnOnce(&mut Tcp, &mut Cx<'_>) -> Next,
    ) {
        let Some(flow) = self.flows.take(id) else {
            return;
        };
        let Flow::Tcp(mut tcp) = flow else {
            if let Flow::Udp(udp) = &flow {
                let deadline = udp.deadline();
                self.flows.put(id, flow, deadline);
            }
            return;
        };
        let mut cx = Cx {
            id,
            now,
            host,
            out: &mut self.out,
            pool: &mut self.pool,
            scratch: &mut self.scratch,
        };
        let was_half_open = tcp.is_half_open();
        let next = work(&mut tcp, &mut cx);
        if was_half_open && (next == Next::Forget || !tcp.is_half_open()) {
            self.half_open = self.half_open.saturating_sub(1);
        }
        match next {
            Next::Forget => {
                tcp.release(&mut self.pool);
                self.flows.remove(id);
            }
            Next::Keep => {
                if tcp.is_ack_due() {
                    self.due.insert(id);
                }
                if tcp.stalled && !self.stalled.contains(&id) {
                    self.stalled.push_back(id);
                }
                let deadline = tcp.deadline();
                self.flows.put(id, Flow::Tcp(tcp), deadline);
            }
        }
    }

    /// A batch of frames or events is complete: acknowledgements go out.
    pub fn flush(&mut self, now: u64, host: &mut dyn Host) {
        while let Some(id) = self.due.pop_first() {
            self.with_tcp(id, now, host, |tcp, cx| {
                tcp.flush(cx);
                Next::Keep
            });
        }
    }

    fn on_udp(
        &mut self,
        packet: &Ipv4<'_>,
        datagram: &Datagram<'_>,
        size: usize,
        now: u64,
        host: &mut dyn Host,
    ) {
        let ends = Ends {
            from: SocketAddrV4::new(packet.destination, datagram.destination),
            to: SocketAddrV4::new(packet.source, datagram.source),
        };
        let mut question = None;
        if ends.from == SocketAddrV4::new(self.config.name_server, DNS_PORT) {
            match self.on_query(ends, datagram.payload, host) {
                Some(asked) => question = Some((asked.id, asked.name)),
                None => return,
            }
        }
        let key = FlowKey {
            protocol: Protocol::Udp,
            guest: ends.to,
            remote: ends.from,
        };
        let id = match self.flows.find(&key) {
            Some(id) => id,
            None => match self.begin_udp(key, now, host) {
                Some(id) => id,
                None => return,
            },
        };
        let Some(Flow::Udp(mut udp)) = self.flows.take(id) else {
            return;
        };
        udp.active = now;
        if question.is_some() {
            udp.question = question;
        }
        let sent = match udp.way {
            Way::Socket => host.udp_send(id, datagram.payload, size),
            Way::Forward(forward, peer) => {
                for piece in datagram.payload.chunks(size) {
                    host.forward_send(forward, peer, piece);
                }
                Ok(())
            }
        };
        if let Err(error) = sent {
            self.undelivered(ends, error);
        }
        let deadline = udp.deadline();
        self.flows.put(id, Flow::Udp(udp), deadline);
    }

    fn undelivered(&mut self, ends: Ends, error: HostError) {
        let code = match error {
            HostError::Refused | HostError::Reset => NO_PORT,
            HostError::Unreachable => NO_HOST,
            HostError::Failed => return,
        };
        // As the guest sent it.
        let sent = Ends {
            from: ends.to,
            to: ends.from,
        };
        self.out.unreachable(*ends.from.ip(), sent, code);
    }

    fn begin_udp(&mut self, key: FlowKey, now: u64, host: &mut dyn Host) -> Option<FlowId> {
        let ends = Ends {
            from: key.remote,
            to: key.guest,
        };
        let Some(to) = self.route(Protocol::Udp, key.remote, now, host) else {
            // Broadcasts find nobody here, and nobody is told.
            let [first, ..] = key.remote.ip().octets();
            if first < 224
                && !(self.config.is_inside(*key.remote.ip())
                    && *key.remote.ip() != self.config.gateway)
            {
                self.deny(Protocol::Udp, key.remote, host);
                let sent = Ends {
                    from: key.guest,
                    to: key.remote,
                };
                self.out.unreachable(self.config.gateway, sent, PROHIBITED);
            }
            return None;
        };
        let id = self.insert_udp(key, Way::Socket, now, host);
        if let Err(error) = host.udp_open(id, to) {
            self.flows.remove(id);
            self.undelivered(ends, error);
            return None;
        }
        Some(id)
    }

    fn insert_udp(&mut self, key: FlowKey, way: Way, now: u64, host: &mut dyn Host) -> FlowId {
        if self.flows.udp >= limits::UDP {
            let oldest = self
                .flows
                .each()
                .filter_map(|(id, _, flow)| match flow {
                    Flow::Udp(udp) => Some((udp.active, id)),
                    Flow::Tcp(_) => None,
                })
                .min();
            if let Some((_, id)) = oldest {
                host.close(id, false);
                self.flows.remove(id);
            }
        }
        self.counters.flows = self.counters.flows.saturating_add(1);
        let id = self.flows.insert(key);
        let udp = Udp {
            ends: Ends {
                from: key.remote,
                to: key.guest,
            },
            way,
            question: None,
            answered: false,
            active: now,
        };
        let deadline = udp.deadline();
        self.flows.put(id, Flow::Udp(udp), deadline);
        id
    }

    /// A question to the name server. Returns it if it is to be passed on.
    fn on_query(&mut self, ends: Ends, query: &[u8], host: &mut dyn Host) -> Option<dns::Question> {
        let question = dns::parse_question(query).filter(|_| dns::is_query(query));
        let Some(question) = question else {
            self.counters.ignored = self.counters.ignored.saturating_add(1);
            return None;
        };
        let own = question.name == GATEWAY_NAME;
        let (code, address) = if own {
            let address = (question.kind == dns::TYPE_A).then_some(self.config.gateway);
            (dns::NO_ERROR, address)
        } else if self.config.policy.decide_name(&question.name) == Action::Deny {
            self.counters.denied = self.counters.denied.saturating_add(1);
            host.denied(Denied::Name(question.name.clone()));
            (dns::REFUSED, None)
        } else if host.resolver().is_none() {
            (dns::SERVER_FAILURE, None)
        } else {
            return Some(question);
        };
        if let Some(answer) = dns::answer(query, &question, code, address) {
            self.out.udp(ends, &answer);
        }
        None
    }

    /// Remembers the addresses in an answer to the guest, if they answer what it asked.
    fn learn_names(&mut self, answer: &[u8], asked: &(u16, String), now: u64) {
        let Some((question, answers)) = dns::parse_answers(answer) else {
            return;
        };
        if (question.id, &question.name) != (asked.0, &asked.1) {
            return;
        }
        for found in answers {
            let until = now
                + u64::from(found.ttl)
                    .saturating_mul(SECOND)
                    .min(86400 * SECOND)
                + NAME_GRACE;
            if self.names.len() >= limits::NAMES && !self.names.contains_key(&found.address) {
                self.names
                    .retain(|_, names| names.iter().any(|(_, until)| *until > now));
                if self.names.len() >= limits::NAMES {
                    self.names.pop_first();
                }
            }
            let names = self.names.entry(found.address).or_default();
            names.retain(|(name, until)| *until > now && *name != question.name);
            if names.len() >= 16 {
                names.remove(0);
            }
            names.push((question.name.clone(), until));
        }
    }

    /// A datagram from `peer` came to forward number `forward`, for the guest's `port`.
    pub fn forward_datagram(
        &mut self,
        forward: u16,
        peer: SocketAddrV4,
        port: u16,
        data: &[u8],
        now: u64,
        host: &mut dyn Host,
    ) {
        let found = self.flows.each().find_map(|(id, _, flow)| match flow {
            Flow::Udp(udp) if udp.way == Way::Forward(forward, peer) => Some(id),
            _ => None,
        });
        let id = match found {
            Some(id) => id,
            None => {
                let Some(key) = self.inward_key(Protocol::Udp, peer, port) else {
                    return;
                };
                self.insert_udp(key, Way::Forward(forward, peer), now, host)
            }
        };
        let Some(Flow::Udp(mut udp)) = self.flows.take(id) else {
            return;
        };
        (udp.active, udp.answered) = (now, true);
        if self.out.has_room() {
            self.out.udp(udp.ends, data);
        }
        let deadline = udp.deadline();
        self.flows.put(id, Flow::Udp(udp), deadline);
    }

    /// The sockets of flow `id` can go on.
    pub fn on_ready(&mut self, id: FlowId, readable: bool, now: u64, host: &mut dyn Host) {
        match self.flows.take(id) {
            None => {}
            Some(Flow::Tcp(tcp)) => {
                let deadline = tcp.deadline();
                self.flows.put(id, Flow::Tcp(tcp), deadline);
                self.with_tcp(id, now, host, |tcp, cx| tcp.on_ready(cx, readable));
            }
            Some(Flow::Udp(mut udp)) => {
                self.receive_datagrams(id, &mut udp, now, host);
                let deadline = udp.deadline();
                self.flows.put(id, Flow::Udp(udp), deadline);
            }
        }
    }

    fn receive_datagrams(&mut self, id: FlowId, udp: &mut Udp, now: u64, host: &mut dyn Host) {
        let mut buffer = core::mem::take(&mut self.scratch);
        buffer.resize(usize::from(u16::MAX), 0);
        for _ in 0..DATAGRAMS {
            match host.udp_receive(id, &mut buffer) {
                Ok(None) => break,
                Ok(Some(len)) => {
                    let data = buffer.get(..len).unwrap_or_default();
                    (udp.active, udp.answered) = (now, true);
                    if let Some(asked) = &udp.question {
                        self.learn_names(data, asked, now);
                    }
                    // A guest that does not read loses datagrams, as on any network.
                    if self.out.has_room() && data.len() <= 65507 {
                        self.out.udp(udp.ends, data);
                    }
                }
                Err(error) => self.undelivered(udp.ends, error),
            }
        }
        self.scratch = buffer;
    }

    /// Does what is due.
    pub fn on_timer(&mut self, now: u64, host: &mut dyn Host) {
        // Each is put further into the future or forgotten.
        while let Some(id) = self.flows.due(now) {
            match self.flows.take(id) {
                Some(Flow::Tcp(tcp)) => {
                    let deadline = tcp.deadline();
                    self.flows.put(id, Flow::Tcp(tcp), deadline);
                    let slow = self.guest_is_slow;
                    self.with_tcp(id, now, host, |tcp, cx| tcp.on_timer(cx, slow));
                }
                _ => {
                    host.close(id, false);
                    self.flows.remove(id);
                }
            }
        }
    }

    /// The guest starts anew: its connections are ended.
    pub fn reset(&mut self, host: &mut dyn Host) {
        for id in self.flows.ids() {
            if let Some(Flow::Tcp(mut tcp)) = self.flows.take(id) {
                tcp.release(&mut self.pool);
            }
            host.close(id, true);
            self.flows.remove(id);
        }
        self.half_open = 0;
        self.due.clear();
        self.stalled.clear();
        self.names.clear();
        self.ending.clear();
        self.out.frames.clear();
        self.out.guest_mac = self.config.guest_mac;
    }

    /// What another router has to know to end the guest's connections.
    pub fn save(&self) -> Vec<u8> {
        let flows = self.flows.each().filter_map(|(_, key, flow)| match flow {
            Flow::Tcp(tcp) => Some(SavedFlow::new(
                (key.guest, key.remote),
                tcp.reset_numbers()?,
            )),
            Flow::Udp(_) => None,
        });
        let flows = flows.chain(self.ending.iter().copied()).take(limits::TCP);
        SavedRouter::new(self.out.guest_mac.0, flows.collect()).to_bytes()
    }

    /// Takes over the connections that the guest had at the router that was saved, to be ended by
    /// [`Router::end_restored`]. Nonsense is ignored.
    pub fn restore(&mut self, saved: &[u8]) {
        let Some(saved) = SavedRouter::from_bytes(saved) else {
            return;
        };
        self.out.guest_mac = MacAddress(saved.guest_mac);
        self.ending = saved.flows;
    }

    /// Ends the connections that were taken over: the guest hears of it.
    pub fn end_restored(&mut self) {
        // There may be more of them than frames usually wait.
        let room = core::mem::replace(&mut self.out.room, limits::TCP);
        for flow in core::mem::take(&mut self.ending) {
            self.out.reset(flow.ends(), flow.seq, Some(flow.ack));
        }
        self.out.room = room;
    }
}
