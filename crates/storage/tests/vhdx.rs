//! VHDX against QEMU's own code, and its log.

mod support;

use std::{fs, path::Path, rc::Rc};

use caisson_memory::Pinned;
use caisson_storage::{
    BackingPolicy, DiskOptions, EngineKind, Format, Layer, OpenError, Runtime,
    file::{FileLayer, MemoryFile},
    format::{
        NoOthers,
        vhdx::{CreateOptions, Vhdx, create},
    },
    manage::{self, NewImage},
    open_image,
};
use support::{qemu_img, qemu_io, random, text};

const SIZE: u64 = 9 << 20;

async fn everything(disk: &dyn Layer) -> Vec<u8> {
    let memory = Pinned::zeroed(disk.size() as usize);
    disk.read(0, memory.clone()).await.unwrap();
    memory.to_vec()
}

fn seen_by_qemu(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("seen");
    qemu_img(&[
        "convert",
        "-f",
        "vhdx",
        "-O",
        "raw",
        text(image),
        text(&raw),
    ]);
    fs::read(raw).unwrap()
}

fn options(path: &Path) -> DiskOptions {
    let mut options = DiskOptions::new(path);
    options.backing = BackingPolicy::Allow;
    options
}

fn runtime() -> Runtime {
    Runtime::new(EngineKind::Auto).unwrap()
}

fn new_image(path: &Path) -> NewImage {
    NewImage {
        path: path.to_owned(),
        format: Format::Vhdx,
        size: Some(SIZE),
        cluster: Some(1 << 20),
        fixed: false,
        version: None,
        backing: None,
    }
}

async fn scribble(disk: &dyn Layer, shadow: &mut [u8], seed: u64) {
    let mut state = seed;
    for n in 0..150u64 {
        let sectors = shadow.len() as u64 / 512;
        let at = random(&mut state) % sectors;
        let len = (1 + random(&mut state) % 4000).min(sectors - at);
        let (at, len) = (at * 512, len * 512);
        let range = at as usize..(at + len) as usize;
        if random(&mut state).is_multiple_of(6) {
            disk.write_zeroes(at, len, n % 2 == 0).await.unwrap();
            shadow[range].fill(0);
        } else {
            let bytes = vec![(n % 255) as u8 + 1; len as usize];
            let from = Pinned::copy_of(&bytes);
            disk.write(at, from, n % 40 == 0).await.unwrap();
            shadow[range].copy_from_slice(&bytes);
        }
        if n % 16 == 0 {
            disk.flush().await.unwrap();
        }
    }
}

#[test]
fn images_of_qemu_are_read_and_written_and_ours_are_read_there() {
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    let shapes = [
        "subformat=dynamic,block_size=1M",
        "subformat=dynamic,block_size=32M",
        "subformat=dynamic,block_size=2M,block_state_zero=off",
        "subformat=fixed,log_size=4M",
    ];
    for (n, shape) in shapes.into_iter().enumerate() {
        let path = folder.path().join(format!("{n}.vhdx"));
        let size = SIZE.to_string();
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "vhdx",
            "-o",
            shape,
            text(&path),
            &size,
        ]);
        let commands = [
            "write -P 3 5000k 70k",
            "write -P 4 1536 512",
            "write -P 5 8M 1M",
        ];
        qemu_io(&path, "vhdx", &commands.map(str::to_owned));
        let mut shadow = seen_by_qemu(&path);
        assert_eq!(shadow.len() as u64, SIZE);
        runtime.block_on(async {
            let disk = open_image(&runtime, &options(&path), false).await.unwrap();
            assert!(everything(&*disk).await == shadow, "{shape}");
            drop(disk);
            let disk = open_image(&runtime, &options(&path), true).await.unwrap();
            scribble(&*disk, &mut shadow, n as u64).await;
            assert!(everything(&*disk).await == shadow, "{shape}");
            disk.close().await.unwrap();
        });
        assert!(seen_by_qemu(&path) == shadow, "{shape}");
        qemu_img(&["check", "-f", "vhdx", text(&path)]);
        let info = manage::info(&path, None).unwrap();
        assert_eq!((info.format, info.size), (Format::Vhdx, SIZE));
    }
    for (fixed, block) in [(false, 1 << 20), (true, 1 << 20), (false, 256 << 20)] {
        let path = folder.path().join(format!("ours-{fixed}-{block}.vhdx"));
        manage::create(&NewImage {
            fixed,
            cluster: Some(block),
            ..new_image(&path)
        })
        .unwrap();
        let mut shadow = vec![0; SIZE as usize];
        runtime.block_on(async {
            let disk = open_image(&runtime, &options(&path), true).await.unwrap();
            scribble(&*disk, &mut shadow, 9).await;
            disk.close().await.unwrap();
        });
        assert!(seen_by_qemu(&path) == shadow, "{fixed}");
        qemu_img(&["check", "-f", "vhdx", text(&path)]);
    }
}

#[test]
fn a_log_that_was_not_applied_is_replayed_here_and_by_qemu() {
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log.vhdx");
    let (cut, shadow) = runtime.block_on(async {
        let file = Rc::new(FileLayer::new(MemoryFile::default(), None).unwrap());
        let image: Rc<dyn Layer> = file.clone();
        let wanted = CreateOptions {
            block: 1 << 20,
            ..CreateOptions::new(SIZE)
        };
        create(&image, &wanted).await.unwrap();
        file.file().record();
        let disk = Vhdx::open(image, true, &NoOthers).await.unwrap();
        let mut shadow = vec![0; SIZE as usize];
        for n in 0..5u8 {
            let at = usize::from(n) * (1 << 20) + 4096;
            let from = Pinned::copy_of(&[n + 1; 8192]);
            disk.write(at as u64, from, false).await.unwrap();
            disk.flush().await.unwrap();
            shadow[at..at + 8192].fill(n + 1);
        }
        // What was written to the table itself after the last flush did not arrive.
        let recording = file.file().recording();
        (recording.crash(recording.changes()).least(), shadow)
    });
    let bytes = cut.content();
    let entry = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(
        entry((3 << 20) + 4 * 8),
        0,
        "the table was written after all"
    );
    fs::write(&path, &bytes).unwrap();
    runtime.block_on(async {
        // Looked at only: the file stays as it is.
        let disk = open_image(&runtime, &options(&path), false).await.unwrap();
        assert!(everything(&*disk).await == shadow);
        drop(disk);
        assert!(fs::read(&path).unwrap() == bytes);
    });
    let other = folder.path().join("qemu.vhdx");
    fs::copy(&path, &other).unwrap();
    qemu_img(&["check", "-f", "vhdx", "-r", "all", text(&other)]);
    assert!(seen_by_qemu(&other) == shadow);
    runtime.block_on(async {
        let disk = open_image(&runtime, &options(&path), true).await.unwrap();
        assert!(everything(&*disk).await == shadow);
        disk.close().await.unwrap();
    });
    assert!(seen_by_qemu(&path) == shadow);
}

#[test]
fn logs_of_qemu_are_replayed() {
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dirty.vhdx");
    let size = SIZE.to_string();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "vhdx",
        "-o",
        "block_size=1M",
        text(&path),
        &size,
    ]);
    // QEMU ends with its log in use.
    let commands = ["write -P 5 0 64k", "write -P 6 5M 64k", "flush", "abort"];
    let mut arguments = vec!["-f", "vhdx"];
    for command in &commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(text(&path));
    assert!(support::qemu("qemu-io", &arguments).is_err());
    let mut shadow = vec![0; SIZE as usize];
    shadow[..64 << 10].fill(5);
    shadow[5 << 20..(5 << 20) + (64 << 10)].fill(6);
    for write in [false, true] {
        runtime.block_on(async {
            let disk = open_image(&runtime, &options(&path), write).await.unwrap();
            assert!(everything(&*disk).await == shadow);
            disk.close().await.unwrap();
        });
    }
    assert!(seen_by_qemu(&path) == shadow);
}

#[test]
fn a_chain_of_eight_differences_shows_through() {
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    let mut shadow = vec![0; SIZE as usize];
    for n in 0..8u64 {
        let path = folder.path().join(format!("{n}.vhdx"));
        let backing = n
            .checked_sub(1)
            .map(|below| (format!("{below}.vhdx"), Format::Vhdx));
        manage::create(&NewImage {
            size: backing.is_none().then_some(SIZE),
            backing,
            ..new_image(&path)
        })
        .unwrap();
        runtime.block_on(async {
            let disk = open_image(&runtime, &options(&path), true).await.unwrap();
            assert!(everything(&*disk).await == shadow, "{n}");
            for m in 0..6 {
                let at = ((n * 7 + m * 5) % 36 * (SIZE / 36)) as usize / 512 * 512;
                let len = 40 << 10;
                if m % 3 == 2 {
                    disk.write_zeroes(at as u64, len as u64, true)
                        .await
                        .unwrap();
                    shadow[at..at + len].fill(0);
                } else {
                    let from = Pinned::copy_of(&vec![n as u8 * 16 + m as u8 + 1; len]);
                    disk.write(at as u64, from, false).await.unwrap();
                    shadow[at..at + len].fill(n as u8 * 16 + m as u8 + 1);
                }
            }
            disk.close().await.unwrap();
            drop(disk);
            let disk = open_image(&runtime, &options(&path), false).await.unwrap();
            assert!(everything(&*disk).await == shadow, "{n}");
        });
    }
    // A parent that was written to is another one.
    let base = folder.path().join("3.vhdx");
    runtime.block_on(async {
        let disk = open_image(&runtime, &options(&base), true).await.unwrap();
        disk.write(0, Pinned::copy_of(&[1; 512]), false)
            .await
            .unwrap();
        disk.close().await.unwrap();
        drop(disk);
        let top = folder.path().join("4.vhdx");
        let error = open_image(&runtime, &options(&top), false)
            .await
            .err()
            .unwrap();
        assert!(matches!(error, OpenError::Format { .. }), "{error}");
        assert!(error.to_string().contains("was changed"), "{error}");
        // Nobody opens a parent unasked.
        let error = open_image(&runtime, &DiskOptions::new(&top), false).await;
        assert!(matches!(error.err().unwrap(), OpenError::Backing { .. }));
    });
    let flat = folder.path().join("flat.raw");
    let top = folder.path().join("2.vhdx");
    let raw = NewImage {
        format: Format::Raw,
        size: None,
        cluster: None,
        ..new_image(&flat)
    };
    manage::convert(&options(&top), &raw, &mut |_, _| {}).unwrap();
    assert_eq!(fs::read(flat).unwrap().len() as u64, SIZE);
}

#[test]
fn a_dynamic_image_grows() {
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("grow.vhdx");
    manage::create(&new_image(&path)).unwrap();
    let mut shadow = vec![0; SIZE as usize];
    runtime.block_on(async {
        let disk = open_image(&runtime, &options(&path), true).await.unwrap();
        scribble(&*disk, &mut shadow, 4).await;
        for size in [SIZE + 512 * 77, 3 * SIZE] {
            disk.resize(size).await.unwrap();
            shadow.resize(size as usize, 0);
            assert!(everything(&*disk).await == shadow);
            scribble(&*disk, &mut shadow, size).await;
        }
        assert!(disk.resize(SIZE).await.is_err());
        disk.close().await.unwrap();
    });
    assert!(seen_by_qemu(&path) == shadow);
}
