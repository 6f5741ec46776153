//! Images of ours, read by programs that are neither ours nor QEMU's.

mod support;

use std::{fs, io::Read, path::Path};

use caisson_memory::Pinned;
use caisson_storage::{
    BackingPolicy, DiskOptions, EngineKind, Format, Layer, Runtime,
    manage::{self, NewImage},
    open_image,
};
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, file::File};
use support::random;
use vhdx::VhdxReader;

const SIZE: u64 = 9 << 20;

fn options(path: &Path) -> DiskOptions {
    let mut options = DiskOptions::new(path);
    options.backing = BackingPolicy::Allow;
    options
}

/// Images in `folder`, each over the one before, with random content; what the last one holds.
fn chain(folder: &Path, format: Format, cluster: u32, count: u64) -> Vec<u8> {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let mut shadow = vec![0; SIZE as usize];
    let mut state = cluster.into();
    for n in 0..count {
        let path = folder.join(format!("{n}.{format}"));
        let below = n.checked_sub(1).map(|n| format!("{n}.{format}"));
        let new = NewImage {
            path: path.clone(),
            format,
            size: below.is_none().then_some(SIZE),
            cluster: Some(cluster),
            fixed: false,
            version: None,
            backing: below.map(|name| (name, format)),
        };
        manage::create(&new).unwrap();
        runtime.block_on(async {
            let disk = open_image(&runtime, &options(&path), true).await.unwrap();
            for _ in 0..20 {
                let at = random(&mut state) % (SIZE / 512);
                let len = (1 + random(&mut state) % 300).min(SIZE / 512 - at);
                let range = at as usize * 512..(at + len) as usize * 512;
                let byte = random(&mut state) as u8;
                let from = Pinned::copy_of(&vec![byte; range.len()]);
                disk.write(at * 512, from, false).await.unwrap();
                shadow[range].fill(byte);
            }
            disk.close().await.unwrap();
        });
    }
    shadow
}

#[test]
fn qcow2_is_read_by_imago() {
    for cluster in [512, 4096, 65_536, 2 << 20] {
        let folder = tempfile::tempdir().unwrap();
        let shadow = chain(folder.path(), Format::Qcow2, cluster, 3);
        let image = imago::qcow2::Qcow2::<File>::builder_path(folder.path().join("2.qcow2"))
            .open(PermissiveImplicitOpenGate::default())
            .unwrap();
        let image = FormatAccess::new(image);
        let mut seen = vec![0; SIZE as usize];
        image.read(&mut seen[..], 0).unwrap();
        assert!(seen == shadow, "{cluster}");
    }
}

#[test]
fn differences_in_vhdx_are_read_by_vhdx_core() {
    for cluster in [1 << 20, 2 << 20] {
        let folder = tempfile::tempdir().unwrap();
        let shadow = chain(folder.path(), Format::Vhdx, cluster, 3);
        let image = |n: u64| fs::read(folder.path().join(format!("{n}.vhdx"))).unwrap();
        let mut reader = VhdxReader::from_bytes(image(0)).unwrap();
        for n in 1..3 {
            reader = VhdxReader::from_bytes_with_parent(image(n), reader).unwrap();
        }
        let mut seen = Vec::new();
        reader.read_to_end(&mut seen).unwrap();
        assert!(seen == shadow, "{cluster}");
    }
}
