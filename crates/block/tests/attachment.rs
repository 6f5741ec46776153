//! Requests, completions and the disk for tests, as a device uses them.

use std::{
    future::Future,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
};

use caisson_block::{
    BlockBackend, BlockError, BlockInfo, Completion, GuestBuffer, Operation, Request, Segment,
    abandoned, testing::RamDisk,
};
use caisson_memory::{
    Gpa, GuestMemory, MemoryView, RegionKind,
    host::{HugePages, Mapping},
};

fn view() -> MemoryView {
    let mapping = Mapping::new("test", 0x10000, HugePages::Off).unwrap();
    let region = mapping.region("ram", Gpa(0x10000), 0, 0x10000, RegionKind::Ram);
    MemoryView::new(GuestMemory::new(vec![region]).unwrap())
}

fn buffer(view: &MemoryView, segments: &[(u64, u32)]) -> GuestBuffer {
    let segments = segments
        .iter()
        .map(|&(gpa, len)| Segment { gpa: Gpa(gpa), len });
    GuestBuffer::new(view.clone(), segments.collect()).unwrap()
}

fn ask(disk: &RamDisk, operation: Operation) -> Result<(), BlockError> {
    let (request, completion) = Request::new(operation);
    disk.submit(request);
    assert_eq!(completion.try_outcome(), None);
    disk.kick();
    completion.try_outcome().expect("an answer")
}

#[test]
fn data_goes_through_the_scatter_list_in_order() {
    let (disk, view) = (RamDisk::new(4096), view());
    view.write(Gpa(0x10800), &[1; 512]).unwrap();
    view.write(Gpa(0x10100), &[2; 512]).unwrap();
    let scattered = buffer(&view, &[(0x10800, 512), (0x10100, 512)]);
    let write = Operation::Write {
        offset: 1024,
        buffer: scattered,
        durable: false,
    };
    assert_eq!(ask(&disk, write), Ok(()));
    assert_eq!(disk.content()[1024..1536], [1; 512]);
    assert_eq!(disk.content()[1536..2048], [2; 512]);
    let together = buffer(&view, &[(0x18000, 1024)]);
    let read = Operation::Read {
        offset: 1024,
        buffer: together,
    };
    assert_eq!(ask(&disk, read), Ok(()));
    let mut bytes = [0; 1024];
    view.read(Gpa(0x18000), &mut bytes).unwrap();
    assert_eq!(bytes[..], disk.content()[1024..2048]);
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let (disk, view) = (RamDisk::new(4096), view());
    let read = |offset, len| {
        let buffer = buffer(&view, &[(0x10000, len)]);
        ask(&disk, Operation::Read { offset, buffer })
    };
    assert_eq!(read(4096, 512), Err(BlockError::OutOfRange));
    assert_eq!(read(!511, 1024), Err(BlockError::OutOfRange));
    assert_eq!(read(1, 512), Err(BlockError::Unaligned));
    assert_eq!(read(0, 100), Err(BlockError::Unaligned));
    let nowhere = buffer(&view, &[(0x1fe00, 1024)]);
    let outcome = ask(
        &disk,
        Operation::Read {
            offset: 0,
            buffer: nowhere,
        },
    );
    assert_eq!(outcome, Err(BlockError::Memory));
    let only_read = RamDisk::with_info(BlockInfo {
        read_only: true,
        ..disk.info()
    });
    let discard = Operation::Discard {
        offset: 0,
        len: 512,
    };
    assert_eq!(ask(&only_read, discard), Err(BlockError::ReadOnly));
    let wrapping = Segment {
        gpa: Gpa(u64::MAX),
        len: 512,
    };
    assert!(GuestBuffer::new(view.clone(), vec![wrapping]).is_err());
    let long = Segment {
        gpa: Gpa(0),
        len: u32::MAX,
    };
    assert!(GuestBuffer::new(view, vec![long]).is_err());
}

struct Flag(std::sync::atomic::AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, std::sync::atomic::Ordering::Release);
    }
}

fn polled(completion: &mut Completion, flag: &Arc<Flag>) -> Poll<Result<(), BlockError>> {
    let waker = Waker::from(flag.clone());
    pin!(completion).poll(&mut Context::from_waker(&waker))
}

#[test]
fn an_answer_wakes_and_a_dropped_request_is_noticed() {
    let before = abandoned();
    let flag = Arc::new(Flag(false.into()));
    let (request, mut completion) = Request::new(Operation::Flush);
    assert!(polled(&mut completion, &flag).is_pending());
    request.complete(Err(BlockError::NoSpace));
    assert!(flag.0.swap(false, std::sync::atomic::Ordering::AcqRel));
    let ready = Poll::Ready(Err(BlockError::NoSpace));
    assert_eq!(polled(&mut completion, &flag), ready);
    assert_eq!(polled(&mut completion, &flag), ready);
    assert_eq!(abandoned(), before);

    let (request, mut completion) = Request::new(Operation::Flush);
    assert!(polled(&mut completion, &flag).is_pending());
    drop(request);
    assert!(flag.0.load(std::sync::atomic::Ordering::Acquire));
    assert_eq!(
        polled(&mut completion, &flag),
        Poll::Ready(Err(BlockError::Abandoned))
    );
    assert_eq!(abandoned(), before + 1);
}

#[test]
fn held_requests_are_answered_in_any_order_and_a_new_size_is_heard_of() {
    let disk = RamDisk::new(4096);
    disk.hold(true);
    let mut completions = Vec::new();
    for _ in 0..2 {
        let (request, completion) = Request::new(Operation::Flush);
        disk.submit(request);
        completions.push(completion);
    }
    disk.kick();
    assert_eq!(disk.waiting(), 2);
    disk.fail_next(BlockError::Io);
    disk.release(1);
    assert_eq!(completions[0].try_outcome(), None);
    assert_eq!(completions[1].try_outcome(), Some(Err(BlockError::Io)));
    disk.release(0);
    assert_eq!(
        (completions[0].try_outcome(), disk.flushes()),
        (Some(Ok(())), 1)
    );

    let flag = Arc::new(Flag(false.into()));
    let waker = Waker::from(flag.clone());
    let cx = &mut Context::from_waker(&waker);
    assert!(disk.poll_resized(cx, 4096).is_pending());
    disk.resize(8192);
    assert!(flag.0.load(std::sync::atomic::Ordering::Acquire));
    assert_eq!(disk.poll_resized(cx, 4096), Poll::Ready(8192));
    assert_eq!(disk.info().size, 8192);
}
