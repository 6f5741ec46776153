//! The controller as a driver finds it: commands, data in memory, interrupts, events, resets, saved state.

use std::sync::Arc;

use caisson_block::{BlockError, BlockInfo, abandoned, testing::RamDisk};
use caisson_device::{Device, ResetKind, StateRecord, testing::check_state};
use caisson_memory::Gpa;
use caisson_nvme::testing::{Host, LINE, RAM};

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;
const WRITE_ZEROES: u8 = 8;
const DATASET_MANAGEMENT: u8 = 9;
const GET_LOG: u8 = 2;
const DELETE_SUBMISSION: u8 = 0;
const DELETE_COMPLETION: u8 = 4;
const IDENTIFY: u8 = 6;
const SET_FEATURES: u8 = 9;
const GET_FEATURES: u8 = 10;
const EVENT_REQUEST: u8 = 12;
/// A page for structures.
const PAGE: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;
const INVALID_FIELD: u16 = 2;

fn disk() -> Arc<RamDisk> {
    let disk = Arc::new(RamDisk::new(2 << 20));
    let bytes: Vec<u8> = (0..2u32 << 20).map(|n| (n / 512 + n % 251) as u8).collect();
    disk.put(0, &bytes);
    disk
}

/// A driver with its queues, MSI-X on.
fn ready(disk: &Arc<RamDisk>) -> Host {
    let mut host = Host::new(disk, "serial");
    host.enable(true);
    host.create_queues(1);
    host.create_queues(2);
    host.msis.take();
    host
}

fn bytes(host: &Host, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    host.memory.read(Gpa(gpa), &mut bytes).unwrap();
    bytes
}

fn put(host: &Host, gpa: u64, data: &[u8]) {
    host.memory.write(Gpa(gpa), data).unwrap();
}

fn identify(host: &mut Host, what: u32, namespace: u32) -> Vec<u8> {
    let fields = [(1, namespace), (6, PAGE as u32), (10, what)];
    assert_eq!(host.admin(IDENTIFY, &fields).status, 0);
    bytes(host, PAGE, 4096)
}

fn log(host: &mut Host, page: u32, len: usize) -> Vec<u8> {
    let dwords = (len as u32 / 4 - 1) << 16;
    let fields = [(1, u32::MAX), (6, PAGE as u32), (10, dwords | page)];
    assert_eq!(host.admin(GET_LOG, &fields).status, 0);
    bytes(host, PAGE, len)
}

#[test]
fn it_says_what_it_is() {
    let mut host = ready(&disk());
    assert_eq!(host.get(8) as u32, 0x10400);
    let controller = identify(&mut host, 1, 0);
    assert_eq!(&controller[4..24], b"serial              ");
    assert_eq!(&controller[512..514], &[0x66, 0x44]);
    assert!(controller[768..].starts_with(b"nqn.2014-08.org.nvmexpress:uuid:"));
    let namespace = identify(&mut host, 0, 1);
    assert_eq!(namespace[..8], 4096u64.to_le_bytes());
    assert_eq!(namespace[130], 9);
    assert_eq!(identify(&mut host, 2, 0)[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(identify(&mut host, 2, 1)[..4], [0; 4]);
    let names = identify(&mut host, 3, 1);
    assert_eq!(names[..4], [3, 16, 0, 0]);
    assert_eq!(names[4 + 6] >> 4, 8, "a UUID of version 8");
    let fields = [(1, 7), (6, PAGE as u32)];
    assert_eq!(host.admin(IDENTIFY, &fields).status, 0x0b);
    let features = host.admin(GET_FEATURES, &[(10, 7)]);
    assert_eq!((features.status, features.result), (0, 1 << 16 | 1));
}

#[test]
fn data_goes_where_prps_say() {
    let disk = disk();
    let mut host = ready(&disk);
    let content = disk.content();
    // One page and a piece of another, not from a page's start.
    let fields = [
        (6, DATA as u32 + 0x800),
        (8, DATA as u32 + 0x9000),
        (10, 3),
        (12, 7),
    ];
    let done = host.perform(1, READ, &fields);
    assert_eq!((done.status, done.head), (0, 1));
    assert_eq!(bytes(&host, DATA + 0x800, 0x800), content[1536..][..0x800]);
    assert_eq!(
        bytes(&host, DATA + 0x9000, 0x800),
        content[1536 + 0x800..][..0x800]
    );
    assert_eq!(host.msis.take().len(), 1);

    // A list that ends its page, and goes on in another: 1 MiB in pages that lie backwards.
    let pages = 256u64;
    let page_of = |n: u64| 0x20_0000 + (pages - 1 - n) * 4096;
    let first_list = PAGE + 4096 - 8 * 4;
    for n in 0..3 {
        put(&host, first_list + 8 * n, &page_of(n + 1).to_le_bytes());
    }
    put(&host, first_list + 24, &(PAGE + 0x1000).to_le_bytes());
    for n in 0..pages - 4 {
        put(&host, PAGE + 0x1000 + 8 * n, &page_of(n + 4).to_le_bytes());
    }
    let fields = [(6, page_of(0) as u32), (8, first_list as u32), (12, 2047)];
    assert_eq!(host.perform(2, READ, &fields).status, 0);
    for n in 0..pages {
        let at = n as usize * 4096;
        assert_eq!(
            bytes(&host, page_of(n), 4096),
            content[at..at + 4096],
            "page {n}"
        );
    }
    // More than a transfer may have.
    let fields = [(6, page_of(0) as u32), (8, first_list as u32), (12, 2048)];
    assert_eq!(host.perform(2, READ, &fields).status, INVALID_FIELD);
    // Misplaced entries.
    assert_eq!(host.perform(1, READ, &[(6, DATA as u32 + 2)]).status, 0x13);
    let fields = [(6, DATA as u32), (8, 0x9008), (12, 15)];
    assert_eq!(host.perform(1, READ, &fields).status, 0x13);
    // Not in memory: the entry, and the list.
    assert_eq!(host.perform(1, READ, &[(7, 1)]).status, 4);
    let fields = [(6, DATA as u32), (9, 1), (12, 63)];
    assert_eq!(host.perform(1, READ, &fields).status, 4);
}

/// A descriptor of an SGL.
fn descriptor(address: u64, len: u32, kind: u8) -> Vec<u8> {
    [
        &address.to_le_bytes()[..],
        &len.to_le_bytes(),
        &[0, 0, 0, kind],
    ]
    .concat()
}

#[test]
fn data_goes_where_sgls_say() {
    let disk = disk();
    let mut host = ready(&disk);
    let content = disk.content();
    let sgl = |host: &mut Host, first: &[u8], blocks: u32| {
        let dword = |n: usize| u32::from_le_bytes(first[4 * n..][..4].try_into().unwrap());
        let mut fields = vec![(0, 1 << 14), (12, blocks - 1)];
        fields.extend((0..4).map(|n| (6 + n, dword(n))));
        host.perform(1, READ, &fields).status
    };
    assert_eq!(sgl(&mut host, &descriptor(DATA + 3, 1024, 0), 2), 0);
    assert_eq!(bytes(&host, DATA + 3, 1024), content[..1024]);

    // Two segments with pieces of odd lengths.
    let one = [
        descriptor(DATA + 0x1001, 7, 0),
        descriptor(PAGE + 0x100, 32, 0x30),
    ];
    put(&host, PAGE, &one.concat());
    let two = [descriptor(DATA, 500, 0), descriptor(DATA + 0x2000, 517, 0)];
    put(&host, PAGE + 0x100, &two.concat());
    assert_eq!(sgl(&mut host, &descriptor(PAGE, 32, 0x20), 2), 0);
    assert_eq!(bytes(&host, DATA + 0x1001, 7), content[..7]);
    assert_eq!(bytes(&host, DATA, 500), content[7..507]);
    assert_eq!(bytes(&host, DATA + 0x2000, 517), content[507..1024]);

    // Too short, too long, of no kind, in no place, for ever.
    assert_eq!(sgl(&mut host, &descriptor(DATA, 512, 0), 2), 0x0f);
    assert_eq!(sgl(&mut host, &descriptor(DATA, 1536, 0), 2), 0x0f);
    assert_eq!(sgl(&mut host, &descriptor(DATA, 1024, 0x40), 2), 0x11);
    assert_eq!(sgl(&mut host, &descriptor(RAM, 16, 0x30), 2), 4);
    assert_eq!(sgl(&mut host, &descriptor(PAGE, 15, 0x30), 2), 0x0d);
    put(&host, PAGE, &descriptor(PAGE, 16, 0x20));
    assert_eq!(sgl(&mut host, &descriptor(PAGE, 16, 0x20), 2), 0x0e);
    assert_eq!(sgl(&mut host, &descriptor(PAGE, 16 << 20, 0x20), 2), 0x0e);
}

#[test]
fn what_is_written_is_there_and_durable_when_asked() {
    let disk = disk();
    let mut host = ready(&disk);
    put(&host, DATA, &[0xab; 1024]);
    let fields = [(6, DATA as u32), (10, 100), (12, 1)];
    assert_eq!(host.perform(1, WRITE, &fields).status, 0);
    assert_eq!(disk.content()[51200..][..1024], [0xab; 1024]);
    assert_eq!(disk.flushes(), 0);
    assert_eq!(host.perform(1, FLUSH, &[]).status, 0);
    assert_eq!(host.perform(1, FLUSH, &[(1, u32::MAX)]).status, 0);
    assert_eq!(disk.flushes(), 2);
    // Zeroes, and blocks that are not needed.
    assert_eq!(host.perform(1, WRITE_ZEROES, &[(10, 100)]).status, 0);
    assert_eq!(
        disk.content()[51200..][..513],
        [[0; 512].as_slice(), &[0xab]].concat()
    );
    let range = |blocks: u32, first: u64| {
        [&[0; 4][..], &blocks.to_le_bytes(), &first.to_le_bytes()].concat()
    };
    put(&host, PAGE, &[range(1, 101), range(2, 0)].concat());
    let fields = [(6, PAGE as u32), (10, 1), (11, 4)];
    assert_eq!(host.perform(1, DATASET_MANAGEMENT, &fields).status, 0);
    assert_eq!(disk.content()[51712..][..512], [0; 512]);
    assert_eq!(disk.content()[..1024], [0; 1024]);
    assert_eq!(disk.content()[1024], disk_byte(1024));
    put(&host, PAGE, &range(2, 4095));
    let fields = [(6, PAGE as u32), (11, 4)];
    assert_eq!(host.perform(1, DATASET_MANAGEMENT, &fields).status, 0x80);
    // Beyond the end, and around it.
    assert_eq!(
        host.perform(1, READ, &[(6, DATA as u32), (10, 4096)])
            .status,
        0x80
    );
    let fields = [(6, DATA as u32), (10, u32::MAX), (11, u32::MAX)];
    assert_eq!(host.perform(1, READ, &fields).status, 0x80);
    assert_eq!(abandoned(), 0);
}

fn disk_byte(n: u32) -> u8 {
    (n / 512 + n % 251) as u8
}

#[test]
fn what_fails_is_told_with_its_status_and_remembered() {
    let disk = disk();
    let mut host = ready(&disk);
    let fields = [(6, DATA as u32), (10, 9)];
    for (opcode, error, status) in [
        (READ, BlockError::Io, 0x281),
        (WRITE, BlockError::Io, 0x280),
        (WRITE, BlockError::NoSpace, 0x81),
    ] {
        disk.fail_next(error);
        assert_eq!(host.perform(1, opcode, &fields).status, status);
    }
    assert_eq!(host.perform(1, 0x7f, &fields).status, 1);
    let errors = log(&mut host, 1, 128);
    assert_eq!(errors[..8], 4u64.to_le_bytes(), "the newest comes first");
    assert_eq!(errors[64..72], 3u64.to_le_bytes());
    assert_eq!(errors[64 + 16..][..8], 9u64.to_le_bytes());
    host.time.set_now(2 * 3_600_000_000_000);
    let health = log(&mut host, 2, 512);
    assert_eq!(health[64..72], 1u64.to_le_bytes(), "reads");
    assert_eq!(health[128..136], 2u64.to_le_bytes(), "hours");
    assert_eq!(health[160..168], 2u64.to_le_bytes(), "media errors");
    let fields = [(6, PAGE as u32), (10, 0x77)];
    assert_eq!(host.admin(GET_LOG, &fields).status, 0x109);
}

#[test]
fn a_disk_that_may_only_be_read_is_not_written() {
    let disk = Arc::new(RamDisk::with_info(BlockInfo {
        size: 1 << 20,
        logical_block: 4096,
        physical_block: 4096,
        optimal_io: 65536,
        read_only: true,
        discard_granularity: None,
        write_cache: false,
    }));
    let mut host = ready(&disk);
    let namespace = identify(&mut host, 0, 1);
    assert_eq!((namespace[99], namespace[130]), (1, 12));
    assert_eq!(namespace[..8], 256u64.to_le_bytes());
    for opcode in [WRITE, WRITE_ZEROES, DATASET_MANAGEMENT] {
        let fields = [(6, DATA as u32)];
        assert_eq!(host.perform(1, opcode, &fields).status, 0x20);
    }
    assert_eq!(host.perform(1, READ, &[(6, DATA as u32)]).status, 0);
    // There is no cache to switch off.
    assert_eq!(host.admin(SET_FEATURES, &[(10, 6)]).status, INVALID_FIELD);
}

#[test]
fn queues_are_made_and_deleted_in_their_order() {
    let disk = disk();
    let mut host = ready(&disk);
    assert_eq!(host.admin(DELETE_COMPLETION, &[(10, 1)]).status, 0x10c);
    // A queue goes only when its commands are complete.
    disk.hold(true);
    host.offer(1, READ, &[(6, DATA as u32)]);
    host.ring(1);
    host.offer(0, DELETE_SUBMISSION, &[(10, 1)]);
    host.ring(0);
    assert_eq!(host.reap(0), None);
    disk.hold(false);
    disk.release(0);
    host.poll();
    assert_eq!(host.reap(1).unwrap().status, 0);
    assert_eq!(host.reap(0).unwrap().status, 0);
    assert_eq!(host.admin(DELETE_SUBMISSION, &[(10, 1)]).status, 0x101);
    assert_eq!(host.admin(DELETE_COMPLETION, &[(10, 1)]).status, 0);
    host.create_queues(1);
    let refused =
        |host: &mut Host, opcode, fields: &[(usize, u32)]| host.admin(opcode, fields).status;
    assert_eq!(refused(&mut host, 5, &[(10, 7 << 16 | 1), (11, 1)]), 0x101);
    assert_eq!(refused(&mut host, 5, &[(10, 7 << 16 | 3), (11, 1)]), 0x101);
    assert_eq!(refused(&mut host, DELETE_SUBMISSION, &[(10, 0)]), 0x101);
    assert_eq!(host.admin(DELETE_SUBMISSION, &[(10, 2)]).status, 0);
    assert_eq!(
        refused(&mut host, 1, &[(10, 0x7fff << 16 | 2), (11, 2 << 16 | 1)]),
        0x102
    );
    assert_eq!(
        refused(&mut host, 1, &[(10, 7 << 16 | 2), (11, 2 << 16)]),
        INVALID_FIELD
    );
    assert_eq!(
        refused(
            &mut host,
            1,
            &[(6, 8), (10, 7 << 16 | 2), (11, 2 << 16 | 1)]
        ),
        0x13
    );
}

#[test]
fn completions_wait_for_room() {
    let disk = disk();
    let mut host = ready(&disk);
    // Eight entries hold seven completions.
    for _ in 0..2 {
        for _ in 0..5 {
            host.offer(1, READ, &[(6, DATA as u32)]);
        }
        host.ring(1);
    }
    let mut seen = 0;
    while host.reap(1).is_some() {
        seen += 1;
        host.poll();
    }
    assert_eq!(seen, 10);
}

#[test]
fn events_are_told_once_until_their_log_is_read() {
    let disk = disk();
    let mut host = ready(&disk);
    host.admin(SET_FEATURES, &[(10, 11), (11, 1 << 8)]);
    for _ in 0..4 {
        host.offer(0, EVENT_REQUEST, &[]);
    }
    host.ring(0);
    assert_eq!(host.reap(0), None);
    assert_eq!(host.admin(EVENT_REQUEST, &[]).status, 0x105);

    disk.resize(3 << 20);
    host.poll();
    assert_eq!(host.reap(0).unwrap().result, 2 | 4 << 16);
    disk.resize(1 << 20);
    host.poll();
    assert_eq!(host.reap(0), None);
    assert_eq!(log(&mut host, 4, 8)[..4], 1u32.to_le_bytes());
    assert_eq!(host.reap(0).map(|told| told.result), Some(2 | 4 << 16));
    assert_eq!(identify(&mut host, 0, 1)[..8], 2048u64.to_le_bytes());

    // A tail beyond the queue, and a queue that is not there.
    host.set(0x1008, 8);
    host.poll();
    assert_eq!(host.reap(0).unwrap().result, 1 << 8 | 1 << 16);
    host.set(0x1800, 1);
    host.poll();
    assert_eq!(host.reap(0), None);
    log(&mut host, 1, 64);
    assert_eq!(host.reap(0).map(|told| told.result), Some(1 << 16));
}

#[test]
fn interrupts_are_a_level_without_msix() {
    let disk = disk();
    let mut host = Host::new(&disk, "serial");
    host.enable(false);
    host.create_queues(1);
    assert!(!host.lines.level(LINE));
    host.offer(1, READ, &[(6, DATA as u32)]);
    host.ring(1);
    assert!(host.lines.level(LINE));
    host.set(0x0c, 1);
    assert!(!host.lines.level(LINE), "masked");
    host.set(0x10, 1);
    assert!(host.lines.level(LINE));
    assert!(host.reap(1).is_some());
    assert!(!host.lines.level(LINE));
    assert!(host.msis.take().is_empty());
}

#[test]
fn it_is_reset_only_when_storage_has_let_go_of_memory() {
    let disk = disk();
    let mut host = ready(&disk);
    disk.hold(true);
    host.offer(1, READ, &[(6, DATA as u32)]);
    host.ring(1);
    host.set(0x14, 0);
    host.poll();
    assert_eq!(host.get(0x1c) & 1, 1, "not before");
    disk.release(0);
    host.poll();
    assert_eq!(host.get(0x1c) & 1, 0);
    disk.hold(false);
    host.enable(true);
    host.create_queues(1);
    assert_eq!(host.perform(1, READ, &[(6, DATA as u32)]).status, 0);

    // A shutdown makes durable what was written.
    let flushes = disk.flushes();
    host.set(0x14, 4 << 20 | 6 << 16 | 1 << 14 | 1);
    host.poll();
    assert_eq!(host.get(0x1c) >> 2 & 3, 2);
    assert_eq!(disk.flushes(), flushes + 1);
}

#[test]
fn what_cannot_be_is_a_fatal_status_until_it_is_reset() {
    let disk = disk();
    let mut host = Host::new(&disk, "serial");
    host.config(4, &[6, 0]);
    // Pages of 8 KiB; then sizes of no queue.
    for configuration in [4 << 20 | 6 << 16 | 1 << 7 | 1, 4 << 20 | 6 << 16 | 1] {
        host.set(0x14, configuration);
        host.poll();
        assert_eq!(host.get(0x1c) & 3, 2);
        host.set(0x14, 0);
        host.poll();
        assert_eq!(host.get(0x1c) & 3, 0);
    }
    // Queues that are not in memory.
    host.set(0x24, 7 << 16 | 7);
    host.write(0x28, &RAM.to_le_bytes());
    host.set(0x14, 4 << 20 | 6 << 16 | 1);
    host.set(0x1000, 1);
    host.poll();
    assert_eq!(host.get(0x1c) & 2, 2);
    host.set(0x14, 0);
    host.poll();
    host.enable(true);
}

/// A controller in the middle of things: a held-back command, a queue that is being deleted, requests for events.
fn busy(disk: &Arc<RamDisk>) -> Host {
    let mut host = ready(disk);
    host.admin(SET_FEATURES, &[(10, 6), (11, 0)]);
    host.offer(0, EVENT_REQUEST, &[]);
    host.ring(0);
    disk.hold(true);
    host.offer(1, READ, &[(6, DATA as u32), (10, 5)]);
    host.ring(1);
    host.offer(0, DELETE_SUBMISSION, &[(10, 1)]);
    host.ring(0);
    host
}

#[test]
fn it_goes_on_elsewhere_with_commands_under_way() {
    let disk = disk();
    let mut host = busy(&disk);
    assert!(host.device.save().is_err(), "storage works for it");
    host.settle();
    disk.hold(false);
    let mut twin = host.twin();
    check_state(&host.device, &mut twin.device);
    assert_eq!(twin.reap(1), None);
    twin.poll();
    assert_eq!(twin.reap(1).unwrap().status, 0);
    assert_eq!(bytes(&twin, DATA, 512), disk.content()[2560..][..512]);
    assert_eq!(twin.reap(0).unwrap().status, 0, "the queue is deleted");
    assert_eq!(twin.perform(2, READ, &[(6, DATA as u32)]).status, 0);
    let cache = twin.admin(GET_FEATURES, &[(10, 6)]);
    assert_eq!(cache.result, 0);
    twin.device.reset(ResetKind::System);
    assert_eq!(twin.get(0x1c), 0);
}

#[test]
fn saved_states_are_read_for_ever() {
    let disk = disk();
    let mut host = busy(&disk);
    host.settle();
    let record = host.device.save().unwrap();
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/nvme.v1");
    if std::env::var_os("CAISSON_WRITE_GOLDEN").is_some() {
        std::fs::write(path, &bytes).unwrap();
    }
    let golden = std::fs::read(path).unwrap();
    assert!(
        golden == bytes,
        "the format has changed; raise VERSION and keep a migration"
    );
    let golden = StateRecord::decode(&mut &golden[..]).unwrap();
    host.twin().device.restore(&golden).unwrap();
}

#[test]
fn any_input_is_survived() {
    // A cheap stand-in for the fuzz target.
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..300 {
        let mut input = Vec::new();
        for _ in 0..400 {
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            input.push((seed >> 56) as u8);
        }
        caisson_nvme::testing::exercise(&input);
    }
}
