//! What images that are damaged, or made to do damage, must not lead to.

mod support;

use std::{fs, io, rc::Rc};

use caisson_block::{BlockBackend, BlockError, Operation};
use caisson_memory::Pinned;
use caisson_storage::{
    Disk, DiskOptions, EngineKind, Format, IoThread, Layer, Runtime, Traits,
    file::{Attempts, FileLayer, MemoryFile},
    format::{
        NoOthers,
        qcow2::{CheckReport, CreateOptions, Qcow2, create},
        vhd,
    },
    runtime::{Call, LocalFuture},
};
use support::{ask, fill, memory, scattered};

const CLUSTER: u64 = 4096;

fn runtime() -> Runtime {
    Runtime::new(EngineKind::Threads).unwrap()
}

fn layer(bytes: &[u8]) -> Rc<FileLayer<MemoryFile>> {
    Rc::new(FileLayer::new(MemoryFile::new(bytes), None).unwrap())
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

async fn check(bytes: &[u8], repair: bool) -> (CheckReport, Vec<u8>) {
    let file = layer(bytes);
    let tables = Qcow2::open_tables(file.clone()).await.unwrap();
    let report = tables.check(repair).await.unwrap();
    (report, file.file().content())
}

/// An image with clusters of 4 KiB: 9s in the first two clusters, 7s in the first that the second L2 table maps.
async fn image() -> Vec<u8> {
    let file = layer(&[]);
    let options = CreateOptions {
        cluster: CLUSTER as u32,
        ..CreateOptions::new(4 << 20)
    };
    let layer: Rc<dyn Layer> = file.clone();
    create(&layer, &options).await.unwrap();
    let disk = Qcow2::open(layer, true, &NoOthers).await.unwrap();
    let write = async |at, byte, len| {
        let from = Pinned::copy_of(&vec![byte; len]);
        disk.write(at, from, false).await.unwrap();
    };
    write(0, 9, 2 * CLUSTER as usize).await;
    write(2 << 20, 7, CLUSTER as usize).await;
    disk.close().await.unwrap();
    file.file().content()
}

#[test]
fn a_table_is_not_put_where_its_own_refcounts_go() {
    runtime().block_on(async {
        // Blocks of 64 refcounts: each longer L1 table needs several that are not there yet.
        for (version, refcount_bits) in [(3, 64), (3, 16), (2, 16)] {
            let file = layer(&[]);
            let options = CreateOptions {
                cluster: 512,
                version,
                refcount_bits,
                ..CreateOptions::new(1 << 20)
            };
            let image: Rc<dyn Layer> = file.clone();
            create(&image, &options).await.unwrap();
            let disk = Qcow2::open(image, true, &NoOthers).await.unwrap();
            let data = Pinned::copy_of(&[5; 4096]);
            disk.write(0, data, false).await.unwrap();
            for size in [4 << 20, 64 << 20, 600 << 20] {
                disk.resize(size).await.unwrap();
                let data = Pinned::copy_of(&[6; 4096]);
                disk.write(size - 4096, data, false).await.unwrap();
            }
            disk.create_snapshot("s").await.unwrap();
            disk.close().await.unwrap();
            let (report, _) = check(&file.file().content(), false).await;
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
            let read = Pinned::zeroed(4096);
            disk.read(0, read.clone()).await.unwrap();
            assert_eq!(read.to_vec(), [5; 4096]);
        }
    });
}

#[test]
fn a_repair_puts_no_refcounts_over_data() {
    runtime().block_on(async {
        let mut bytes = image().await;
        let table = word(&bytes, 48);
        put(&mut bytes, table, 0);
        let (report, repaired) = check(&bytes, true).await;
        assert!(report.corruptions > 0 && report.repaired == report.corruptions + report.leaks);
        let (clean, _) = check(&repaired, false).await;
        assert_eq!((clean.corruptions, clean.leaks), (0, 0), "{clean:?}");
        let disk = Qcow2::open(layer(&repaired), true, &NoOthers)
            .await
            .unwrap();
        let read = Pinned::zeroed(2 * CLUSTER as usize);
        disk.read(0, read.clone()).await.unwrap();
        assert!(read.to_vec() == [9; 2 * CLUSTER as usize]);
        let read = Pinned::zeroed(CLUSTER as usize);
        disk.read(2 << 20, read.clone()).await.unwrap();
        assert!(read.to_vec() == [7; CLUSTER as usize]);
    });
}

#[test]
fn what_is_compressed_around_a_table_frees_no_table_and_marks_the_image() {
    runtime().block_on(async {
        let mut bytes = image().await;
        const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
        let l1 = word(&bytes, 40);
        let (first, second) = (word(&bytes, l1) & OFFSET, word(&bytes, l1 + 8) & OFFSET);
        let data = |at| word(&bytes, at) & OFFSET;
        // Data, a table, data: in this order in the file.
        assert_eq!(data(first + 8) + CLUSTER, second);
        assert_eq!(second + CLUSTER, data(second));
        let host = second - 512;
        // 16 sectors; the field of the length begins at bit 58 with these clusters.
        put(&mut bytes, first + 8, 1 << 62 | 15 << 58 | host);
        let file = layer(&bytes);
        let disk = Qcow2::open(file.clone(), true, &NoOthers).await.unwrap();
        let from = || Pinned::copy_of(&[1; CLUSTER as usize]);
        let error = disk.write(CLUSTER, from(), false).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("where a table is"), "{error}");
        // Nothing is written any more, and everybody is told.
        assert!(disk.write(0, from(), false).await.is_err());
        let after = file.file().content();
        assert_eq!(after[79] & 2, 2);
        assert!(after[second as usize..][..512] == bytes[second as usize..][..512]);
        let again = Qcow2::open(layer(&after), true, &NoOthers).await;
        assert!(again.err().unwrap().to_string().contains("corrupt"));
    });
}

/// A file in which each write is durable.
struct Through(MemoryFile);

impl Attempts for Through {
    fn attempt<'a>(&'a self, call: Call, memory: Pinned) -> LocalFuture<'a, io::Result<usize>> {
        self.0.attempt(call, memory)
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn stored(&self, at: u64, len: u64) -> io::Result<(u64, bool)> {
        self.0.stored(at, len)
    }
    fn traits(&self) -> Traits {
        Traits {
            write_cache: false,
            ..self.0.traits()
        }
    }
    fn writes_through(&self) -> bool {
        true
    }
}

#[test]
fn zeroes_are_as_durable_as_writes() {
    runtime().block_on(async {
        for unmap in [true, false] {
            let file = MemoryFile::new(&[3; 8192]);
            file.record();
            let file = FileLayer::new(Through(file), None).unwrap();
            file.write_zeroes(0, 4096, unmap).await.unwrap();
            let recording = file.file().0.recording();
            let left = recording.crash(recording.changes()).least().content();
            assert!(left[..4096].iter().all(|&byte| byte == 0), "{unmap}");
            assert!(left[4096..].iter().all(|&byte| byte == 3));
        }
    });
}

#[test]
fn large_blocks_do_not_reach_what_follows_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.vhd");
    let bytes = runtime().block_on(async {
        let file = layer(&[]);
        let image: Rc<dyn Layer> = file.clone();
        vhd::create(&image, 9 * 512, false, None).await.unwrap();
        file.file().content()
    });
    fs::write(&path, &bytes).unwrap();
    let thread = IoThread::start("test", EngineKind::Auto).unwrap();
    let mut options = DiskOptions::new(&path);
    options.format = Some(Format::Vhd);
    options.logical_block = 4096;
    let disk = Disk::open(&thread, options).unwrap();
    assert_eq!(disk.info().size, 4096);
    let view = memory();
    let buffer = scattered(&view, 0, 4096);
    fill(&buffer, &[0xee; 4096]);
    let write = |offset| {
        let buffer = buffer.clone();
        ask(
            &disk,
            Operation::Write {
                offset,
                buffer,
                durable: true,
            },
        )
    };
    assert_eq!(write(0), Ok(()));
    assert_eq!(write(4096), Err(BlockError::OutOfRange));
    disk.close().unwrap();
    let after = fs::read(&path).unwrap();
    assert!(after[9 * 512..] == bytes[9 * 512..]);
}
