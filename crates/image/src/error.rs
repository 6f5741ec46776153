//! What can go wrong while images are fetched, unpacked and assembled.

use std::io;
use std::path::{Path, PathBuf};

/// An error of this crate. The message names the thing, the cause and the way out.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host has no apt.
    #[error(
        "this host has no `{program}`, and the guest's packages are fetched with apt-get: give the guest's own files instead, with --kernel VMLINUZ and --initrd INITRD"
    )]
    NoApt {
        /// The program that was not found.
        program: &'static str,
    },
    /// apt ran and failed.
    #[error(
        "`{command}` failed: {detail}; check the network and the host's apt sources, or give the guest's own files with --kernel and --initrd"
    )]
    Apt {
        /// The program and its verb.
        command: String,
        /// What it said.
        detail: String,
    },
    /// No apt source of the host offers the package.
    #[error(
        "the host's apt sources offer no package \"{name}\" for amd64: add a Debian source, or give the guest's own files with --kernel and --initrd"
    )]
    NoSuchPackage {
        /// The package's name.
        name: String,
    },
    /// A package name or version that cannot be one.
    #[error("\"{name}\" is not a package name")]
    BadPackageName {
        /// The offending text.
        name: String,
    },
    /// The bytes that arrived are not those that the signed package list promises.
    #[error(
        "{path}: expected {expected}, found {found}; the download is damaged and was removed: try again",
        path = .path.display()
    )]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// The size or SHA-256 that apt reports.
        expected: String,
        /// The file's.
        found: String,
    },
    /// A file system is full, or would be.
    #[error(
        "no space left in {path}: {needed} are needed{}; free some, or set XDG_CACHE_HOME to a folder on another disk",
        .available.map(|bytes| format!(" and {} are free", human_bytes(bytes))).unwrap_or_default(),
        path = .path.display(), needed = human_bytes(*.needed)
    )]
    NoSpace {
        /// The folder.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free, if known.
        available: Option<u64>,
    },
    /// A file operation failed.
    #[error("cannot {action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A package, archive or kernel module that is damaged or not what it should be.
    #[error("{path}: {reason}", path = .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that an image needs is not in the package.
    #[error("package {package} has no {wanted}")]
    Missing {
        /// The package.
        package: String,
        /// What was looked for.
        wanted: String,
    },
    /// Neither `XDG_CACHE_HOME` nor `HOME` is set.
    #[error("no cache folder: set XDG_CACHE_HOME or HOME to an absolute path")]
    NoCacheFolder,
    /// An image that does not exist.
    #[error("no image is named \"{name}\"; there is: {known}")]
    UnknownImage {
        /// The name given.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// An image that is known but has not been fetched.
    #[error("image \"{name}\" is not here yet: `caisson image pull {name}` fetches it")]
    NotPulled {
        /// The name given.
        name: String,
    },
}

impl ImageError {
    /// Makes the `map_err` argument for a failed file operation; a full disk becomes
    /// [`ImageError::NoSpace`] with `needed` bytes.
    pub(crate) fn io(
        action: &'static str,
        path: &Path,
        needed: u64,
    ) -> impl FnOnce(io::Error) -> ImageError {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ImageError::NoSpace {
                path: path.parent().unwrap_or(path).to_owned(),
                needed,
                available: None,
            },
            _ => ImageError::Io {
                action,
                path: path.to_owned(),
                source,
            },
        }
    }

    pub(crate) fn malformed(path: &Path, reason: impl Into<String>) -> ImageError {
        ImageError::Malformed {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

/// A number of bytes as a person reads it: `27.4 MiB`.
#[must_use]
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_well() {
        assert_eq!(human_bytes(1023), "1023 bytes");
        assert_eq!(human_bytes(1024), "1.0 KiB");
        assert_eq!(human_bytes(26_713_492), "25.5 MiB");
        assert_eq!(human_bytes(u64::MAX), "16777216.0 TiB");
    }

    #[test]
    fn a_full_disk_names_the_folder_and_the_need() {
        let error = ImageError::io("write", Path::new("/cache/caisson/x.deb"), 3 << 20)(
            io::Error::from(io::ErrorKind::StorageFull),
        );
        assert_eq!(
            error.to_string(),
            "no space left in /cache/caisson: 3.0 MiB are needed; free some, or set XDG_CACHE_HOME to a folder on another disk"
        );
    }
}
