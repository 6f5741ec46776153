//! The file of guest RAM: the RAM regions one after the other, and a page that says whose they are.
//!
//! | bytes | content |
//! |---|---|
//! | length of RAM | its contents; pages of zeros are holes |
//! | 16 | `caisson memory` and two line feeds |
//! | 16 | the snapshot's number |
//! | 8 | length of RAM |
//! | 4 | CRC-32 (IEEE) over each page that is not zero, in order: its number in 8 bytes, then its contents |
//! | 4 | CRC-32 (IEEE) of the 44 bytes before |
//! | 4048 | zero |

use std::{fs::File, ops::Range};

use caisson_memory::{
    Gpa, GuestMemory, MemoryView, PAGE_SIZE,
    host::{Mapping, data_of},
};

use super::SnapshotError;
use crate::host;

const MAGIC: &[u8; 16] = b"caisson memory\n\n";
const PAGE: usize = PAGE_SIZE as usize;
/// How much is read and written at once, a multiple of the page size.
const PIECE: u64 = 1 << 20;

/// What the last page says.
struct Trailer {
    id: u128,
    ram: u64,
    crc: u32,
}

impl Trailer {
    fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[..16].copy_from_slice(MAGIC);
        page[16..32].copy_from_slice(&self.id.to_le_bytes());
        page[32..40].copy_from_slice(&self.ram.to_le_bytes());
        page[40..44].copy_from_slice(&self.crc.to_le_bytes());
        let crc = crc32fast::hash(&page[..44]);
        page[44..48].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// Reads it from the end of `file`, which has `ram` bytes of RAM.
    fn read(file: &File, ram: u64) -> Result<Self, SnapshotError> {
        let expected = ram.saturating_add(PAGE_SIZE);
        let found = file.metadata()?.len();
        if found != expected {
            return Err(SnapshotError::Length { found, expected });
        }
        let mut bytes = [0; 48];
        host::read_exact_at(file, &mut bytes, ram)?;
        let word = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |word| u32::from_le_bytes(*word))
        };
        let damaged = |what| Err(SnapshotError::Damaged { what });
        if !bytes.starts_with(MAGIC) {
            return damaged("its last page is not that of saved memory");
        }
        if word(44) != crc32fast::hash(&bytes[..44]) {
            return damaged("its last page's checksum does not match");
        }
        let id = bytes[16..]
            .first_chunk()
            .map_or(0, |id| u128::from_le_bytes(*id));
        let length = u64::from(word(32)) | u64::from(word(36)) << 32;
        if length != ram {
            return damaged("its last page has another length");
        }
        Ok(Self {
            id,
            ram,
            crc: word(40),
        })
    }
}

/// Writes `memory`, whose RAM lies in `mapping`, to the empty `file`.
pub(super) fn write(
    file: &File,
    mapping: &Mapping,
    memory: &GuestMemory,
    id: u128,
) -> Result<(), SnapshotError> {
    let view = MemoryView::new(memory.clone());
    let ram = mapping.len();
    file.set_len(ram + PAGE_SIZE)?;
    let mut sum = Sum::default();
    let mut piece = vec![0; PIECE as usize];
    let mut offset = 0;
    let data = mapping.data()?;
    for region in memory.regions() {
        let within = offset..offset + region.len();
        for range in data.iter().map(|range| common(range, &within)) {
            let mut at = range.start;
            while at < range.end {
                let bytes = &mut piece[..(range.end - at).min(PIECE) as usize];
                let gpa = Gpa(region.gpa().0 + (at - offset));
                view.read(gpa, bytes).map_err(|_| SnapshotError::Damaged {
                    what: "guest memory is not where its table says",
                })?;
                for (run, bytes) in runs(at, bytes) {
                    sum.add(run, bytes);
                    host::write_all_at(file, bytes, run)?;
                }
                at += bytes.len() as u64;
            }
        }
        offset = within.end;
    }
    let trailer = Trailer {
        id,
        ram,
        crc: sum.finish(),
    };
    host::write_all_at(file, &trailer.encode(), ram)?;
    file.sync_all()?;
    Ok(())
}

/// Checks that `file` is the memory of snapshot `id`, with `ram` bytes. Reads its last page only.
pub(super) fn check(file: &File, ram: u64, id: u128) -> Result<(), SnapshotError> {
    if Trailer::read(file, ram)?.id != id {
        return Err(SnapshotError::OtherSnapshot);
    }
    Ok(())
}

/// Reads everything and compares it with the checksum.
pub(super) fn verify(file: &File, ram: u64) -> Result<(), SnapshotError> {
    let trailer = Trailer::read(file, ram)?;
    let mut sum = Sum::default();
    let mut piece = vec![0; PIECE as usize];
    for range in data_of(file, ram)? {
        // Holes may be finer or coarser than pages, depending on the file system.
        let (mut at, end) = (range.start / PAGE_SIZE * PAGE_SIZE, range.end);
        while at < end {
            let len = (end - at).next_multiple_of(PAGE_SIZE).min(PIECE);
            let bytes = &mut piece[..len as usize];
            host::read_exact_at(file, bytes, at)?;
            for (run, bytes) in runs(at, bytes) {
                sum.add(run, bytes);
            }
            at += len;
        }
    }
    if sum.finish() != trailer.crc {
        return Err(SnapshotError::Damaged {
            what: "the checksum of the memory does not match",
        });
    }
    Ok(())
}

/// The checksum over pages.
#[derive(Default)]
struct Sum {
    hasher: crc32fast::Hasher,
    /// Pages before this one have been added.
    next: u64,
}

impl Sum {
    /// Adds the pages of `bytes`, which lie at `at`.
    fn add(&mut self, at: u64, bytes: &[u8]) {
        for (number, page) in (at / PAGE_SIZE..).zip(bytes.chunks(PAGE)) {
            // Two ranges of a file may meet within one page.
            if number >= self.next {
                self.hasher.update(&number.to_le_bytes());
                self.hasher.update(page);
                self.next = number + 1;
            }
        }
    }

    fn finish(self) -> u32 {
        self.hasher.finalize()
    }
}

fn common(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// The runs of pages in `bytes`, which lie at `at`, that are not all zeros.
fn runs(at: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut page = 0;
    let is_zero = |page: usize| {
        bytes[page..(page + PAGE).min(bytes.len())]
            .iter()
            .all(|byte| *byte == 0)
    };
    core::iter::from_fn(move || {
        while page < bytes.len() && is_zero(page) {
            page += PAGE;
        }
        let start = page;
        while page < bytes.len() && !is_zero(page) {
            page += PAGE;
        }
        let run = bytes.get(start..page.min(bytes.len()))?;
        (!run.is_empty()).then_some((at + start as u64, run))
    })
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::{FileExt, MetadataExt},
        sync::Arc,
    };

    use caisson_memory::{RegionKind, host::HugePages};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn memory(mapping: &Arc<Mapping>) -> GuestMemory {
        GuestMemory::new(vec![
            mapping.region("low", Gpa(0), 0, 3 * MIB, RegionKind::Ram),
            mapping.region("high", Gpa(16 * MIB), 3 * MIB, 5 * MIB, RegionKind::Ram),
        ])
        .unwrap()
    }

    fn written() -> (tempfile::TempDir, File, GuestMemory) {
        let mapping = Mapping::new("test", 8 * MIB, HugePages::Off).unwrap();
        let memory = memory(&mapping);
        let view = MemoryView::new(memory.clone());
        view.write(Gpa(0), b"first").unwrap();
        view.write(Gpa(3 * MIB - 2), &[1, 2]).unwrap();
        view.write(Gpa(16 * MIB), &[3, 4]).unwrap();
        // Touched, but zero again.
        view.fill(Gpa(17 * MIB), MIB, 0).unwrap();
        view.write(Gpa(21 * MIB - 1), b"!").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = super::super::create(&folder.path().join("memory")).unwrap();
        write(&file, &mapping, &memory, 7).unwrap();
        (folder, file, memory)
    }

    #[test]
    fn what_was_written_is_what_is_mapped_again_and_zeros_take_no_room() {
        let (_folder, file, before) = written();
        check(&file, 8 * MIB, 7).unwrap();
        verify(&file, 8 * MIB).unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 < MIB);
        let mapping = Mapping::private(file, 8 * MIB).unwrap();
        let (before, after) = (MemoryView::new(before), MemoryView::new(memory(&mapping)));
        for (at, len) in [(0, 3 * MIB), (16 * MIB, 5 * MIB)] {
            let (mut a, mut b) = (vec![0; len as usize], vec![0; len as usize]);
            before.read(Gpa(at), &mut a).unwrap();
            after.read(Gpa(at), &mut b).unwrap();
            assert!(a == b, "at {at:#x}");
        }
    }

    #[test]
    fn memory_saved_again_after_a_restore_has_both_old_and_new_pages() {
        let (folder, file, _) = written();
        let mapping = Mapping::private(file, 8 * MIB).unwrap();
        let memory = memory(&mapping);
        MemoryView::new(memory.clone())
            .write(Gpa(MIB), b"new")
            .unwrap();
        let file = super::super::create(&folder.path().join("again")).unwrap();
        write(&file, &mapping, &memory, 8).unwrap();
        verify(&file, 8 * MIB).unwrap();
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"first");
        file.read_exact_at(&mut bytes, MIB).unwrap();
        assert_eq!(&bytes, b"new\0\0");
    }

    #[test]
    fn other_short_and_damaged_files_are_refused() {
        let (_folder, file, _) = written();
        assert!(matches!(
            check(&file, 8 * MIB, 8),
            Err(SnapshotError::OtherSnapshot)
        ));
        assert!(matches!(
            check(&file, 9 * MIB, 7),
            Err(SnapshotError::Length { .. })
        ));
        file.write_all_at(b"F", 0).unwrap();
        assert!(check(&file, 8 * MIB, 7).is_ok());
        assert!(matches!(
            verify(&file, 8 * MIB),
            Err(SnapshotError::Damaged { .. })
        ));
        for byte in 0..48 {
            let mut old = [0];
            file.read_exact_at(&mut old, 8 * MIB + byte).unwrap();
            file.write_all_at(&[old[0] ^ 4], 8 * MIB + byte).unwrap();
            let error = check(&file, 8 * MIB, 7).unwrap_err();
            assert!(matches!(error, SnapshotError::Damaged { .. }), "{error}");
            file.write_all_at(&old, 8 * MIB + byte).unwrap();
        }
        file.set_len(8 * MIB + 4095).unwrap();
        assert!(matches!(
            check(&file, 8 * MIB, 7),
            Err(SnapshotError::Length { .. })
        ));
    }
}
