//! The user-mode network on real sockets: a guest with smoltcp's TCP, and peers on the host's loopback.

use std::{
    collections::VecDeque,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use caisson_net::{Capture, Forward, NetError, UserNetwork, UserNetworkSpec};
use caisson_packet::{Frame, PacketBackend};
use caisson_user_net::Config;
use smoltcp::{
    iface::{Config as InterfaceConfig, Interface, SocketHandle, SocketSet},
    phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::{tcp, udp},
    wire::{EthernetAddress, IpAddress, IpCidr, IpEndpoint, Ipv4Address},
};

/// How long anything may take on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const ROUTER: IpAddress = IpAddress::Ipv4(Ipv4Address::new(10, 0, 2, 2));

struct Wire {
    network: Arc<dyn PacketBackend>,
    arrived: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a dyn PacketBackend);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = vec![0; len];
        let result = f(&mut bytes);
        self.0.send(Frame::from(bytes));
        self.0.kick();
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sending<'_>)> {
        let frame = self.arrived.pop_front()?;
        Some((Received(frame), Sending(&*self.network)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sending<'_>> {
        let mut cx = Context::from_waker(Waker::noop());
        let ready = self.network.poll_send(&mut cx).is_ready();
        ready.then_some(Sending(&*self.network))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.max_transmission_unit = 1514;
        capabilities.medium = Medium::Ethernet;
        capabilities
    }
}

struct Guest {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
}

fn spec(forwards: &[String]) -> UserNetworkSpec {
    UserNetworkSpec {
        router: Config {
            host_access: true,
            ..Config::default()
        },
        forwards: forwards.iter().map(|text| text.parse().unwrap()).collect(),
        resolver: None,
    }
}

impl Guest {
    fn new(network: Arc<dyn PacketBackend>) -> Self {
        let mut wire = Wire {
            network,
            arrived: VecDeque::new(),
        };
        let options = InterfaceConfig::new(EthernetAddress([2, 0, 0, 0, 0, 1]).into());
        let mut interface = Interface::new(options, &mut wire, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let address = IpCidr::new(IpAddress::v4(10, 0, 2, 15), 24);
            addresses.push(address).unwrap();
        });
        Self {
            wire,
            interface,
            sockets: SocketSet::new(vec![]),
            start: Instant::now(),
        }
    }

    fn tcp(&mut self) -> SocketHandle {
        let room = || tcp::SocketBuffer::new(vec![0; 60_000]);
        self.sockets.add(tcp::Socket::new(room(), room()))
    }

    fn connect(&mut self, port: u16, from: u16) -> SocketHandle {
        let handle = self.tcp();
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket
            .connect(self.interface.context(), (ROUTER, port), from)
            .unwrap();
        handle
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        while !done(self) {
            assert!(self.start.elapsed() < PATIENCE, "{what} never comes");
            let mut cx = Context::from_waker(Waker::noop());
            let mut idle = true;
            while let Poll::Ready(frame) = self.wire.network.poll_receive(&mut cx) {
                self.wire.arrived.push_back(frame.bytes);
                idle = false;
            }
            let now = smoltcp::time::Instant::from_micros(self.start.elapsed().as_micros() as i64);
            self.interface.poll(now, &mut self.wire, &mut self.sockets);
            if idle {
                thread::sleep(Duration::from_micros(200));
            }
        }
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }
}

fn pattern(len: usize) -> Vec<u8> {
    let mut state = 7u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[test]
fn bytes_go_through_the_hosts_sockets_and_back() {
    let network = UserNetwork::open(spec(&[])).unwrap();
    let mut guest = Guest::new(network);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // What comes goes back, to the end.
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    });
    let data = pattern(3_000_000);
    let handle = guest.connect(port, 40000);
    let (mut sent, mut got) = (0, Vec::new());
    guest.until("the echo", |guest| {
        let socket = guest.socket(handle);
        if socket.may_send() {
            sent += socket.send_slice(&data[sent..]).unwrap();
            if sent == data.len() {
                socket.close();
            }
        }
        while socket.can_recv() {
            socket
                .recv(|bytes| (bytes.len(), got.extend_from_slice(bytes)))
                .unwrap();
        }
        got.len() >= data.len()
    });
    assert!(got == data);
    echo.join().unwrap();
}

#[test]
fn a_port_where_nobody_listens_refuses_and_many_connections_leave_nothing() {
    let network = UserNetwork::open(spec(&[])).unwrap();
    let mut guest = Guest::new(network);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = thread::spawn(move || {
        for stream in listener.incoming().take(300) {
            let _ = stream.unwrap().write_all(b"x");
        }
        // Nobody listens from here on.
    });
    for round in 0..3u16 {
        let handles: Vec<_> = (0..100)
            .map(|n| guest.connect(port, 10_000 + round * 100 + n))
            .collect();
        guest.until("a byte for each", |guest| {
            handles
                .iter()
                .all(|handle| guest.socket(*handle).can_recv())
        });
        for handle in handles {
            guest.socket(handle).abort();
            guest.until("the reset is sent", |guest| !guest.socket(handle).is_open());
        }
        guest.sockets = SocketSet::new(vec![]);
    }
    serving.join().unwrap();
    let handle = guest.connect(port, 50000);
    guest.until("a refusal", |guest| !guest.socket(handle).is_open());
}

#[test]
fn forwards_lead_to_the_guest() {
    let free = || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let (tcp_port, udp_port) = (free(), free());
    let forwards = [format!("tcp:{tcp_port}:80"), format!("udp:{udp_port}:53")];
    let network = UserNetwork::open(spec(&forwards)).unwrap();
    let taken = UserNetwork::open(spec(&forwards[..1]));
    assert!(matches!(taken.map(|_| ()), Err(NetError::Forward { .. })));
    let mut guest = Guest::new(network);
    let web = guest.tcp();
    guest.socket(web).listen(80).unwrap();
    let room = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut names = udp::Socket::new(room(), room());
    names.bind(53).unwrap();
    let names = guest.sockets.add(names);

    let mut client = TcpStream::connect(("127.0.0.1", tcp_port)).unwrap();
    client.write_all(b"hello").unwrap();
    guest.until("a connection", |guest| guest.socket(web).can_recv());
    let socket = guest.socket(web);
    assert_eq!(socket.recv(|bytes| (5, bytes == b"hello")), Ok(true));
    socket.send_slice(b"welcome").unwrap();
    socket.close();
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).map(|_| all)
    });
    guest.until("its end", |guest| {
        !guest.socket(web).may_send() && reader.is_finished()
    });
    assert_eq!(reader.join().unwrap().unwrap(), b"welcome");

    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"who?", ("127.0.0.1", udp_port)).unwrap();
    guest.until("a datagram", |guest| {
        guest.sockets.get::<udp::Socket>(names).can_recv()
    });
    let socket = guest.sockets.get_mut::<udp::Socket>(names);
    let (data, meta) = socket.recv().unwrap();
    assert_eq!(data, b"who?");
    let from: IpEndpoint = meta.endpoint;
    socket.send_slice(b"me", from).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut answer = [0; 8];
    guest.until("an answer", |_| {
        client.recv(&mut answer).is_ok_and(|len| len == 2)
    });
    assert_eq!(&answer[..2], b"me");
}

#[test]
fn connections_end_where_the_guest_goes_on_elsewhere() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let first = UserNetwork::open(spec(&[])).unwrap();
    let mut guest = Guest::new(first.clone());
    let handle = guest.connect(port, 40000);
    guest.until("a connection", |guest| guest.socket(handle).may_send());
    let saved = first.save();
    let second = UserNetwork::open(spec(&[])).unwrap();
    second.restore(&saved);
    assert_eq!(second.save(), saved);
    guest.wire.network = second;
    guest.until("the reset", |guest| !guest.socket(handle).is_open());
    let (mut peer, _) = listener.accept().unwrap();
    drop(first);
    // With the network its sockets are gone.
    assert!(matches!(peer.read(&mut [0; 1]), Ok(0) | Err(_)));
}

#[test]
fn a_capture_has_every_frame() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let network = UserNetwork::open(spec(&[])).unwrap();
    let mut guest = Guest::new(Capture::new(network, file.path()).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let handle = guest.connect(port, 40000);
    guest.until("a connection", |guest| guest.socket(handle).may_send());
    drop(guest);
    let bytes = std::fs::read(file.path()).unwrap();
    assert_eq!(bytes[..4], 0xa1b2_3c4du32.to_le_bytes());
    let (mut at, mut kinds) = (24, Vec::new());
    while at < bytes.len() {
        let len = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        kinds.push(u16::from_be_bytes([bytes[at + 28], bytes[at + 29]]));
        at += 16 + len;
    }
    assert_eq!(at, bytes.len());
    // A question for the router's address and its answer, then the connection.
    assert_eq!(kinds[..4], [0x806, 0x806, 0x800, 0x800]);
}

#[test]
fn forwards_are_read_as_they_are_written() {
    for text in ["tcp:8080:80", "udp:0.0.0.0:5353:53"] {
        assert_eq!(text.parse::<Forward>().unwrap().to_string(), text);
    }
    let forward: Forward = "tcp:8080:80".parse().unwrap();
    assert_eq!(*forward.host.ip(), Ipv4Addr::LOCALHOST);
    for wrong in [
        "",
        "tcp",
        "tcp:80",
        "tcp:0:80",
        "tcp:80:0",
        "sctp:1:2",
        "tcp:host:1:2",
        "tcp:1:2:3:4",
        "tcp:70000:1",
    ] {
        assert!(wrong.parse::<Forward>().is_err(), "{wrong}");
    }
}
