//! Guest memory on Linux: a memfd, sharable, optionally of huge pages.

use std::{
    fs::File,
    io::{self, ErrorKind},
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    ptr::{self, NonNull},
};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap},
    param::page_size,
};

pub(super) use super::holes::data_of;
use super::{HostObject, HugePages};

pub(super) const HUGE_PAGES_REMEDY: &str =
    "reserve 2 MiB pages in /proc/sys/vm/nr_hugepages, or leave hugepages off";

/// What `/proc/PID/pagemap` says of a page (Linux, admin-guide/mm/pagemap):
/// it is in memory, in swap, and (not) the file's own.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
/// What large memory is aligned to: the processor's next larger page.
const HUGE_PAGE: usize = 2 << 20;
/// How many pages are asked about at once.
const BATCH: usize = 4096;

/// A mapping of a memfd or a file.
#[derive(Debug)]
pub(super) struct Object {
    base: NonNull<u8>,
    len: usize,
    file: File,
    /// Writes go to copies of the file's pages, not to the file.
    private: bool,
}

impl HostObject for Object {
    fn zeroed(name: &str, len: usize, huge: HugePages) -> io::Result<Self> {
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if huge == HugePages::Hugetlb {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = memfd_create(name, flags)?;
        ftruncate(&fd, len as u64)?;
        let object = Self::map(fd.into(), len, false)?;
        match huge {
            HugePages::Transparent => object.advise(Advice::LinuxHugepage),
            HugePages::Off => object.advise(Advice::LinuxNoHugepage),
            HugePages::Hugetlb => {}
        }
        Ok(object)
    }

    fn private(file: File, len: usize) -> io::Result<Self> {
        Self::map(file, len, true)
    }

    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }

    fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let mut ranges = data_of(&self.file, self.len as u64)?;
        if self.private {
            ranges.extend(self.copied()?);
        }
        Ok(ranges)
    }
}

impl Object {
    /// Maps the first `len` bytes of `file`.
    fn map(file: File, len: usize, private: bool) -> io::Result<Self> {
        let base = if private {
            place(&file, len, MapFlags::PRIVATE)?
        } else {
            place_aligned(&file, len)?
        };
        let object = Self {
            base,
            len,
            file,
            private,
        };
        // Core dumps of the VMM must not carry the guest's secrets.
        object.advise(Advice::LinuxDontDump);
        Ok(object)
    }

    /// Tells the host how the memory is used. Only hints, which some hosts refuse.
    fn advise(&self, advice: Advice) {
        // SAFETY: the range is this object's mapping and holds no Rust objects; none of the hints given changes what
        // it holds.
        let _ = unsafe { madvise(self.base.as_ptr().cast(), self.len, advice) };
    }

    /// The pages of a private mapping that were written.
    fn copied(&self) -> io::Result<Vec<Range<u64>>> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let page = page_size() as u64;
        let first = self.base.as_ptr() as u64 / page;
        let pages = (self.len as u64).div_ceil(page);
        let mut ranges = Vec::new();
        let mut batch = [0; BATCH * 8];
        let mut done = 0;
        while done < pages {
            let count = (pages - done).min(BATCH as u64);
            let bytes = &mut batch[..count as usize * 8];
            pagemap.read_exact_at(bytes, (first + done) * 8)?;
            for (number, entry) in (done..).zip(bytes.as_chunks().0) {
                let entry = u64::from_ne_bytes(*entry);
                if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                    ranges.push(number * page..((number + 1) * page).min(self.len as u64));
                }
            }
            done += count;
        }
        Ok(ranges)
    }
}

/// Maps the first `len` bytes of `file` where the host likes.
fn place(file: &File, len: usize, sharing: MapFlags) -> io::Result<NonNull<u8>> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = sharing | MapFlags::NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice disturbs nothing.
    let base = unsafe { mmap(ptr::null_mut(), len, protection, flags, file, 0)? };
    NonNull::new(base.cast()).ok_or_else(|| ErrorKind::OutOfMemory.into())
}

/// Shares the first `len` bytes of `file`. If it is that long, its address is a multiple of [`HUGE_PAGE`]: memory whose
/// guest and host addresses agree modulo a huge page is what the host can map into the guest by such pages.
fn place_aligned(file: &File, len: usize) -> io::Result<NonNull<u8>> {
    if len < HUGE_PAGE {
        return place(file, len, MapFlags::SHARED);
    }
    let pages = len
        .checked_next_multiple_of(page_size())
        .ok_or(ErrorKind::OutOfMemory)?;
    let room = pages.checked_add(HUGE_PAGE).ok_or(ErrorKind::OutOfMemory)?;
    let none = ProtFlags::empty();
    // SAFETY: a fresh mapping at an address of the kernel's choice, in which nothing can be accessed.
    let reserved: *mut u8 =
        unsafe { mmap_anonymous(ptr::null_mut(), room, none, MapFlags::PRIVATE)?.cast() };
    let before = reserved.align_offset(HUGE_PAGE);
    let aligned = reserved.wrapping_add(before);
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: replaces a part of what was just reserved, where nothing is.
    let mapped = unsafe { mmap(aligned.cast(), len, protection, flags, file, 0) };
    if let Err(error) = mapped {
        // SAFETY: nobody has an address in the reserved range.
        let _ = unsafe { munmap(reserved.cast(), room) };
        return Err(error.into());
    }
    let after = (aligned.wrapping_add(pages), room - before - pages);
    for (start, len) in [(reserved, before), after] {
        if len > 0 {
            // What cannot be given back costs nothing but addresses.
            // SAFETY: the part of the reserved range beside the mapping, where nothing is.
            let _ = unsafe { munmap(start.cast(), len) };
        }
    }
    NonNull::new(aligned).ok_or_else(|| ErrorKind::OutOfMemory.into())
}

impl AsFd for Object {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: the last holder is gone, so nobody has an address into the range.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// RAM of the host in bytes, if it says.
pub(super) fn physical_memory() -> Option<u64> {
    let info = rustix::system::sysinfo();
    // The types of the fields differ between architectures.
    #[allow(
        clippy::useless_conversion,
        reason = "not useless where the kernel's unsigned long has 32 bits"
    )]
    let (total, unit) = (u64::from(info.totalram), u64::from(info.mem_unit));
    total.checked_mul(unit.max(1)).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Gpa, GuestMemory, MemoryView, PAGE_SIZE, RegionKind, host::Mapping};

    const MIB: u64 = 1 << 20;

    fn view(mapping: &Arc<Mapping>) -> MemoryView {
        let region = mapping.region("ram", Gpa(0), 0, mapping.len(), RegionKind::Ram);
        MemoryView::new(GuestMemory::new(vec![region]).unwrap())
    }

    /// A file in memory, which has holes as one on a disk has.
    fn tempfile() -> File {
        File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap())
    }

    #[test]
    fn fresh_memory_has_no_data_until_it_is_written() {
        let mapping = Mapping::new("test", 64 * MIB, HugePages::Off).unwrap();
        assert_eq!(mapping.data().unwrap(), []);
        let memory = view(&mapping);
        memory.write(Gpa(5 * MIB + 10), b"x").unwrap();
        memory.write(Gpa(64 * MIB - 1), b"y").unwrap();
        let page = 5 * MIB..5 * MIB + PAGE_SIZE;
        assert_eq!(
            mapping.data().unwrap(),
            [page, 64 * MIB - PAGE_SIZE..64 * MIB]
        );
    }

    #[test]
    fn large_memory_begins_where_huge_pages_do() {
        let lens = [HUGE_PAGE, HUGE_PAGE + 0x3000, 7 * HUGE_PAGE, 64 * HUGE_PAGE];
        let mappings = lens
            .map(|len| Mapping::new("caisson-test", len as u64, HugePages::Transparent).unwrap());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        for (mapping, len) in mappings.iter().zip(lens) {
            let start = mapping.base().as_ptr() as usize;
            assert_eq!(start % HUGE_PAGE, 0, "{len:#x}");
            let memory = view(mapping);
            for at in [0, len as u64 - 8] {
                assert_eq!(memory.read_obj::<u64>(Gpa(at)).unwrap(), 0);
                memory.write_obj(Gpa(at), &len).unwrap();
                assert_eq!(memory.read_obj::<usize>(Gpa(at)).unwrap(), len);
            }
            let line = maps
                .lines()
                .find(|line| line.starts_with(&format!("{start:x}-")))
                .unwrap();
            assert!(line.contains(&format!("-{:x} ", start + len)), "{line}");
        }
    }

    #[test]
    fn writes_to_a_private_mapping_stay_out_of_the_file() {
        let file = tempfile();
        file.set_len(8 * MIB).unwrap();
        file.write_all_at(b"saved", 3 * MIB).unwrap();
        let mapping = Mapping::private(file.try_clone().unwrap(), 8 * MIB).unwrap();
        let memory = view(&mapping);
        let mut bytes = [0; 5];
        memory.read(Gpa(3 * MIB), &mut bytes).unwrap();
        assert_eq!(&bytes, b"saved");
        memory.write(Gpa(3 * MIB), b"S").unwrap();
        memory.write(Gpa(6 * MIB), b"new").unwrap();
        file.read_exact_at(&mut bytes, 3 * MIB).unwrap();
        assert_eq!(&bytes, b"saved");
        let data = mapping.data().unwrap();
        let has = |at| data.iter().any(|range| range.contains(&at));
        assert!(
            has(3 * MIB) && has(6 * MIB) && !has(5 * MIB) && !has(7 * MIB),
            "{data:?}"
        );
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = tempfile();
        file.set_len(MIB - 1).unwrap();
        let error = Mapping::private(file, MIB).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }
}
