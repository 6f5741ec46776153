//! One process at a time changes the cache.

use crate::durable::create_folder;
use crate::error::ImageError;
use crate::progress::Progress;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::File;
use std::path::Path;
use std::process::Stdio;

/// The cache's lock, held until this and every child process that was given it is gone.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

impl Lock {
    /// Takes the lock `path`, waiting for another process to finish if need be.
    pub(crate) fn take(path: &Path, progress: &dyn Progress) -> Result<Lock, ImageError> {
        create_folder(path.parent().unwrap_or(Path::new(".")))?;
        let file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(ImageError::io("open", path, 0))?;
        let lock = |how| loop {
            match flock(&file, how) {
                Err(Errno::INTR) => {}
                other => return other,
            }
        };
        let mut outcome = lock(FlockOperation::NonBlockingLockExclusive);
        if outcome == Err(Errno::WOULDBLOCK) {
            progress.begin("waiting for another caisson that is fetching", None);
            outcome = lock(FlockOperation::LockExclusive);
            progress.finish();
        }
        outcome.map_err(|errno| ImageError::io("lock", path, 0)(errno.into()))?;
        Ok(Lock { file })
    }

    /// The lock as a child's standard input: an empty file to read, and the lock lasts as long as
    /// the child, so that one which outlives us is not disturbed.
    pub(crate) fn as_stdin(&self) -> Stdio {
        self.file
            .try_clone()
            .map_or_else(|_| Stdio::null(), Stdio::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use std::process::Command;

    fn free(path: &Path) -> bool {
        let file = File::open(path).unwrap();
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
    }

    #[test]
    fn a_child_keeps_the_lock_that_its_parent_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let lock = Lock::take(&path, &Silent).unwrap();
        assert!(!free(&path));
        // `cat` on a FIFO waits until the test opens its other end.
        let fifo = folder.path().join("fifo");
        assert!(
            Command::new("mkfifo")
                .arg(&fifo)
                .status()
                .unwrap()
                .success()
        );
        let mut child = Command::new("cat")
            .arg(&fifo)
            .stdin(lock.as_stdin())
            .spawn()
            .unwrap();
        drop(lock);
        assert!(!free(&path));
        std::fs::write(&fifo, "").unwrap();
        child.wait().unwrap();
        assert!(free(&path));
    }
}
