//! The network device over both transports, in front of a network that records.

mod rig;

use std::sync::Arc;

use caisson_device::testing::check_state;
use caisson_memory::Gpa;
use caisson_packet::{
    Checksum, Frame, MacAddress, Segmentation, SegmentationKind,
    testing::{RecordedNetwork, SAVED},
};
use caisson_virtio::{
    net::{Net, NetConfig},
    status,
    testing::Driver,
};

use rig::{FEATURES, MMIO, REGISTERS, Rig, TRANSPORTS, Transport, World, check_kept};

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
const CTRL_RX: u64 = 1 << 18;
const CTRL_VLAN: u64 = 1 << 19;
const ANNOUNCE: u64 = 1 << 21;
const CTRL_MAC: u64 = 1 << 23;
const CTRL_OFFLOADS: u64 = 1 << 2;
const ALL: u64 = FEATURES
    | CSUM
    | GUEST_CSUM
    | GUEST_TSO4
    | HOST_TSO4
    | MRG_RXBUF
    | STATUS
    | CTRL_VQ
    | CTRL_RX
    | CTRL_VLAN
    | ANNOUNCE
    | CTRL_MAC
    | CTRL_OFFLOADS;
const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];

const OUT: u64 = 0x8_0000;
const IN: u64 = 0x9_0000;
const COMMAND: u64 = 0xe_0000;

struct Card {
    rig: Rig<Net>,
    network: Arc<RecordedNetwork>,
    drivers: Vec<Driver>,
}

impl Card {
    fn new(world: &World, transport: Transport, features: u64) -> Self {
        let network = Arc::<RecordedNetwork>::default();
        let mut rig = world.place(net(&network), transport);
        let drivers = rig.set_up(features, 3);
        Self {
            rig,
            network,
            drivers,
        }
    }

    fn send(&mut self, header: [u8; 12], frame: &[u8]) {
        let bytes = [&header[..], frame].concat();
        self.rig.memory.write(Gpa(OUT), &bytes).unwrap();
        let half = bytes.len() as u32 / 2;
        let parts = [
            (OUT, half, false),
            (OUT + u64::from(half), bytes.len() as u32 - half, false),
        ];
        self.drivers[1].add(&parts, None).unwrap();
        self.drivers[1].publish();
        self.rig.notify(1);
        self.rig.poll();
        assert_eq!(self.drivers[1].take_used().map(|used| used.1), Some(0));
    }

    /// Offers `count` receive buffers of `len` bytes.
    fn offer(&mut self, count: u64, len: u32) {
        for n in 0..count {
            let at = IN + n * 0x1000;
            self.drivers[0].add(&[(at, len, true)], None).unwrap();
        }
        self.drivers[0].publish();
        self.rig.notify(0);
    }

    fn command(&mut self, command: &[u8]) -> u8 {
        self.rig.memory.write(Gpa(COMMAND), command).unwrap();
        self.rig
            .memory
            .write(Gpa(COMMAND + 0x2000), &[0xee])
            .unwrap();
        let parts = [
            (COMMAND, command.len() as u32, false),
            (COMMAND + 0x2000, 1, true),
        ];
        self.drivers[2].add(&parts, None).unwrap();
        self.drivers[2].publish();
        self.rig.notify(2);
        self.rig.poll();
        assert_eq!(self.drivers[2].take_used().map(|used| used.1), Some(1));
        self.read(COMMAND + 0x2000, 1)[0]
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.rig.memory.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    /// Whether the driver gets a frame to `destination`.
    fn hears(&mut self, destination: [u8; 6], vlan: Option<u16>) -> bool {
        self.offer(1, 200);
        let mut frame = frame(60);
        frame[..6].copy_from_slice(&destination);
        if let Some(vlan) = vlan {
            frame[12..14].copy_from_slice(&[0x81, 0]);
            frame[14..16].copy_from_slice(&vlan.to_be_bytes());
        }
        self.network.give(frame.into());
        self.rig.poll();
        let heard = self.drivers[0].take_used().is_some();
        if !heard {
            // The buffer is used up, so that each question begins alike.
            let mut plain = self::frame(60);
            plain[..6].copy_from_slice(&MAC.0);
            self.network.give(plain.into());
            self.rig.poll();
            assert!(
                self.drivers[0].take_used().is_some(),
                "own frames are heard"
            );
        }
        heard
    }

    fn config(&mut self, offset: u64, len: usize) -> u64 {
        let base = match self.rig.is_pci() {
            true => REGISTERS + 0x2000,
            false => MMIO + 0x100,
        };
        self.rig.read(base + offset, len)
    }
}

fn net(network: &Arc<RecordedNetwork>) -> Net {
    Net::new(network.clone(), NetConfig { mac: MAC })
}

/// `len` bytes that are told apart, to everybody.
fn frame(len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
    frame[..6].fill(0xff);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    frame
}

#[test]
fn frames_leave_with_what_is_left_to_do_to_them() {
    let world = World::new();
    for transport in TRANSPORTS {
        let mut card = Card::new(&world, transport, ALL);
        card.send([0; 12], &frame(60));
        assert_eq!(card.network.take_sent(), [Frame::from(frame(60))]);
        card.send([1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], &frame(4000));
        let sent = Frame {
            bytes: frame(4000),
            checksum: Checksum::Partial {
                start: 34,
                offset: 16,
            },
            segmentation: Some(Segmentation {
                kind: SegmentationKind::Tcp4,
                payload: 1460,
                headers: 54,
            }),
        };
        assert_eq!(card.network.take_sent(), [sent]);
    }
}

#[test]
fn frames_that_are_described_wrongly_are_dropped_and_the_card_goes_on() {
    let world = World::new();
    let mut card = Card::new(&world, Transport::Pci, ALL);
    for (header, len) in [
        // A checksum past the end, segments without a checksum, of no length, and of kinds that were not agreed on.
        ([1, 0, 0, 0, 0, 0, 59, 0, 0, 0, 0, 0], 60),
        ([1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], 60),
        ([0, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], 60),
        ([1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0], 60),
        ([1, 5, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], 60),
        ([1, 3, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], 60),
        ([0; 12], 13),
    ] {
        card.send(header, &frame(len.max(14))[..len]);
        assert_eq!(card.network.take_sent(), [], "{header:?}");
    }
    card.send([0; 12], &frame(14));
    assert_eq!(card.network.take_sent().len(), 1);
    assert!(
        card.rig.inspect().contains("frames sent wrongly: 7"),
        "{}",
        card.rig.inspect()
    );

    let mut plain = Card::new(&world, Transport::Pci, FEATURES);
    plain.send([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &frame(60));
    assert_eq!(
        plain.network.take_sent(),
        [],
        "checksums were not agreed on"
    );
}

#[test]
fn a_full_network_makes_frames_wait_in_the_ring() {
    let world = World::new();
    let mut card = Card::new(&world, Transport::Mmio, ALL);
    card.network.set_full(true);
    card.rig.memory.write(Gpa(OUT), &[0; 100]).unwrap();
    card.drivers[1].add(&[(OUT, 100, false)], None).unwrap();
    card.drivers[1].publish();
    card.rig.notify(1);
    card.rig.poll();
    assert_eq!(card.drivers[1].take_used(), None);
    card.rig.woken();
    card.network.set_full(false);
    assert!(card.rig.woken());
    card.rig.poll();
    assert!(card.drivers[1].take_used().is_some());
    assert_eq!(card.network.take_sent().len(), 1);
}

#[test]
fn a_frame_is_spread_over_as_many_buffers_as_it_needs() {
    let world = World::new();
    for transport in TRANSPORTS {
        let mut card = Card::new(&world, transport, ALL);
        assert!(card.network.offloads().tcp4 && !card.network.offloads().udp4);
        let big = Frame {
            bytes: frame(700),
            checksum: Checksum::Partial {
                start: 34,
                offset: 16,
            },
            segmentation: Some(Segmentation {
                kind: SegmentationKind::Tcp4,
                payload: 100,
                headers: 54,
            }),
        };
        card.network.give(big);
        card.offer(2, 256);
        card.rig.poll();
        assert_eq!(card.drivers[0].take_used(), None, "two are too few");
        card.offer(1, 256);
        // The third buffer is where the first is; it comes last.
        card.rig.poll();
        let lens: Vec<u32> = std::iter::from_fn(|| card.drivers[0].take_used())
            .map(|used| used.1)
            .collect();
        assert_eq!(lens, [256, 256, 200]);
        assert_eq!(card.read(IN + 0x1000, 256), frame(700)[244..500]);
        assert_eq!(card.read(IN, 200), frame(700)[500..]);
    }
}

#[test]
fn the_header_says_how_many_buffers_and_what_is_left_to_do() {
    let world = World::new();
    let mut card = Card::new(&world, Transport::Pci, ALL);
    card.offer(2, 512);
    let mut verified = Frame::from(frame(700));
    verified.checksum = Checksum::Verified;
    card.network.give(verified);
    card.rig.poll();
    assert_eq!(card.read(IN, 12), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    assert_eq!(card.read(IN + 12, 500), frame(700)[..500]);

    // A driver that takes no open checksum gets a complete one, and no frame that is to be cut.
    let mut plain = Card::new(&world, Transport::Pci, FEATURES);
    let partial = |bytes: Vec<u8>| Frame {
        bytes,
        checksum: Checksum::Partial {
            start: 34,
            offset: 16,
        },
        segmentation: None,
    };
    plain.offer(1, 512);
    plain.network.give(partial(frame(40)));
    plain.network.give(Frame {
        segmentation: Some(Segmentation {
            kind: SegmentationKind::Tcp4,
            payload: 100,
            headers: 54,
        }),
        ..partial(frame(400))
    });
    plain.network.give(partial(frame(100)));
    plain.rig.poll();
    assert_eq!(plain.drivers[0].take_used().map(|used| used.1), Some(112));
    assert_eq!(plain.read(IN, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    let mut complete = frame(100);
    assert!(caisson_packet::complete(&mut complete, 34, 16));
    assert_eq!(plain.read(IN + 12, 100), complete);
    assert!(
        plain.rig.inspect().contains("frames dropped: 2"),
        "{}",
        plain.rig.inspect()
    );
}

#[test]
fn frames_too_long_for_all_buffers_are_dropped() {
    let world = World::new();
    let mut card = Card::new(&world, Transport::Pci, FEATURES);
    card.offer(1, 100);
    card.network.give(frame(200).into());
    card.network.give(frame(60).into());
    card.rig.poll();
    assert_eq!(card.drivers[0].take_used().map(|used| used.1), Some(72));
    card.offer(1, 11);
    card.rig.poll();
    assert_ne!(
        card.rig.status() & status::NEEDS_RESET,
        0,
        "no room for a header"
    );
}

#[test]
fn the_driver_chooses_what_it_hears() {
    let world = World::new();
    let mut card = Card::new(&world, Transport::Pci, ALL);
    let group = [1, 0, 0x5e, 0, 0, 1];
    assert!(card.hears(OTHER, None), "all, at first");
    assert_eq!(card.command(&[0, 0, 0]), 0);
    assert!(!card.hears(OTHER, None) && !card.hears(group, None));
    assert!(card.hears([0xff; 6], None));
    let table = [&[1, 0, 1, 0, 0, 0][..], &OTHER, &[1, 0, 0, 0], &group].concat();
    assert_eq!(card.command(&table), 0);
    assert!(card.hears(OTHER, None) && card.hears(group, None));
    assert!(!card.hears([1, 0, 0x5e, 0, 0, 2], None));
    // More than are kept: all of the kind.
    let many = [&[1, 0, 100, 0, 0, 0][..], &[2; 600], &[0; 4]].concat();
    assert_eq!(card.command(&many), 0);
    assert!(card.hears(OTHER, None) && !card.hears(group, None));
    assert!(!card.hears(MAC.0, Some(5)), "no VLAN was added");
    assert_eq!(card.command(&[2, 0, 5, 0]), 0);
    assert!(card.hears(MAC.0, Some(5)) && !card.hears(MAC.0, Some(6)));
    assert_eq!(card.command(&[2, 1, 5, 0]), 0);
    assert!(!card.hears(MAC.0, Some(5)));
    for wrong in [
        &[0, 9, 1][..],
        &[0, 2, 1],
        &[1, 0, 9, 0, 0, 0, 1],
        &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        &[1, 1, 1, 0, 0, 0, 0, 1],
        &[1, 1, 2, 0, 0],
        &[2, 0, 0xff, 0xff],
        &[5, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        &[77, 0],
        &[],
    ] {
        let wrong = if wrong.is_empty() { &[9][..] } else { wrong };
        assert_eq!(card.command(wrong), 1, "{wrong:?}");
    }
    assert_eq!(card.command(&[1, 1, 2, 0, 0, 0, 0, 7]), 0);
    assert_eq!(card.config(5, 1), 7);
    assert_eq!(card.command(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert!(card.network.offloads().checksum && !card.network.offloads().tcp4);
}

#[test]
fn after_a_restore_the_driver_announces_itself() {
    let world = World::new();
    for transport in TRANSPORTS {
        let mut card = Card::new(&world, transport, ALL);
        card.command(&[0, 0, 0]);
        card.offer(2, 100);
        card.network.give(frame(300).into());
        card.rig.poll();
        let fresh_network = Arc::<RecordedNetwork>::default();
        let mut fresh = world.place(net(&fresh_network), transport);
        check_state(card.rig.device(), fresh.device());
        if transport == Transport::Pci {
            let mut other = world.place(net(&fresh_network), transport);
            check_kept("net-pci", card.rig.device(), other.device());
        }
        assert_eq!(fresh_network.restored(), SAVED);
        assert!(fresh_network.offloads().tcp4);
        fresh.interrupt_cause();
        fresh.poll();
        let mut moved = Card {
            rig: fresh,
            network: fresh_network,
            drivers: card.drivers,
        };
        if transport == Transport::Mmio {
            assert_eq!(
                moved.rig.interrupt_cause() & 2,
                2,
                "the configuration changed"
            );
        }
        assert_eq!(moved.config(6, 2), 3, "up, and to be announced");
        assert_eq!(moved.command(&[3, 0]), 0);
        assert_eq!(moved.config(6, 2), 1);
        // The buffers that were taken are still there; the frame that waited for more of them is lost.
        moved.network.give(frame(150).into());
        moved.rig.poll();
        let lens: Vec<u32> = std::iter::from_fn(|| moved.drivers[0].take_used())
            .map(|used| used.1)
            .collect();
        assert_eq!(lens, [100, 62]);
        moved.rig.set_status(0);
        assert!(moved.network.resets() > 0);
    }
}
