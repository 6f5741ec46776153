//! Locks of files that images are in, and who holds one.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
};

/// Locks all of `file` for as long as it is open anywhere: exclusively, or together with others who only read.
///
/// It is an open file description lock (fcntl(2)) on every byte, so that QEMU's own locks (bytes from 100 on) and ours
/// exclude each other.
pub(super) fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    set(
        file,
        if exclusive {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        },
    )
}

/// Gives up what [`lock`] took. Closing the file does so only when nobody has a copy of the descriptor, which a child
/// of another thread has between its fork and its exec.
pub(super) fn unlock(file: &File) {
    // A lock that cannot be given up goes when the file is closed.
    let _ = set(file, libc::F_UNLCK);
}

fn set(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: a structure of numbers, for which zeroes are values.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the call reads the structure, which lives.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether an error of [`lock`] says that somebody else has it.
pub(super) fn is_held(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Who has a lock on `file`, as far as this user may see: name and number of the process, and the machine's name where
/// the process is told one on its command line. The kernel does not name holders of such locks, but lists each
/// process's locks with its descriptors.
pub(super) fn holder(file: &File) -> Option<String> {
    let metadata = file.metadata().ok()?;
    let inode = metadata.ino().to_string();
    let device = metadata.dev();
    let device = format!("{:02x}:{:02x}", libc::major(device), libc::minor(device));
    let own = std::process::id().to_string();
    let mut own_too = false;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name
            .to_str()
            .filter(|n| n.bytes().all(|b| b.is_ascii_digit()))
        else {
            continue;
        };
        let Ok(descriptors) = fs::read_dir(process.path().join("fdinfo")) else {
            continue;
        };
        let holds = descriptors.flatten().any(|descriptor| {
            fs::read_to_string(descriptor.path()).is_ok_and(|info| locks(&info, &device, &inode))
        });
        if holds && pid == own {
            own_too = true;
        } else if holds {
            return Some(describe(pid));
        }
    }
    own_too.then(|| "this process".to_owned())
}

/// Whether a descriptor's information lists a lock on the file, as in
/// `lock: 1: OFDLCK  ADVISORY  WRITE -1 fd:00:1234 0 EOF`.
fn locks(info: &str, device: &str, inode: &str) -> bool {
    info.lines()
        .filter(|line| line.starts_with("lock:"))
        .flat_map(str::split_ascii_whitespace)
        .any(|word| {
            word.rsplit_once(':')
                .is_some_and(|(on, number)| on == device && number == inode)
        })
}

fn describe(pid: &str) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<String> = line
        .split(|&byte| byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let program = words
        .first()
        .and_then(|path| path.rsplit('/').next())
        .filter(|name| !name.is_empty())
        .unwrap_or("a process");
    let machine = words.iter().enumerate().find_map(|(index, word)| {
        word.strip_prefix("--name=")
            .map(str::to_owned)
            .or_else(|| (word == "--name").then(|| words.get(index + 1).cloned())?)
    });
    match machine {
        Some(machine) => format!("machine \"{machine}\" ({program}, process {pid})"),
        None => format!("{program} (process {pid})"),
    }
}
