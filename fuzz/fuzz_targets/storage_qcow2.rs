//! An image of any bytes: it is used or refused. Whatever it says, a disk made of it answers, and what was written is
//! read back until the image turns out to be damaged.
#![no_main]

use std::rc::Rc;

use caisson_memory::Pinned;
use caisson_storage::{
    EngineKind, Layer, Runtime,
    file::{FileLayer, MemoryFile},
    format::{
        Format, FormatError, Opener,
        qcow2::{Header, Qcow2},
    },
    runtime::LocalFuture,
};
use libfuzzer_sys::fuzz_target;

/// A short backing file, whatever its name.
struct Below;

impl Opener for Below {
    fn open<'a>(
        &'a self,
        _: &'a str,
        _: Option<Format>,
    ) -> LocalFuture<'a, Result<Rc<dyn Layer>, FormatError>> {
        Box::pin(async {
            let file = FileLayer::new(MemoryFile::new(&[0xbb; 5000]), None)?;
            let file: Rc<dyn Layer> = Rc::new(file);
            Ok(file)
        })
    }
}

fn file(bytes: &[u8]) -> Rc<dyn Layer> {
    Rc::new(FileLayer::new(MemoryFile::new(bytes), None).expect("memory has a length"))
}

/// Reads, writes, discards and flushes at both ends of the disk and in its middle.
async fn use_it(disk: &Qcow2) -> std::io::Result<()> {
    let size = disk.size();
    if size == 0 {
        return Ok(());
    }
    let len = size.min(3000);
    for at in [0, size / 2, size - len] {
        let at = at.min(size - len);
        let memory = Pinned::zeroed(len as usize);
        disk.read(at, memory.clone()).await?;
        disk.extent(at, len).await?;
        memory.fill(0, memory.len(), 0x77);
        disk.write(at, memory.clone(), false).await?;
        disk.flush().await?;
        let again = Pinned::zeroed(len as usize);
        disk.read(at, again.clone()).await?;
        assert!(again.to_vec() == memory.to_vec(), "a write is not there");
    }
    disk.write_zeroes(0, len, true).await?;
    let memory = Pinned::copy_of(&vec![1; len as usize]);
    disk.read(0, memory.clone()).await?;
    assert!(memory.to_vec().iter().all(|&byte| byte == 0));
    disk.discard(0, size.min(1 << 24)).await?;
    disk.close().await
}

fuzz_target!(|input: &[u8]| {
    let runtime = Runtime::new(EngineKind::Threads).expect("an executor");
    runtime.block_on(async {
        if let Ok(header) = Header::parse(input, input.len() as u64) {
            let _ = header.encode();
        }
        if let Ok(tables) = Qcow2::open_tables(file(input)).await {
            if let Ok(report) = tables.check(false).await {
                assert!(report.repaired == 0);
            }
            let _ = tables.snapshots().await;
        }
        if let Ok(tables) = Qcow2::open_tables(file(input)).await {
            let _ = tables.check(true).await;
        }
        if let Ok(disk) = Qcow2::open(file(input), false, &Below).await {
            let memory = Pinned::zeroed(disk.size().min(1 << 16) as usize);
            let _ = disk.read(0, memory).await;
        }
        if let Ok(disk) = Qcow2::open(file(input), true, &Below).await {
            let _ = use_it(&disk).await;
            let names: Vec<String> = match disk.snapshots().await {
                Ok(all) => all.into_iter().map(|s| s.name).collect(),
                Err(_) => Vec::new(),
            };
            let _ = disk.create_snapshot("new").await;
            for name in names.iter().take(2) {
                let _ = disk.apply_snapshot(name).await;
                let _ = disk.delete_snapshot(name).await;
            }
        }
    });
});
