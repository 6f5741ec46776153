//! Which guest pages hold translated code, and which vCPUs may write a page
//! without telling.
//!
//! The rule: a page never has a bit in `granules` (code was decoded from it)
//! while some vCPU has a write tag for it in its TLB. Whoever wants the one
//! announces it, then looks for the other; both steps are sequentially
//! consistent, so one of two racing vCPUs sees the other.

use std::sync::atomic::{AtomicU64, Ordering};

use caisson_memory::{Gpa, GuestMemory};

struct Pages {
    first: u64,
    /// A bit per 64 bytes from which code was decoded.
    granules: Box<[AtomicU64]>,
    /// A bit per vCPU that may have a write tag.
    writers: Box<[AtomicU64]>,
}

/// The map for one memory table.
pub(crate) struct CodeMap {
    regions: Vec<Pages>,
}

/// One page's state.
#[derive(Clone, Copy)]
pub(crate) struct PageCode<'a> {
    granules: &'a AtomicU64,
    writers: &'a AtomicU64,
}

fn zeroed(n: usize) -> Box<[AtomicU64]> {
    // Zeroed memory from the allocator is not touched until it is used: a map of
    // many pages costs nothing at start.
    let raw = vec![0u64; n].into_boxed_slice();
    // SAFETY: `AtomicU64` has the layout of `u64`, and the box is unique.
    unsafe { Box::from_raw(Box::into_raw(raw) as *mut [AtomicU64]) }
}

impl CodeMap {
    pub(crate) fn new(memory: &GuestMemory) -> Self {
        let regions = memory
            .regions()
            .iter()
            .map(|r| {
                let n = (r.len() >> 12) as usize;
                Pages {
                    first: r.gpa().page(),
                    granules: zeroed(n),
                    writers: zeroed(n),
                }
            })
            .collect();
        Self { regions }
    }

    /// The state of guest page `page`, if it is memory.
    pub(crate) fn page(&self, page: u64) -> Option<PageCode<'_>> {
        let i = self
            .regions
            .partition_point(|r| r.first <= page)
            .checked_sub(1)?;
        let r = self.regions.get(i)?;
        let at = usize::try_from(page - r.first).ok()?;
        Some(PageCode {
            granules: r.granules.get(at)?,
            writers: r.writers.get(at)?,
        })
    }
}

impl PageCode<'_> {
    /// vCPU `bit` wants a write tag. `false`: the page has code in it.
    pub(crate) fn claim_writer(&self, bit: u64) -> bool {
        self.writers.fetch_or(bit, Ordering::SeqCst);
        if self.granules.load(Ordering::SeqCst) == 0 {
            return true;
        }
        self.writers.fetch_and(!bit, Ordering::SeqCst);
        false
    }

    /// Code is about to be decoded from `granules`. Returns the vCPUs that may
    /// have write tags and must lose them first.
    pub(crate) fn mark(&self, granules: u64) -> u64 {
        // Most blocks are built beside older ones.
        if self.granules.load(Ordering::SeqCst) & granules == granules {
            return 0;
        }
        self.granules.fetch_or(granules, Ordering::SeqCst);
        if self.writers.load(Ordering::SeqCst) == 0 {
            return 0;
        }
        self.writers.swap(0, Ordering::SeqCst)
    }

    /// `len` bytes at `gpa` were stored. `true` if code was there: the page is
    /// then free of code, and everybody's blocks of it must go.
    pub(crate) fn written(&self, gpa: Gpa, len: u64) -> bool {
        std::sync::atomic::fence(Ordering::SeqCst);
        let first = gpa.0 >> 6 & 63;
        let last = (((gpa.0 & 0xfff) + len.max(1) - 1).min(4095)) >> 6;
        let touched = (!0 << first) & (!0 >> (63 - last));
        if self.granules.load(Ordering::SeqCst) & touched == 0 {
            return false;
        }
        self.granules.swap(0, Ordering::SeqCst) != 0
    }
}
