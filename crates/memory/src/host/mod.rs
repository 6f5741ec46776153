//! Host mappings behind guest memory. Memory is mapped, never touched, so a
//! machine's RAM costs nothing until the guest uses it.
//!
//! What each host operating system does behind [`Mapping`] stands in a file of its own. Only Linux's has been run;
//! the others are checked by the compiler as far as a compiler can.
//!
//! | host | memory is | shared with another process as | huge pages | [`Mapping::data`] |
//! |---|---|---|---|---|
//! | Linux | a memfd | its descriptor | hugetlb pool, or transparent | what was touched |
//! | macOS | a shared memory object without a name | its descriptor | none | everything |
//! | Windows | a section of the paging file, charged in full | its handle | large pages | everything, or what was written to a private mapping |

#[cfg(unix)]
use std::os::fd::{AsFd, BorrowedFd};
#[cfg(windows)]
use std::os::windows::io::{AsHandle, BorrowedHandle};
use std::{
    fs::File,
    io::{self, ErrorKind},
    ops::Range,
    ptr::NonNull,
    sync::Arc,
};

use crate::{Gpa, PAGE_SIZE, Region, RegionKind};

#[cfg(unix)]
mod holes;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;
#[cfg(windows)]
mod windows;

#[cfg(not(any(target_os = "linux", target_os = "macos", windows)))]
compile_error!("guest memory is there for hosts with Linux, macOS or Windows only");

#[cfg(target_os = "linux")]
use linux as os;
#[cfg(target_os = "macos")]
use macos as os;
#[cfg(windows)]
use windows as os;

/// Which pages the host uses behind guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HugePages {
    /// Ordinary pages; the kernel may make transparent huge pages of them.
    #[default]
    Transparent,
    /// Pages of the host's pool of huge ones (2 MiB): hugetlb on Linux, large pages on Windows. Fails if the pool is
    /// too small or there is none.
    Hugetlb,
    /// Small pages only, where the host lets us choose.
    Off,
}

/// What a user can do when the host has no [`HugePages::Hugetlb`] to give.
pub const HUGE_PAGES_REMEDY: &str = os::HUGE_PAGES_REMEDY;

/// What an operating system has to have: memory that is mapped as long as the object lives.
trait HostObject: Sized {
    /// Maps `len` bytes of zeroes, readable, writable and sharable, without using memory for them yet. `name` is
    /// for people, where the host shows names of mappings.
    fn zeroed(name: &str, len: usize, huge: HugePages) -> io::Result<Self>;

    /// Maps the first `len` bytes of `file`, which has at least as many, readable and writable; what is written stays
    /// in this process.
    fn private(file: File, len: usize) -> io::Result<Self>;

    /// Address of the first byte.
    fn base(&self) -> NonNull<u8>;

    /// Length in bytes, as asked for.
    fn len(&self) -> usize;

    /// Ranges outside which every byte is zero, in any order; they may overlap.
    fn data(&self) -> io::Result<Vec<Range<u64>>>;
}

/// RAM of the host in bytes, if it says.
pub fn physical_memory() -> Option<u64> {
    os::physical_memory()
}

/// The parts of the first `len` bytes of a file that are not holes; all of it where the file system does not tell.
/// May move the file's position.
///
/// # Errors
/// The host's.
pub fn data_of(file: &File, len: u64) -> io::Result<Vec<Range<u64>>> {
    os::data_of(file, len)
}

/// A shared mapping of host memory, or a private one of a file; unmapped when the last holder lets go.
#[derive(Debug)]
pub struct Mapping {
    object: os::Object,
}

// SAFETY: the mapping is only an address range; access to the bytes is the business of `access`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Makes `len` bytes of zeroed memory named `name` (seen on Linux in
    /// `/proc/PID/maps`). On Linux its host address is a multiple of 2 MiB if it
    /// is that long.
    ///
    /// # Errors
    /// The host's: no memory, no huge pages, too many mappings.
    pub fn new(name: &str, len: u64, huge: HugePages) -> io::Result<Arc<Self>> {
        let len = usize::try_from(len).map_err(|_| ErrorKind::OutOfMemory)?;
        let object = os::Object::zeroed(name, len, huge)?;
        Ok(Arc::new(Self { object }))
    }

    /// Maps the first `len` bytes of `file`, a multiple of the page size, so
    /// that pages are read when they are first touched, and writes stay in this
    /// process.
    ///
    /// # Errors
    /// The file is shorter, or the host refuses.
    pub fn private(file: File, len: u64) -> io::Result<Arc<Self>> {
        if file.metadata()?.len() < len {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let len = usize::try_from(len).map_err(|_| ErrorKind::OutOfMemory)?;
        let object = os::Object::private(file, len)?;
        Ok(Arc::new(Self { object }))
    }

    /// The ranges outside which every byte is zero, in ascending order and of whole pages. Finding them touches no
    /// page. A host that does not know which pages were used says that all were.
    ///
    /// # Errors
    /// The host's.
    pub fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let mut ranges = self.object.data()?;
        ranges.sort_by_key(|range| range.start);
        Ok(joined(ranges))
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.object.len() as u64
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.object.len() == 0
    }

    /// Host address of the first byte.
    pub fn base(&self) -> NonNull<u8> {
        self.object.base()
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
            let host = self.base().add(offset as usize);
            Region::new(name, gpa, len, host, kind, self.clone())
        }
    }
}

/// The memory as a descriptor, to share it with another process; of a private mapping the file, which does not have what
/// was written since.
#[cfg(unix)]
impl AsFd for Mapping {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.object.as_fd()
    }
}

/// The memory as a section, to share it with another process.
#[cfg(windows)]
impl AsHandle for Mapping {
    fn as_handle(&self) -> BorrowedHandle<'_> {
        self.object.as_handle()
    }
}

/// Widens sorted ranges to whole pages and joins those that touch.
fn joined(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let range = range.start / PAGE_SIZE * PAGE_SIZE..range.end.next_multiple_of(PAGE_SIZE);
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
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

    #[test]
    fn ranges_are_widened_to_pages_and_joined() {
        assert_eq!(
            joined(vec![1..2, 0x1000..0x1001, 0x1800..0x2800, 0x5000..0x6000]),
            [0..0x3000, 0x5000..0x6000]
        );
        assert_eq!(joined(vec![]), []);
    }
}
