//! Devices under both transports, driven through their registers as a guest does.

mod rig;

use std::sync::atomic::Ordering;

use caisson_device::{Msi, ResetKind, Space, testing::check_state};
use caisson_memory::Gpa;
use caisson_virtio::{feature, rng::Rng, status, testing::exercise_device};
use proptest::prelude::*;

use rig::{
    ECAM, FEATURES, LINE, MMIO, MSIX, REGISTERS, Rig, TRANSPORTS, Transport, World, check_kept,
};

#[test]
fn entropy_fills_buffers_and_interrupts_once() {
    for transport in TRANSPORTS {
        for packed in [
            0,
            feature::RING_PACKED,
            feature::EVENT_IDX | feature::IN_ORDER,
        ] {
            let world = World::new();
            let mut rig = world.place(world.rng(), transport);
            let mut drivers = rig.set_up(FEATURES | packed, 1);
            let driver = &mut drivers[0];
            driver.want_interrupts(true);
            rig.poll();
            for n in 0..3 {
                let gpa = 0x8_0000 + 0x100 * n;
                driver
                    .add(&[(gpa, 16, true), (gpa + 16, 20, true)], None)
                    .unwrap();
            }
            driver.publish();
            rig.woken();
            rig.notify(0);
            assert!(rig.woken(), "{transport:?}");
            rig.poll();
            assert_eq!(rig.lines.edges(LINE), 1);
            assert_eq!(rig.interrupt_cause(), 1);
            let used: Vec<_> = core::iter::from_fn(|| driver.take_used()).collect();
            assert_eq!(
                used.iter().map(|(_, len)| *len).collect::<Vec<_>>(),
                [36; 3]
            );
            let mut bytes = [0; 0x236];
            rig.memory.read(Gpa(0x8_0000), &mut bytes).unwrap();
            assert_eq!(
                bytes[..36],
                core::array::from_fn::<u8, 36, _>(|n| n as u8 + 1)
            );
            assert_eq!(bytes[36], 0, "nothing behind a buffer");
            assert_eq!(bytes[0x100], 37);
            rig.poll();
            assert_eq!(rig.lines.edges(LINE), 1, "nothing new");
        }
    }
}

#[test]
fn a_request_that_waits_for_its_source_goes_on_after_a_restore() {
    for transport in TRANSPORTS {
        for packed in [0, feature::RING_PACKED] {
            let world = World::new();
            let mut rig = world.place(world.rng(), transport);
            let mut drivers = rig.set_up(FEATURES | packed, 1);
            world.counts.dry.store(true, Ordering::SeqCst);
            for n in 0..2 {
                drivers[0]
                    .add(&[(0x8_0000 + 64 * n, 64, true)], None)
                    .unwrap();
            }
            drivers[0].publish();
            rig.poll();
            assert!(drivers[0].take_used().is_none());
            // What the ring holds of the request may be gone by now; the saved state has all of it.
            let mut fresh = world.place(world.rng(), transport);
            fresh.enable();
            check_state(rig.device(), fresh.device());
            world.counts.refill();
            assert!(rig.woken(), "the source wakes the device");
            fresh.poll();
            let used: Vec<_> = core::iter::from_fn(|| drivers[0].take_used()).collect();
            assert_eq!(used.len(), 2);
            assert_eq!(fresh.interrupt_cause(), 1);
            let mut bytes = [0; 128];
            world.memory.read(Gpa(0x8_0000), &mut bytes).unwrap();
            assert_eq!(bytes[..3], [1, 2, 3]);
            assert!(bytes.iter().all(|byte| *byte != 0));
        }
    }
}

#[test]
fn a_source_that_fails_and_a_ring_that_is_broken_need_a_reset_which_helps() {
    for transport in TRANSPORTS {
        let world = World::new();
        let mut rig = world.place(world.rng(), transport);
        let mut drivers = rig.set_up(FEATURES, 1);
        world.counts.broken.store(true, Ordering::SeqCst);
        drivers[0].add(&[(0x8_0000, 64, true)], None).unwrap();
        drivers[0].publish();
        rig.poll();
        assert_eq!(rig.status(), 15 | status::NEEDS_RESET);
        assert_eq!(
            rig.interrupt_cause(),
            2,
            "told by a change of configuration"
        );
        assert!(rig.inspect().contains("source of entropy has failed"));
        assert_eq!(rig.doorbells.get(), [], "nobody is to ring");
        world.counts.broken.store(false, Ordering::SeqCst);
        rig.poll();
        assert_eq!(
            drivers[0].take_used(),
            None,
            "it does nothing before it is reset"
        );
        rig.set_status(0);
        assert_eq!(rig.status(), 0);
        let mut drivers = rig.set_up(FEATURES, 1);
        drivers[0].add(&[(0x8_0000, 64, true)], None).unwrap();
        drivers[0].publish();
        rig.poll();
        assert!(drivers[0].take_used().is_some());
        // Buffers outside of memory, and an available index far ahead.
        drivers[0].add(&[(0x8000_0000, 64, true)], None).unwrap();
        drivers[0].publish();
        rig.poll();
        assert_eq!(rig.status(), 15 | status::NEEDS_RESET);
        assert!(rig.inspect().contains("no guest memory"));
        rig.set_status(0);
        let drivers = rig.set_up(FEATURES, 1);
        let driver_area = drivers[0].place().driver;
        rig.memory.write(Gpa(driver_area + 2), &[9, 0]).unwrap();
        rig.poll();
        assert!(rig.inspect().contains("more buffers are available"));
    }
}

#[test]
fn features_are_a_matter_of_both_sides() {
    for transport in TRANSPORTS {
        let world = World::new();
        let mut rig = world.place(world.rng(), transport);
        rig.enable();
        for (features, accepted) in [
            (0, false),
            (feature::VERSION_1 | 1, false),
            (feature::VERSION_1 | 1 << 33, false),
            (feature::VERSION_1, true),
        ] {
            for value in [0, 1, 3] {
                rig.set_status(value);
            }
            rig.accept(features);
            rig.set_status(11);
            assert_eq!(rig.status() & 8 != 0, accepted, "{features:#x}");
            rig.set_status(15);
            assert_eq!(
                rig.status() & 4 != 0,
                accepted,
                "no driver without features"
            );
        }
        // Bits stay until the reset, and features do not change any more.
        rig.set_status(1);
        assert_eq!(rig.status(), 15);
        rig.accept(FEATURES);
        rig.set_queue(0, feature::VERSION_1);
        rig.select(0);
        if rig.is_pci() {
            rig.write(REGISTERS + 0x3a, 2, 1);
        } else {
            rig.write(MMIO + 0xc0, 4, 1);
        }
        assert!(
            rig.is_queue_enabled(0),
            "a queue's reset was not negotiated"
        );
    }
}

#[test]
fn a_single_queue_can_be_reset_and_used_again() {
    for transport in TRANSPORTS {
        let world = World::new();
        let mut rig = world.place(world.rng(), transport);
        let mut drivers = rig.set_up(FEATURES, 1);
        world.counts.dry.store(true, Ordering::SeqCst);
        drivers[0].add(&[(0x8_0000, 64, true)], None).unwrap();
        drivers[0].publish();
        rig.poll();
        rig.select(0);
        match rig.is_pci() {
            true => rig.write(REGISTERS + 0x3a, 2, 1),
            false => rig.write(MMIO + 0xc0, 4, 1),
        }
        assert!(!rig.is_queue_enabled(0));
        world.counts.refill();
        rig.poll();
        assert_eq!(drivers[0].take_used(), None, "its buffers are forgotten");
        let mut driver = rig.set_queue(0, FEATURES);
        driver.add(&[(0x8_1000, 8, true)], None).unwrap();
        driver.publish();
        rig.poll();
        assert_eq!(driver.take_used().map(|(_, len)| len), Some(8));
    }
}

#[test]
fn a_console_carries_bytes_both_ways_and_waits_for_a_full_end() {
    for transport in TRANSPORTS {
        let world = World::new();
        let mut rig = world.place(world.console(), transport);
        let features = FEATURES | 1 | 4;
        let mut drivers = rig.set_up(features, 2);
        rig.poll();
        rig.memory.write(Gpa(0x8_0000), b"hello, ").unwrap();
        rig.memory.write(Gpa(0x8_1000), b"world").unwrap();
        drivers[1]
            .add(&[(0x8_0000, 7, false), (0x8_1000, 5, false)], None)
            .unwrap();
        drivers[1].publish();
        world.output.set_full(true);
        rig.poll();
        assert_eq!(
            (world.output.take(), drivers[1].take_used()),
            (vec![], None)
        );
        // With the output waiting, the machine moves.
        let mut moved = world.place(world.console(), transport);
        moved.enable();
        check_state(rig.device(), moved.device());
        let mut rig = moved;
        world.output.set_full(false);
        rig.poll();
        assert_eq!(world.output.take(), b"hello, world");
        assert!(drivers[1].take_used().is_some());

        let typed: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
        assert_eq!(rig.update(|console| console.receive(&typed)), 4096);
        for n in 0..5 {
            drivers[0]
                .add(&[(0x9_0000 + 1000 * n, 1000, true)], None)
                .unwrap();
        }
        drivers[0].publish();
        rig.poll();
        assert!(
            world.room.0.load(Ordering::SeqCst) > 0,
            "there is room again"
        );
        assert_eq!(rig.update(|console| console.receive(&typed[4096..])), 904);
        rig.poll();
        let got: Vec<u32> = core::iter::from_fn(|| drivers[0].take_used())
            .map(|(_, len)| len)
            .collect();
        assert_eq!(got, [1000, 1000, 1000, 1000, 96]);
        let mut bytes = vec![0; 4096];
        rig.memory.read(Gpa(0x9_0000), &mut bytes).unwrap();
        assert_eq!(bytes, typed[..4096]);
        assert!(rig.inspect().contains("input waiting: 904"));
    }
}

#[test]
fn a_console_tells_its_size_and_takes_last_words() {
    for transport in TRANSPORTS {
        let world = World::new();
        let mut rig = world.place(world.console(), transport);
        rig.enable();
        let (config, generation) = match transport {
            Transport::Pci => (REGISTERS + 0x2000, (REGISTERS + 0x15, 1)),
            Transport::Mmio => (MMIO + 0x100, (MMIO + 0xfc, 4)),
        };
        rig.write(config + 8, 4, u64::from(b'!'));
        assert_eq!(world.output.take(), b"!", "before any driver");
        rig.set_up(FEATURES | 1, 2);
        let before = rig.read(generation.0, generation.1);
        rig.update(|console| console.set_size(132, 43));
        assert!(rig.lines.level(LINE));
        assert_eq!(rig.interrupt_cause(), 2);
        assert_ne!(rig.read(generation.0, generation.1), before);
        assert_eq!(rig.read(config, 4), 43 << 16 | 132);
        rig.update(|console| console.set_size(132, 43));
        assert!(!rig.lines.level(LINE), "nothing changed");
    }
}

#[test]
fn pci_interrupts_go_to_the_vector_of_their_queue() {
    let world = World::new();
    let mut rig = world.place(world.rng(), Transport::Pci);
    rig.enable();
    let config = ECAM + (1 << 15);
    // The list of capabilities, up to MSI-X.
    let mut at = rig.read(config + 0x34, 1);
    let mut kinds = Vec::new();
    while rig.read(config + at, 1) == 9 {
        kinds.push(rig.read(config + at + 3, 1));
        at = rig.read(config + at + 1, 1);
    }
    assert_eq!(kinds, [1, 3, 4, 2, 5], "one of each kind");
    assert_eq!(rig.read(config + at, 1), 0x11);
    assert_eq!(rig.read(config + at + 2, 2), 1, "two vectors");
    rig.write(config + at + 2, 2, 0x8000);
    for vector in 0..2 {
        rig.write(MSIX + 16 * vector, 8, 0xfee0_0000);
        rig.write(MSIX + 16 * vector + 8, 4, 0x40 + vector);
        rig.write(MSIX + 16 * vector + 12, 4, 0);
    }
    let mut drivers = rig.set_up(FEATURES, 1);
    rig.write(REGISTERS + 0x10, 2, 0);
    rig.select(0);
    rig.write(REGISTERS + 0x1a, 2, 9);
    assert_eq!(
        rig.read(REGISTERS + 0x1a, 2),
        0xffff,
        "there is no vector 9"
    );
    rig.write(REGISTERS + 0x1a, 2, 1);
    assert_eq!(rig.read(REGISTERS + 0x1a, 2), 1);
    let mut send = |rig: &mut Rig<Rng>, gpa| {
        drivers[0].add(&[(gpa, 8, true)], None).unwrap();
        drivers[0].publish();
        rig.poll();
        while drivers[0].take_used().is_some() {}
    };
    let message = |data| Msi {
        address: 0xfee0_0000,
        data,
    };
    send(&mut rig, 0x8_0000);
    assert_eq!(rig.msis.take(), [message(0x41)]);
    assert!(!rig.lines.level(LINE));
    rig.write(MSIX + 16 + 12, 4, 1);
    send(&mut rig, 0x8_0000);
    assert_eq!(rig.msis.take(), []);
    rig.write(MSIX + 16 + 12, 4, 0);
    assert_eq!(rig.msis.take(), [message(0x41)], "it was pending");
    send(&mut rig, 0x8000_0000);
    assert_eq!(rig.msis.take(), [message(0x40)], "the need for a reset");
}

#[test]
fn doorbells_are_set_while_the_device_works_and_follow_its_range() {
    let world = World::new();
    let mut rig = world.place(world.console(), Transport::Pci);
    assert_eq!(rig.doorbells.get(), []);
    rig.set_up(FEATURES, 2);
    let at = |base: u64| vec![(Space::Mmio, base), (Space::Mmio, base + 4)];
    assert_eq!(rig.doorbells.get(), at(REGISTERS + 0x3000));
    let config = ECAM + (1 << 15);
    rig.write(config + 0x14, 4, 2);
    assert_eq!(rig.doorbells.get(), at(0x2_c000_3000));
    rig.write(config + 4, 2, 4);
    assert_eq!(rig.doorbells.get(), [], "nothing is decoded");
    rig.write(config + 4, 2, 6);
    rig.device().reset(ResetKind::System);
    assert_eq!(rig.doorbells.get(), []);

    let mut rig = world.place(world.rng(), Transport::Mmio);
    rig.set_up(FEATURES, 1);
    assert_eq!(rig.doorbells.get(), [(Space::Mmio, MMIO + 0x50)]);
    rig.set_status(0);
    assert_eq!(rig.doorbells.get(), []);
}

#[test]
fn no_bus_master_no_memory_access() {
    let world = World::new();
    let mut rig = world.place(world.rng(), Transport::Pci);
    let mut drivers = rig.set_up(FEATURES, 1);
    let config = ECAM + (1 << 15);
    rig.write(config + 4, 2, 2);
    drivers[0].add(&[(0x8_0000, 8, true)], None).unwrap();
    drivers[0].publish();
    rig.notify(0);
    rig.poll();
    assert_eq!(drivers[0].take_used(), None);
    rig.woken();
    rig.write(config + 4, 2, 6);
    assert!(rig.woken());
    rig.poll();
    assert!(drivers[0].take_used().is_some());
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let world = World::new();
    let mut rig = world.place(world.rng(), Transport::Pci);
    let config = ECAM + (1 << 15);
    let mut at = rig.read(config + 0x34, 1);
    while rig.read(config + at + 3, 1) != 5 {
        at = rig.read(config + at + 1, 1);
    }
    let window = config + at;
    let aim = |rig: &mut Rig<Rng>, offset: u64, len: u64| {
        rig.write(window + 4, 1, 0);
        rig.write(window + 8, 4, offset);
        rig.write(window + 12, 4, len);
    };
    // No range is decoded, and it works all the same.
    aim(&mut rig, 0x12, 2);
    assert_eq!(rig.read(window + 16, 4), 1, "one queue");
    aim(&mut rig, 0x14, 1);
    rig.write(window + 16, 1, 3);
    assert_eq!(rig.read(window + 16, 1), 3);
    for (offset, len) in [(0x11, 2), (0, 3), (0, 0x100)] {
        aim(&mut rig, offset, len);
        assert_eq!(rig.read(window + 16, 4), 0, "no such access");
    }
}

#[test]
fn impossible_states_are_refused() {
    let world = World::new();
    let mut rng = world.place(world.rng(), Transport::Pci);
    let drivers = rng.set_up(FEATURES, 1);
    drop(drivers);
    let record = rng.device().save().unwrap();
    let mut console = world.place(world.console(), Transport::Pci);
    assert!(console.device().restore(&record).is_err(), "another device");
    let mut mmio = world.place(world.rng(), Transport::Mmio);
    assert!(mmio.device().restore(&record).is_err(), "another transport");
    assert!(
        world
            .place(world.rng(), Transport::Pci)
            .device()
            .restore(&record)
            .is_ok()
    );
}

/// Devices in the middle of their work, as version 1 saved them: they restore for ever, to the same state. A schema that
/// changes keeps reading these.
#[test]
fn records_of_version_1_restore() {
    for (name, transport, packed) in [
        ("rng-pci-split", Transport::Pci, 0),
        (
            "rng-mmio-packed",
            Transport::Mmio,
            feature::RING_PACKED | feature::IN_ORDER,
        ),
    ] {
        let world = World::new();
        let mut rig = world.place(world.rng(), transport);
        let mut drivers = rig.set_up(FEATURES | packed, 1);
        world.counts.dry.store(true, Ordering::SeqCst);
        drivers[0]
            .add(&[(0x8_0000, 64, true), (0x8_1000, 1, true)], None)
            .unwrap();
        drivers[0].publish();
        rig.poll();
        check_kept(
            name,
            rig.device(),
            world.place(world.rng(), transport).device(),
        );
    }
    let world = World::new();
    let mut rig = world.place(world.console(), Transport::Pci);
    let mut drivers = rig.set_up(FEATURES, 2);
    world.output.set_full(true);
    drivers[1].add(&[(0x8_0000, 7, false)], None).unwrap();
    drivers[1].publish();
    rig.poll();
    rig.update(|console| {
        console.receive(b"typed");
        console.set_size(80, 25);
    });
    check_kept(
        "console-pci",
        rig.device(),
        world.place(world.console(), Transport::Pci).device(),
    );
}

proptest! {
    #[test]
    fn a_hostile_driver_breaks_nothing(input in prop::collection::vec(any::<u8>(), 0..1500)) {
        exercise_device(&input);
    }
}
