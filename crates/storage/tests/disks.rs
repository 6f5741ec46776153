//! Disks as a device uses them, on files of the host's.

mod support;

use std::{
    fs,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use caisson_block::{BlockBackend, BlockError, Completion, GuestBuffer, Operation, Request};
use caisson_memory::{Gpa, MemoryView};
use caisson_storage::{
    BackingPolicy, Disk, DiskOptions, EngineKind, Ephemeral, Format, IoThread, Limits, OpenError,
    Rate, RateLimit, file::CacheMode,
};
use support::{ask, content, fill, memory, qemu_img, random, scattered, text, wait};

const SIZE: u64 = 3 << 20;

/// A request under way and what the shadow is to become.
struct Pending {
    completion: Completion,
    /// Of a read: where it goes and what must be there.
    expected: Option<(GuestBuffer, Vec<u8>)>,
}

/// Random operations, many at once, compared with a shadow in memory. The requests of a batch do not overlap.
fn exercise(disk: &Disk, view: &MemoryView, shadow: &mut [u8], seed: u64, batches: u32) {
    let mut state = seed;
    for _ in 0..batches {
        let count = 1 + random(&mut state) % 24;
        let share = SIZE / 512 / count;
        let mut pending = Vec::new();
        for n in 0..count {
            let first = n * share + random(&mut state) % share;
            let len = (1 + random(&mut state) % 200).min((n + 1) * share - first);
            let (offset, bytes) = (first * 512, len * 512);
            let range = offset as usize..(offset + bytes) as usize;
            let high = random(&mut state) & 1;
            let buffer = scattered(view, (high << 32) + n * 131_072 + high * 512, bytes as u32);
            let mut expected = None;
            let operation = match random(&mut state) % 10 {
                0..4 => {
                    fill(&buffer, &vec![0xee; bytes as usize]);
                    expected = Some((buffer.clone(), shadow[range].to_vec()));
                    Operation::Read { offset, buffer }
                }
                4..8 => {
                    let data: Vec<u8> = (0..bytes / 8)
                        .flat_map(|_| random(&mut state).to_le_bytes())
                        .collect();
                    fill(&buffer, &data);
                    shadow[range].copy_from_slice(&data);
                    let durable = random(&mut state).is_multiple_of(8);
                    Operation::Write {
                        offset,
                        buffer,
                        durable,
                    }
                }
                8 => {
                    shadow[range].fill(0);
                    Operation::WriteZeroes {
                        offset,
                        len: bytes,
                        unmap: high == 1,
                        durable: false,
                    }
                }
                _ => Operation::Flush,
            };
            let (request, completion) = Request::new(operation);
            disk.submit(request);
            pending.push(Pending {
                completion,
                expected,
            });
        }
        disk.kick();
        for one in pending {
            assert_eq!(wait(one.completion), Ok(()));
            if let Some((buffer, expected)) = one.expected {
                assert!(content(&buffer) == expected, "a read differs");
            }
        }
    }
}

fn check_with_qemu(image: &Path, format: &str, shadow: &[u8]) {
    let raw = image.with_extension("shadow");
    fs::write(&raw, shadow).unwrap();
    if format == "qcow2" {
        qemu_img(&["check", "-f", "qcow2", text(image)]);
    }
    qemu_img(&[
        "compare",
        "-f",
        format,
        "-F",
        "raw",
        text(image),
        text(&raw),
    ]);
}

#[test]
fn every_engine_cache_mode_and_format_stores_what_was_written() {
    let view = memory();
    let folder = tempfile::tempdir().unwrap();
    let before = caisson_block::abandoned();
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let thread = IoThread::start("disks", engine).unwrap();
        let modes = [
            CacheMode::Writeback,
            CacheMode::Direct,
            CacheMode::Writethrough,
            CacheMode::Unsafe,
        ];
        for (seed, cache) in modes.into_iter().enumerate() {
            for format in ["raw", "qcow2"] {
                let path = folder.path().join(format!("{engine:?}-{cache:?}.{format}"));
                qemu_img(&["create", "-q", "-f", format, text(&path), &SIZE.to_string()]);
                let mut options = DiskOptions::new(&path);
                options.cache = cache;
                let disk = Disk::open(&thread, options).unwrap();
                assert_eq!(
                    disk.info().write_cache,
                    cache != CacheMode::Writethrough || format == "qcow2"
                );
                let mut shadow = vec![0; SIZE as usize];
                exercise(&disk, &view, &mut shadow, seed as u64, 30);
                disk.close().unwrap();
                check_with_qemu(&path, format, &shadow);
            }
        }
    }
    assert_eq!(caisson_block::abandoned(), before);
}

#[test]
fn a_throw_away_layer_takes_the_writes_and_the_image_stays() {
    let view = memory();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("base.img");
    let mut state = 7;
    let base: Vec<u8> = (0..SIZE / 8)
        .flat_map(|_| random(&mut state).to_le_bytes())
        .collect();
    fs::write(&path, &base).unwrap();
    let thread = IoThread::start("disks", EngineKind::Auto).unwrap();
    for place in [
        Ephemeral::Memory,
        Ephemeral::Folder(folder.path().to_owned()),
    ] {
        let mut options = DiskOptions::new(&path);
        options.ephemeral = Some(place);
        let disk = Disk::open(&thread, options.clone()).unwrap();
        // Several machines may have their own layers over one image.
        let other = Disk::open(&thread, options).unwrap();
        let mut shadow = base.clone();
        exercise(&disk, &view, &mut shadow, 3, 40);
        assert!(shadow != base);
        let buffer = scattered(&view, 0, 1 << 20);
        let read = Operation::Read {
            offset: 1 << 20,
            buffer: buffer.clone(),
        };
        ask(&disk, read.clone()).unwrap();
        assert!(content(&buffer) == shadow[1 << 20..2 << 20]);
        ask(&other, read).unwrap();
        assert!(content(&buffer) == base[1 << 20..2 << 20]);
        disk.close().unwrap();
        other.close().unwrap();
        assert!(fs::read(&path).unwrap() == base);
    }
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

/// Copies of this process's descriptors of a file.
fn descriptors_of(path: &Path) -> Vec<OwnedFd> {
    let own = fs::read_dir("/proc/self/fd").unwrap().flatten();
    own.filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == path))
        .map(|entry| {
            let number = entry.file_name().to_str().unwrap().parse().unwrap();
            // SAFETY: the disk that the caller holds keeps it open.
            let open = unsafe { BorrowedFd::borrow_raw(number) };
            open.try_clone_to_owned().unwrap()
        })
        .collect()
}

#[test]
fn the_second_who_writes_is_refused_and_told_who_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.img");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    let thread = IoThread::start("disks", EngineKind::Auto).unwrap();
    let disk = Disk::open(&thread, DiskOptions::new(&path)).unwrap();
    for read_only in [false, true] {
        let mut options = DiskOptions::new(&path);
        options.read_only = read_only;
        let error = Disk::open(&thread, options).err().unwrap();
        assert!(matches!(error, OpenError::Locked { .. }));
        assert!(
            error.to_string().contains("in use by this process"),
            "{error}"
        );
    }
    let theirs = support::qemu("qemu-img", &["check", "-f", "raw", text(&path)]);
    let theirs = theirs
        .and_then(|_| support::qemu("qemu-io", &["-f", "raw", "-c", "write 0 512", text(&path)]));
    assert!(theirs.unwrap_err().contains("lock"));
    // As a child has them between its fork and its exec.
    let copies = descriptors_of(&path);
    assert!(!copies.is_empty());
    disk.close().unwrap();
    let again = Disk::open(&thread, DiskOptions::new(&path)).unwrap();
    again.close().unwrap();
    drop(copies);
    let mut options = DiskOptions::new(&path);
    options.read_only = true;
    let first = Disk::open(&thread, options.clone()).unwrap();
    let second = Disk::open(&thread, options).unwrap();
    let write = Operation::Discard {
        offset: 0,
        len: 512,
    };
    assert_eq!(ask(&second, write), Err(BlockError::ReadOnly));
    drop(first);
}

#[test]
fn a_hostile_request_is_an_error() {
    let view = memory();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.img");
    fs::write(&path, vec![0; 4096]).unwrap();
    let thread = IoThread::start("disks", EngineKind::Auto).unwrap();
    let disk = Disk::open(&thread, DiskOptions::new(&path)).unwrap();
    let read = |offset, gpa, len| {
        let segment = caisson_block::Segment { gpa: Gpa(gpa), len };
        let buffer = GuestBuffer::new(view.clone(), vec![segment]).unwrap();
        ask(&disk, Operation::Read { offset, buffer })
    };
    assert_eq!(read(0, 0, 4096), Ok(()));
    assert_eq!(read(512, 0, 4096), Err(BlockError::OutOfRange));
    assert_eq!(read(u64::MAX - 511, 0, 512), Err(BlockError::OutOfRange));
    assert_eq!(read(3, 0, 512), Err(BlockError::Unaligned));
    assert_eq!(read(0, (8 << 20) - 256, 512), Err(BlockError::Memory));
    assert_eq!(read(0, 0, 0), Ok(()));
    assert_eq!(disk.errors(), 0);
}

#[test]
fn a_device_hears_of_a_new_size_and_the_image_has_it() {
    let view = memory();
    let folder = tempfile::tempdir().unwrap();
    let thread = IoThread::start("disks", EngineKind::Auto).unwrap();
    for format in ["raw", "qcow2"] {
        let path = folder.path().join(format!("grows.{format}"));
        qemu_img(&["create", "-q", "-f", format, text(&path), "1M"]);
        let disk = Disk::open(&thread, DiskOptions::new(&path)).unwrap();
        let cx = &mut Context::from_waker(Waker::noop());
        assert!(disk.poll_resized(cx, 1 << 20).is_pending());
        // More than one L1 entry reaches.
        disk.resize(2 << 30).unwrap();
        assert_eq!(disk.poll_resized(cx, 1 << 20), Poll::Ready(2 << 30));
        let buffer = scattered(&view, 0, 4096);
        fill(&buffer, &[7; 4096]);
        let offset = (2 << 30) - 4096;
        let write = Operation::Write {
            offset,
            buffer,
            durable: true,
        };
        assert_eq!(ask(&disk, write), Ok(()));
        assert!(disk.resize(1000).is_err());
        disk.resize(1 << 20).unwrap();
        disk.resize(3 << 30).unwrap();
        let buffer = scattered(&view, 0, 4096);
        let read = Operation::Read {
            offset,
            buffer: buffer.clone(),
        };
        assert_eq!(ask(&disk, read), Ok(()));
        assert!(
            content(&buffer) == [0; 4096],
            "{format}: old content is back"
        );
        disk.close().unwrap();
        let info = qemu_img(&["info", text(&path)]);
        assert!(info.contains("3221225472 bytes"), "{info}");
        if format == "qcow2" {
            qemu_img(&["check", text(&path)]);
        }
    }
}

#[test]
fn a_limit_is_shared_and_lifted_while_requests_wait() {
    let view = memory();
    let folder = tempfile::tempdir().unwrap();
    let thread = IoThread::start("disks", EngineKind::Auto).unwrap();
    // One operation a day.
    let slow = Rate {
        per_second: 1,
        burst: 1,
    };
    let limit = RateLimit::new(Limits {
        bytes: Some(slow),
        operations: None,
    });
    let disks: Vec<Disk> = (0..2)
        .map(|n| {
            let path = folder.path().join(format!("{n}.img"));
            fs::write(&path, vec![0; 1 << 20]).unwrap();
            let mut options = DiskOptions::new(path);
            options.limit = Some(limit.clone());
            Disk::open(&thread, options).unwrap()
        })
        .collect();
    let read = |disk: &Disk| {
        let buffer = scattered(&view, 0, 1 << 20);
        let (request, completion) = Request::new(Operation::Read { offset: 0, buffer });
        disk.submit(request);
        disk.kick();
        completion
    };
    // The first goes into debt for both disks.
    assert_eq!(wait(read(&disks[0])), Ok(()));
    let waiting = [read(&disks[0]), read(&disks[1])];
    assert_eq!(ask(&disks[1], Operation::Flush), Ok(()));
    assert!(waiting.iter().all(|one| one.try_outcome().is_none()));
    limit.set(Limits::default());
    for one in waiting {
        assert_eq!(wait(one), Ok(()));
    }
}

#[test]
fn a_format_is_not_guessed_and_backing_files_must_be_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let thread = IoThread::start("disks", EngineKind::Auto).unwrap();
    let at = |name: &str| folder.path().join(name);
    qemu_img(&["create", "-q", "-f", "raw", text(&at("base.raw")), "1M"]);
    let base = ["-b", "base.raw", "-F", "raw"];
    let top = at("top.qcow2");
    qemu_img(&[&["create", "-q", "-f", "qcow2"], &base[..], &[text(&top)]].concat());
    let open = |name: &str, change: &dyn Fn(&mut DiskOptions)| {
        let mut options = DiskOptions::new(at(name));
        change(&mut options);
        let disk = Disk::open(&thread, options).map_err(|e| e.to_string())?;
        disk.close().map_err(|e| e.to_string())
    };
    // What a guest may do to its raw disk.
    fs::copy(&top, at("evil.img")).unwrap();
    fs::copy(&top, at("noname")).unwrap();
    for name in ["evil.img", "noname"] {
        let error = open(name, &|_| {}).unwrap_err();
        assert!(error.contains("format="), "{error}");
        open(name, &|o| o.format = Some(Format::Raw)).unwrap();
    }
    fs::write(at("plain"), [0; 512]).unwrap();
    assert!(open("plain", &|_| {}).unwrap_err().contains("format="));
    let error = open("top.qcow2", &|_| {}).unwrap_err();
    assert!(error.contains("backing files are not allowed"), "{error}");
    open("top.qcow2", &|o| o.backing = BackingPolicy::Allow).unwrap();
    let below = |o: &mut DiskOptions| {
        o.backing = BackingPolicy::Below(vec![folder.path().to_owned()]);
    };
    open("top.qcow2", &below).unwrap();
    let elsewhere = |o: &mut DiskOptions| {
        o.backing = BackingPolicy::Below(vec!["/usr".into()]);
    };
    assert!(
        open("top.qcow2", &elsewhere)
            .unwrap_err()
            .contains("outside")
    );
    // A circle.
    qemu_img(&["rebase", "-u", "-b", "top.qcow2", "-F", "qcow2", text(&top)]);
    assert!(open("top.qcow2", &below).unwrap_err().contains("circle"));
    // A backing file whose format is not said.
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        text(&at("old.qcow2")),
        "1M",
    ]);
    let mut bytes = fs::read(at("old.qcow2")).unwrap();
    bytes[8..16].copy_from_slice(&200u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&8u32.to_be_bytes());
    bytes[200..208].copy_from_slice(b"base.raw");
    fs::write(at("old.qcow2"), bytes).unwrap();
    let error = open("old.qcow2", &below).unwrap_err();
    assert!(error.contains("format"), "{error}");
}

#[test]
fn a_closed_disk_answers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.img");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    let before = caisson_block::abandoned();
    let thread = IoThread::start("disks", EngineKind::Auto).unwrap();
    let disk = Arc::new(Disk::open(&thread, DiskOptions::new(&path)).unwrap());
    let completions: Vec<Completion> = (0..100)
        .map(|_| {
            let (request, completion) = Request::new(Operation::Flush);
            disk.submit(request);
            completion
        })
        .collect();
    drop(disk);
    drop(thread);
    for completion in completions {
        assert!(completion.try_outcome().is_some());
    }
    assert_eq!(caisson_block::abandoned(), before);
}
