//! The image `debian`: a whole Debian on a disk of its own.
//!
//! It is made in a machine, because setting packages up takes a root of its own and runs their scripts: the small guest
//! gets an empty disk and one with the packages, and runs `build.sh`. Nothing is installed or run on the host, and no
//! privileges are needed. [`ImageStore::prepare_debian`](crate::ImageStore::prepare_debian) fetches the packages and lays
//! out the disks; whoever can run machines does so and calls [`DebianBuild::finish`].

use crate::apt::Record;
use crate::durable;
use crate::error::ImageError;
use crate::initramfs::{Cpio, INIT};
use crate::lock::Lock;
use crate::manifest::{ImageFile, Manifest, SCHEMA};
use crate::mini::Source;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The image's name.
pub const DEBIAN: &str = "debian";
/// Its other name, with the version.
pub const DEBIAN_12: &str = "debian12";
/// What is installed besides what these depend on: what every Debian has, and what a person expects at a prompt.
pub(crate) const PACKAGES: &[&str] = &[
    "adduser",
    "apt",
    "base-files",
    "base-passwd",
    "bash",
    "bsdutils",
    "coreutils",
    "dash",
    "dbus",
    "debian-archive-keyring",
    "debianutils",
    "diffutils",
    "dpkg",
    "e2fsprogs",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "ifupdown",
    "init-system-helpers",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libc-bin",
    "libpam-runtime",
    "libpam-systemd",
    "login",
    "mawk",
    "mount",
    "nano",
    "ncurses-base",
    "ncurses-bin",
    "netbase",
    "passwd",
    "pciutils",
    "perl-base",
    "procps",
    "sed",
    "sudo",
    "systemd",
    "systemd-sysv",
    "sysvinit-utils",
    "tar",
    "tzdata",
    "udev",
    "usr-is-merged",
    "util-linux",
];
/// What `mke2fs` needs to run.
const TOOLS: &[&str] = &[
    "e2fsprogs",
    "libblkid1",
    "libc6",
    "libcom-err2",
    "libext2fs2",
    "libuuid1",
];
/// The command of the machine in which it is made: the rest is with the packages.
const START: &str =
    "mkdir /tmp/debs && cd /tmp/debs && cpio -i --quiet < /dev/vda && exec sh build.sh";
/// What it runs.
const SCRIPT: &str = include_str!("build.sh");
const EXTRAS: [(&str, &[u8]); 3] = [
    ("login-user", include_bytes!("login-user")),
    (
        "caisson-user.service",
        include_bytes!("caisson-user.service"),
    ),
    ("autologin.conf", include_bytes!("autologin.conf")),
];
const DISK: &str = "root.img";
/// Bytes of the disk; what is empty takes no room on the host's.
const DISK_LEN: u64 = 8 << 30;
/// Room for the image while it is made, besides the packages.
pub(crate) const SPACE: u64 = 1 << 30;

/// The image's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DebianImage {
    /// The kernel, a bzImage with NVMe and ext4 built in.
    pub kernel: PathBuf,
    /// The disk, a raw image: the file system without partitions.
    pub disk: PathBuf,
    /// The version of the kernel package.
    pub version: String,
}

/// An image that is being made. Nobody else changes the store meanwhile.
#[derive(Debug)]
pub struct DebianBuild {
    folder: PathBuf,
    work: tempfile::TempDir,
    manifest: Manifest,
    _lock: Lock,
}

impl DebianBuild {
    /// The disk that becomes the image: to be the machine's only NVMe disk.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.work.path().join(DISK)
    }

    /// The disk with the packages: to be the machine's only virtio disk, read only.
    #[must_use]
    pub fn packages(&self) -> PathBuf {
        self.work.path().join("packages.cpio")
    }

    /// The command for the small guest. What it prints is read by [`step`].
    #[must_use]
    pub fn command(&self) -> Vec<String> {
        ["sh", "-c", START].map(str::to_owned).to_vec()
    }

    /// Puts the image, which was made without fault, in its place.
    ///
    /// # Errors
    /// If a file cannot be renamed or written.
    pub fn finish(mut self) -> Result<DebianImage, ImageError> {
        let made = self.disk();
        let file = File::open(&made).map_err(ImageError::io("open", &made, 0))?;
        file.sync_all()
            .map_err(ImageError::io("write", &made, SPACE))?;
        let place = self.folder.join(DISK);
        std::fs::rename(&made, &place).map_err(ImageError::io("rename", &made, 0))?;
        durable::sync_folder(&self.folder)?;
        self.manifest.disk = Some(ImageFile {
            file: DISK.to_owned(),
            bytes: DISK_LEN,
            // It is 8 GiB of holes; the packages in it were checked.
            sha256: String::new(),
        });
        self.manifest.write(&self.folder)?;
        find(&self.manifest, &self.folder).ok_or_else(|| {
            ImageError::malformed(&self.folder, "its files were removed while they were made")
        })
    }
}

/// How far the making is, by a line that its command has printed: steps done, steps in all, and what comes next.
#[must_use]
pub fn step(line: &str) -> Option<(u64, u64, &str)> {
    let mut words = line.strip_prefix("step ")?.splitn(3, ' ');
    let (done, total) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some((done, total, words.next()?))
}

/// What `manifest` describes, if all of it is there.
pub(crate) fn find(manifest: &Manifest, folder: &Path) -> Option<DebianImage> {
    Some(DebianImage {
        kernel: manifest.kernel.present_in(folder)?,
        disk: manifest.disk.as_ref()?.present_in(folder)?,
        version: manifest.version.clone(),
    })
}

/// Lays out the disks of the machine that makes the image out of `packages` and the modules of `kernel`.
pub(crate) fn prepare(
    folder: &Path,
    (kernel, vmlinuz): (&Source, ImageFile),
    packages: &[Source],
    sources: &str,
    lock: Lock,
) -> Result<DebianBuild, ImageError> {
    let work = durable::unfinished_folder(folder)?;
    let disk = work.path().join(DISK);
    let make = |path: &Path| File::create(path).map_err(ImageError::io("create", path, SPACE));
    make(&disk)?
        .set_len(DISK_LEN)
        .map_err(ImageError::io("create", &disk, SPACE))?;
    let archive = work.path().join("packages.cpio");
    let failed = || ImageError::io("write", &archive, SPACE);
    let mut file = std::io::BufWriter::new(make(&archive)?);
    write_archive(&mut file, kernel, packages, sources)?;
    let file = file
        .into_inner()
        .map_err(|error| failed()(error.into_error()))?;
    let len = file.metadata().map_err(failed())?.len();
    file.set_len(len.next_multiple_of(4096)).map_err(failed())?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH);
    let manifest = Manifest {
        schema: SCHEMA,
        name: DEBIAN.to_owned(),
        version: kernel.record.version.clone(),
        created: created.map_or(0, |since| since.as_secs()),
        packages: packages
            .iter()
            .map(|source| source.record.clone())
            .collect(),
        kernel: vmlinuz,
        initramfs: Vec::new(),
        disk: None,
    };
    Ok(DebianBuild {
        folder: folder.to_owned(),
        work,
        manifest,
        _lock: lock,
    })
}

fn write_archive(
    out: &mut impl Write,
    kernel: &Source,
    packages: &[Source],
    sources: &str,
) -> Result<(), ImageError> {
    let mut cpio = Cpio::new(out);
    let list = |records: &mut dyn Iterator<Item = &Record>| {
        records.fold(String::new(), |text, record| {
            text + &record.file_name() + "\n"
        })
    };
    let all = list(&mut packages.iter().map(|source| &source.record));
    let is_tool = |record: &&Record| TOOLS.contains(&record.name.as_str());
    let tools = list(&mut packages.iter().map(|source| &source.record).filter(is_tool));
    let texts = [
        ("packages", all.as_bytes()),
        ("tools", tools.as_bytes()),
        ("kernel", kernel.record.file_name().as_bytes()),
        ("build.sh", SCRIPT.as_bytes()),
        ("sources.list", sources.as_bytes()),
        ("init", INIT),
    ]
    .map(|(name, text)| (name.to_owned(), text.to_vec()));
    let extras = EXTRAS.map(|(name, text)| (name.to_owned(), text.to_vec()));
    for (name, text) in texts.into_iter().chain(extras) {
        cpio.file(&name, 0o644, &text)
            .map_err(ImageError::io("write", Path::new(&name), SPACE))?;
    }
    for source in packages.iter().chain([kernel]) {
        let content =
            std::fs::read(&source.file).map_err(ImageError::io("read", &source.file, 0))?;
        cpio.file(&source.record.file_name(), 0o644, &content)
            .map_err(ImageError::io("write", &source.file, SPACE))?;
    }
    cpio.finish()
        .map_err(ImageError::io("write", Path::new("packages.cpio"), SPACE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_from_what_the_script_prints() {
        assert_eq!(
            step("step 3 10 unpacking bash"),
            Some((3, 10, "unpacking bash"))
        );
        for other in ["", "step", "step 3", "step 3 x y", "unpacking", "step 1 2"] {
            assert_eq!(step(other), None, "{other}");
        }
        assert!(PACKAGES.is_sorted());
        assert!(SCRIPT.contains("echo \"step $done $total $*\""));
    }
}
