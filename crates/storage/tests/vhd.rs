//! VHD against QEMU's own code, and after power cuts.

mod support;

use std::{fs, path::Path, rc::Rc};

use caisson_memory::Pinned;
use caisson_storage::{
    BackingPolicy, DiskOptions, EngineKind, Format, Layer, OpenError, Runtime,
    file::{FileLayer, MemoryFile},
    format::{
        NoOthers,
        vhd::{Vhd, create},
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
    qemu_img(&["convert", "-f", "vpc", "-O", "raw", text(image), text(&raw)]);
    fs::read(raw).unwrap()
}

async fn scribble(disk: &dyn Layer, shadow: &mut [u8], seed: u64) {
    let mut state = seed;
    for n in 0..150u64 {
        let sectors = shadow.len() as u64 / 512;
        let at = random(&mut state) % sectors;
        let len = (1 + random(&mut state) % 400).min(sectors - at);
        let (at, len) = (at * 512, len * 512);
        let range = at as usize..(at + len) as usize;
        if random(&mut state).is_multiple_of(6) {
            disk.write_zeroes(at, len, n % 2 == 0).await.unwrap();
            shadow[range].fill(0);
        } else {
            let bytes = vec![(n % 255) as u8 + 1; len as usize];
            disk.write(at, Pinned::copy_of(&bytes), false)
                .await
                .unwrap();
            shadow[range].copy_from_slice(&bytes);
        }
    }
}

#[test]
fn images_of_qemu_are_read_and_written_and_ours_are_read_there() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (n, subformat) in ["dynamic", "fixed"].into_iter().enumerate() {
        let path = folder.path().join(format!("{subformat}.vhd"));
        let shape = format!("subformat={subformat},force_size=on");
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "vpc",
            "-o",
            &shape,
            text(&path),
            &SIZE.to_string(),
        ]);
        let commands = [
            "write -P 3 5000k 70k",
            "write -P 4 1536 512",
            "write -P 5 8M 1M",
        ];
        qemu_io(&path, "vpc", &commands.map(str::to_owned));
        let mut shadow = seen_by_qemu(&path);
        assert_eq!(shadow.len() as u64, SIZE);
        runtime.block_on(async {
            let disk = open_image(&runtime, &DiskOptions::new(&path), true)
                .await
                .unwrap();
            assert!(everything(&*disk).await == shadow, "{subformat}");
            scribble(&*disk, &mut shadow, n as u64).await;
            assert!(everything(&*disk).await == shadow, "{subformat}");
            disk.close().await.unwrap();
        });
        assert!(seen_by_qemu(&path) == shadow, "{subformat}");
        let info = manage::info(&path, None).unwrap();
        assert_eq!((info.format, info.size), (Format::Vhd, SIZE));
    }
    for dynamic in [true, false] {
        let path = folder.path().join(format!("ours-{dynamic}.vhd"));
        runtime.block_on(async {
            let made = Rc::new(FileLayer::new(MemoryFile::default(), None).unwrap());
            let image: Rc<dyn Layer> = made.clone();
            create(&image, SIZE, dynamic, None).await.unwrap();
            let disk = Vhd::open(image, true, &NoOthers).await.unwrap();
            let mut shadow = vec![0; SIZE as usize];
            scribble(&disk, &mut shadow, 9).await;
            disk.close().await.unwrap();
            fs::write(&path, made.file().content()).unwrap();
            assert!(seen_by_qemu(&path) == shadow, "{dynamic}");
        });
    }
}

#[test]
fn sectors_that_were_never_written_are_zero_whatever_is_there() {
    let runtime = Runtime::new(EngineKind::Threads).unwrap();
    runtime.block_on(async {
        let file = Rc::new(FileLayer::new(MemoryFile::default(), None).unwrap());
        let image: Rc<dyn Layer> = file.clone();
        create(&image, SIZE, true, None).await.unwrap();
        let disk = Vhd::open(image, true, &NoOthers).await.unwrap();
        disk.write(0, Pinned::copy_of(&[7; 4096]), false)
            .await
            .unwrap();
        disk.close().await.unwrap();
        // The first block's map: only the second and the fourth sector count.
        let mut bytes = file.file().content();
        let start = u32::from_be_bytes(bytes[1536..1540].try_into().unwrap()) as usize * 512;
        bytes[start..start + 512].fill(0);
        bytes[start] = 0b0101_0000;
        let image: Rc<dyn Layer> = Rc::new(FileLayer::new(MemoryFile::new(&bytes), None).unwrap());
        let disk = Vhd::open(image, true, &NoOthers).await.unwrap();
        let mut expected = vec![0; SIZE as usize];
        expected[512..1024].fill(7);
        expected[1536..2048].fill(7);
        assert!(everything(&disk).await == expected);
        disk.write(2048, Pinned::copy_of(&[8; 512]), false)
            .await
            .unwrap();
        expected[2048..2560].fill(8);
        assert!(everything(&disk).await == expected);
    });
}

#[test]
fn a_power_cut_leaves_what_was_flushed() {
    let runtime = Runtime::new(EngineKind::Threads).unwrap();
    runtime.block_on(async {
        let file = MemoryFile::default().shuffled(1);
        let file = Rc::new(FileLayer::new(file, None).unwrap());
        let image: Rc<dyn Layer> = file.clone();
        create(&image, SIZE, true, None).await.unwrap();
        file.file().record();
        let disk = Vhd::open(image, true, &NoOthers).await.unwrap();
        // After so many changes of the file, these sectors hold 7.
        let mut flushed: Vec<(usize, u64)> = Vec::new();
        for sector in [3, 9000, 5000, 17_000] {
            let memory = Pinned::copy_of(&[7; 512]);
            disk.write(sector * 512, memory, false).await.unwrap();
            disk.flush().await.unwrap();
            flushed.push((file.file().changes(), sector));
        }
        let recording = file.file().recording();
        for cut in 0..=recording.changes() {
            let crash = recording.crash(cut);
            let images = [crash.least(), crash.most()].into_iter();
            for image in images.chain((0..8).map(|seed| crash.by_chance(seed))) {
                let image: Rc<dyn Layer> = Rc::new(FileLayer::new(image, None).unwrap());
                let disk = Vhd::open(image, true, &NoOthers).await.unwrap();
                let content = everything(&disk).await;
                for (number, sector) in content.chunks_exact(512).enumerate() {
                    let sure = flushed
                        .iter()
                        .any(|(at, s)| *at <= cut && *s == number as u64);
                    let asked = flushed.iter().any(|(_, s)| *s == number as u64);
                    let is = sector[0];
                    let fine = if sure {
                        is == 7
                    } else {
                        is == 0 || asked && is == 7
                    };
                    assert!(fine, "cut at {cut}: sector {number} holds {is}");
                }
                // The next block does not lie over one that is there.
                disk.write(13_000 * 512, Pinned::copy_of(&[9; 512]), true)
                    .await
                    .unwrap();
                let after = everything(&disk).await;
                assert!(after[..13_000 * 512] == content[..13_000 * 512]);
                assert!(after[13_001 * 512..] == content[13_001 * 512..]);
            }
        }
    });
}

#[test]
fn images_that_lie_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.vhd");
    let base = folder.path().join("base.vhd");
    qemu_img(&["create", "-q", "-f", "vpc", text(&base), "4M"]);
    let good = fs::read(&base).unwrap();
    let refused = |change: &dyn Fn(&mut Vec<u8>), what: &str| {
        let mut bytes = good.clone();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let error = manage::info(&path, Some(Format::Vhd))
            .map(|_| ())
            .unwrap_err();
        assert!(matches!(error, OpenError::Format { .. }), "{error}");
        assert!(
            error.to_string().contains(what),
            "{error} instead of {what}"
        );
    };
    let both = |bytes: &mut Vec<u8>, at: usize, value: u8| {
        let end = bytes.len() - 512;
        for start in [0, end] {
            bytes[start + at] = value;
            let sum: u32 = (0..512)
                .filter(|n| !(64..68).contains(n))
                .map(|n| u32::from(bytes[start + n]))
                .sum();
            bytes[start + 64..start + 68].copy_from_slice(&(!sum).to_be_bytes());
        }
    };
    refused(
        &|b| {
            let end = b.len() - 512;
            b[end + 70] ^= 1;
            b[70] ^= 1
        },
        "footer",
    );
    refused(&|b| both(b, 48, 9), "bytes");
    refused(&|b| both(b, 16, 9), "header");
    refused(&|b| b[512 + 30] = 9, "header is damaged");
    refused(
        &|b| b[1536..1540].copy_from_slice(&[0; 4]),
        "over each other",
    );
    refused(&|b| b.truncate(100), "too short");
}

#[test]
fn a_chain_of_eight_differences_shows_through() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = |path: &Path| {
        let mut options = DiskOptions::new(path);
        options.backing = BackingPolicy::Allow;
        options
    };
    let mut shadow = vec![0; SIZE as usize];
    for n in 0..8u64 {
        let path = folder.path().join(format!("{n}.vhd"));
        let backing = n
            .checked_sub(1)
            .map(|below| (format!("{below}.vhd"), Format::Vhd));
        manage::create(&NewImage {
            path: path.clone(),
            format: Format::Vhd,
            size: backing.is_none().then_some(SIZE),
            cluster: None,
            fixed: n == 0,
            version: None,
            backing,
        })
        .unwrap();
        let open = async |write| open_image(&runtime, &options(&path), write).await;
        // Written, read again, and with the sectors of one block marked as not written.
        runtime.block_on(async {
            let disk = open(true).await.unwrap();
            assert!(everything(&*disk).await == shadow, "{n}");
            for m in 0..3u64 {
                let at = ((n * 5 + m * 3) % 17) * (SIZE / 17) / 512 * 512;
                let range = at as usize..at as usize + 7680;
                if m == 2 {
                    disk.write_zeroes(at, 7680, true).await.unwrap();
                    shadow[range].fill(0);
                } else {
                    let byte = (n * 16 + m + 1) as u8;
                    let from = Pinned::copy_of(&[byte; 7680]);
                    disk.write(at, from, false).await.unwrap();
                    shadow[range].fill(byte);
                }
            }
            disk.close().await.unwrap();
            drop(disk);
            let disk = open(false).await.unwrap();
            assert!(everything(&*disk).await == shadow, "{n}");
        });
        let info = manage::info(&path, None).unwrap();
        let parent = info.blocks.unwrap().parent;
        assert_eq!(parent.is_some(), n > 0);
    }
    // What a map says is not written shows the parent: all that this image has of its first block is gone then.
    let (path, below) = (folder.path().join("7.vhd"), folder.path().join("6.vhd"));
    let mut bytes = fs::read(&path).unwrap();
    let field = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let table = field(512 + 20) as usize;
    let index = (0..5).find(|n| field(table + n * 4) != u32::MAX).unwrap();
    let start = field(table + index * 4) as usize * 512;
    bytes[start..start + 512].fill(0);
    fs::write(&path, &bytes).unwrap();
    runtime.block_on(async {
        let under = open_image(&runtime, &options(&below), false).await.unwrap();
        let under = everything(&*under).await;
        let disk = open_image(&runtime, &options(&path), true).await.unwrap();
        let block = index * (2 << 20)..((index + 1) * (2 << 20)).min(SIZE as usize);
        shadow[block.clone()].copy_from_slice(&under[block.clone()]);
        assert!(everything(&*disk).await == shadow);
        let from = Pinned::copy_of(&[0xee; 512]);
        disk.write(block.start as u64 + 1024, from, true)
            .await
            .unwrap();
        shadow[block.start + 1024..block.start + 1536].fill(0xee);
        assert!(everything(&*disk).await == shadow);
    });
    // Another image in the parent's place is noticed.
    fs::remove_file(&below).unwrap();
    manage::create(&NewImage {
        path: below,
        format: Format::Vhd,
        size: Some(SIZE),
        cluster: None,
        fixed: false,
        version: None,
        backing: None,
    })
    .unwrap();
    runtime.block_on(async {
        let error = open_image(&runtime, &options(&path), false).await;
        let error = error.err().unwrap().to_string();
        assert!(error.contains("is another image"), "{error}");
    });
}
