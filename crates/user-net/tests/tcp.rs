//! Connections between a guest with smoltcp's TCP and peers of the host's.

mod guest;

use caisson_user_net::{Config, Denied, Protocol, Router, testing::Peer};
use guest::{Guest, Trouble, pattern};
use proptest::prelude::*;
use smoltcp::{iface::SocketHandle, socket::tcp::State, wire::IpAddress};

const PEER: (IpAddress, u16) = (
    IpAddress::Ipv4(smoltcp::wire::Ipv4Address::new(192, 0, 2, 1)),
    80,
);
const SECOND: u64 = 1_000_000_000;

fn connected(trouble: Trouble) -> (Guest, SocketHandle) {
    let mut guest = Guest::new(Config::default(), trouble);
    let handle = guest.tcp(64 << 10);
    guest.connect(handle, PEER, 40000);
    guest.until(|guest| guest.socket(handle).state() == State::Established);
    (guest, handle)
}

/// Sends `up` from the guest and `down` from the host at once, and ends both sides.
fn exchange(trouble: Trouble, big_frames: bool, up: &[u8], down: &[u8]) -> Guest {
    let mut guest = Guest::new(Config::default(), trouble);
    if big_frames {
        guest.take_big_frames();
    }
    let handle = guest.tcp(64 << 10);
    guest.connect(handle, PEER, 40000);
    let (mut sent, mut got, mut asked, mut ended) = (0, Vec::new(), false, false);
    guest.until(|guest| {
        if let Some(peer) = guest.host.peers.values_mut().next()
            && !asked
        {
            asked = true;
            peer.sends.extend(down.chunks(5000).map(<[u8]>::to_vec));
            peer.ended = true;
        }
        let socket = guest.socket(handle);
        if socket.may_send() {
            sent += socket.send_slice(&up[sent..]).unwrap();
            if sent == up.len() {
                socket.close();
            }
        }
        while socket.can_recv() {
            socket
                .recv(|bytes| (bytes.len(), got.extend_from_slice(bytes)))
                .unwrap();
        }
        ended |= !guest.host.closed.is_empty();
        ended && got.len() >= down.len()
    });
    assert!(got == down, "what the host sent arrived");
    let (_, peer, aborted) = &guest.host.closed[0];
    assert!(peer.received == up, "what the guest sent arrived");
    assert!(peer.shut && !aborted);
    guest
}

#[test]
fn bytes_go_both_ways_and_both_ends_end() {
    let data = pattern(300_000);
    for big_frames in [false, true] {
        let mut guest = exchange(Trouble::default(), big_frames, &data, &data[7..]);
        assert_eq!(guest.largest > 20_000, big_frames);
        assert_eq!(guest.router.held(), 0);
        for _ in 0..3000 {
            guest.step();
        }
        assert_eq!(guest.router.flow_counts(), (0, 0), "nothing is left of it");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn bytes_arrive_in_order_whatever_the_wire_does(
        seed in any::<u64>(),
        loss in prop_oneof![Just(0u32), 8..100u32],
        repeat in prop_oneof![Just(0u32), 5..100u32],
        reorder in prop_oneof![Just(0u32), 5..100u32],
        big_frames in any::<bool>(),
        up in 0usize..60_000,
        down in 0usize..60_000,
    ) {
        let trouble = Trouble { loss, repeat, reorder, seed };
        let data = pattern(60_000);
        exchange(trouble, big_frames, &data[..up], &data[60_000 - down..]);
    }
}

#[test]
fn a_refused_connection_is_reset() {
    let mut guest = Guest::new(Config::default(), Trouble::default());
    guest.host.is_slow = true;
    let handle = guest.tcp(4096);
    guest.connect(handle, PEER, 40000);
    for _ in 0..20 {
        guest.step();
    }
    assert_eq!(
        guest.socket(handle).state(),
        State::SynSent,
        "nobody has answered"
    );
    guest.host.only().1.answered = Some(false);
    guest.until(|guest| guest.socket(handle).state() == State::Closed);
    assert_eq!(guest.router.flow_counts(), (0, 0));
    assert!(guest.host.peers.is_empty());
}

#[test]
fn a_broken_connection_is_reset_and_a_reset_breaks_the_connection() {
    let (mut guest, handle) = connected(Trouble::default());
    guest.host.only().1.broken = true;
    guest.until(|guest| guest.socket(handle).state() == State::Closed);
    assert_eq!(guest.router.flow_counts(), (0, 0));

    let (mut guest, handle) = connected(Trouble::default());
    guest.socket(handle).abort();
    guest.until(|guest| !guest.host.closed.is_empty());
    assert!(guest.host.closed[0].2, "the peer is told");
}

#[test]
fn either_side_can_end_first_and_go_on_listening() {
    // The guest ends; the host goes on.
    let (mut guest, handle) = connected(Trouble::default());
    guest.socket(handle).close();
    guest.until(|guest| guest.host.only().1.shut);
    guest.host.only().1.sends.push_back(b"late".to_vec());
    guest.until(|guest| guest.socket(handle).can_recv());
    let mut got = [0; 8];
    assert_eq!(guest.socket(handle).recv_slice(&mut got), Ok(4));
    guest.host.only().1.ended = true;
    guest.until(|guest| guest.host.peers.is_empty());

    // The host ends; the guest goes on.
    let (mut guest, handle) = connected(Trouble::default());
    guest.host.only().1.ended = true;
    guest.until(|guest| guest.socket(handle).state() == State::CloseWait);
    guest.socket(handle).send_slice(b"late").unwrap();
    guest.until(|guest| guest.host.only().1.received == b"late");
    guest.socket(handle).close();
    guest.until(|guest| guest.host.peers.is_empty());
    assert!(!guest.host.closed[0].2);
}

#[test]
fn who_does_not_read_holds_a_bounded_amount() {
    // The host's peer.
    let (mut guest, handle) = connected(Trouble::default());
    guest.host.only().1.takes = 1000;
    let data = pattern(1 << 20);
    let mut sent = 0;
    for _ in 0..5000 {
        sent += guest.socket(handle).send_slice(&data[sent..]).unwrap();
        guest.step();
    }
    assert!(
        sent < 600_000 && guest.router.held() <= 256 << 10,
        "{sent} {}",
        guest.router.held()
    );
    guest.host.only().1.takes = usize::MAX;
    guest.until(|guest| {
        let socket = guest.socket(handle);
        sent += socket.send_slice(&data[sent..]).unwrap();
        guest.host.only().1.received.len() == data.len()
    });
    assert!(guest.host.only().1.received == data);

    // The guest, for so long that its window has been asked for many times.
    let (mut guest, handle) = connected(Trouble::default());
    guest
        .host
        .only()
        .1
        .sends
        .extend(data.chunks(10_000).map(<[u8]>::to_vec));
    for _ in 0..30_000 {
        guest.step();
    }
    assert!(guest.router.held() <= 1 << 20);
    let mut got = Vec::new();
    guest.until(|guest| {
        let socket = guest.socket(handle);
        while socket.can_recv() {
            socket
                .recv(|bytes| (bytes.len(), got.extend_from_slice(bytes)))
                .unwrap();
        }
        got.len() == data.len()
    });
    assert!(got == data);
}

#[test]
fn a_guest_that_is_gone_is_given_up_but_one_that_is_paused_is_not() {
    for paused in [true, false] {
        let (mut guest, _) = connected(Trouble::default());
        guest.host.only().1.sends.push_back(pattern(5000));
        let flow = guest.host.only().0;
        let Guest {
            router, host, now, ..
        } = &mut guest;
        router.on_ready(flow, true, *now, host);
        let end = *now + 600 * SECOND;
        while let Some(at) = router.next_deadline().filter(|at| *at < end) {
            router.set_room(64, paused, at, host);
            router.on_timer(at, host);
            while router.take_frame().is_some() {}
        }
        assert_eq!(host.peers.is_empty(), !paused);
    }
}

#[test]
fn the_host_connects_to_the_guest() {
    let mut guest = Guest::new(Config::default(), Trouble::default());
    let handle = guest.tcp(4096);
    guest.socket(handle).listen(8080).unwrap();
    let peer = "127.0.0.1:50000".parse().unwrap();
    let Guest {
        router, host, now, ..
    } = &mut guest;
    let flow = router.accept(peer, 8080, *now, host).unwrap();
    host.peers.insert(flow, Peer::new(peer));
    guest.host.only().1.sends.push_back(b"hello".to_vec());
    guest.until(|guest| guest.socket(handle).can_recv());
    let from = guest.socket(handle).remote_endpoint().unwrap();
    assert_eq!(from.to_string(), "10.0.2.2:50000");
    guest.socket(handle).send_slice(b"welcome").unwrap();
    guest.until(|guest| guest.host.only().1.received == b"welcome");

    // Nobody listens there.
    let Guest {
        router, host, now, ..
    } = &mut guest;
    let flow = router.accept(peer, 9, *now, host).unwrap();
    host.peers.insert(flow, Peer::new(peer));
    guest.until(|guest| {
        guest
            .host
            .closed
            .iter()
            .any(|(id, _, abort)| *id == flow && *abort)
    });
}

#[test]
fn what_is_denied_is_reset_at_once_and_told() {
    let mut config = Config::default();
    config.policy.deny.push("192.0.2.0/24".parse().unwrap());
    let mut guest = Guest::new(config, Trouble::default());
    for (n, to) in [
        IpAddress::v4(192, 0, 2, 9),
        // The host itself, its loopback, and what is special.
        IpAddress::v4(10, 0, 2, 2),
        IpAddress::v4(127, 0, 0, 1),
        IpAddress::v4(169, 254, 169, 254),
        IpAddress::v4(198, 51, 100, 1),
    ]
    .into_iter()
    .enumerate()
    {
        guest.host.own.insert("198.51.100.1".parse().unwrap());
        let handle = guest.tcp(4096);
        if to == IpAddress::v4(127, 0, 0, 1) {
            continue;
        }
        guest.connect(handle, (to, 80), 41000 + n as u16);
        guest.until(|guest| guest.socket(handle).state() == State::Closed);
        assert!(guest.host.peers.is_empty() && guest.host.closed.is_empty());
        let denied = guest.host.denied.pop();
        assert!(
            matches!(denied, Some(Denied::Address(Protocol::Tcp, _))),
            "{to}"
        );
    }
}

#[test]
fn after_a_restore_the_guest_sees_resets() {
    let (mut guest, handle) = connected(Trouble::default());
    let saved = guest.router.save();
    guest.router = Router::new(Config::default());
    guest.host.peers.clear();
    guest.router.restore(&saved);
    assert_eq!(guest.router.save(), saved);
    guest.router.end_restored();
    guest.until(|guest| guest.socket(handle).state() == State::Closed);

    // Without a word of it, whoever speaks learns it.
    let (mut guest, handle) = connected(Trouble::default());
    guest.router = Router::new(Config::default());
    guest.host.peers.clear();
    for nonsense in [&[][..], &[1], &[1; 100], &saved[..saved.len() - 1]] {
        guest.router.restore(nonsense);
        guest.router.end_restored();
    }
    guest.socket(handle).send_slice(b"anybody?").unwrap();
    guest.until(|guest| guest.socket(handle).state() == State::Closed);
}

#[test]
fn thousands_of_connections_leave_nothing_behind() {
    let mut guest = Guest::new(Config::default(), Trouble::default());
    let handles: Vec<_> = (0..100).map(|_| guest.tcp(512)).collect();
    for round in 0..20u16 {
        for (n, handle) in (0u16..).zip(&handles) {
            guest.connect(*handle, PEER, 10_000 + round * 100 + n);
        }
        guest.until(|guest| {
            handles.iter().all(|handle| {
                guest
                    .sockets
                    .get::<smoltcp::socket::tcp::Socket>(*handle)
                    .may_send()
            })
        });
        for handle in &handles {
            guest.socket(*handle).abort();
        }
        guest.until(|guest| guest.host.peers.is_empty());
    }
    assert_eq!(guest.router.flow_counts(), (0, 0));
    assert_eq!(guest.router.counters().flows, 2000);
    assert_eq!(guest.router.held(), 0);
}
