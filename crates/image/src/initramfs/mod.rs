//! The small guest's root: an archive of busybox, our init program, a few files of configuration
//! and the kernel modules asked for.
//!
//! The archive is the same, byte for byte, for the same inputs: entries are in a fixed order and
//! all times are zero. It is not compressed: a software CPU would spend longer on unpacking it than
//! the host spends on reading two megabytes more.

mod applets;
mod cpio;
mod modules;

pub use modules::ModuleSet;

use crate::durable;
use crate::error::ImageError;
use cpio::Writer;
pub(crate) use cpio::Writer as Cpio;
use sha2::{Digest, Sha256};
use std::io;
use std::path::Path;

/// The guest's `/init`, built from `guests/init` by this crate's build script.
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/init"));

/// What is in the archive besides the fixed files.
#[derive(Debug, Clone, Copy)]
pub struct InitramfsSpec<'a> {
    /// A statically linked busybox for x86-64.
    pub busybox: &'a [u8],
    /// The program that the kernel starts: [`INIT`].
    pub init: &'a [u8],
    /// Kernel modules, which the init program loads in this order.
    pub modules: &'a ModuleSet,
}

const OS_RELEASE: &str = "PRETTY_NAME=\"Caisson mini (Debian kernel, busybox)\"\n\
    NAME=\"Caisson mini\"\n\
    ID=caisson-mini\n\
    ID_LIKE=debian\n";

const PROFILE: &str = "export PATH=/usr/local/bin:/bin:/sbin:/usr/bin:/usr/sbin\n\
    export PAGER=less\n\
    umask 022\n\
    if [ \"$(id -u)\" = 0 ]; then PS1='\\u@\\h:\\w# '; else PS1='\\u@\\h:\\w$ '; fi\n";

const PLAIN_FILES: &[(&str, &str)] = &[
    ("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/hostname", "caisson\n"),
    ("etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost\n"),
    (
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files dns\n",
    ),
    ("etc/os-release", OS_RELEASE),
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n",
    ),
    ("etc/profile", PROFILE),
    ("etc/shells", "/bin/sh\n/bin/ash\n"),
];

/// What busybox's DHCP client calls with what it learned, and what calls the client.
const PROGRAMS: &[(&str, &str)] = &[
    (
        "etc/caisson/dhcp",
        r#"#!/bin/sh
case $1 in
deconfig)
    ifconfig "$interface" 0.0.0.0 ;;
bound|renew)
    ifconfig "$interface" "$ip" netmask "${subnet:-255.255.255.0}" mtu "${mtu:-1500}"
    for gateway in $router; do route add default gw "$gateway" dev "$interface" 2>/dev/null; done
    for server in $dns; do echo "nameserver $server"; done > /etc/resolv.conf ;;
esac
"#,
    ),
    (
        "etc/caisson/network",
        r#"#!/bin/sh
for card in /sys/class/net/eth*; do
    card=${card##*/}
    ifconfig "$card" up
    udhcpc -n -q -t 5 -T 1 -A 1 -i "$card" -s /etc/caisson/dhcp >/dev/null 2>&1 ||
        echo "init: nobody gives $card an address; configure it by hand" >&2
done
"#,
    ),
];

const FOLDERS: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("dev/pts", 0o755),
    ("etc", 0o755),
    ("etc/caisson", 0o755),
    ("home", 0o755),
    ("lib", 0o755),
    ("lib/modules", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("usr/local", 0o755),
    ("usr/local/bin", 0o755),
    ("var", 0o755),
    ("var/log", 0o755),
];

const LINKS: &[(&str, &str)] = &[
    ("lib64", "lib"),
    ("sbin", "bin"),
    ("usr/bin", "../bin"),
    ("usr/lib", "../lib"),
    ("usr/sbin", "../bin"),
    ("var/run", "../run"),
    ("var/tmp", "../tmp"),
];

/// Writes the archive to `out`, an uncompressed `newc` cpio.
///
/// # Errors
/// If `busybox` has no table of applets, or writing fails.
pub fn write_initramfs(
    spec: &InitramfsSpec<'_>,
    busybox_path: &Path,
    out: &mut dyn io::Write,
) -> io::Result<()> {
    let applets = applets::names(spec.busybox).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} has no table of busybox applets", busybox_path.display()),
        )
    })?;
    let mut cpio = Writer::new(out);
    for (path, mode) in FOLDERS {
        cpio.folder(path, *mode)?;
    }
    for (path, target) in LINKS {
        cpio.symlink(path, target)?;
    }
    // The kernel opens /dev/console for init before anything is mounted there.
    cpio.character_device("dev/console", 0o600, 5, 1)?;
    cpio.character_device("dev/null", 0o666, 1, 3)?;
    for (path, text) in PLAIN_FILES {
        cpio.file(path, 0o644, text.as_bytes())?;
    }
    for (path, text) in PROGRAMS {
        cpio.file(path, 0o755, text.as_bytes())?;
    }
    cpio.file("init", 0o755, spec.init)?;
    cpio.file("bin/busybox", 0o755, spec.busybox)?;
    for applet in applets.iter().filter(|name| **name != "busybox") {
        cpio.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    let mut list = String::new();
    for folder in spec.modules.folders() {
        cpio.folder(&folder, 0o755)?;
    }
    for module in spec.modules.iter() {
        cpio.file(&module.path, 0o644, &module.content)?;
        list.push('/');
        list.push_str(&module.path);
        list.push('\n');
    }
    cpio.file("etc/caisson/modules", 0o644, list.as_bytes())?;
    cpio.finish()
}

/// Makes the file `target` an initramfs, whole or not at all. Returns its SHA-256 and length.
///
/// # Errors
/// As [`write_initramfs`], and if the disk is full.
pub fn build_initramfs(
    spec: &InitramfsSpec<'_>,
    busybox_path: &Path,
    target: &Path,
) -> Result<(String, u64), ImageError> {
    let needed = (spec.busybox.len() + spec.init.len() + (1 << 20)) as u64
        + spec
            .modules
            .iter()
            .map(|module| module.content.len() as u64)
            .sum::<u64>();
    durable::write_whole(target, needed, |out| {
        write_initramfs(spec, busybox_path, out)
    })
}

/// A digest of what this version of Caisson puts into an initramfs on its own account: it changes
/// when an archive that was made earlier should be made anew.
pub(crate) fn recipe() -> String {
    let mut hash = Sha256::new();
    hash.update(INIT);
    for (path, text) in PLAIN_FILES.iter().chain(PROGRAMS).chain(LINKS) {
        hash.update([path.as_bytes(), b"\0", text.as_bytes(), b"\0"].concat());
    }
    for (path, mode) in FOLDERS {
        hash.update(path);
        hash.update(mode.to_le_bytes());
    }
    hash.update(b"layout 1");
    durable::hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A busybox as far as this crate is concerned: something with a table of applets.
    fn busybox() -> Vec<u8> {
        let mut bytes = b"\x7fELF some code\0".to_vec();
        bytes.extend(applets::tests::table());
        bytes
    }

    fn archive() -> Vec<u8> {
        let busybox = busybox();
        let modules = ModuleSet::default();
        let spec = InitramfsSpec {
            busybox: &busybox,
            init: b"init program",
            modules: &modules,
        };
        let mut out = Vec::new();
        write_initramfs(&spec, Path::new("busybox"), &mut out).unwrap();
        out
    }

    #[test]
    fn the_archive_is_the_same_each_time_and_complete() {
        let archive = archive();
        assert_eq!(archive, self::archive());
        let entries = cpio::tests::read(&archive);
        let find = |path: &str| {
            entries
                .iter()
                .find(|entry| entry.path == path)
                .unwrap_or_else(|| panic!("{path} is missing"))
        };
        assert_eq!(find("init").content, b"init program");
        assert_eq!(find("init").mode, 0o100_755);
        assert_eq!(find("bin/busybox").content, busybox());
        assert_eq!(find("bin/sh").content, b"busybox");
        assert_eq!(find("tmp").mode, 0o041_777);
        assert_eq!(find("dev/console").device, (5, 1));
        assert_eq!(find("etc/caisson/modules").content, b"");
    }

    #[test]
    fn every_entry_comes_after_its_folder_and_once() {
        let entries = cpio::tests::read(&archive());
        let mut seen = std::collections::HashSet::new();
        for entry in &entries {
            if let Some((parent, _)) = entry.path.rsplit_once('/') {
                assert!(seen.contains(parent), "{} before its folder", entry.path);
            }
            assert!(seen.insert(entry.path.clone()), "{} twice", entry.path);
        }
    }

    #[test]
    fn a_program_that_is_not_busybox_is_refused() {
        let modules = ModuleSet::default();
        let spec = InitramfsSpec {
            busybox: b"\x7fELF",
            init: b"",
            modules: &modules,
        };
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out.cpio");
        let error = build_initramfs(&spec, Path::new("/x/bin/true"), &target).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("/x/bin/true has no table of busybox applets")
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_init_program_is_a_static_x86_64_executable() {
        assert_eq!(INIT[..4], *b"\x7fELF");
        assert_eq!(INIT[4], 2, "64-bit");
        assert_eq!(INIT[16..20], [2, 0, 62, 0], "ET_EXEC for x86-64");
        let headers = u64::from_le_bytes(INIT[32..40].try_into().unwrap()) as usize;
        let count = usize::from(u16::from_le_bytes(INIT[56..58].try_into().unwrap()));
        for header in INIT[headers..].chunks_exact(56).take(count) {
            assert_ne!(header[0], 3, "PT_INTERP: it needs a dynamic linker");
        }
    }
}
