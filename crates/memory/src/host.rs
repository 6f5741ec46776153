//! Host mappings behind guest memory (Linux): memfd, sharable, optionally of
//! huge pages. Memory is mapped, never touched, so a machine's RAM costs
//! nothing until the guest uses it.

use std::{io, os::fd::OwnedFd, ptr::NonNull, sync::Arc};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap},
};

use crate::{Gpa, Region, RegionKind};

/// Which pages the host uses behind guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HugePages {
    /// Ordinary pages; the kernel may make transparent huge pages of them.
    #[default]
    Transparent,
    /// Pages of the host's hugetlb pool (2 MiB); fails if the pool is too small.
    Hugetlb,
    /// Small pages only.
    Off,
}

/// A shared mapping of a memfd, unmapped when the last holder lets go.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    fd: OwnedFd,
}

// SAFETY: the mapping is only an address range; access to the bytes is the business of `access`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Makes `len` bytes of zeroed memory named `name` (seen in the host's
    /// `/proc/PID/maps`).
    ///
    /// # Errors
    /// The host's: no memory, no huge pages, too many mappings.
    pub fn new(name: &str, len: u64, huge: HugePages) -> io::Result<Arc<Self>> {
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if huge == HugePages::Hugetlb {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = memfd_create(name, flags)?;
        ftruncate(&fd, len)?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice disturbs nothing.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )?
        };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Self { base, len, fd };
        let advice = match huge {
            HugePages::Transparent => Some(Advice::LinuxHugepage),
            HugePages::Off => Some(Advice::LinuxNoHugepage),
            HugePages::Hugetlb => None,
        };
        if let Some(advice) = advice {
            // Only a hint: hosts without transparent huge pages refuse it.
            // SAFETY: the range was mapped above and holds no Rust objects.
            let _ = unsafe { madvise(mapping.base.as_ptr().cast(), mapping.len, advice) };
        }
        // SAFETY: as above. Core dumps of the VMM must not carry the guest's secrets.
        let _ = unsafe {
            madvise(
                mapping.base.as_ptr().cast(),
                mapping.len,
                Advice::LinuxDontDump,
            )
        };
        Ok(Arc::new(mapping))
    }

    /// The memfd, to share the memory with another process.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Host address of the first byte.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// A region over part of the mapping.
    ///
    /// # Panics
    /// If `offset + len` leaves the mapping: a fault of the caller's arithmetic,
    /// never of the guest's.
    pub fn region(
        self: &Arc<Self>,
        name: &str,
        gpa: Gpa,
        offset: u64,
        len: u64,
        kind: RegionKind,
    ) -> Region {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len()));
        // SAFETY: in bounds by the assertion; the Arc keeps the mapping, and no
        // references into it are ever made.
        unsafe {
            let host = self.base.add(offset as usize);
            Region::new(name, gpa, len, host, kind, self.clone())
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the last holder is gone, so nobody has an address into the range.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DirtyBitmap, GuestMemory, MemoryError, MemoryView, TableError};

    fn memory() -> MemoryView {
        let m = Mapping::new("test", 0x6000, HugePages::Off).unwrap();
        let dirty = Arc::new(DirtyBitmap::new(4));
        MemoryView::new(
            GuestMemory::new(vec![
                m.region("low", Gpa(0), 0, 0x4000, RegionKind::Ram)
                    .with_dirty(dirty),
                m.region("next", Gpa(0x4000), 0x4000, 0x1000, RegionKind::Ram),
                m.region("rom", Gpa(0x10000), 0x5000, 0x1000, RegionKind::Rom),
            ])
            .unwrap(),
        )
    }

    #[test]
    fn copies_across_adjacent_regions_and_notes_dirt() {
        let v = memory();
        v.write(Gpa(0x3ffe), &[1, 2, 3, 4]).unwrap();
        let mut b = [0; 4];
        v.read(Gpa(0x3ffe), &mut b).unwrap();
        assert_eq!(b, [1, 2, 3, 4]);
        let d = v.memory().regions()[0].dirty().unwrap();
        assert!(d.is_dirty(3) && !d.is_dirty(0));
    }

    #[test]
    fn refuses_holes_rom_writes_and_wrap_around_before_moving_a_byte() {
        let v = memory();
        assert!(matches!(
            v.write(Gpa(0x4ffe), &[9; 4]),
            Err(MemoryError::Unmapped { .. })
        ));
        assert_eq!(v.read_obj::<u16>(Gpa(0x4ffe)).unwrap(), 0);
        assert!(matches!(
            v.write(Gpa(0x10000), &[1]),
            Err(MemoryError::Denied { .. })
        ));
        assert!(v.read(Gpa(u64::MAX - 1), &mut [0; 4]).is_err());
        assert!(
            v.load_u16(Gpa(1), std::sync::atomic::Ordering::Acquire)
                .is_err()
        );
    }

    #[test]
    fn overlap_names_both() {
        let m = Mapping::new("t", 0x4000, HugePages::Off).unwrap();
        let e = GuestMemory::new(vec![
            m.region("a", Gpa(0), 0, 0x2000, RegionKind::Ram),
            m.region("b", Gpa(0x1000), 0x2000, 0x1000, RegionKind::Ram),
        ])
        .err();
        assert_eq!(e, Some(TableError::Overlap("a".into(), "b".into())));
    }
}
