//! Devices under both transports, driven through their registers as a guest does.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Wake, Waker},
};

use caisson_device::{
    Access, Device, Inspector, Lines, Msi, Outcome, ResetKind, Space,
    testing::{
        RecordedBytes, RecordedClaims, RecordedDoorbells, RecordedLines, RecordedMsis, check_state,
    },
};
use caisson_memory::{Gpa, MemoryView};
use caisson_pci::{FunctionAddress, FunctionHandles, Place};
use caisson_virtio::{
    VirtioDevice,
    console::Console,
    feature,
    mmio::{MmioHandles, VirtioMmio},
    pci::{PciHandles, Ranges, VirtioPci},
    queue::{RingFeatures, RingPlace},
    rng::Rng,
    status,
    testing::{Counting, Counts, Driver, exercise_device, memory},
};
use proptest::prelude::*;

const LINE: u32 = 20;
const ECAM: u64 = 0xe000_0000;
const REGISTERS: u64 = 0xc000_0000;
const MSIX: u64 = 0xc000_8000;
const MMIO: u64 = 0xf000_0000;
/// What a driver here negotiates besides version 1.
const FEATURES: u64 = feature::VERSION_1 | feature::INDIRECT_DESC | feature::RING_RESET;

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Pci,
    Mmio,
}

const TRANSPORTS: [Transport; 2] = [Transport::Pci, Transport::Mmio];

/// What a device is wired to; it outlives the device, as memory and the host's ends do when a machine moves.
struct World {
    memory: MemoryView,
    counts: Arc<Counts>,
    output: Arc<RecordedBytes>,
    room: Arc<Wakes>,
}

impl World {
    fn new() -> Self {
        Self {
            memory: memory(),
            counts: Arc::default(),
            output: RecordedBytes::new(),
            room: Arc::default(),
        }
    }

    fn rng(&self) -> Rng {
        Rng::new(Box::new(Counting(self.counts.clone())))
    }

    fn console(&self) -> Console {
        Console::new(self.output.clone(), Some(Waker::from(self.room.clone())))
    }

    fn place<D: VirtioDevice + 'static>(&self, device: D, transport: Transport) -> Rig<D> {
        Rig::new(device, transport, self.memory.clone())
    }
}

enum Under<D> {
    Pci(Box<VirtioPci<D>>),
    Mmio(VirtioMmio<D>),
}

/// A device under a transport, and everything it affects.
struct Rig<D> {
    under: Under<D>,
    memory: MemoryView,
    claims: Arc<RecordedClaims>,
    msis: Arc<RecordedMsis>,
    lines: Arc<RecordedLines>,
    doorbells: Arc<RecordedDoorbells>,
    wakes: Arc<Wakes>,
}

impl<D: VirtioDevice + 'static> Rig<D> {
    fn new(device: D, transport: Transport, memory: MemoryView) -> Self {
        let (claims, msis, lines, doorbells) = (
            RecordedClaims::new(),
            RecordedMsis::new(),
            RecordedLines::new(),
            RecordedDoorbells::new(),
        );
        let line = Lines::new(lines.clone()).line(LINE).unwrap();
        let under = match transport {
            Transport::Pci => {
                let place = Place {
                    address: FunctionAddress::new(1, 0).unwrap(),
                    ecam: ECAM,
                };
                let ranges = Ranges {
                    registers: REGISTERS,
                    msix: MSIX,
                };
                let handles = PciHandles {
                    function: FunctionHandles {
                        claims: claims.clone(),
                        msi: msis.clone(),
                        line: Some(line),
                    },
                    memory: memory.clone(),
                    doorbells: Some(doorbells.clone()),
                };
                let device = VirtioPci::new("d", device, place, ranges, handles).unwrap();
                Under::Pci(Box::new(device))
            }
            Transport::Mmio => {
                let handles = MmioHandles {
                    line,
                    memory: memory.clone(),
                    doorbells: Some(doorbells.clone()),
                };
                Under::Mmio(VirtioMmio::new("d", device, MMIO, handles))
            }
        };
        let mut rig = Self {
            under,
            memory,
            claims,
            msis,
            lines,
            doorbells,
            wakes: Arc::default(),
        };
        rig.device().reset(ResetKind::PowerOn);
        rig.poll();
        rig
    }

    fn device(&mut self) -> &mut dyn Device {
        match &mut self.under {
            Under::Pci(device) => &mut **device,
            Under::Mmio(device) => device,
        }
    }

    fn update<T>(&mut self, change: impl FnOnce(&mut D) -> T) -> T {
        match &mut self.under {
            Under::Pci(device) => device.update(change),
            Under::Mmio(device) => device.update(change),
        }
    }

    fn poll(&mut self) {
        let waker = Waker::from(self.wakes.clone());
        self.device().poll(&mut Context::from_waker(&waker));
    }

    fn woken(&self) -> bool {
        self.wakes.0.swap(0, Ordering::SeqCst) > 0
    }

    fn access(&mut self, address: u64) -> Access {
        let claims = self.claims.clone();
        caisson_device::testing::access(self.device(), Space::Mmio, address)
            .or_else(|| claims.access(Space::Mmio, address))
            .unwrap_or_else(|| panic!("nothing answers at {address:#x}"))
    }

    fn write(&mut self, address: u64, len: usize, value: u64) {
        let at = self.access(address);
        let done = self.device().write(at, &value.to_le_bytes()[..len]);
        assert_eq!(done, Outcome::Done);
    }

    fn read(&mut self, address: u64, len: usize) -> u64 {
        let at = self.access(address);
        let mut data = [0xff; 8];
        assert_eq!(self.device().read(at, &mut data[..len]), Outcome::Done);
        data[len..].fill(0);
        u64::from_le_bytes(data)
    }

    fn is_pci(&self) -> bool {
        matches!(self.under, Under::Pci(_))
    }

    fn status(&mut self) -> u8 {
        match self.is_pci() {
            true => self.read(REGISTERS + 0x14, 1) as u8,
            false => self.read(MMIO + 0x70, 4) as u8,
        }
    }

    fn set_status(&mut self, value: u8) {
        match self.is_pci() {
            true => self.write(REGISTERS + 0x14, 1, value.into()),
            false => self.write(MMIO + 0x70, 4, value.into()),
        }
    }

    /// Lets the device decode and write to memory.
    fn enable(&mut self) {
        if self.is_pci() {
            self.write(ECAM + (1 << 15) + 4, 2, 6);
        }
    }

    fn accept(&mut self, features: u64) {
        for select in 0..2u64 {
            let half = features >> (32 * select) & 0xffff_ffff;
            let (at, value) = match self.is_pci() {
                true => (REGISTERS + 8, REGISTERS + 12),
                false => (MMIO + 0x24, MMIO + 0x20),
            };
            self.write(at, 4, select);
            self.write(value, 4, half);
        }
    }

    fn select(&mut self, queue: u16) {
        match self.is_pci() {
            true => self.write(REGISTERS + 0x16, 2, queue.into()),
            false => self.write(MMIO + 0x30, 4, queue.into()),
        }
    }

    /// Enables `queue` of 8 entries and gives the driver's side of it.
    fn set_queue(&mut self, queue: u16, features: u64) -> Driver {
        let base = 0x1_0000 * (u64::from(queue) + 1);
        let place = RingPlace {
            size: 8,
            descriptors: base,
            driver: base + 0x1000,
            device: base + 0x2000,
        };
        let driver = Driver::new(&self.memory, place, RingFeatures::from_bits(features));
        self.select(queue);
        if self.is_pci() {
            self.write(REGISTERS + 0x18, 2, 8);
            // One address in two halves.
            self.write(REGISTERS + 0x20, 4, place.descriptors);
            self.write(REGISTERS + 0x24, 4, 0);
            self.write(REGISTERS + 0x28, 8, place.driver);
            self.write(REGISTERS + 0x30, 8, place.device);
            self.write(REGISTERS + 0x1c, 2, 1);
        } else {
            self.write(MMIO + 0x38, 4, 8);
            for (at, gpa) in [
                (0x80, place.descriptors),
                (0x90, place.driver),
                (0xa0, place.device),
            ] {
                self.write(MMIO + at, 4, gpa);
                self.write(MMIO + at + 4, 4, 0);
            }
            self.write(MMIO + 0x44, 4, 1);
        }
        driver
    }

    fn is_queue_enabled(&mut self, queue: u16) -> bool {
        self.select(queue);
        match self.is_pci() {
            true => self.read(REGISTERS + 0x1c, 2) == 1,
            false => self.read(MMIO + 0x44, 4) == 1,
        }
    }

    /// Everything a driver does before it uses the device (§3.1.1), with `queues` queues.
    fn set_up(&mut self, features: u64, queues: u16) -> Vec<Driver> {
        self.enable();
        for value in [0, 1, 3] {
            self.set_status(value);
        }
        self.accept(features);
        self.set_status(11);
        assert_eq!(self.status(), 11, "the features are accepted");
        let drivers = (0..queues).map(|queue| self.set_queue(queue, features));
        let drivers = drivers.collect();
        self.set_status(15);
        drivers
    }

    fn notify(&mut self, queue: u16) {
        match self.is_pci() {
            true => self.write(REGISTERS + 0x3000 + 4 * u64::from(queue), 2, queue.into()),
            false => self.write(MMIO + 0x50, 4, queue.into()),
        }
    }

    /// What interrupted without messages, once.
    fn interrupt_cause(&mut self) -> u64 {
        let cause = match self.is_pci() {
            true => self.read(REGISTERS + 0x1000, 1),
            false => {
                let cause = self.read(MMIO + 0x60, 4);
                self.write(MMIO + 0x64, 4, cause);
                cause
            }
        };
        assert!(!self.lines.level(LINE), "acknowledged");
        cause
    }

    fn inspect(&mut self) -> String {
        let mut tree = Inspector::new();
        self.device().inspect(&mut tree);
        tree.to_string()
    }
}

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

/// The record in `tests/kept/NAME` restores into `fresh`, and is what `device` saves today.
fn check_kept(name: &str, device: &dyn Device, fresh: &mut dyn Device) {
    let path = format!("{}/tests/kept/{name}", env!("CARGO_MANIFEST_DIR"));
    let record = device.save().unwrap();
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    if std::env::var_os("CAISSON_KEEP").is_some() {
        std::fs::write(&path, &bytes).unwrap();
    }
    let kept = std::fs::read(&path).unwrap();
    let kept = caisson_device::StateRecord::decode(&mut &kept[..]).unwrap();
    fresh.restore(&kept).unwrap();
    assert_eq!(fresh.save().unwrap(), record, "{name}");
}

proptest! {
    #[test]
    fn a_hostile_driver_breaks_nothing(input in prop::collection::vec(any::<u8>(), 0..1500)) {
        exercise_device(&input);
    }
}
