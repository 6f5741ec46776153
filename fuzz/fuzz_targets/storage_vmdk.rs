//! An image of any bytes: it is used or refused; a disk made of it answers, and is never written to.
#![no_main]

use std::rc::Rc;

use caisson_memory::Pinned;
use caisson_storage::{
    EngineKind, Layer, Runtime,
    file::{FileLayer, MemoryFile},
    format::{
        NoOthers,
        vmdk::{Descriptor, Vmdk},
    },
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let _ = Descriptor::parse(input);
    let runtime = Runtime::new(EngineKind::Threads).expect("an executor");
    runtime.block_on(async {
        let file = FileLayer::new(MemoryFile::new(input), None).expect("memory has a length");
        let file = Rc::new(file);
        let _ = Vmdk::describe(file.clone()).await;
        let Ok(disk) = Vmdk::open(file, false, &NoOthers).await else {
            return;
        };
        let size = disk.size();
        let len = size.min(3 * 512);
        for at in [0, size / 1024 * 512, size - len] {
            let at = at.min(size - len);
            if len == 0 {
                return;
            }
            let _ = disk.read(at, Pinned::zeroed(len as usize)).await;
            let extent = disk.extent(at, len).await;
            assert!(extent.is_err() || extent.is_ok_and(|e| (1..=len).contains(&e.len)));
        }
        assert!(disk.write(0, Pinned::zeroed(512), false).await.is_err());
    });
});
