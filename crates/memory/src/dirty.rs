//! One bit per 4 KiB page, set by whoever writes guest memory.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

/// Which pages of a region were written since the last harvest.
///
/// Writers (vCPUs and devices) set bits without a lock; the harvester swaps
/// whole words, so a bit set during a harvest is seen by it or by the next.
#[derive(Debug)]
pub struct DirtyBitmap {
    words: Vec<AtomicU64>,
    pages: u64,
}

impl DirtyBitmap {
    /// A clean bitmap for `pages` pages.
    pub fn new(pages: u64) -> Self {
        let words = pages.div_ceil(64) as usize;
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            pages,
        }
    }

    /// Marks the pages that `len` bytes from byte offset `offset` touch.
    /// Bytes outside the region are ignored.
    pub fn mark(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = offset >> 12;
        let last = (offset.saturating_add(len - 1) >> 12).min(self.pages.saturating_sub(1));
        for page in first..=last {
            if let Some(word) = self.words.get((page / 64) as usize) {
                let bit = 1 << (page % 64);
                // Most writes hit pages that are dirty already; a plain load keeps
                // the cache line shared.
                if word.load(Ordering::Relaxed) & bit == 0 {
                    word.fetch_or(bit, Ordering::AcqRel);
                }
            }
        }
    }

    /// Whether page number `page` (relative to the region) is dirty.
    pub fn is_dirty(&self, page: u64) -> bool {
        self.words
            .get((page / 64) as usize)
            .is_some_and(|w| w.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
    }

    /// Takes the bits and leaves the bitmap clean. Bit `n % 64` of word
    /// `n / 64` stands for page `n`.
    pub fn harvest(&self) -> Vec<u64> {
        self.words
            .iter()
            .map(|w| w.swap(0, Ordering::AcqRel))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_every_touched_page_and_harvest_clears() {
        let d = DirtyBitmap::new(130);
        d.mark(4095, 2);
        d.mark(129 << 12, 1 << 40);
        d.mark(500 << 12, 8);
        assert!(d.is_dirty(0) && d.is_dirty(1) && !d.is_dirty(2) && d.is_dirty(129));
        assert_eq!(d.harvest(), alloc::vec![3, 0, 2]);
        assert!(!d.is_dirty(0));
    }
}
