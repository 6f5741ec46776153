//! Windows. Type-checked only.
//!
//! Who may read a new file or folder is inherited from the folder that it is made in: in the user's own, the user and
//! the host's administrators.
#![allow(unsafe_code, reason = "calls of the host's that Rust's library lacks")]

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::windows::{fs::FileExt, io::AsRawHandle},
    path::Path,
    ptr,
};

use windows_sys::Win32::{
    Media::{TIMERR_NOERROR, timeBeginPeriod, timeEndPeriod},
    Security::Cryptography::{BCRYPT_USE_SYSTEM_PREFERRED_RNG, BCryptGenRandom},
    System::{IO::DeviceIoControl, Ioctl::FSCTL_SET_SPARSE},
};

/// The shortest period that every host grants, in milliseconds.
const PERIOD: u32 = 1;

/// Precise waits for a thread. The period holds for the whole process; without it waits end up to 15.6 ms late.
pub(crate) struct PreciseTimers {
    granted: bool,
}

impl PreciseTimers {
    /// Asks the host. One that refuses leaves the timers as they are.
    pub(crate) fn new() -> Self {
        // SAFETY: takes a number; a period that the host does not grant is refused.
        let granted = unsafe { timeBeginPeriod(PERIOD) } == TIMERR_NOERROR;
        Self { granted }
    }
}

impl Drop for PreciseTimers {
    fn drop(&mut self) {
        if self.granted {
            // SAFETY: ends the period that `new` began.
            unsafe { timeEndPeriod(PERIOD) };
        }
    }
}

/// See the [module](super).
pub(crate) fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.seek_read(bytes, offset) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                bytes = bytes.get_mut(count..).unwrap_or_default();
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// See the [module](super).
pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.seek_write(bytes, offset) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = bytes.get(count..).unwrap_or_default();
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// See the [module](super).
pub(crate) fn private_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    let mut bytes = 0;
    // A file system without holes refuses, and the file takes all its room.
    // SAFETY: the handle is an open file's; nothing is passed either way but a length that the host writes.
    let _ = unsafe {
        DeviceIoControl(
            file.as_raw_handle(),
            FSCTL_SET_SPARSE,
            ptr::null(),
            0,
            ptr::null_mut(),
            0,
            &raw mut bytes,
            ptr::null_mut(),
        )
    };
    Ok(file)
}

/// See the [module](super).
pub(crate) fn private_folder(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

/// See the [module](super). The file system's journal sees to it.
pub(crate) fn sync_folder(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// See the [module](super).
pub(crate) fn random(bytes: &mut [u8]) -> io::Result<()> {
    for piece in bytes.chunks_mut(1 << 16) {
        // SAFETY: the host writes as many bytes as it is told, which the slice has.
        let status = unsafe {
            BCryptGenRandom(
                ptr::null_mut(),
                piece.as_mut_ptr(),
                piece.len() as u32,
                BCRYPT_USE_SYSTEM_PREFERRED_RNG,
            )
        };
        if status < 0 {
            return Err(io::Error::other("the host has no random numbers"));
        }
    }
    Ok(())
}
