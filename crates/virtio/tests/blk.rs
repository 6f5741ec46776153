//! The block device over both transports, in front of a disk in memory.

mod rig;

use std::sync::Arc;

use caisson_block::{BlockError, BlockInfo, abandoned, testing::RamDisk};
use caisson_device::testing::check_state;
use caisson_memory::Gpa;
use caisson_virtio::{
    blk::{Blk, BlkConfig},
    status,
    testing::Driver,
};

use rig::{FEATURES, MMIO, REGISTERS, Rig, TRANSPORTS, Transport, World, check_kept};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Feature bits.
const CAN_FLUSH: u64 = 1 << 9;
const CAN_DISCARD: u64 = 1 << 13 | 1 << 14;
const MQ: u64 = 1 << 12;
const WCE: u64 = 1 << 11;

const HEADERS: u64 = 0x8_0000;
const DATA: u64 = 0x9_0000;
const STATUS: u64 = 0xf_0000;
/// A status that no device gives.
const NONE: u8 = 0xee;

fn blk(disk: &Arc<RamDisk>, queues: u16) -> Blk {
    let config = BlkConfig {
        queues,
        id: "a-disk".into(),
    };
    Blk::new(disk.clone(), config)
}

fn rig(world: &World, disk: &Arc<RamDisk>, transport: Transport) -> (Rig<Blk>, Driver) {
    let mut rig = world.place(blk(disk, 1), transport);
    let drivers = rig.set_up(FEATURES | CAN_FLUSH | CAN_DISCARD, 1);
    let driver = drivers.into_iter().next().unwrap();
    (rig, driver)
}

/// Offers request number `n`: a header, `data` (address, length, written by the device), and a status.
fn offer(
    rig: &Rig<Blk>,
    driver: &mut Driver,
    n: u64,
    kind: u32,
    sector: u64,
    data: &[(u64, u32, bool)],
) {
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    rig.memory.write(Gpa(HEADERS + 64 * n), &header).unwrap();
    rig.memory.write(Gpa(STATUS + n), &[NONE]).unwrap();
    let mut segments = vec![(HEADERS + 64 * n, 16, false)];
    segments.extend(data);
    segments.push((STATUS + n, 1, true));
    driver
        .add(&segments, Some(HEADERS + 0x8000 + 0x100 * n))
        .unwrap();
    driver.publish();
}

fn status_of(rig: &Rig<Blk>, n: u64) -> u8 {
    let mut status = [0];
    rig.memory.read(Gpa(STATUS + n), &mut status).unwrap();
    status[0]
}

/// One request from its offer to its end: status and length.
fn run(
    rig: &mut Rig<Blk>,
    driver: &mut Driver,
    kind: u32,
    sector: u64,
    data: &[(u64, u32, bool)],
) -> (u8, u32) {
    offer(rig, driver, 0, kind, sector, data);
    rig.poll();
    let (_, len) = driver.take_used().expect("it is given back");
    (status_of(rig, 0), len)
}

#[test]
fn data_goes_to_the_disk_and_comes_back() {
    for transport in TRANSPORTS {
        let (world, disk) = (World::new(), Arc::new(RamDisk::new(1 << 20)));
        let (mut rig, mut driver) = rig(&world, &disk, transport);
        let bytes: Vec<u8> = (0..1536u32).map(|n| (n % 251) as u8).collect();
        rig.memory.write(Gpa(DATA), &bytes).unwrap();
        // In pieces that have nothing to do with sectors.
        let pieces = [
            (DATA, 100, false),
            (DATA + 100, 1400, false),
            (DATA + 1500, 36, false),
        ];
        assert_eq!(run(&mut rig, &mut driver, OUT, 3, &pieces), (0, 1));
        assert_eq!(disk.content()[1536..3072], bytes);
        assert_eq!(run(&mut rig, &mut driver, FLUSH, 0, &[]), (0, 1));
        assert_eq!(disk.flushes(), 1);
        let back = [(DATA + 0x1000, 1000, true), (DATA + 0x2000, 536, true)];
        assert_eq!(run(&mut rig, &mut driver, IN, 3, &back), (0, 1537));
        let mut read = vec![0; 1536];
        rig.memory
            .read(Gpa(DATA + 0x1000), &mut read[..1000])
            .unwrap();
        rig.memory
            .read(Gpa(DATA + 0x2000), &mut read[1000..])
            .unwrap();
        assert_eq!(read, bytes);
        assert_eq!(
            run(&mut rig, &mut driver, GET_ID, 0, &[(DATA, 20, true)]),
            (0, 21)
        );
        rig.memory.read(Gpa(DATA), &mut read[..20]).unwrap();
        assert_eq!(&read[..20], b"a-disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(rig.interrupt_cause(), 1);

        let range = |rig: &Rig<Blk>, sector: u64, count: u32, flags: u32| {
            let bytes = [
                &sector.to_le_bytes()[..],
                &count.to_le_bytes(),
                &flags.to_le_bytes(),
            ]
            .concat();
            rig.memory.write(Gpa(DATA), &bytes).unwrap();
            [(DATA, 16, false)]
        };
        let three = range(&rig, 3, 1, 0);
        assert_eq!(run(&mut rig, &mut driver, DISCARD, 0, &three), (0, 1));
        let four = range(&rig, 4, 1, 1);
        assert_eq!(run(&mut rig, &mut driver, WRITE_ZEROES, 0, &four), (0, 1));
        assert_eq!(disk.content()[1536..2560], [0; 1024]);
        assert_eq!(disk.content()[2560..3072], bytes[1024..]);
        let unknown = range(&rig, 3, 1, 2);
        assert_eq!(run(&mut rig, &mut driver, WRITE_ZEROES, 0, &unknown).0, 2);
        let unmap = range(&rig, 3, 1, 1);
        assert_eq!(
            run(&mut rig, &mut driver, DISCARD, 0, &unmap).0,
            2,
            "not for discards"
        );
    }
}

#[test]
fn what_cannot_be_done_has_a_status_and_what_is_no_request_needs_a_reset() {
    let (world, disk) = (World::new(), Arc::new(RamDisk::new(1 << 20)));
    let (mut rig, mut driver) = rig(&world, &disk, Transport::Pci);
    let block = [(DATA, 512, true)];
    for (what, kind, sector, data) in [
        ("past the end", IN, 2048, block),
        ("an offset without end", IN, u64::MAX, block),
        ("half a sector", IN, 0, [(DATA, 100, true)]),
        ("no memory", IN, 0, [(0x8000_0000, 512, true)]),
        (
            "memory that wraps around",
            IN,
            0,
            [(u64::MAX - 100, 512, true)],
        ),
        ("too much", IN, 0, [(0, u32::MAX - 511, true)]),
    ] {
        assert_eq!(
            run(&mut rig, &mut driver, kind, sector, &data),
            (1, 1),
            "{what}"
        );
    }
    assert_eq!(
        run(&mut rig, &mut driver, 99, 0, &[]).0,
        2,
        "an unknown request"
    );
    disk.fail_next(BlockError::NoSpace);
    assert_eq!(
        run(&mut rig, &mut driver, OUT, 0, &[(DATA, 512, false)]).0,
        1
    );
    assert_eq!(
        run(&mut rig, &mut driver, OUT, 0, &[(DATA, 512, false)]).0,
        0
    );
    assert_eq!(rig.status(), 15);
    // No status, and half a header.
    for segments in [
        &[(HEADERS, 16, false)][..],
        &[(HEADERS, 8, false), (STATUS, 1, true)],
    ] {
        driver.add(segments, None).unwrap();
        driver.publish();
        rig.poll();
        assert_eq!(rig.status(), 15 | status::NEEDS_RESET);
        rig.set_status(0);
        driver = rig.set_up(FEATURES, 1).into_iter().next().unwrap();
    }
    assert_eq!(abandoned(), 0);
}

#[test]
fn a_read_only_disk_says_so_and_refuses() {
    let (world, info) = (World::new(), RamDisk::new(1 << 20));
    let info = BlockInfo {
        read_only: true,
        logical_block: 4096,
        physical_block: 16384,
        ..caisson_block::BlockBackend::info(&info)
    };
    let disk = Arc::new(RamDisk::with_info(info));
    let mut rig = world.place(blk(&disk, 2), Transport::Mmio);
    let offered = rig.read(MMIO + 0x10, 4);
    assert_eq!(offered & (1 << 5 | CAN_DISCARD | MQ), 1 << 5 | MQ);
    assert_eq!(
        rig.read(MMIO + 0x100, 8),
        2048,
        "sectors of 512 bytes all the same"
    );
    assert_eq!(rig.read(MMIO + 0x114, 4), 4096);
    assert_eq!(
        rig.read(MMIO + 0x118, 1),
        2,
        "four blocks are written at once"
    );
    assert_eq!(rig.read(MMIO + 0x122, 2), 2, "queues");
    let mut drivers = rig.set_up(FEATURES | 1 << 5 | MQ, 2);
    let driver = &mut drivers[1];
    assert_eq!(run(&mut rig, driver, OUT, 0, &[(DATA, 4096, false)]).0, 1);
    assert_eq!(
        run(&mut rig, driver, IN, 1, &[(DATA, 4096, true)]).0,
        1,
        "not a block's start"
    );
    assert_eq!(run(&mut rig, driver, IN, 8, &[(DATA, 4096, true)]).0, 0);
}

#[test]
fn requests_end_in_the_order_of_the_storage_and_resets_wait_for_it() {
    for transport in TRANSPORTS {
        let (world, disk) = (World::new(), Arc::new(RamDisk::new(1 << 20)));
        let (mut rig, mut driver) = rig(&world, &disk, transport);
        disk.hold(true);
        for n in 0..3 {
            offer(&rig, &mut driver, n, IN, n, &[(DATA + 512 * n, 512, true)]);
        }
        rig.poll();
        assert_eq!((disk.waiting(), driver.take_used()), (3, None));
        rig.woken();
        disk.release(1);
        assert!(rig.woken(), "the storage wakes the device");
        rig.poll();
        assert!(driver.take_used().is_some());
        assert_eq!((status_of(&rig, 0), status_of(&rig, 1)), (NONE, 0));
        // The storage may still write to memory: the reset takes effect when it is through.
        rig.set_status(0);
        assert_eq!(rig.status(), 15);
        rig.set_status(1);
        disk.release(0);
        rig.poll();
        assert_eq!(rig.status(), 15);
        disk.release(0);
        assert!(rig.woken());
        rig.poll();
        assert_eq!(rig.status(), 0);
        assert_eq!(status_of(&rig, 2), NONE, "forgotten");
        disk.hold(false);
        let mut driver = rig.set_up(FEATURES, 1).into_iter().next().unwrap();
        assert_eq!(run(&mut rig, &mut driver, IN, 0, &[(DATA, 512, true)]).0, 0);
        // The same for a queue alone.
        disk.hold(true);
        offer(&rig, &mut driver, 0, IN, 0, &[(DATA, 512, true)]);
        rig.poll();
        rig.select(0);
        let (at, len) = match transport {
            Transport::Pci => (REGISTERS + 0x3a, 2),
            Transport::Mmio => (MMIO + 0xc0, 4),
        };
        rig.write(at, len, 1);
        assert_eq!(rig.read(at, len), 1, "under way");
        assert!(rig.is_queue_enabled(0));
        disk.release(0);
        rig.poll();
        assert_eq!(rig.read(at, len), 0);
        assert!(!rig.is_queue_enabled(0));
    }
    assert_eq!(abandoned(), 0);
}

#[test]
fn requests_under_way_are_waited_for_and_reported_after_a_restore() {
    for transport in TRANSPORTS {
        let (world, disk) = (World::new(), Arc::new(RamDisk::new(1 << 20)));
        let (mut rig, mut driver) = rig(&world, &disk, transport);
        disk.hold(true);
        for n in 0..2 {
            offer(&rig, &mut driver, n, OUT, n, &[(DATA, 512, false)]);
        }
        rig.poll();
        assert!(rig.device().save().is_err(), "the storage has not answered");
        assert!(!rig.is_quiet());
        disk.release(0);
        disk.release(0);
        assert!(rig.is_quiet());
        assert_eq!(
            status_of(&rig, 0),
            NONE,
            "nothing is reported while the machine stands still"
        );
        let mut fresh = world.place(blk(&disk, 1), transport);
        fresh.enable();
        check_state(rig.device(), fresh.device());
        fresh.poll();
        let used: Vec<_> = core::iter::from_fn(|| driver.take_used()).collect();
        assert_eq!(used.len(), 2);
        assert_eq!((status_of(&fresh, 0), status_of(&fresh, 1)), (0, 0));
        assert_eq!(fresh.interrupt_cause(), 1);
        if transport == Transport::Pci {
            check_kept(
                "blk-pci",
                rig.device(),
                world.place(blk(&disk, 1), transport).device(),
            );
        }
    }
}

#[test]
fn a_disk_that_grows_tells_its_driver() {
    let (world, disk) = (World::new(), Arc::new(RamDisk::new(1 << 20)));
    let (mut rig, mut driver) = rig(&world, &disk, Transport::Pci);
    rig.poll();
    assert_eq!(rig.read(REGISTERS + 0x2000, 8), 2048);
    rig.woken();
    disk.resize(2 << 20);
    assert!(rig.woken());
    rig.poll();
    assert_eq!(rig.interrupt_cause(), 2);
    assert_eq!(rig.read(REGISTERS + 0x2000, 8), 4096);
    assert_eq!(
        run(&mut rig, &mut driver, IN, 4000, &[(DATA, 512, true)]).0,
        0
    );
}

#[test]
fn the_write_cache_is_the_drivers_choice() {
    let (world, disk) = (World::new(), Arc::new(RamDisk::new(1 << 20)));
    let mut rig = world.place(blk(&disk, 1), Transport::Pci);
    rig.set_up(FEATURES | CAN_FLUSH | WCE, 1);
    assert_eq!(rig.read(REGISTERS + 0x2020, 1), 1);
    assert!(rig.inspect().contains("write-back: true"));
    rig.write(REGISTERS + 0x2020, 1, 0);
    assert_eq!(rig.read(REGISTERS + 0x2020, 1), 0);
    assert!(rig.inspect().contains("write-back: false"));
    rig.set_status(0);
    rig.set_up(FEATURES, 1);
    assert!(
        rig.inspect().contains("write-back: false"),
        "a driver that cannot flush"
    );
}
