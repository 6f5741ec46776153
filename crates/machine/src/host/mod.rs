//! What the standard library does not have, or not on every host: a file per operating system.
//!
//! | each has | which |
//! |---|---|
//! | `PreciseTimers` | while it lives, makes waits of the thread that made it end as close to their time as the host can |
//! | `read_exact_at`, `write_all_at` | read and write a whole buffer at a place in a file; may move the file's position |
//! | `private_file` | makes a new file that only the user can read, and that may have holes |
//! | `private_folder` | makes a folder that only the user can enter, and those above it |
//! | `sync_folder` | makes new names in a folder survive a power cut |
//! | `random` | fills a buffer with bytes that nobody can guess |

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;
#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(target_os = "linux")]
pub(crate) use linux::PreciseTimers;
#[cfg(target_os = "macos")]
pub(crate) use macos::PreciseTimers;
#[cfg(unix)]
pub(crate) use unix::*;
#[cfg(windows)]
pub(crate) use windows::*;

#[cfg(test)]
mod tests {
    use std::{fs::read, io::ErrorKind};

    use super::*;

    #[test]
    fn files_are_read_and_written_at_a_place_and_to_the_last_byte() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("a/b");
        private_folder(&inner).unwrap();
        private_folder(&inner).unwrap();
        let path = inner.join("file");
        let file = private_file(&path).unwrap();
        assert_eq!(
            private_file(&path).unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        write_all_at(&file, b"3456", 3).unwrap();
        write_all_at(&file, b"01", 0).unwrap();
        sync_folder(&inner).unwrap();
        assert_eq!(read(&path).unwrap(), *b"01\x003456");
        let mut bytes = [0; 4];
        read_exact_at(&file, &mut bytes, 3).unwrap();
        assert_eq!(&bytes, b"3456");
        read_exact_at(&file, &mut [], 9).unwrap();
        let error = read_exact_at(&file, &mut bytes, 4).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn random_bytes_are_not_twice_the_same() {
        let (mut a, mut b) = ([0; 16], [0; 16]);
        random(&mut a).unwrap();
        random(&mut b).unwrap();
        assert_ne!(a, b);
    }
}
