//! Memory that belongs to a virtual machine.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use caisson_memory::{Gpa, Region, RegionKind};
use kvm_bindings::kvm_create_guest_memfd;
use kvm_ioctls::VmFd;
use rustix::io::{FdFlags, fcntl_setfd};

use super::{error, pages::Pages};

/// GUEST_MEMFD_FLAG_MMAP and _INIT_SHARED (Linux 6.18): the process may map it,
/// and it is the guest's memory whether the guest calls it private or not.
const MAPPABLE: u64 = 1 | 2;

/// A guest_memfd with its mapping.
#[derive(Debug)]
pub(crate) struct GuestMemfd {
    pages: Pages,
    fd: OwnedFd,
}

impl GuestMemfd {
    /// The flags that the kernel has to know (KVM_CAP_GUEST_MEMFD_FLAGS).
    pub(crate) const FLAGS: u64 = MAPPABLE;

    /// `len` bytes for `vm`.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn new(vm: &VmFd, len: u64) -> io::Result<Arc<Self>> {
        let wanted = kvm_create_guest_memfd {
            size: len,
            flags: MAPPABLE,
            ..Default::default()
        };
        let fd = vm.create_guest_memfd(wanted).map_err(error)?;
        // SAFETY: the kernel just made it, for us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let pages = Pages::map(fd.as_fd(), 0, len)?;
        Ok(Arc::new(Self { pages, fd }))
    }

    /// All of it, as RAM at `gpa`.
    pub(crate) fn region(self: Arc<Self>, name: &str, gpa: Gpa) -> Region {
        let (base, len) = (self.pages.base(), self.pages.len() as u64);
        // SAFETY: `self` keeps the mapping, which is readable and writable, and
        // no reference into it is ever made.
        unsafe { Region::new(name, gpa, len, base, RegionKind::Ram, self) }
    }

    /// The descriptor that memslots name.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
