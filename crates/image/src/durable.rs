//! Files that are either whole or absent, whatever interrupts their making.

use crate::error::ImageError;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The start of the names of files that are still being written; whatever bears it while nobody
/// holds the store's lock is left over from an interrupted run.
pub(crate) const UNFINISHED: &str = ".unfinished-";

/// Makes `target` whole or not at all: `fill` writes a file beside it, which is flushed to disk
/// and then renamed over `target`. `needed` is what a full disk's error asks for.
///
/// Returns the content's SHA-256, in hexadecimal, and its length.
pub(crate) fn write_whole(
    target: &Path,
    needed: u64,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(String, u64), ImageError> {
    let folder = target.parent().unwrap_or(Path::new("."));
    create_folder(folder)?;
    let file = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(folder)
        .map_err(ImageError::io("create a file in", folder, needed))?;
    let write = || -> io::Result<(String, u64)> {
        let mut sink = Hashing {
            inner: BufWriter::with_capacity(1 << 17, file.as_file()),
            hash: Sha256::new(),
            len: 0,
        };
        fill(&mut sink)?;
        sink.inner.flush()?;
        let (hash, len) = (hex(&sink.hash.finalize()), sink.len);
        file.as_file().sync_all()?;
        Ok((hash, len))
    };
    let sum = write().map_err(ImageError::io("write", target, needed))?;
    file.persist(target)
        .map_err(|error| ImageError::io("write", target, needed)(error.error))?;
    sync_folder(folder)?;
    Ok(sum)
}

/// Makes a rename or a new name in `folder` survive a power cut.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), ImageError> {
    File::open(folder)
        .and_then(|opened| opened.sync_all())
        .map_err(ImageError::io("flush", folder, 0))
}

/// Creates a folder and those above it.
pub(crate) fn create_folder(folder: &Path) -> Result<(), ImageError> {
    fs::create_dir_all(folder).map_err(ImageError::io("create", folder, 1 << 20))
}

/// Removes a file or a whole folder; one that is not there is fine.
pub(crate) fn remove(path: &Path) -> Result<(), ImageError> {
    let outcome = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match outcome {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(ImageError::io("remove", path, 0)(error))
        }
        _ => Ok(()),
    }
}

/// A folder for a job in `folder`, removed with everything in it unless the job is done.
pub(crate) fn unfinished_folder(folder: &Path) -> Result<tempfile::TempDir, ImageError> {
    create_folder(folder)?;
    tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempdir_in(folder)
        .map_err(ImageError::io("create a folder in", folder, 0))
}

/// Removes what interrupted runs left in `folder`. Only for the holder of the store's lock.
pub(crate) fn remove_unfinished(folder: &Path) -> Result<(), ImageError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(ImageError::io("read", folder, 0))?,
    };
    for entry in entries {
        let entry = entry.map_err(ImageError::io("read", folder, 0))?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(UNFINISHED.as_bytes())
        {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Fails if the file system of `folder` has fewer than `needed` bytes for this user.
pub(crate) fn require_space(folder: &Path, needed: u64) -> Result<(), ImageError> {
    let stat = rustix::fs::statvfs(folder).map_err(|errno| {
        ImageError::io("measure the free space of", folder, needed)(errno.into())
    })?;
    let available = stat.f_bavail.saturating_mul(stat.f_frsize);
    if available < needed {
        return Err(ImageError::NoSpace {
            path: folder.to_owned(),
            needed,
            available: Some(available),
        });
    }
    Ok(())
}

/// The SHA-256 of a file, in hexadecimal, and its length.
pub(crate) fn checksum(path: &Path) -> Result<(String, u64), ImageError> {
    let read = || -> io::Result<(String, u64)> {
        let mut file = File::open(path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 17];
        let mut len = 0;
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                return Ok((hex(&hash.finalize()), len));
            }
            hash.update(&buffer[..count]);
            len += count as u64;
        }
    };
    read().map_err(ImageError::io("read", path, 0))
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
    len: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.len += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("file");
        write_whole(&target, 0, |out| out.write_all(b"old")).unwrap();
        let error = write_whole(&target, 5 << 20, |out| {
            out.write_all(b"new but")?;
            Err(io::ErrorKind::StorageFull.into())
        })
        .unwrap_err();
        assert!(matches!(error, ImageError::NoSpace { needed, .. } if needed == 5 << 20));
        assert_eq!(fs::read(&target).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_checksum_is_that_of_the_content() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a/b/file");
        let written = write_whole(&target, 0, |out| out.write_all(b"abc")).unwrap();
        assert_eq!(
            written.0,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(written, checksum(&target).unwrap());
    }

    #[test]
    fn left_overs_go_and_files_stay() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".unfinished-1"), "x").unwrap();
        fs::create_dir(folder.path().join(".unfinished-2")).unwrap();
        fs::write(folder.path().join(".unfinished-2/deep"), "x").unwrap();
        fs::write(folder.path().join("kept"), "x").unwrap();
        remove_unfinished(folder.path()).unwrap();
        let left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["kept"]);
    }

    #[test]
    fn more_than_any_disk_has_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = require_space(folder.path(), u64::MAX).unwrap_err();
        assert!(matches!(
            error,
            ImageError::NoSpace {
                available: Some(_),
                ..
            }
        ));
        require_space(folder.path(), 0).unwrap();
    }
}
