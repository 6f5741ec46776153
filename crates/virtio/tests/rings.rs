//! Rings of both formats: against each other, against their rules, and split rings against `virtio-queue`.

use caisson_memory::{Gpa, MemoryView};
use caisson_virtio::{
    Fault,
    queue::{Chain, Queue, RingFeatures, RingPlace},
    testing::{Driver, RAM, exercise_ring, memory},
};
use proptest::prelude::*;

/// A ring of `size` entries whose parts are far from each other.
fn place(size: u16) -> RingPlace {
    RingPlace {
        size,
        descriptors: 0x1000,
        driver: 0x8_1000,
        device: 0x9_2000,
    }
}

const TABLES: u64 = 0xa_0000;

fn features(bits: u8) -> RingFeatures {
    RingFeatures {
        packed: bits & 1 != 0,
        indirect: bits & 2 != 0,
        event_idx: bits & 4 != 0,
        in_order: bits & 8 != 0,
    }
}

fn rig(size: u16, features: RingFeatures) -> (MemoryView, Driver, Queue) {
    let memory = memory();
    let driver = Driver::new(&memory, place(size), features);
    let queue = Queue::new(3, place(size), features).unwrap();
    (memory, driver, queue)
}

fn put(memory: &MemoryView, gpa: u64, bytes: &[u8]) {
    memory.write(Gpa(gpa), bytes).unwrap();
}

#[test]
fn buffers_go_round_the_ring_many_times_in_every_combination() {
    for bits in 0..16 {
        let features = features(bits);
        let sizes: &[u16] = if features.packed {
            &[1, 2, 3, 7, 16]
        } else {
            &[1, 2, 4, 16]
        };
        for &size in sizes {
            let (memory, mut driver, mut queue) = rig(size, features);
            for round in 0..200u32 {
                let mut sent = Vec::new();
                while driver.room() > 0 {
                    let tag = 0x2_0000 + 64 * (round as u64 % 100);
                    let two = driver.room() > 1 && round % 3 == 0;
                    let segments = [(tag, 16 + round, false), (tag + 32, 8, true)];
                    let table = (features.indirect && round % 2 == 0)
                        .then(|| TABLES + 0x100 * sent.len() as u64);
                    let used = if two || table.is_some() { 2 } else { 1 };
                    sent.push(driver.add(&segments[..used], table).unwrap());
                }
                driver.publish();
                let mut chains = Vec::new();
                loop {
                    let mut chain = Chain::default();
                    if !queue.pop(&memory, &mut chain).unwrap() {
                        break;
                    }
                    assert_eq!(chain.readable_len(), u64::from(16 + round));
                    chains.push(chain);
                }
                let seen: Vec<u16> = chains.iter().map(Chain::id).collect();
                assert_eq!(seen, sent, "{features:?} of {size}");
                assert_eq!(usize::from(queue.in_flight()), sent.len());
                // Backwards: an in-order ring puts them right.
                for (n, chain) in chains.iter().enumerate().rev() {
                    queue.complete(&memory, chain, n as u32).unwrap();
                }
                queue.flush(&memory).unwrap();
                let mut expected: Vec<_> = (0..).zip(&sent).map(|(n, id)| (*id, n)).collect();
                if !features.in_order {
                    expected.reverse();
                }
                let used: Vec<_> = core::iter::from_fn(|| driver.take_used()).collect();
                assert_eq!(used, expected, "{features:?} of {size}");
                assert_eq!((driver.room(), queue.in_flight()), (size, 0));
            }
        }
    }
}

#[test]
fn a_driver_that_was_told_to_keep_quiet_is_asked_to_notify_before_the_ring_is_left() {
    for bits in 0..8 {
        let features = features(bits);
        let (memory, mut driver, mut queue) = rig(4, features);
        let mut chain = Chain::default();
        assert!(!queue.pop(&memory, &mut chain).unwrap());
        for _ in 0..20 {
            driver.add(&[(0x2_0000, 1, false)], None).unwrap();
            assert!(
                driver.publish(),
                "the first after an empty ring: {features:?}"
            );
            assert!(queue.pop(&memory, &mut chain).unwrap());
            driver.add(&[(0x2_0000, 1, false)], None).unwrap();
            assert!(!driver.publish(), "while the device looks: {features:?}");
            let mut second = Chain::default();
            assert!(queue.pop(&memory, &mut second).unwrap());
            let mut none = Chain::default();
            assert!(!queue.pop(&memory, &mut none).unwrap());
            for chain in [&chain, &second] {
                queue.complete(&memory, chain, 0).unwrap();
                driver_takes(&memory, &mut queue, &mut driver);
            }
        }
    }
}

fn driver_takes(memory: &MemoryView, queue: &mut Queue, driver: &mut Driver) {
    queue.flush(memory).unwrap();
    assert!(driver.take_used().is_some());
}

#[test]
fn interrupts_come_when_wanted_and_once_for_a_batch() {
    for bits in 0..8 {
        let features = features(bits);
        let (memory, mut driver, mut queue) = rig(4, features);
        driver.want_interrupts(true);
        for round in 0..30 {
            for _ in 0..3 {
                driver.add(&[(0x2_0000, 1, false)], None).unwrap();
            }
            driver.publish();
            for n in 0..3 {
                let mut chain = Chain::default();
                assert!(queue.pop(&memory, &mut chain).unwrap());
                queue.complete(&memory, &chain, n).unwrap();
            }
            let wanted = round % 3 != 1;
            driver.want_interrupts(wanted);
            assert_eq!(
                queue.flush(&memory),
                Ok(wanted),
                "{features:?}, round {round}"
            );
            assert_eq!(queue.flush(&memory), Ok(false), "nothing new");
            while driver.take_used().is_some() {}
        }
    }
}

/// What a device makes of a ring that was written by hand.
fn first(
    features: RingFeatures,
    size: u16,
    write: impl FnOnce(&MemoryView),
) -> Result<bool, Fault> {
    let (memory, _, mut queue) = rig(size, features);
    write(&memory);
    queue.pop(&memory, &mut Chain::default())
}

fn descriptor(memory: &MemoryView, at: u64, gpa: u64, len: u32, words: [u16; 2]) {
    put(memory, at, &gpa.to_le_bytes());
    put(memory, at + 8, &len.to_le_bytes());
    put(memory, at + 12, &words[0].to_le_bytes());
    put(memory, at + 14, &words[1].to_le_bytes());
}

#[test]
fn a_broken_split_ring_is_a_fault_not_a_hang() {
    let split = features(2);
    let available = |memory: &MemoryView, count: u16, head: u16| {
        put(memory, 0x8_1002, &count.to_le_bytes());
        put(memory, 0x8_1004, &head.to_le_bytes());
    };
    let queue = 3;
    let loops = first(split, 8, |memory| {
        descriptor(memory, 0x1000, 0x2_0000, 1, [1, 1]);
        descriptor(memory, 0x1010, 0x2_0000, 1, [1, 0]);
        available(memory, 1, 0);
    });
    assert_eq!(loops, Err(Fault::ChainTooLong { queue }));
    let too_many = first(split, 8, |memory| available(memory, 9, 0));
    assert_eq!(too_many, Err(Fault::TooManyAvailable { queue }));
    let head = first(split, 8, |memory| available(memory, 1, 8));
    assert_eq!(head, Err(Fault::DescriptorIndex { queue, index: 8 }));
    let next = first(split, 8, |memory| {
        descriptor(memory, 0x1000, 0x2_0000, 1, [1, 0xffff]);
        available(memory, 1, 0);
    });
    assert_eq!(
        next,
        Err(Fault::DescriptorIndex {
            queue,
            index: 0xffff
        })
    );
    let order = first(split, 8, |memory| {
        descriptor(memory, 0x1000, 0x2_0000, 1, [3, 1]);
        descriptor(memory, 0x1010, 0x2_0000, 1, [0, 0]);
        available(memory, 1, 0);
    });
    assert_eq!(order, Err(Fault::Order { queue }));
    for (len, flags, table_flags) in [(0, 4, 0), (24, 4, 0), (16, 5, 0), (16, 4, 4)] {
        let indirect = first(split, 8, |memory| {
            descriptor(memory, 0x1000, TABLES, len, [flags, 0]);
            descriptor(memory, TABLES, 0x2_0000, 16, [table_flags, 0]);
            available(memory, 1, 0);
        });
        assert_eq!(indirect, Err(Fault::Indirect { queue }));
    }
    let not_negotiated = first(features(0), 8, |memory| {
        descriptor(memory, 0x1000, TABLES, 16, [4, 0]);
        available(memory, 1, 0);
    });
    assert_eq!(not_negotiated, Err(Fault::Indirect { queue }));
    // A table that leaves memory, one that wraps around, and one that loops for as long as a chain may be.
    for table in [RAM - 16, u64::MAX - 15] {
        let outside = first(split, 8, |memory| {
            descriptor(memory, 0x1000, table, 64, [4, 0]);
            if table < RAM {
                descriptor(memory, table, 0x2_0000, 1, [1, 1]);
            }
            available(memory, 1, 0);
        });
        assert!(matches!(outside, Err(Fault::Memory { .. })), "{outside:?}");
    }
    let endless = first(split, 8, |memory| {
        descriptor(memory, 0x1000, TABLES, 32, [4, 0]);
        descriptor(memory, TABLES, 0x2_0000, 1, [1, 1]);
        descriptor(memory, TABLES + 16, 0x2_0000, 1, [1, 0]);
        available(memory, 1, 0);
    });
    assert_eq!(endless, Err(Fault::ChainTooLong { queue }));
}

#[test]
fn a_broken_packed_ring_is_a_fault_not_a_hang() {
    const AVAILABLE: u16 = 0x80;
    let packed = features(3);
    let queue = 3;
    let endless = first(packed, 5, |memory| {
        for slot in 0..5 {
            descriptor(memory, 0x1000 + 16 * slot, 0x2_0000, 1, [0, AVAILABLE | 1]);
        }
    });
    assert_eq!(endless, Err(Fault::ChainTooLong { queue }));
    let order = first(packed, 5, |memory| {
        descriptor(memory, 0x1010, 0x2_0000, 1, [0, AVAILABLE]);
        descriptor(memory, 0x1000, 0x2_0000, 1, [0, AVAILABLE | 3]);
    });
    assert_eq!(order, Err(Fault::Order { queue }));
    for (len, flags, table_flags) in [(0, 4, 0), (24, 4, 0), (16, 5, 0), (16, 4, 4)] {
        let indirect = first(packed, 5, |memory| {
            descriptor(memory, 0x1000, TABLES, len, [0, AVAILABLE | flags]);
            descriptor(memory, TABLES, 0x2_0000, 16, [0, table_flags]);
        });
        assert_eq!(indirect, Err(Fault::Indirect { queue }));
    }
    let huge = first(packed, 5, |memory| {
        descriptor(memory, 0x1000, 0, 0x8000_0000, [0, AVAILABLE | 4]);
    });
    assert_eq!(huge, Err(Fault::ChainTooLong { queue }));
    let wraps = first(packed, 5, |memory| {
        descriptor(memory, 0x1000, u64::MAX - 7, 32, [0, AVAILABLE | 4]);
    });
    assert_eq!(wraps, Err(Fault::Indirect { queue }));
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let queue = 3;
    for (size, packed, sound) in [(0, true, false), (3, false, false), (3, true, true)] {
        let features = RingFeatures {
            packed,
            ..RingFeatures::default()
        };
        let made = Queue::new(queue, place(size), features).map(drop);
        let refused = Err(Fault::QueueSize { queue, size });
        assert_eq!(made, if sound { Ok(()) } else { refused });
    }
    for address in [0x1008, u64::MAX - 0xf] {
        let place = RingPlace {
            descriptors: address,
            ..place(4)
        };
        let made = Queue::new(queue, place, RingFeatures::default()).map(drop);
        assert_eq!(made, Err(Fault::RingAddress { queue, address }));
    }
    // Where there is no memory, the first use tells.
    let nowhere = RingPlace {
        driver: RAM,
        ..place(4)
    };
    let mut made = Queue::new(queue, nowhere, RingFeatures::default()).unwrap();
    let used = made.pop(&memory(), &mut Chain::default());
    assert!(matches!(used, Err(Fault::Memory { .. })));
}

#[test]
fn states_that_cannot_be_are_refused() {
    let (memory, mut driver, mut queue) = rig(4, features(8));
    driver.add(&[(0x2_0000, 1, false)], None).unwrap();
    driver.publish();
    assert!(queue.pop(&memory, &mut Chain::default()).unwrap());
    let state = queue.state();
    assert!(Queue::restore(3, &state, features(8)).is_ok());
    for other in [features(0), features(9), features(12)] {
        assert!(Queue::restore(3, &state, other).is_err());
    }
}

/// The same ring given to `virtio-queue`.
#[cfg(unix)]
mod oracle {
    use super::*;
    use virtio_queue::{Queue as Theirs, QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    fn theirs(place: RingPlace, event_idx: bool) -> (GuestMemoryMmap, Theirs) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let mut queue = Theirs::new(place.size).unwrap();
        queue.set_size(place.size);
        queue.set_desc_table_address(Some(place.descriptors as u32), Some(0));
        queue.set_avail_ring_address(Some(place.driver as u32), Some(0));
        queue.set_used_ring_address(Some(place.device as u32), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        (memory, queue)
    }

    /// One random descriptor: most often something that could be.
    fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
        let address = prop_oneof![4 => 0x2_0000u64..0x2_1000, 1 => Just(TABLES), 1 => any::<u64>()];
        let len =
            prop_oneof![4 => 1u32..64, 2 => (1u32..6).prop_map(|n| n * 16), 1 => any::<u32>()];
        let flags = prop_oneof![6 => 0u16..4, 1 => Just(4u16), 1 => 0u16..8];
        let next = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
        (address, len, flags, next)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_same_chains_come_out_of_the_same_ring(
            ring in prop::collection::vec(any_descriptor(), 8),
            table in prop::collection::vec(any_descriptor(), 8),
            heads in prop::collection::vec(0u16..8, 8),
            count in 0u16..=8,
            event_idx: bool,
            used_event in 0u16..10,
        ) {
            let features = RingFeatures { indirect: true, event_idx, ..RingFeatures::default() };
            let place = place(8);
            let ours = memory();
            let (their_memory, mut their_queue) = theirs(place, event_idx);
            let both = |gpa: u64, bytes: &[u8]| {
                put(&ours, gpa, bytes);
                their_memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
            };
            for (base, descriptors) in [(place.descriptors, &ring), (TABLES, &table)] {
                for (n, (gpa, len, flags, next)) in descriptors.iter().enumerate() {
                    let at = base + 16 * n as u64;
                    both(at, &gpa.to_le_bytes());
                    both(at + 8, &len.to_le_bytes());
                    both(at + 12, &flags.to_le_bytes());
                    both(at + 14, &next.to_le_bytes());
                }
            }
            both(place.driver + 2, &count.to_le_bytes());
            for (n, head) in heads.iter().enumerate() {
                both(place.driver + 4 + 2 * n as u64, &head.to_le_bytes());
            }
            both(place.driver + 4 + 16, &used_event.to_le_bytes());

            let mut queue = Queue::new(0, place, features).unwrap();
            for _ in 0..count {
                let mut chain = Chain::default();
                let popped = queue.pop(&ours, &mut chain);
                let their_chain = their_queue.iter(&their_memory).unwrap().next();
                let Some(their_chain) = their_chain else {
                    prop_assert!(popped != Ok(true));
                    return Ok(());
                };
                let head = their_chain.head_index();
                let theirs: Vec<_> = their_chain
                    .map(|d| (d.addr().0, d.len(), d.is_write_only()))
                    .collect();
                match popped {
                    Ok(true) => {
                        prop_assert_eq!(head, chain.id());
                        let mine: Vec<_> = chain.readable().iter().map(|s| (s.gpa, s.len, false))
                            .chain(chain.writable().iter().map(|s| (s.gpa, s.len, true)))
                            .collect();
                        // Theirs ends where the bytes exceed 2^32; ours takes such a chain, and refuses to use it.
                        let total = chain.readable_len() + chain.writable_len();
                        if total < 1 << 32 {
                            let theirs: Vec<_> = theirs.into_iter().filter(|s| s.1 > 0).collect();
                            prop_assert_eq!(mine, theirs);
                        }
                        queue.complete(&ours, &chain, 5).unwrap();
                        their_queue.add_used(&their_memory, head, 5).unwrap();
                    }
                    // What breaks a rule ends theirs early, without saying so.
                    Err(fault) => {
                        let early = theirs.len() < 9;
                        prop_assert!(early, "{} but {:?}", fault, theirs);
                        return Ok(());
                    }
                    Ok(false) => prop_assert!(false, "theirs has a chain"),
                }
            }
            let wanted = queue.flush(&ours).unwrap();
            if count > 0 {
                prop_assert_eq!(wanted, their_queue.needs_notification(&their_memory).unwrap());
            }
            let mut chain = Chain::default();
            prop_assert_eq!(queue.pop(&ours, &mut chain), Ok(false));
            prop_assert_eq!(their_queue.enable_notification(&their_memory).unwrap(), false);
            // Used ring, index and what is asked of the driver: byte for byte.
            let mut our_used = [0; 4 + 64 + 2];
            let mut their_used = [0; 4 + 64 + 2];
            ours.read(Gpa(place.device), &mut our_used).unwrap();
            their_memory.read_slice(&mut their_used, GuestAddress(place.device)).unwrap();
            prop_assert_eq!(our_used, their_used);
        }
    }
}

proptest! {
    /// The two formats carry the same buffers: what goes in comes out alike, whatever is added, given back and saved.
    #[test]
    fn split_and_packed_rings_behave_alike(
        steps in prop::collection::vec((0u8..5, any::<u16>()), 0..200),
        bits in 0u8..8,
    ) {
        let mut outcomes = Vec::new();
        for packed in [false, true] {
            let features = RingFeatures { packed, ..features(bits << 1) };
            let (memory, mut driver, mut queue) = rig(8, features);
            let mut log = Vec::new();
            let mut taken: Vec<(u16, Chain)> = Vec::new();
            let mut tags = std::collections::HashMap::new();
            let mut tag = 0u16;
            for (step, value) in &steps {
                match step {
                    0 => {
                        let count = usize::from(value % 3) + 1;
                        let segments: Vec<_> = (0..count)
                            .map(|n| (0x2_0000 + 64 * n as u64, 1 + u32::from(value >> 8), n * 2 >= count))
                            .collect();
                        let table = (features.indirect && value & 8 != 0)
                            .then(|| TABLES + 0x100 * u64::from(tag % 64));
                        if let Some(id) = driver.add(&segments, table) {
                            tags.insert(id, tag);
                            tag += 1;
                            driver.publish();
                        }
                        log.push(format!("room {}", driver.room()));
                    }
                    1 => {
                        let mut chain = Chain::default();
                        if queue.pop(&memory, &mut chain).unwrap() {
                            log.push(format!("{:?} {:?}", chain.readable(), chain.writable()));
                            taken.push((tags[&chain.id()], chain));
                        }
                    }
                    2 if !taken.is_empty() => {
                        let (tag, chain) = taken.swap_remove(usize::from(*value) % taken.len());
                        queue.complete(&memory, &chain, tag.into()).unwrap();
                    }
                    3 => {
                        queue.flush(&memory).unwrap();
                        while let Some((id, written)) = driver.take_used() {
                            prop_assert_eq!(u32::from(tags[&id]), written);
                            log.push(format!("used {written}"));
                        }
                    }
                    _ => {
                        let state = queue.state();
                        queue = Queue::restore(3, &state, features).unwrap();
                    }
                }
            }
            outcomes.push(log);
        }
        prop_assert_eq!(&outcomes[0], &outcomes[1]);
    }

    #[test]
    fn a_hostile_driver_gets_faults(input in prop::collection::vec(any::<u8>(), 0..800)) {
        exercise_ring(&input);
    }
}
