//! Host memory for transfers that take their time.

use alloc::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    sync::Arc,
    vec,
    vec::Vec,
};
use core::ptr::NonNull;

use crate::{Gpa, GuestMemory, access};

/// What own memory is aligned to: enough for direct I/O on any disk.
const ALIGN: usize = 4096;

/// A scatter list of host memory that stays mapped, and where it is, for as long as it is held: guest memory
/// ([`MemoryView::pin`](crate::MemoryView::pin)) or memory of its own ([`Pinned::zeroed`]). It is what an operation of
/// the host's kernel reads from or writes to while the guest goes on.
///
/// Bytes are only ever copied in and out, so that nobody minds who else changes them. To clone it copies the list, not
/// the memory.
#[derive(Clone, Default)]
pub struct Pinned {
    pieces: Vec<Piece>,
    len: usize,
}

#[derive(Clone)]
struct Piece {
    host: NonNull<u8>,
    len: usize,
    keep: Keep,
}

/// What keeps a piece mapped.
#[derive(Clone)]
enum Keep {
    Guest(GuestMemory, Gpa),
    Own { _memory: Arc<Allocation> },
}

// SAFETY: `host` points to memory that `keep` keeps mapped; all access to it goes through `access` or the kernel.
unsafe impl Send for Piece {}
// SAFETY: as above; concurrent access is by copies that no reference is made for.
unsafe impl Sync for Piece {}

struct Allocation {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an address range; the bytes are the business of `Piece`.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated in `Pinned::zeroed` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

impl Pinned {
    /// `len` zero bytes of its own, aligned to 4096.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self::default();
        }
        let layout = match Layout::from_size_align(len, ALIGN) {
            Ok(layout) => layout,
            Err(_) => handle_alloc_error(Layout::new::<[u8; ALIGN]>()),
        };
        // SAFETY: the layout's size is not 0.
        let Some(base) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        let keep = Keep::Own {
            _memory: Arc::new(Allocation { base, layout }),
        };
        let host = base;
        Self {
            pieces: vec![Piece { host, len, keep }],
            len,
        }
    }

    /// A copy of `bytes`, aligned to 4096.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let own = Self::zeroed(bytes.len());
        own.write(0, bytes);
        own
    }

    /// Appends a run of guest memory.
    ///
    /// # Safety
    /// `memory` must keep `len` bytes at `host` mapped, and they must be the ones at `gpa`.
    pub(crate) unsafe fn push_guest(
        &mut self,
        memory: &GuestMemory,
        gpa: Gpa,
        host: NonNull<u8>,
        len: usize,
    ) {
        let keep = Keep::Guest(memory.clone(), gpa);
        self.pieces.push(Piece { host, len, keep });
        self.len += len;
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address and length of each run, in order: what an iovec is made of. The memory may be read and written by the
    /// kernel for as long as `self` or a clone of it lives; then [`Pinned::note_written`] is due.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = (NonNull<u8>, usize)> + '_ {
        self.pieces.iter().map(|piece| (piece.host, piece.len))
    }

    /// Whether every run begins at a multiple of `align` bytes and is made of whole units of that length.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.runs().all(|(host, len)| {
            host.as_ptr().addr().is_multiple_of(align) && len.is_multiple_of(align)
        })
    }

    /// The `len` bytes from byte `start` on, of the same memory.
    ///
    /// # Panics
    /// When they are not all in it: a fault of the caller's arithmetic, never of the guest's.
    #[must_use]
    pub fn slice(&self, start: usize, len: usize) -> Self {
        let mut sliced = Self::default();
        self.each(start, len, |piece, host, n, _, skipped| {
            let keep = match &piece.keep {
                Keep::Guest(memory, gpa) => {
                    Keep::Guest(memory.clone(), Gpa(gpa.0 + skipped as u64))
                }
                own @ Keep::Own { .. } => own.clone(),
            };
            sliced.pieces.push(Piece { host, len: n, keep });
        });
        sliced.len = len;
        sliced
    }

    /// `self` and then `other`, as one list.
    #[must_use]
    pub fn followed_by(mut self, other: Self) -> Self {
        self.len += other.len;
        self.pieces.extend(other.pieces);
        self
    }

    /// Copies the bytes from byte `at` on into `to`.
    ///
    /// # Panics
    /// As [`Pinned::slice`].
    pub fn read(&self, at: usize, to: &mut [u8]) {
        let len = to.len();
        let out = to.as_mut_ptr();
        self.each(at, len, |_, host, n, done, _| {
            // SAFETY: `host` has `n` bytes in its piece, `to` has `n` from `done` on, and no Rust object is in pinned
            // memory.
            unsafe { access::copy(out.add(done), host.as_ptr(), n) }
        });
    }

    /// Copies `from` to byte `at`.
    ///
    /// # Panics
    /// As [`Pinned::slice`].
    pub fn write(&self, at: usize, from: &[u8]) {
        let bytes = from.as_ptr();
        self.each(at, from.len(), |_, host, n, done, _| {
            // SAFETY: as in `read`, with the directions swapped.
            unsafe { access::copy(host.as_ptr(), bytes.add(done), n) }
        });
        self.note_written(at, from.len());
    }

    /// Sets `len` bytes from byte `at` on to `byte`.
    ///
    /// # Panics
    /// As [`Pinned::slice`].
    pub fn fill(&self, at: usize, len: usize, byte: u8) {
        self.each(at, len, |_, host, n, _, _| {
            // SAFETY: `host` has `n` bytes in its piece.
            unsafe { access::fill(host.as_ptr(), byte, n) }
        });
        self.note_written(at, len);
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }

    /// The kernel wrote `len` bytes from byte `at` on: notes dirty pages and tells who watches, as writes through a
    /// view do.
    ///
    /// # Panics
    /// As [`Pinned::slice`].
    pub fn note_written(&self, at: usize, len: usize) {
        self.each(at, len, |piece, _, n, _, skipped| {
            if let Keep::Guest(memory, gpa) = &piece.keep {
                let gpa = Gpa(gpa.0 + skipped as u64);
                if let Some(region) = memory.find(gpa)
                    && let Some(dirty) = region.dirty()
                {
                    dirty.mark(gpa.0 - region.gpa().0, n as u64);
                }
                memory.tell_written(gpa, n as u64);
            }
        });
    }

    /// Calls `f` with each piece that has some of `len` bytes from `start` on: the piece, the address and number of
    /// those bytes, how many came before them, and how many of the piece's are skipped.
    fn each(
        &self,
        start: usize,
        len: usize,
        mut f: impl FnMut(&Piece, NonNull<u8>, usize, usize, usize),
    ) {
        let inside = start.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "{start}+{len} of {} pinned bytes", self.len);
        let (mut skip, mut done) = (start, 0);
        for piece in &self.pieces {
            if done == len {
                return;
            }
            if skip >= piece.len {
                skip -= piece.len;
                continue;
            }
            let n = (piece.len - skip).min(len - done);
            // SAFETY: `skip` is less than the piece's length.
            let host = unsafe { piece.host.add(skip) };
            f(piece, host, n, done, skip);
            done += n;
            skip = 0;
        }
    }
}

impl core::fmt::Debug for Pinned {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} bytes in {} runs", self.len, self.pieces.len())
    }
}

#[cfg(all(test, feature = "host"))]
mod tests {
    use super::*;
    use crate::{
        DirtyBitmap, MemoryError, MemoryView, Perms, RegionKind,
        host::{HugePages, Mapping},
    };

    fn view() -> (MemoryView, Arc<DirtyBitmap>) {
        let mapping = Mapping::new("test", 0x4000, HugePages::Off).unwrap();
        let dirty = Arc::new(DirtyBitmap::new(2));
        let ram = mapping.region("ram", Gpa(0x1000), 0, 0x2000, RegionKind::Ram);
        let more = mapping.region("more", Gpa(0x3000), 0x2000, 0x1000, RegionKind::Ram);
        let rom = mapping.region("rom", Gpa(0x8000), 0x3000, 0x1000, RegionKind::Rom);
        let memory = GuestMemory::new(vec![ram.with_dirty(dirty.clone()), more, rom]).unwrap();
        (MemoryView::new(memory), dirty)
    }

    #[test]
    fn guest_memory_is_reached_in_the_list_s_order_across_regions() {
        let (view, dirty) = view();
        let ranges = [(Gpa(0x2fff), 2), (Gpa(0x1000), 3)];
        let pinned = view.pin(ranges, Perms::WRITE).unwrap();
        assert_eq!((pinned.len(), pinned.runs().len()), (5, 3));
        assert_eq!(dirty.harvest(), [0]);
        pinned.write(0, &[1, 2, 3, 4, 5]);
        let mut found = [0; 2];
        view.read(Gpa(0x2fff), &mut found).unwrap();
        assert_eq!(found, [1, 2]);
        assert_eq!(dirty.harvest(), [0b11]);
        assert_eq!(pinned.slice(1, 3).to_vec(), [2, 3, 4]);
        pinned.slice(2, 2).note_written(0, 1);
        assert_eq!(dirty.harvest(), [0b01]);
        pinned.slice(1, 4).fill(1, 2, 9);
        assert_eq!(pinned.to_vec(), [1, 2, 9, 9, 5]);
    }

    #[test]
    fn what_may_not_be_written_is_not_pinned_for_writing() {
        let (view, _) = view();
        let rom = [(Gpa(0x8000), 8)];
        assert!(view.pin(rom, Perms::READ).is_ok());
        let denied = view.pin(rom, Perms::WRITE).unwrap_err();
        assert!(matches!(denied, MemoryError::Denied { .. }));
        for nowhere in [(Gpa(0x3fff), 2), (Gpa(u64::MAX), 2), (Gpa(0), u64::MAX)] {
            let unmapped = view.pin([nowhere], Perms::READ).unwrap_err();
            assert!(matches!(unmapped, MemoryError::Unmapped { .. }));
        }
    }

    #[test]
    fn own_memory_is_aligned_and_shared_by_its_slices() {
        let own = Pinned::zeroed(8192);
        assert!(own.is_aligned(4096) && own.slice(4096, 4096).is_aligned(4096));
        assert!(!own.slice(512, 4096).is_aligned(4096) && own.slice(512, 512).is_aligned(512));
        let joined = own.slice(8190, 2).followed_by(Pinned::copy_of(b"ab"));
        joined.write(1, b"xy");
        assert_eq!(joined.to_vec(), b"\0xyb");
        assert_eq!(own.slice(8191, 1).to_vec(), b"x");
        assert!(Pinned::zeroed(0).is_empty());
    }
}
