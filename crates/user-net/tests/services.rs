//! What the router itself answers, datagrams, and the egress policy.

mod guest;

use std::net::{Ipv4Addr, SocketAddrV4};

use caisson_packet::{Checksum, Frame, Segmentation, SegmentationKind};
use caisson_user_net::{
    Action, Config, Denied, Policy, Protocol, Router, Rule, Target, limits, parse_answers,
    parse_question,
    testing::{PlainHost, exercise_router, guest_frame},
};
use guest::{Guest, Trouble, pattern};
use proptest::prelude::*;
use smoltcp::{
    socket::{dhcpv4, dns, icmp, udp},
    wire::{DnsQueryType, IpAddress, IpEndpoint, IpListenEndpoint, Ipv4Address},
};

const RESOLVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 1), 5300);

#[test]
fn dhcp_gives_the_guest_its_place() {
    let mut guest = Guest::new(Config::default(), Trouble::default());
    guest
        .interface
        .update_ip_addrs(|addresses| addresses.clear());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let mut lease = None;
    guest.until(|guest| {
        let event = guest.sockets.get_mut::<dhcpv4::Socket>(handle).poll();
        if let Some(dhcpv4::Event::Configured(config)) = event {
            lease = Some((
                config.address.to_string(),
                config.router,
                config.dns_servers.to_vec(),
            ));
        }
        lease.is_some()
    });
    let (address, router, servers) = lease.unwrap();
    assert_eq!(address, "10.0.2.15/24");
    assert_eq!(router, Some(Ipv4Address::new(10, 0, 2, 2)));
    assert_eq!(servers, [Ipv4Address::new(10, 0, 2, 3)]);
}

/// An answer with the address 192.0.2.`last`, behind an alias.
fn answer(query: &[u8], last: u8) -> Vec<u8> {
    let mut out = query.to_vec();
    out[2] |= 0x80;
    out[7] = 2;
    out.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 4, 1, b'x', 0xc0, 12]);
    out.extend([
        1, b'x', 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, last,
    ]);
    out
}

/// Has the guest resolve `name`; the resolver says 192.0.2.`last`.
fn resolve(
    guest: &mut Guest,
    name: &str,
    last: u8,
) -> Result<Vec<IpAddress>, dns::GetQueryResultError> {
    let server = [IpAddress::v4(10, 0, 2, 3)];
    let handle = guest.sockets.add(dns::Socket::new(&server, vec![]));
    let socket = guest.sockets.get_mut::<dns::Socket>(handle);
    let query = socket
        .start_query(guest.interface.context(), name, DnsQueryType::A)
        .unwrap();
    let mut found = None;
    guest.until(|guest| {
        for peer in guest
            .host
            .peers
            .values_mut()
            .filter(|peer| peer.to == RESOLVER)
        {
            for query in std::mem::take(&mut peer.datagrams) {
                peer.sends.push_back(answer(&query, last));
            }
        }
        let socket = guest.sockets.get_mut::<dns::Socket>(handle);
        match socket.get_query_result(query) {
            Err(dns::GetQueryResultError::Pending) => false,
            Ok(addresses) => {
                found = Some(Ok(addresses.to_vec()));
                true
            }
            Err(error) => {
                found = Some(Err(error));
                true
            }
        }
    });
    guest.sockets.remove(handle);
    found.unwrap()
}

#[test]
fn names_are_resolved_by_the_host_and_the_router_knows_its_own() {
    let mut guest = Guest::new(Config::default(), Trouble::default());
    assert!(
        resolve(&mut guest, "example.test", 7).is_err(),
        "there is no resolver"
    );
    assert_eq!(
        resolve(&mut guest, "host.caisson.internal", 7).unwrap(),
        [IpAddress::v4(10, 0, 2, 2)]
    );
    guest.host.resolver = Some(RESOLVER);
    assert_eq!(
        resolve(&mut guest, "example.test", 7).unwrap(),
        [IpAddress::v4(192, 0, 2, 7)]
    );
}

fn closed(allow: &[&str], deny: &[&str]) -> Guest {
    let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let config = Config {
        policy: Policy {
            allow: rules(allow),
            deny: rules(deny),
        },
        ..Config::default()
    };
    let mut guest = Guest::new(config, Trouble::default());
    guest.host.resolver = Some(RESOLVER);
    guest
}

/// Whether the guest gets through to `to`.
fn reaches(guest: &mut Guest, to: [u8; 4], port: u16) -> bool {
    let handle = guest.tcp(512);
    let local = 30_000 + guest.now as u16 % 20_000;
    let address = IpAddress::v4(to[0], to[1], to[2], to[3]);
    guest.connect(handle, (address, port), local);
    guest.until(|guest| guest.socket(handle).may_send() || !guest.socket(handle).is_open());
    let reached = guest.socket(handle).may_send();
    guest.socket(handle).abort();
    for _ in 0..10 {
        guest.step();
    }
    guest.sockets.remove(handle);
    reached
}

#[test]
fn only_names_that_are_allowed_lead_out() {
    let mut guest = closed(&["*.good.test:443", "198.51.100.0/24:22"], &["*"]);
    assert!(
        !reaches(&mut guest, [192, 0, 2, 7], 443),
        "an address that nobody resolved"
    );
    assert!(resolve(&mut guest, "evil.test", 8).is_err());
    assert_eq!(
        guest.host.denied.last(),
        Some(&Denied::Name("evil.test".into()))
    );
    assert!(resolve(&mut guest, "good.test.evil.test", 8).is_err());
    assert!(resolve(&mut guest, "www.good.test", 7).is_ok());
    assert!(reaches(&mut guest, [192, 0, 2, 7], 443));
    assert!(!reaches(&mut guest, [192, 0, 2, 7], 80), "another port");
    assert!(!reaches(&mut guest, [192, 0, 2, 8], 443), "another address");
    assert!(
        reaches(&mut guest, [198, 51, 100, 1], 22) && !reaches(&mut guest, [198, 51, 100, 1], 53)
    );
    assert!(
        !reaches(&mut guest, [10, 0, 2, 3], 53),
        "names over TCP are not looked at"
    );
    // What a name resolved to is forgotten some time after it holds.
    guest.now += 3600 * 1_000_000_000;
    assert!(!reaches(&mut guest, [192, 0, 2, 7], 443));
}

#[test]
fn a_name_may_not_lead_to_the_host() {
    let mut guest = closed(&["*.good.test"], &["*"]);
    guest.host.own.insert(Ipv4Addr::new(192, 0, 2, 9));
    assert!(resolve(&mut guest, "www.good.test", 9).is_ok());
    assert!(!reaches(&mut guest, [192, 0, 2, 9], 80), "rebinding");
}

#[test]
fn rules_say_what_they_mean() {
    for text in [
        "*",
        "*:25",
        "example.org",
        "*.example.org:443",
        "10.1.0.0/16",
        "192.0.2.7:22",
        "0.0.0.0/0",
    ] {
        assert_eq!(text.parse::<Rule>().unwrap().to_string(), text);
    }
    assert_eq!(
        "EXAMPLE.org.".parse::<Rule>().unwrap().target,
        Target::Name("example.org".into())
    );
    for wrong in [
        "",
        ":80",
        "a..b",
        "*.",
        "10.1.0.0/33",
        "10.1.0/8",
        "300.1.1.1",
        "a b",
        "example.org:0",
        "example.org:x",
        "[::1]:80",
        "**",
    ] {
        assert!(wrong.parse::<Rule>().is_err(), "{wrong}");
    }
    let policy = Policy {
        allow: vec!["10.1.0.0/16".parse().unwrap()],
        deny: vec![
            "10.0.0.0/8".parse().unwrap(),
            "bad.test".parse().unwrap(),
            "*:25".parse().unwrap(),
        ],
    };
    let decide =
        |address: &str, port, names: &[&str]| policy.decide(address.parse().unwrap(), port, names);
    assert_eq!(decide("10.1.2.3", 25, &[]), Action::Allow);
    assert_eq!(decide("10.2.2.3", 80, &[]), Action::Deny);
    assert_eq!(decide("192.0.2.1", 25, &[]), Action::Deny);
    assert_eq!(
        decide("192.0.2.1", 80, &["good.test", "bad.test"]),
        Action::Deny
    );
    assert_eq!(policy.decide_name("bad.test"), Action::Deny);
    assert_eq!(
        policy.decide_name("mail.test"),
        Action::Allow,
        "a port is no name"
    );
}

#[test]
fn the_router_answers_echo() {
    let mut guest = Guest::new(Config::default(), Trouble::default());
    let room = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 2000]);
    let mut socket = icmp::Socket::new(room(), room());
    socket.bind(icmp::Endpoint::Ident(7)).unwrap();
    let message = [&[8, 0, 0, 0, 0, 7, 0, 1][..], &pattern(500)].concat();
    let mut sum = caisson_packet::Sum::default()
        .bytes(&message)
        .finish()
        .to_be_bytes()
        .to_vec();
    let mut message = message;
    message[2..4].copy_from_slice(&std::mem::take(&mut sum));
    socket
        .send_slice(&message, IpAddress::v4(10, 0, 2, 2))
        .unwrap();
    let handle = guest.sockets.add(socket);
    guest.until(|guest| guest.sockets.get::<icmp::Socket>(handle).can_recv());
    let (answer, from) = guest
        .sockets
        .get_mut::<icmp::Socket>(handle)
        .recv()
        .unwrap();
    assert_eq!(from, IpAddress::v4(10, 0, 2, 2));
    assert_eq!((answer[0], &answer[4..]), (0, &message[4..]));
}

#[test]
fn datagrams_go_both_ways_and_keep_their_bounds() {
    let mut guest = Guest::new(Config::default(), Trouble::default());
    let room = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 8000]);
    let mut socket = udp::Socket::new(room(), room());
    socket.bind(IpListenEndpoint::from(5000)).unwrap();
    let to = IpEndpoint::new(IpAddress::v4(192, 0, 2, 1), 9);
    for data in [&b"one"[..], b"", b"three"] {
        socket.send_slice(data, to).unwrap();
    }
    let handle = guest.sockets.add(socket);
    guest.until(|guest| {
        guest
            .host
            .peers
            .values()
            .any(|peer| peer.datagrams.len() == 3)
    });
    let (flow, peer) = guest.host.only();
    assert_eq!(peer.datagrams, [&b"one"[..], b"", b"three"]);
    peer.sends.push_back(b"four".to_vec());
    guest.until(|guest| guest.sockets.get::<udp::Socket>(handle).can_recv());
    let (data, meta) = guest.sockets.get_mut::<udp::Socket>(handle).recv().unwrap();
    assert_eq!((data, meta.endpoint), (&b"four"[..], to));

    // A forward.
    let peer = "127.0.0.1:6000".parse().unwrap();
    let Guest {
        router, host, now, ..
    } = &mut guest;
    router.forward_datagram(3, peer, 5000, b"five", *now, host);
    guest.until(|guest| guest.sockets.get::<udp::Socket>(handle).can_recv());
    let socket = guest.sockets.get_mut::<udp::Socket>(handle);
    let (data, meta) = socket.recv().unwrap();
    assert_eq!(data, b"five");
    assert_eq!(meta.endpoint.to_string(), "10.0.2.2:6000");
    socket.send_slice(b"six", meta.endpoint).unwrap();
    guest.until(|guest| !guest.host.forwarded.is_empty());
    assert_eq!(guest.host.forwarded, [(3, peer, b"six".to_vec())]);

    // Flows that nobody uses end.
    for _ in 0..2 {
        guest.now += 400 * 1_000_000_000;
        let Guest {
            router, host, now, ..
        } = &mut guest;
        router.on_timer(*now, host);
    }
    assert_eq!(guest.router.flow_counts(), (0, 0));
    assert_eq!(guest.host.closed.last().unwrap().0, flow);
}

/// A datagram of the guest's from `port`.
fn datagram(port: u16, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let mut bytes = port.to_be_bytes().to_vec();
    bytes.extend(9u16.to_be_bytes());
    bytes.extend((8 + payload.len() as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    let config = Config::default();
    guest_frame(&config, 17, (config.guest, to), &bytes, Some(6))
}

#[test]
fn datagrams_in_one_frame_are_cut_and_flows_are_bounded() {
    let (mut router, mut host) = (Router::new(Config::default()), PlainHost::default());
    let to = Ipv4Addr::new(192, 0, 2, 1);
    let frame = Frame {
        bytes: datagram(1, to, &pattern(2500)),
        checksum: Checksum::Verified,
        segmentation: Some(Segmentation {
            kind: SegmentationKind::Udp,
            payload: 1000,
            headers: 42,
        }),
    };
    router.receive(&frame, 0, &mut host);
    let lens: Vec<usize> = host.only().1.datagrams.iter().map(Vec::len).collect();
    assert_eq!(lens, [1000, 1000, 500]);
    for port in 2..4000 {
        router.receive(
            &Frame::from(datagram(port, to, b"x")),
            u64::from(port),
            &mut host,
        );
    }
    assert_eq!(router.flow_counts().1, limits::UDP);
    assert_eq!(host.peers.len(), limits::UDP);
}

#[test]
fn what_cannot_be_delivered_is_said_and_what_is_damaged_is_dropped() {
    let (mut router, mut host) = (Router::new(Config::default()), PlainHost::default());
    let to = Ipv4Addr::new(192, 0, 2, 1);
    router.receive(&Frame::from(datagram(1, to, b"x")), 0, &mut host);
    let (flow, peer) = host.only();
    peer.broken = true;
    router.on_ready(flow, true, 0, &mut host);
    let told = router.take_frame().expect("a message");
    // Destination unreachable, port unreachable, about that datagram.
    assert_eq!((told.bytes[23], &told.bytes[34..36]), (1, &[3, 3][..]));
    assert_eq!(told.bytes[42 + 20..42 + 24], [0, 1, 0, 9]);

    let mut damaged = datagram(2, to, b"x");
    *damaged.last_mut().unwrap() ^= 1;
    router.receive(&Frame::from(damaged), 0, &mut host);
    assert_eq!((router.counters().damaged, host.peers.len()), (1, 1));
    let mut stranger = datagram(3, to, b"x");
    stranger[26..30].copy_from_slice(&[10, 0, 3, 15]);
    router.receive(&Frame::from(stranger), 0, &mut host);
    assert_eq!(host.peers.len(), 1, "addresses of others are not taken");
}

#[test]
fn messages_about_names_are_read_whatever_they_are() {
    let query =
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03WWW\x04test\x00\x00\x01\x00\x01";
    let question = parse_question(query).unwrap();
    assert_eq!(
        (question.id, question.name.as_str(), question.kind),
        (0x1234, "www.test", 1)
    );
    let (_, found) = parse_answers(&answer(query, 5)).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].address, Ipv4Addr::new(192, 0, 2, 5));
    for len in 0..query.len() {
        assert_eq!(parse_question(&query[..len]), None);
    }
    assert_eq!(parse_answers(query), None, "no answer");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_hostile_guest_only_harms_itself(input in prop::collection::vec(any::<u8>(), 0..3000)) {
        exercise_router(&input);
    }

    #[test]
    fn no_message_about_names_is_too_strange(message in prop::collection::vec(any::<u8>(), 0..300)) {
        parse_question(&message);
        parse_answers(&message);
    }
}

#[test]
fn denied_datagrams_are_told() {
    let mut guest = closed(&[], &["192.0.2.0/24"]);
    let frame = Frame::from(datagram(1, Ipv4Addr::new(192, 0, 2, 1), b"x"));
    guest.router.receive(&frame, 0, &mut guest.host);
    let to = "192.0.2.1:9".parse().unwrap();
    assert_eq!(guest.host.denied, [Denied::Address(Protocol::Udp, to)]);
    let told = guest.router.take_frame().expect("a message");
    assert_eq!(told.bytes[34..36], [3, 13]);
}
