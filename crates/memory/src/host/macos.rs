//! Guest memory on macOS: a POSIX shared memory object that loses its name at once. Type-checked only.

use std::{
    fs::File,
    io::{self, ErrorKind},
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::{
    fs::{Mode, ftruncate},
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap, munmap},
    shm,
};

pub(super) use super::holes::data_of;
use super::{HostObject, HugePages};

pub(super) const HUGE_PAGES_REMEDY: &str = "macOS has no pool of huge pages: leave hugepages off";

/// How many names are tried: another process of the same number may have died before it let its own go.
const NAMES: u32 = 16;

/// A mapping of a shared memory object or a file.
#[derive(Debug)]
pub(super) struct Object {
    base: NonNull<u8>,
    len: usize,
    fd: OwnedFd,
}

impl HostObject for Object {
    fn zeroed(_name: &str, len: usize, huge: HugePages) -> io::Result<Self> {
        if huge == HugePages::Hugetlb {
            return Err(ErrorKind::Unsupported.into());
        }
        let fd = shared_memory()?;
        ftruncate(&fd, len as u64)?;
        Self::map(fd, len, MapFlags::SHARED)
    }

    fn private(file: File, len: usize) -> io::Result<Self> {
        Self::map(file.into(), len, MapFlags::PRIVATE)
    }

    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }

    /// Everything: mincore(2) tells which pages are in memory, but promises nothing of those that were swapped out.
    fn data(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(vec![0..self.len as u64])
    }
}

impl Object {
    /// Maps the first `len` bytes of `fd`.
    fn map(fd: OwnedFd, len: usize, sharing: MapFlags) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice disturbs nothing.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                sharing | MapFlags::NORESERVE,
                &fd,
                0,
            )?
        };
        let base = NonNull::new(base.cast()).ok_or(ErrorKind::OutOfMemory)?;
        Ok(Self { base, len, fd })
    }
}

/// A new shared memory object that only this process can reach.
fn shared_memory() -> io::Result<OwnedFd> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut refused = Errno::EXIST;
    for _ in 0..NAMES {
        // Names may have 31 bytes at most.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("/caisson-{}-{number}", std::process::id());
        let flags = shm::OFlags::RDWR | shm::OFlags::CREATE | shm::OFlags::EXCL;
        match shm::open(&*name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => {
                shm::unlink(&*name)?;
                return Ok(fd);
            }
            Err(Errno::EXIST) => {}
            Err(error) => {
                refused = error;
                break;
            }
        }
    }
    Err(refused.into())
}

impl AsFd for Object {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: the last holder is gone, so nobody has an address into the range.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// RAM of the host in bytes, if it says: `hw.memsize` of sysctl(3).
pub(super) fn physical_memory() -> Option<u64> {
    let mut bytes = 0_u64;
    let mut len = size_of_val(&bytes);
    // SAFETY: the name ends with a zero; the kernel writes at most `len` bytes, the size of what it is given, and
    // the length that it wrote; nothing is set.
    let refused = unsafe {
        libc::sysctlbyname(
            c"hw.memsize".as_ptr(),
            (&raw mut bytes).cast(),
            &raw mut len,
            ptr::null_mut(),
            0,
        )
    };
    (refused == 0 && len == size_of_val(&bytes) && bytes > 0).then_some(bytes)
}
