//! Downloading one package and making sure of it.

use super::{Apt, Record, collect_errors, finish, is_full_disk, spawn};
use crate::durable;
use crate::error::ImageError;
use crate::lock::Lock;
use crate::progress::Progress;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// How often the growing file is looked at.
const GLANCE: Duration = Duration::from_millis(100);

impl Apt {
    /// Fetches the package of `record` into the folder `into`, under [`Record::file_name`].
    ///
    /// The download takes place in a folder of its own beside the target, where apt continues what
    /// an earlier, interrupted run left. Only a file of the right size and SHA-256 gets its name.
    pub(crate) fn download(
        &self,
        record: &Record,
        into: &Path,
        lock: &Lock,
        progress: &dyn Progress,
    ) -> Result<PathBuf, ImageError> {
        let target = into.join(record.file_name());
        let staging = into.join("incoming").join(&record.name);
        durable::create_folder(&staging)?;
        let partial = present(&staging).map_or(0, |(_, len)| len);
        durable::require_space(into, record.size.saturating_sub(partial))?;

        let mut outcome = self.download_once(record, &staging, lock, progress);
        if matches!(
            outcome,
            Err(ImageError::Apt { .. } | ImageError::Mismatch { .. })
        ) && partial > 0
        {
            // What the interrupted run left may be of no use: of another build, or damaged.
            durable::remove(&staging)?;
            durable::create_folder(&staging)?;
            outcome = self.download_once(record, &staging, lock, progress);
        }
        let arrived = match outcome {
            Ok(arrived) => arrived,
            Err(error) => {
                // What came of a broken connection is worth keeping; on a full disk nothing is.
                if !matches!(error, ImageError::Apt { .. }) {
                    durable::remove(&staging)?;
                }
                return Err(error);
            }
        };
        fs::File::open(&arrived)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&arrived, &target))
            .map_err(ImageError::io("move into the cache", &target, record.size))?;
        durable::sync_folder(into)?;
        durable::remove(&staging)?;
        Ok(target)
    }

    fn download_once(
        &self,
        record: &Record,
        staging: &Path,
        lock: &Lock,
        progress: &dyn Progress,
    ) -> Result<PathBuf, ImageError> {
        let mut command = self.command("apt-get");
        command
            .args(["--quiet", "download"])
            .arg(format!("{}={}", record.name, record.version))
            .current_dir(staging);
        let mut child = spawn(&mut command, "apt-get", lock.as_stdin())?;
        let complaints = collect_errors(&mut child);
        let stdout = child.stdout.take();
        let (ended, watch) = mpsc::channel::<()>();
        let drain = std::thread::spawn(move || {
            let mut sink = [0; 4096];
            if let Some(mut stdout) = stdout {
                while stdout.read(&mut sink).is_ok_and(|count| count > 0) {}
            }
            drop(ended);
        });
        progress.begin(&format!("fetching {}", record.name), Some(record.size));
        while watch.recv_timeout(GLANCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            progress.advance(present(staging).map_or(0, |(_, len)| len));
        }
        let _ = drain.join();
        let outcome = finish(child, complaints, "apt-get", "download".to_owned());
        // A quick download ends before the first glance; the bar ends where the file does.
        progress.advance(present(staging).map_or(0, |(_, len)| len));
        progress.finish();
        outcome.map_err(|error| match error {
            ImageError::Apt { detail, .. } if is_full_disk(&detail) => ImageError::NoSpace {
                path: staging.to_owned(),
                needed: record.size,
                available: None,
            },
            other => other,
        })?;
        let arrived = present(staging).map(|(path, _)| path).ok_or_else(|| {
            ImageError::malformed(staging, "apt-get reported success but left no package here")
        })?;
        verify(&arrived, record)?;
        Ok(arrived)
    }
}

/// Compares a file with what the package list says of it.
pub(super) fn verify(path: &Path, record: &Record) -> Result<(), ImageError> {
    let (sum, len) = durable::checksum(path)?;
    let (expected, found) = if len != record.size {
        (format!("{} bytes", record.size), format!("{len} bytes"))
    } else if sum != record.sha256 {
        (
            format!("SHA-256 {}", record.sha256),
            format!("SHA-256 {sum}"),
        )
    } else {
        return Ok(());
    };
    Err(ImageError::Mismatch {
        path: path.to_owned(),
        expected,
        found,
    })
}

/// The package file in a staging folder and its length so far.
fn present(staging: &Path) -> Option<(PathBuf, u64)> {
    fs::read_dir(staging)
        .ok()?
        .filter_map(Result::ok)
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "deb"))
        .find_map(|entry| Some((entry.path(), entry.metadata().ok()?.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_wrong_size_or_content_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.deb");
        fs::write(&path, b"abc").unwrap();
        let mut record = Record {
            name: "xx".into(),
            version: "1".into(),
            architecture: "amd64".into(),
            size: 3,
            installed_size: 0,
            sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".into(),
            depends: Vec::new(),
        };
        verify(&path, &record).unwrap();
        fs::write(&path, b"abd").unwrap();
        assert!(matches!(
            verify(&path, &record),
            Err(ImageError::Mismatch { .. })
        ));
        record.size = 4;
        let error = verify(&path, &record).unwrap_err().to_string();
        assert!(error.contains("expected 4 bytes, found 3 bytes"), "{error}");
    }
}
