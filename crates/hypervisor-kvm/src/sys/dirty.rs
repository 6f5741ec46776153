//! The kernel's dirty log: rings, and clearing bitmaps by the piece.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::atomic::{AtomicU32, Ordering},
};

use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_dirty_gfn,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::{
    ioctl::{ioctl, ioctl_with_ref},
    ioctl_io_nr, ioctl_iowr_nr,
};

use super::{check, pages::Pages};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Flags of an entry (KVM API §8.29): the kernel filled it; we read it.
const DIRTY: u32 = 1;
const READ: u32 = 2;

/// The pages that one vCPU wrote. The kernel fills it, we read it in order, and
/// [`reset_dirty_rings`] frees what was read.
#[derive(Debug)]
pub(crate) struct DirtyRing {
    pages: Pages,
    /// The entry that is filled next. Counts on past the ring's length.
    next: u32,
}

impl DirtyRing {
    /// The ring of `vcpu`, with the `entries` that it was enabled with: a power of two.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn of(vcpu: &VcpuFd, entries: u32) -> io::Result<Self> {
        // SAFETY: the descriptor is open as long as the vCPU is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        let len = entries as usize * size_of::<kvm_dirty_gfn>();
        let pages = Pages::map(fd, offset, len)?;
        Ok(Self { pages, next: 0 })
    }

    /// Reads what is there: `found` gets the memslot and the page's number in it.
    /// Gives how many there were.
    pub(crate) fn harvest(&mut self, mut found: impl FnMut(u32, u64)) -> usize {
        let entries = self.pages.len() / size_of::<kvm_dirty_gfn>();
        for count in 0..entries {
            let at = self.next as usize & (entries - 1);
            // SAFETY: `at` is below the number of entries that the mapping has.
            let entry = unsafe { self.pages.base().cast::<kvm_dirty_gfn>().add(at) };
            // SAFETY: the entry's first four bytes are its flags, which the kernel
            // and we access as one.
            let flags = unsafe { entry.cast::<AtomicU32>().as_ref() };
            if flags.load(Ordering::Acquire) & (DIRTY | READ) != DIRTY {
                return count;
            }
            // SAFETY: integers in the mapping, which the kernel leaves alone
            // between the two flags.
            let gfn = unsafe { entry.read_volatile() };
            found(gfn.slot, gfn.offset);
            flags.store(READ, Ordering::Release);
            self.next = self.next.wrapping_add(1);
        }
        entries
    }
}

/// Watches the pages again that were read from the rings, and frees their entries.
///
/// # Errors
/// The host's.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> io::Result<()> {
    // SAFETY: the call takes no argument.
    check(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) })?;
    Ok(())
}

/// Watches the pages of `slot` again that `bits` has, the first of which is
/// `first`, a multiple of 64; of a memslot of `pages` pages.
///
/// # Errors
/// The host's.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    pages: u64,
    first: u64,
    bits: &[u64],
) -> io::Result<()> {
    let covered = (bits.len() as u64 * 64).min(pages.saturating_sub(first));
    let argument = kvm_clear_dirty_log {
        slot,
        num_pages: u32::try_from(covered).map_err(|_| io::ErrorKind::InvalidInput)?,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bits.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the call reads the structure and as many bits as it says, rounded
    // up to words; `bits` has them.
    check(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &argument) })?;
    Ok(())
}
