//! The built-in small guest: Debian's cloud kernel and an initramfs of busybox and our init.

use crate::apt::Record;
use crate::deb;
use crate::durable::{self, write_whole};
use crate::error::ImageError;
use crate::initramfs::{self, INIT, InitramfsSpec, ModuleSet, build_initramfs};
use crate::manifest::{ImageFile, Initramfs, Manifest, SCHEMA};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The image's name.
pub const MINI: &str = "mini";
/// The package whose first dependency is the newest kernel for virtual machines.
pub(crate) const KERNEL_META: &str = "linux-image-cloud-amd64";
/// The package with the guest's userland.
pub(crate) const BUSYBOX: &str = "busybox-static";

const MAX_KERNEL: u64 = 256 << 20;
const MAX_BUSYBOX: u64 = 64 << 20;

/// The small guest's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MiniImage {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs, an uncompressed cpio archive.
    pub initramfs: PathBuf,
    /// The version of the kernel package.
    pub version: String,
}

/// The name of the kernel package proper among the dependencies of the meta package.
pub(crate) fn kernel_package(meta: &Record) -> Result<&str, ImageError> {
    meta.depends
        .iter()
        .find(|name| name.starts_with("linux-image-"))
        .map(String::as_str)
        .ok_or_else(|| ImageError::Missing {
            package: meta.name.clone(),
            wanted: "dependency on a kernel package".to_owned(),
        })
}

/// The image in `folder` for a list of modules, if all of it is there and up to date.
pub(crate) fn find(manifest: &Manifest, folder: &Path, modules: &[String]) -> Option<MiniImage> {
    let recipe = initramfs::recipe();
    let archive = manifest
        .initramfs
        .iter()
        .find(|archive| archive.recipe == recipe && archive.modules == modules)?;
    Some(MiniImage {
        kernel: manifest.kernel.present_in(folder)?,
        initramfs: archive.file.present_in(folder)?,
        version: manifest.version.clone(),
    })
}

/// A package with its file.
pub(crate) struct Source {
    pub(crate) record: Record,
    pub(crate) file: PathBuf,
}

/// Writes the kernel of the package `kernel` to `folder`.
pub(crate) fn write_kernel(folder: &Path, kernel: &Source) -> Result<ImageFile, ImageError> {
    let (path, vmlinuz) = deb::read_file(&kernel.file, "kernel", MAX_KERNEL, |path| {
        path.starts_with("boot/vmlinuz-")
    })?;
    let file = path.trim_start_matches("boot/").to_owned();
    let (sha256, bytes) = write_whole(&folder.join(&file), vmlinuz.len() as u64, |out| {
        out.write_all(&vmlinuz)
    })?;
    Ok(ImageFile {
        file,
        bytes,
        sha256,
    })
}

/// Makes the image in `folder` out of the two packages and gives its manifest, which is written
/// last. Archives of `previous` that still fit stay.
pub(crate) fn assemble(
    folder: &Path,
    kernel: &Source,
    busybox: &Source,
    modules: &[String],
    previous: Option<Manifest>,
) -> Result<Manifest, ImageError> {
    let kernel_file = write_kernel(folder, kernel)?;

    let (busybox_path, program) =
        deb::read_file(&busybox.file, "busybox program", MAX_BUSYBOX, |path| {
            path == "bin/busybox" || path == "usr/bin/busybox"
        })?;
    let names: Vec<&str> = modules.iter().map(String::as_str).collect();
    let set = ModuleSet::from_kernel_package(&kernel.file, &names)?;
    let spec = InitramfsSpec {
        busybox: &program,
        init: INIT,
        modules: &set,
    };
    let recipe = initramfs::recipe();
    let packages = vec![kernel.record.clone(), busybox.record.clone()];
    let mut archives: Vec<Initramfs> = previous
        .filter(|previous| previous.packages == packages)
        .map(|previous| previous.initramfs)
        .unwrap_or_default();
    archives.retain(|archive| archive.recipe == recipe && archive.modules != modules);
    let name = archive_name(modules);
    let (sha256, bytes) = build_initramfs(&spec, Path::new(&busybox_path), &folder.join(&name))?;
    archives.push(Initramfs {
        recipe,
        modules: modules.to_vec(),
        file: ImageFile {
            file: name,
            bytes,
            sha256,
        },
    });
    let manifest = Manifest {
        schema: SCHEMA,
        name: MINI.to_owned(),
        version: kernel.record.version.clone(),
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        packages,
        kernel: kernel_file,
        initramfs: archives,
        disk: None,
    };
    manifest.write(folder)?;
    remove_others(folder, &manifest)?;
    Ok(manifest)
}

fn archive_name(modules: &[String]) -> String {
    if modules.is_empty() {
        return "initramfs.cpio".to_owned();
    }
    use sha2::Digest;
    let digest = durable::hex(&sha2::Sha256::digest(modules.join(" ")));
    format!("initramfs-{}.cpio", &digest[..16])
}

/// Removes what an earlier version of the image left.
fn remove_others(folder: &Path, manifest: &Manifest) -> Result<(), ImageError> {
    let mut kept = vec!["manifest.json", manifest.kernel.file.as_str()];
    kept.extend(manifest.initramfs.iter().map(|a| a.file.file.as_str()));
    let entries = std::fs::read_dir(folder).map_err(ImageError::io("read", folder, 0))?;
    for entry in entries.filter_map(Result::ok) {
        if !kept.iter().any(|name| entry.file_name() == *name) {
            durable::remove(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::tests::{deb, tar_with};
    use ::tar::EntryType::Regular;

    fn source(folder: &Path, name: &str, version: &str, files: &[(&str, &[u8])]) -> Source {
        let folder = folder.join(name).join(version);
        std::fs::create_dir_all(&folder).unwrap();
        let entries: Vec<_> = files
            .iter()
            .map(|(path, content)| (*path, Regular, "", *content))
            .collect();
        Source {
            record: Record {
                name: name.into(),
                version: version.into(),
                architecture: "amd64".into(),
                size: 0,
                installed_size: 0,
                sha256: String::new(),
                depends: vec!["initramfs-tools".into(), "linux-image-9-cloud-amd64".into()],
            },
            file: deb(&folder, ".xz", &tar_with(&entries)),
        }
    }

    const BUSYBOX_PROGRAM: &[u8] = b"\x7fELF\0[\0[[\0busybox\0sh\0\0";

    #[test]
    fn the_image_has_the_packages_files_and_a_newer_kernel_replaces_the_old() {
        let work = tempfile::tempdir().unwrap();
        let busybox = source(
            work.path(),
            "busybox-static",
            "1",
            &[("./bin/busybox", BUSYBOX_PROGRAM)],
        );
        let old = source(work.path(), "k", "1", &[("./boot/vmlinuz-1", b"old")]);
        let new = source(work.path(), "k", "2", &[("./boot/vmlinuz-2", b"newer")]);
        let folder = work.path().join("images/mini");
        let first = assemble(&folder, &old, &busybox, &[], None).unwrap();
        let image = find(&first, &folder, &[]).unwrap();
        assert_eq!(std::fs::read(&image.kernel).unwrap(), b"old");
        assert_eq!(find(&first, &folder, &["ext4".into()]), None);

        let second = assemble(&folder, &new, &busybox, &[], Some(first)).unwrap();
        let image = find(&second, &folder, &[]).unwrap();
        assert_eq!(std::fs::read(&image.kernel).unwrap(), b"newer");
        assert_eq!(image.version, "2");
        assert!(!folder.join("vmlinuz-1").exists());
        assert_eq!(Manifest::read(&folder).unwrap(), Some(second.clone()));

        let mut stale = second;
        stale.initramfs[0].recipe = "that of another version".into();
        assert_eq!(find(&stale, &folder, &[]), None);
    }

    #[test]
    fn a_package_without_a_kernel_is_an_error_and_makes_no_image() {
        let work = tempfile::tempdir().unwrap();
        let empty = source(work.path(), "k", "1", &[("./boot/config-1", b"x")]);
        let folder = work.path().join("images/mini");
        let error = assemble(&folder, &empty, &empty, &[], None).unwrap_err();
        assert!(error.to_string().contains("has no kernel"), "{error}");
        assert_eq!(Manifest::read(&folder).unwrap(), None);
    }

    #[test]
    fn the_kernel_is_the_meta_packages_dependency() {
        let work = tempfile::tempdir().unwrap();
        let mut meta = source(work.path(), "meta", "1", &[]).record;
        assert_eq!(kernel_package(&meta).unwrap(), "linux-image-9-cloud-amd64");
        meta.depends.pop();
        assert!(kernel_package(&meta).is_err());
    }
}
