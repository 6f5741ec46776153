//! qcow2 against QEMU's own code: its images here, ours there, and images that lie.

mod support;

use std::{fs, path::Path, rc::Rc};

use caisson_memory::Pinned;
use caisson_storage::{
    BackingPolicy, DiskOptions, EngineKind, Layer, Runtime,
    file::{FileLayer, FileOptions, HostFile, MemoryFile},
    format::{
        NoOthers,
        qcow2::{CreateOptions, Qcow2, create},
    },
    open_image,
};
use support::{qemu, qemu_img, qemu_io, random, text};

const SIZE: u64 = 9 << 20;

fn options(path: &Path) -> DiskOptions {
    let mut options = DiskOptions::new(path);
    options.backing = BackingPolicy::Allow;
    options
}

async fn everything(disk: &dyn Layer) -> Vec<u8> {
    let memory = Pinned::zeroed(disk.size() as usize);
    disk.read(0, memory.clone()).await.unwrap();
    memory.to_vec()
}

/// What QEMU sees in an image.
fn seen_by_qemu(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("seen");
    qemu_img(&["convert", "-O", "raw", text(image), text(&raw)]);
    fs::read(raw).unwrap()
}

/// Commands for `qemu-io` that write here and there.
fn scribbles(seed: u64, count: u64) -> Vec<String> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            let at = random(&mut state) % (SIZE / 512);
            let len = (1 + random(&mut state) % 400).min(SIZE / 512 - at);
            let (at, len) = (at * 512, len * 512);
            match random(&mut state) % 8 {
                0 => format!("discard {at} {len}"),
                1 => format!("write -z {at} {len}"),
                2 => format!("write -z -u {at} {len}"),
                n => format!("write -P {} {at} {len}", n * 16 + 3),
            }
        })
        .collect()
}

/// Random writes of ours; `shadow` is what the disk then holds.
async fn scribble(disk: &dyn Layer, shadow: &mut [u8], seed: u64, count: u64) {
    let mut state = seed;
    for n in 0..count {
        let at = random(&mut state) % (SIZE / 512);
        let len = (1 + random(&mut state) % 400).min(SIZE / 512 - at);
        let (at, len) = (at * 512, len * 512);
        let range = at as usize..(at + len) as usize;
        match random(&mut state) % 8 {
            0 => {
                disk.write_zeroes(at, len, true).await.unwrap();
                shadow[range].fill(0);
            }
            1 => {
                disk.write_zeroes(at, len, false).await.unwrap();
                shadow[range].fill(0);
            }
            _ => {
                let bytes = vec![(n % 255) as u8 + 1; len as usize];
                let from = Pinned::copy_of(&bytes);
                disk.write(at, from, false).await.unwrap();
                shadow[range].copy_from_slice(&bytes);
            }
        }
        if n % 16 == 0 {
            disk.flush().await.unwrap();
        }
    }
}

#[test]
fn images_of_qemu_are_read_and_written() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let shapes = [
        ("cluster_size=512", 40),
        ("cluster_size=4096,refcount_bits=1", 60),
        ("cluster_size=65536", 60),
        ("cluster_size=65536,compat=0.10", 60),
        ("cluster_size=2M,refcount_bits=64", 40),
        ("cluster_size=8192,refcount_bits=4,lazy_refcounts=on", 60),
    ];
    for (seed, (shape, count)) in shapes.into_iter().enumerate() {
        let path = folder.path().join(format!("{seed}.qcow2"));
        let size = SIZE.to_string();
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            shape,
            text(&path),
            &size,
        ]);
        qemu_io(&path, "qcow2", &scribbles(seed as u64, count));
        let mut shadow = seen_by_qemu(&path);
        runtime.block_on(async {
            let disk = open_image(&runtime, &options(&path), false).await.unwrap();
            assert!(everything(&*disk).await == shadow, "{shape}");
            drop(disk);
            let disk = open_image(&runtime, &options(&path), true).await.unwrap();
            scribble(&*disk, &mut shadow, seed as u64, 200).await;
            assert!(everything(&*disk).await == shadow, "{shape}");
            disk.close().await.unwrap();
        });
        qemu_img(&["check", text(&path)]);
        assert!(seen_by_qemu(&path) == shadow, "{shape}");
    }
}

#[test]
fn compressed_clusters_and_subclusters_are_read() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        text(&source),
        &SIZE.to_string(),
    ]);
    qemu_io(&source, "qcow2", &scribbles(9, 60));
    for (shape, compress, may_write) in [
        ("cluster_size=65536", true, true),
        ("cluster_size=4096,compat=0.10", true, true),
        ("compression_type=zstd", true, true),
        ("extended_l2=on,cluster_size=128k", false, false),
    ] {
        let path = folder.path().join("shaped.qcow2");
        let _ = fs::remove_file(&path);
        let mut arguments = vec!["convert", "-O", "qcow2", "-o", shape];
        arguments.extend(compress.then_some("-c"));
        qemu_img(&[&arguments[..], &[text(&source), text(&path)]].concat());
        if !compress {
            // Parts of clusters.
            qemu_io(&path, "qcow2", &scribbles(10, 60));
        }
        let mut shadow = seen_by_qemu(&path);
        runtime.block_on(async {
            let disk = open_image(&runtime, &options(&path), false).await.unwrap();
            assert!(everything(&*disk).await == shadow, "{shape}");
            drop(disk);
            let disk = open_image(&runtime, &options(&path), true).await;
            if !may_write {
                let error = disk.err().unwrap().to_string();
                assert!(error.contains("subclusters"), "{error}");
                return;
            }
            let disk = disk.unwrap();
            scribble(&*disk, &mut shadow, 5, 100).await;
            disk.close().await.unwrap();
        });
        qemu_img(&["check", text(&path)]);
        assert!(seen_by_qemu(&path) == shadow, "{shape}");
    }
}

#[test]
fn a_chain_of_eight_shows_through() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let at = |n: usize| folder.path().join(format!("{n}.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", text(&at(0)), "5M"]);
    for n in 1..8 {
        let below = format!("{}.qcow2", n - 1);
        let size = (SIZE - (n as u64 % 3) * (1 << 20)).to_string();
        let cluster = format!("cluster_size={}", 4096 << (n % 4));
        let base = ["-b", &below, "-F", "qcow2", "-o", &cluster];
        qemu_img(
            &[
                &["create", "-q", "-f", "qcow2"],
                &base[..],
                &[text(&at(n)), &size],
            ]
            .concat(),
        );
        let all = scribbles(n as u64, 30);
        let within: Vec<String> = all
            .into_iter()
            .filter(|command| {
                let mut numbers = command
                    .split(' ')
                    .rev()
                    .map(|w| w.parse::<u64>().unwrap_or(0));
                let (len, at) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
                at + len <= 7 << 20
            })
            .collect();
        qemu_io(&at(n), "qcow2", &within);
    }
    let top = folder.path().join("top.qcow2");
    let size = SIZE.to_string();
    let base = ["-b", "7.qcow2", "-F", "qcow2"];
    qemu_img(
        &[
            &["create", "-q", "-f", "qcow2"],
            &base[..],
            &[text(&top), &size],
        ]
        .concat(),
    );
    let mut shadow = seen_by_qemu(&top);
    runtime.block_on(async {
        let disk = open_image(&runtime, &options(&top), true).await.unwrap();
        assert!(everything(&*disk).await == shadow);
        scribble(&*disk, &mut shadow, 77, 150).await;
        assert!(everything(&*disk).await == shadow);
        disk.close().await.unwrap();
    });
    qemu_img(&["check", text(&top)]);
    assert!(seen_by_qemu(&top) == shadow);
}

#[test]
fn images_of_ours_are_read_by_qemu() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (n, (cluster, version, refcount_bits)) in [
        (512, 3, 1),
        (512, 2, 16),
        (4096, 3, 8),
        (65_536, 3, 16),
        (65_536, 2, 16),
        (2 << 20, 3, 64),
    ]
    .into_iter()
    .enumerate()
    {
        let path = folder.path().join(format!("{n}.qcow2"));
        fs::write(&path, []).unwrap();
        let mut shadow = vec![0; SIZE as usize];
        runtime.block_on(async {
            let writable = FileOptions {
                write: true,
                lock: true,
                ..FileOptions::default()
            };
            let file = HostFile::open(&runtime, &path, writable).unwrap();
            let file: Rc<dyn Layer> = Rc::new(FileLayer::new(file, None).unwrap());
            let wanted = CreateOptions {
                cluster,
                version,
                refcount_bits,
                ..CreateOptions::new(SIZE)
            };
            create(&file, &wanted).await.unwrap();
            let disk = Qcow2::open(file, true, &NoOthers).await.unwrap();
            scribble(&disk, &mut shadow, n as u64, 150).await;
            disk.close().await.unwrap();
        });
        qemu_img(&["check", text(&path)]);
        assert!(seen_by_qemu(&path) == shadow, "{cluster} {version}");
    }
}

#[test]
fn internal_snapshots_are_those_of_qemu() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshots.qcow2");
    let options = options(&path);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4096",
        text(&path),
        &SIZE.to_string(),
    ]);
    qemu_io(&path, "qcow2", &scribbles(1, 40));
    qemu_img(&["snapshot", "-c", "theirs", text(&path)]);
    let at_theirs = seen_by_qemu(&path);
    let mut shadow = at_theirs.clone();
    let open = async || {
        let file = HostFile::open(
            &runtime,
            &path,
            FileOptions {
                write: true,
                lock: true,
                ..FileOptions::default()
            },
        );
        let file = FileLayer::new(file.unwrap(), None).unwrap();
        Qcow2::open(Rc::new(file), true, &NoOthers).await.unwrap()
    };
    let at_ours = runtime.block_on(async {
        let disk = open_image(&runtime, &options, true).await.unwrap();
        scribble(&*disk, &mut shadow, 2, 80).await;
        disk.close().await.unwrap();
        drop(disk);
        let disk = open().await;
        disk.create_snapshot("ours").await.unwrap();
        assert!(disk.create_snapshot("ours").await.is_err());
        let at_ours = shadow.clone();
        scribble(&disk, &mut shadow, 3, 80).await;
        disk.close().await.unwrap();
        at_ours
    });
    qemu_img(&["check", text(&path)]);
    assert!(seen_by_qemu(&path) == shadow);
    let list = qemu_img(&["snapshot", "-l", text(&path)]);
    assert!(list.contains("theirs") && list.contains("ours"), "{list}");
    runtime.block_on(async {
        let disk = open().await;
        let names: Vec<String> = disk
            .snapshots()
            .await
            .unwrap()
            .into_iter()
            .map(|s| s.name)
            .collect();
        assert_eq!(names, ["theirs", "ours"]);
        disk.apply_snapshot("theirs").await.unwrap();
        assert!(everything(&disk).await == at_theirs);
        disk.close().await.unwrap();
    });
    qemu_img(&["check", text(&path)]);
    qemu_img(&["snapshot", "-a", "ours", text(&path)]);
    assert!(seen_by_qemu(&path) == at_ours);
    runtime.block_on(async {
        let disk = open().await;
        disk.delete_snapshot("ours").await.unwrap();
        disk.delete_snapshot("theirs").await.unwrap();
        assert!(disk.delete_snapshot("theirs").await.is_err());
        let mut now = at_ours.clone();
        scribble(&disk, &mut now, 4, 40).await;
        assert!(everything(&disk).await == now);
        disk.close().await.unwrap();
    });
    qemu_img(&["check", text(&path)]);
}

#[test]
fn wrong_refcounts_are_found_and_repaired() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.qcow2");
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "lazy_refcounts=on",
        text(&path),
        "9M",
    ];
    qemu_img(&create);
    // QEMU ends without having written its refcounts.
    let commands = [
        "-f",
        "qcow2",
        "-t",
        "unsafe",
        "-c",
        "write -P 5 0 3M",
        "-c",
        "flush",
        "-c",
        "abort",
    ];
    assert!(qemu("qemu-io", &[&commands[..], &[text(&path)]].concat()).is_err());
    let shadow = [vec![5; 3 << 20], vec![0; 6 << 20]].concat();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes[79] & 1, 1, "the image is not dirty");
    runtime.block_on(async {
        let check = async |bytes: Vec<u8>, repair| {
            let file = Rc::new(FileLayer::new(MemoryFile::new(&bytes), None).unwrap());
            let tables = Qcow2::open_tables(file.clone()).await.unwrap();
            let report = tables.check(repair).await.unwrap();
            (report, file.file().content())
        };
        let (found, _) = check(bytes.clone(), false).await;
        assert!(found.corruptions > 0 && found.repaired == 0);
        let (repaired, after) = check(bytes, true).await;
        assert_eq!(repaired.repaired, repaired.corruptions + repaired.leaks);
        let (clean, _) = check(after, false).await;
        assert_eq!((clean.corruptions, clean.leaks), (0, 0));
        // To open it for writing does the same.
        let disk = open_image(&runtime, &options(&path), true).await.unwrap();
        assert!(everything(&*disk).await == shadow);
        disk.close().await.unwrap();
    });
    qemu_img(&["check", text(&path)]);
    assert_eq!(fs::read(&path).unwrap()[79] & 1, 0);
}

/// An image of ours as bytes, and one changed field of it.
fn lies(change: impl FnOnce(&mut Vec<u8>)) -> Result<Vec<u8>, String> {
    let runtime = Runtime::new(EngineKind::Threads).unwrap();
    runtime.block_on(async {
        let file = Rc::new(FileLayer::new(MemoryFile::default(), None).unwrap());
        let image: Rc<dyn Layer> = file.clone();
        let wanted = CreateOptions {
            cluster: 4096,
            ..CreateOptions::new(1 << 20)
        };
        create(&image, &wanted).await.unwrap();
        let disk = Qcow2::open(image, true, &NoOthers).await.unwrap();
        let data = Pinned::copy_of(&[9; 8192]);
        disk.write(0, data, false).await.unwrap();
        disk.close().await.unwrap();
        let mut bytes = file.file().content();
        change(&mut bytes);
        let file: Rc<dyn Layer> = Rc::new(FileLayer::new(MemoryFile::new(&bytes), None).unwrap());
        let disk = Qcow2::open(file, true, &NoOthers).await;
        let disk = disk.map_err(|error| error.to_string())?;
        let read = Pinned::zeroed(4096);
        disk.read(0, read.clone())
            .await
            .map_err(|e| e.to_string())?;
        let data = Pinned::copy_of(&[8; 4096]);
        disk.write(0, data, false)
            .await
            .map_err(|e| e.to_string())?;
        Ok(read.to_vec())
    })
}

#[test]
fn images_that_lie_are_refused_by_name() {
    assert_eq!(lies(|_| {}).unwrap(), [9; 4096]);
    let put = |at: usize, value: u64| {
        move |bytes: &mut Vec<u8>| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes())
    };
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let refused = |change: &dyn Fn(&mut Vec<u8>), what: &str| {
        let outcome = lies(change).map(|_| "it was used");
        let error = outcome.unwrap_err();
        assert!(error.contains(what), "{error} instead of {what}");
    };
    refused(&put(32, 2 << 32), "LUKS");
    refused(&put(32, 1 << 32), "AES");
    refused(&put(72, 1 << 2), "another file");
    refused(&put(72, 1 << 1), "corrupt");
    refused(&put(72, 1 << 40), "not known");
    refused(&put(24, 1 << 63), "too many");
    refused(&put(24, 1 << 40), "too short");
    refused(&put(40, 0), "L1 table");
    refused(&put(40, 4096 + 8), "L1 table");
    refused(&put(48, 1 << 60), "refcount table");
    refused(&|b| b[23] = 40, "cluster size");
    // An L2 table that is the header, an L2 entry that points at the L2 table, and one at the refcounts.
    let l1 = |bytes: &[u8]| word(bytes, 40) as usize;
    refused(&|b| put(l1(b), 1 << 63 | 4096)(b), "over another table");
    for target in ["l1", "l2", "refcounts"] {
        refused(
            &|b| {
                let l2 = word(b, l1(b)) & 0x00ff_ffff_ffff_fe00;
                let to = match target {
                    "l1" => l1(b) as u64,
                    "l2" => l2,
                    _ => word(b, 4096),
                };
                put(l2 as usize, 1 << 63 | to)(b);
            },
            "where a table is",
        );
    }
}
