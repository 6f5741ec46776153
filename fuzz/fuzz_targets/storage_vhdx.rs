//! Changes of a sound image, which is far longer than an input: tables, headers, metadata and log get any bytes, with
//! checksums that are right. It is used or refused; a disk made of it answers, and what was written is read back.
//!
//! An input is a list of changes: which table (one byte), where in it (two bytes), how many bytes (one), and these bytes.
#![no_main]

use std::{rc::Rc, sync::OnceLock};

use caisson_memory::Pinned;
use caisson_storage::{
    EngineKind, Layer, Runtime,
    file::{FileLayer, MemoryFile},
    format::{
        NoOthers,
        vhdx::{CreateOptions, Vhdx, create},
    },
};
use libfuzzer_sys::fuzz_target;

/// Where changes go: offset, and the length of what has a checksum at its fifth byte.
const PLACES: [(usize, usize); 8] = [
    (64 << 10, 4096),
    (128 << 10, 4096),
    (192 << 10, 64 << 10),
    (256 << 10, 64 << 10),
    // An entry of the log, and its data.
    (1 << 20, 8192),
    ((1 << 20) + 8192, 8192),
    (2 << 20, 0),
    (3 << 20, 0),
];

/// A sound image whose log has two entries.
fn sound() -> &'static [u8] {
    static SOUND: OnceLock<Vec<u8>> = OnceLock::new();
    SOUND.get_or_init(|| {
        let runtime = Runtime::new(EngineKind::Threads).expect("an executor");
        runtime.block_on(async {
            let file = FileLayer::new(MemoryFile::default(), None).expect("memory has a length");
            let file = Rc::new(file);
            let image: Rc<dyn Layer> = file.clone();
            let options = CreateOptions {
                block: 1 << 20,
                ..CreateOptions::new(4 << 20)
            };
            create(&image, &options).await.expect("a new image");
            let disk = Vhdx::open(image, true, &NoOthers).await.expect("it opens");
            for at in [0, 2 << 20] {
                let written = disk.write(at, Pinned::copy_of(&[7; 512]), true).await;
                written.expect("it is written");
            }
            // Not closed: the log is in use.
            file.file().content()
        })
    })
}

fuzz_target!(|input: &[u8]| {
    let mut bytes = sound().to_vec();
    let mut rest = input;
    while let [place, low, high, len, more @ ..] = rest {
        let (start, _) = PLACES[usize::from(*place) % PLACES.len()];
        let at = start + usize::from(u16::from_le_bytes([*low, *high]));
        let len = usize::from(*len).min(more.len());
        bytes[at..at + len].copy_from_slice(&more[..len]);
        rest = &more[len..];
    }
    for (start, len) in PLACES.into_iter().filter(|(_, len)| *len > 0) {
        let part = &mut bytes[start..start + len];
        part[4..8].fill(0);
        let sum = crc32c::crc32c(part);
        part[4..8].copy_from_slice(&sum.to_le_bytes());
    }
    let runtime = Runtime::new(EngineKind::Threads).expect("an executor");
    runtime.block_on(async {
        for write in [false, true] {
            use_it(&bytes, write).await;
        }
    });
});

async fn use_it(bytes: &[u8], write: bool) {
    let file = FileLayer::new(MemoryFile::new(bytes), None).expect("memory has a length");
    let Ok(disk) = Vhdx::open(Rc::new(file), write, &NoOthers).await else {
        return;
    };
    let size = disk.size();
    let len = size.min(3 * 512);
    for at in [0, size / 1024 * 512, size - len] {
        let memory = Pinned::zeroed(len as usize);
        let at = at.min(size - len);
        if len == 0 || disk.read(at, memory.clone()).await.is_err() {
            return;
        }
        let _ = disk.extent(at, len).await;
        if !write {
            continue;
        }
        memory.fill(0, len as usize, 0x55);
        if disk.write(at, memory.clone(), false).await.is_err() {
            return;
        }
        let again = Pinned::zeroed(len as usize);
        let read = disk.read(at, again.clone()).await;
        read.expect("it was read before");
        assert!(again.to_vec() == memory.to_vec(), "a write is not there");
    }
    let _ = disk.write_zeroes(0, len, true).await;
    let _ = disk.flush().await;
    let _ = disk.close().await;
}
