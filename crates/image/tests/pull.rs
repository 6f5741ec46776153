//! Fetching for real, through the host's apt, into a store of the test's own.

use caisson_image::{ImageError, ImageStore, Progress, Silent};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Remembers what was reported.
#[derive(Default)]
struct Remember {
    steps: Mutex<Vec<(String, Option<u64>)>>,
    furthest: Mutex<u64>,
}

impl Progress for Remember {
    fn begin(&self, step: &str, total: Option<u64>) {
        self.steps.lock().unwrap().push((step.to_owned(), total));
    }
    fn advance(&self, done: u64) {
        let mut furthest = self.furthest.lock().unwrap();
        *furthest = done.max(*furthest);
    }
    fn finish(&self) {}
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// One test, because each of its parts needs what the one before fetched.
#[test]
fn the_small_guest_is_pulled_kept_and_removed() {
    let work = tempfile::tempdir().unwrap();
    let store = ImageStore::open(work.path().join("cache"));
    let progress = Remember::default();
    let image = store.ensure_mini(&progress).unwrap();

    // The kernel is a bzImage (Documentation/arch/x86/boot.rst: "HdrS" at 0x202).
    let kernel = fs::read(&image.kernel).unwrap();
    assert_eq!(kernel[0x202..0x206], *b"HdrS");
    let archive = fs::read(&image.initramfs).unwrap();
    assert_eq!(archive[..6], *b"070701");
    for name in ["bin/sh\0", "bin/busybox\0", "bin/sha256sum\0", "init\0"] {
        assert!(
            archive.windows(name.len()).any(|w| w == name.as_bytes()),
            "{name}"
        );
    }

    let steps = progress.steps.lock().unwrap().clone();
    let fetched = steps.iter().filter(|(_, total)| total.is_some()).count();
    assert_eq!(fetched, 2, "{steps:?}");
    let largest = steps.iter().filter_map(|(_, total)| *total).max();
    assert_eq!(Some(*progress.furthest.lock().unwrap()), largest);

    // A second time needs nothing from outside.
    let again = Remember::default();
    assert_eq!(store.ensure_mini(&again).unwrap(), image);
    assert_eq!(*again.steps.lock().unwrap(), []);

    let listed = store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (listed[0].name.as_str(), &listed[0].version),
        ("mini", &image.version)
    );
    assert_eq!(listed[0].bytes, (kernel.len() + archive.len()) as u64);
    assert_eq!(store.path("mini").unwrap(), image.kernel.parent().unwrap());

    modules_come_with_what_they_need(&store);
    a_damaged_or_interrupted_download_is_mended(&store);
    dependencies_come_along(&store);
    packages_are_left_packed_and_alone(&store);
    a_package_that_does_not_exist_is_named(&store);

    store.remove("mini", &Silent).unwrap();
    assert_eq!(store.list().unwrap(), []);
    let left = names_in(&store.root().join("packages"));
    assert!(
        !left.iter().any(|name| name.contains("linux-image-6")),
        "{left:?}"
    );
}

fn modules_come_with_what_they_need(store: &ImageStore) {
    let image = store.ensure_mini_with(&["virtio_net"], &Silent).unwrap();
    let archive = fs::read(&image.initramfs).unwrap();
    let list_at = |name: &str| {
        let needle = format!("/{name}.ko\n");
        archive
            .windows(needle.len())
            .position(|window| window == needle.as_bytes())
            .unwrap_or_else(|| panic!("{name} is not listed"))
    };
    assert!(list_at("virtio_ring") < list_at("virtio"));
    assert!(list_at("virtio") < list_at("virtio_net"));
    assert!(list_at("failover") < list_at("net_failover"));
    assert_ne!(
        image.initramfs,
        store.ensure_mini(&Silent).unwrap().initramfs
    );
    let error = store
        .ensure_mini_with(&["no_such_module"], &Silent)
        .unwrap_err();
    assert!(error.to_string().contains("\"no_such_module\""), "{error}");
}

fn a_damaged_or_interrupted_download_is_mended(store: &ImageStore) {
    let package = store.package("busybox-static", &Silent).unwrap();
    let whole = fs::read(&package.file).unwrap();
    assert!(
        package.root.join("bin/busybox").exists() || package.root.join("usr/bin/busybox").exists()
    );
    let name = package.file.file_name().unwrap();
    let incoming = store.root().join("packages/incoming/busybox-static");
    for left_over in [&whole[..whole.len() / 2], &vec![0xA5; 4096], b""] {
        fs::remove_file(&package.file).unwrap();
        fs::create_dir_all(&incoming).unwrap();
        fs::write(incoming.join(name), left_over).unwrap();
        let mended = store.package("busybox-static", &Silent).unwrap();
        assert_eq!(fs::read(&mended.file).unwrap(), whole);
        assert!(!incoming.exists());
    }
    // What an interrupted run of ours left is cleared away.
    let unfinished = store.root().join("packages/.unfinished-x");
    fs::write(&unfinished, "half").unwrap();
    fs::remove_file(&package.file).unwrap();
    store.package("busybox-static", &Silent).unwrap();
    assert!(!unfinished.exists());
}

fn dependencies_come_along(store: &ImageStore) {
    let packages = store
        .packages_with_dependencies(&["zlib1g"], &Silent)
        .unwrap();
    let names: Vec<_> = packages.iter().map(|p| p.name.as_str()).collect();
    assert!(
        names.contains(&"zlib1g") && names.contains(&"libc6"),
        "{names:?}"
    );
    for package in &packages {
        assert!(package.root.is_dir(), "{}", package.name);
    }
}

fn packages_are_left_packed_and_alone(store: &ImageStore) {
    let files = store
        .package_files(&["zlib1g-dev", "zlib1g"], &Silent)
        .unwrap();
    let names: Vec<_> = files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["zlib1g-dev", "zlib1g"]);
    for file in &files {
        assert!(file.file.is_file(), "{}", file.name);
    }
    let stem = files[0].file.file_stem().unwrap();
    assert!(!store.root().join("packages/unpacked").join(stem).exists());
}

fn a_package_that_does_not_exist_is_named(store: &ImageStore) {
    for error in [
        store
            .package_files(&["no-such-package-xyz"], &Silent)
            .unwrap_err(),
        store.package("no-such-package-xyz", &Silent).unwrap_err(),
        store
            .packages_with_dependencies(&["no-such-package-xyz"], &Silent)
            .unwrap_err(),
    ] {
        assert!(
            matches!(&error, ImageError::NoSuchPackage { name } if name == "no-such-package-xyz"),
            "{error}"
        );
    }
}

/// Set for the copy of this test program that runs with a small disk.
const SMALL_DISK: &str = "CAISSON_TEST_SMALL_DISK";

#[test]
fn a_full_disk_is_named_and_left_clean() {
    if let Some(folder) = std::env::var_os(SMALL_DISK) {
        return on_a_small_disk(&PathBuf::from(folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let mount = "mount -t tmpfs -o size=2m small \"$1\" && shift && exec \"$@\"";
    let unshare = |program: &[&str]| {
        let mut command = Command::new("unshare");
        command.args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            mount,
            "sh",
        ]);
        command.arg(folder.path()).args(program);
        command
    };
    if !unshare(&["true"])
        .status()
        .is_ok_and(|status| status.success())
    {
        eprintln!("not tested: this host lets nobody make a mount namespace");
        return;
    }
    let own = std::env::current_exe().unwrap();
    let output = unshare(&[own.to_str().unwrap()])
        .args([
            "--exact",
            "a_full_disk_is_named_and_left_clean",
            "--nocapture",
        ])
        .env(SMALL_DISK, folder.path())
        .process_group(0)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

fn on_a_small_disk(folder: &Path) {
    let store = ImageStore::open(folder.join("cache"));
    let error = store.ensure_mini(&Silent).unwrap_err();
    assert!(matches!(error, ImageError::NoSpace { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains(folder.to_str().unwrap()) && text.contains("MiB"),
        "{text}"
    );
    assert_eq!(store.list().unwrap(), []);
    let mut left = Vec::new();
    visit(folder, &mut left);
    assert!(
        !left
            .iter()
            .any(|path| path.contains(".deb") || path.contains("unfinished")),
        "{left:?}"
    );
}

fn visit(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() {
            visit(&entry.path(), found);
        }
        found.push(entry.path().display().to_string());
    }
}
