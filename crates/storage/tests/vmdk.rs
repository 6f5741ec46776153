//! VMDK images of QEMU's, read here.

mod support;

use std::{fs, path::Path};

use caisson_memory::Pinned;
use caisson_storage::{
    BackingPolicy, Content, DiskOptions, EngineKind, Format, Layer, OpenError, Runtime, manage,
    open_image,
};
use support::{qemu_img, qemu_io, text};

const SIZE: u64 = 9 << 20;

async fn everything(disk: &dyn Layer) -> Vec<u8> {
    let memory = Pinned::zeroed(disk.size() as usize);
    disk.read(0, memory.clone()).await.unwrap();
    memory.to_vec()
}

fn options(path: &Path) -> DiskOptions {
    let mut options = DiskOptions::new(path);
    options.backing = BackingPolicy::Allow;
    options
}

fn made(folder: &Path, name: &str, shape: &str) -> std::path::PathBuf {
    let path = folder.join(name);
    let size = SIZE.to_string();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "vmdk",
        "-o",
        shape,
        text(&path),
        &size,
    ]);
    path
}

#[test]
fn images_of_qemu_are_read() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let commands = [
        "write -P 3 5000k 70k",
        "write -P 4 1536 512",
        "write -P 5 8M 1M",
        "write -z 8500k 128k",
    ];
    let shapes = [
        "subformat=monolithicSparse",
        "subformat=monolithicSparse,zeroed_grain=on",
        "subformat=monolithicFlat",
        "subformat=twoGbMaxExtentSparse",
        "subformat=twoGbMaxExtentFlat",
    ];
    for (n, shape) in shapes.into_iter().enumerate() {
        let path = made(folder.path(), &format!("{n}.vmdk"), shape);
        qemu_io(&path, "vmdk", &commands.map(str::to_owned));
        let raw = path.with_extension("seen");
        qemu_img(&[
            "convert",
            "-f",
            "vmdk",
            "-O",
            "raw",
            text(&path),
            text(&raw),
        ]);
        let shadow = fs::read(&raw).unwrap();
        assert_eq!(shadow.len() as u64, SIZE);
        let info = manage::info(&path, None).unwrap();
        assert_eq!((info.format, info.size), (Format::Vmdk, SIZE), "{shape}");
        runtime.block_on(async {
            let disk = open_image(&runtime, &options(&path), false).await.unwrap();
            assert!(everything(&*disk).await == shadow, "{shape}");
            let mut at = 0;
            while at < SIZE {
                let extent = disk.extent(at, SIZE - at).await.unwrap();
                let range = at as usize..(at + extent.len) as usize;
                let zero = shadow[range].iter().all(|&byte| byte == 0);
                assert!(extent.content == Content::Data || zero);
                at += extent.len;
            }
            assert!(disk.write(0, Pinned::zeroed(512), false).await.is_err());
            drop(disk);
            let error = open_image(&runtime, &options(&path), true).await;
            assert!(matches!(error.err().unwrap(), OpenError::Format { .. }));
        });
        let packed = folder.path().join(format!("packed-{n}.vmdk"));
        let streamed = "subformat=streamOptimized";
        qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            streamed,
            text(&raw),
            text(&packed),
        ]);
        runtime.block_on(async {
            let disk = open_image(&runtime, &DiskOptions::new(&packed), false).await;
            assert!(
                everything(&*disk.unwrap()).await == shadow,
                "{shape} packed"
            );
        });
    }
}

#[test]
fn what_a_description_names_is_not_opened_unasked() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = made(folder.path(), "flat.vmdk", "subformat=monolithicFlat");
    let refused = |options: &DiskOptions| {
        let opened = runtime.block_on(async { open_image(&runtime, options, false).await });
        opened.err().unwrap().to_string()
    };
    let error = refused(&DiskOptions::new(&path));
    assert!(error.contains("not allowed"), "{error}");
    let described = fs::read_to_string(&path).unwrap();
    for (from, to, what) in [
        ("flat-flat.vmdk", "/etc/passwd", "too short"),
        ("flat-flat.vmdk", "flat.vmdk", "circle"),
        ("flat-flat.vmdk", "missing.vmdk", "restore"),
        (" FLAT ", " VMFSRDM ", "not supported"),
        ("RW ", "RW 9", "too short"),
        ("RW ", "RW 99999999999999999999", "damaged"),
        ("parentCID=ffffffff", "parentCID=12345678", "difference"),
        ("\" 0", "\" 9999999999", "too short"),
    ] {
        assert!(described.contains(from), "{described}");
        fs::write(&path, described.replacen(from, to, 1)).unwrap();
        let error = refused(&options(&path));
        assert!(error.contains(what), "{error} instead of {what}");
    }
}

#[test]
fn images_that_lie_are_refused_by_name() {
    let runtime = Runtime::new(EngineKind::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = made(folder.path(), "lies.vmdk", "subformat=monolithicSparse");
    qemu_io(&path, "vmdk", &["write -P 3 0 64k".to_owned()]);
    let good = fs::read(&path).unwrap();
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        runtime.block_on(async {
            let disk = open_image(&runtime, &DiskOptions::new(&path), false).await;
            let disk = disk.map_err(|error| error.to_string())?;
            let memory = Pinned::zeroed(4096);
            let read = disk.read(0, memory.clone()).await;
            read.map(|()| memory.to_vec()).map_err(|e| e.to_string())
        })
    };
    assert_eq!(read(&good).unwrap(), [3; 4096]);
    let refused = |at: usize, field: &[u8], what: &str| {
        let mut bytes = good.clone();
        bytes[at..at + field.len()].copy_from_slice(field);
        let error = read(&bytes).unwrap_err();
        assert!(error.contains(what), "{error} instead of {what}");
    };
    refused(4, &[9], "version");
    refused(12, &u64::MAX.to_le_bytes(), "sectors");
    refused(12, &(1u64 << 51).to_le_bytes(), "directory");
    refused(20, &[3], "grains");
    refused(20, &[0; 8], "grains");
    refused(44, &[0; 4], "tables");
    refused(44, &[0xff; 4], "tables");
    refused(28, &[0xff; 7], "description");
    refused(36, &[0xff; 8], "description");
    refused(56, &[0xff; 7], "directory");
    refused(56, &[0xff; 8], "not complete");
    refused(73, b"\r", "text");
    let directory = usize::try_from(u64::from_le_bytes(good[56..64].try_into().unwrap())).unwrap();
    refused(directory * 512, &[0xff; 4], "table");
    let table = u32::from_le_bytes(good[directory * 512..][..4].try_into().unwrap()) as usize;
    refused(table * 512, &[0xff; 4], "grain");
}
