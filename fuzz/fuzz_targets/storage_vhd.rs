//! An image of any bytes: it is used or refused; a disk made of it answers, and what was written is read back.
#![no_main]

use std::rc::Rc;

use caisson_memory::Pinned;
use caisson_storage::{
    EngineKind, Layer, Runtime,
    file::{FileLayer, MemoryFile},
    format::{
        NoOthers,
        vhd::{Shape, Vhd},
    },
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let runtime = Runtime::new(EngineKind::Threads).expect("an executor");
    runtime.block_on(async {
        if let (Some(footer), Some(header)) = (input.get(..512), input.get(512..1536)) {
            // With the checksums right, the numbers are looked at.
            let mut bytes = [footer, header].concat();
            for (start, len, at) in [(0, 512, 64), (512, 1024, 36)] {
                let part = &mut bytes[start..start + len];
                part[at..at + 4].fill(0);
                let sum = part.iter().fold(0u32, |sum, &b| sum.wrapping_add(b.into()));
                part[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
            }
            let _ = Shape::parse(&bytes[..512], &bytes[512..], input.len() as u64);
            bytes.extend(&input[1536..]);
            use_it(&bytes).await;
        }
        use_it(input).await;
    });
});

async fn use_it(bytes: &[u8]) {
    let file = FileLayer::new(MemoryFile::new(bytes), None).expect("memory has a length");
    let Ok(disk) = Vhd::open(Rc::new(file), true, &NoOthers).await else {
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
        memory.fill(0, len as usize, 0x55);
        if disk.write(at, memory.clone(), false).await.is_err() {
            return;
        }
        let again = Pinned::zeroed(len as usize);
        disk.read(at, again.clone())
            .await
            .expect("it was read before");
        assert!(again.to_vec() == memory.to_vec(), "a write is not there");
    }
    let _ = disk.write_zeroes(0, len, true).await;
    let _ = disk.close().await;
}
