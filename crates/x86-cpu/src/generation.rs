//! How long it holds that a linear address leads to certain code.
//!
//! Whoever finds code through a linear address remembers the generation; as long
//! as it lasts, the address need not be translated again. CPL 3 and the rest
//! have generations of their own, so that a CR3 load, which keeps global
//! translations (Intel SDM Vol. 3 §5.10.4.1), ends only that of user code where
//! the kernel's code is global; and an invalidation of a page ends those in
//! which code of that page was looked up.

use alloc::{boxed::Box, vec};

/// log2 of the number of bits in a filter.
const BITS: u32 = 12;
/// Pages larger than 4 KiB are noted by GiB: INVLPG anywhere in one drops it all.
const LARGE_SHIFT: u32 = 30;

/// A generation, and what was looked up in it.
#[derive(Debug)]
struct Generation {
    number: u64,
    /// A bit for each page that code was looked up in, by hash.
    pages: Box<[u64]>,
    /// A translation that was not global.
    local: bool,
    /// A piece of a large page.
    large: bool,
}

impl Generation {
    fn new() -> Self {
        Self {
            number: 0,
            pages: vec![0; 1 << (BITS - 6)].into(),
            local: false,
            large: false,
        }
    }

    fn end(&mut self) {
        self.number += 1;
        self.pages.fill(0);
        self.local = false;
        self.large = false;
    }

    fn note(&mut self, address: u64, large: bool, global: bool) {
        let shift = if large { LARGE_SHIFT } else { 12 };
        let (word, bit) = place(address, shift);
        self.pages[word] |= bit;
        self.large |= large;
        self.local |= !global;
    }

    fn holds(&self, address: u64) -> bool {
        let noted = |shift| {
            let (word, bit) = place(address, shift);
            self.pages[word] & bit != 0
        };
        noted(12) || self.large && noted(LARGE_SHIFT)
    }
}

/// Where a filter has the page of `address`.
fn place(address: u64, shift: u32) -> (usize, u64) {
    let hash = (address >> shift).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS);
    ((hash >> 6) as usize, 1 << (hash & 63))
}

/// The generations of one vCPU.
#[derive(Debug)]
pub struct Generations {
    kernel: Generation,
    user: Generation,
}

impl Generations {
    pub(crate) fn new() -> Self {
        Self {
            kernel: Generation::new(),
            user: Generation::new(),
        }
    }

    /// The number of the generation that `user` code is in.
    #[inline]
    pub(crate) fn number(&self, user: bool) -> u64 {
        if user {
            self.user.number
        } else {
            self.kernel.number
        }
    }

    /// Code at `address` was looked up.
    pub(crate) fn note(&mut self, user: bool, address: u64, large: bool, global: bool) {
        let generation = if user {
            &mut self.user
        } else {
            &mut self.kernel
        };
        generation.note(address, large, global);
    }

    /// Everything may be different: translations, or code.
    pub(crate) fn end(&mut self) {
        self.kernel.end();
        self.user.end();
    }

    /// Translations that are not global may be different.
    pub(crate) fn end_local(&mut self) {
        for generation in [&mut self.kernel, &mut self.user] {
            if generation.local {
                generation.end();
            }
        }
    }

    /// The translation of `address` may be different.
    pub(crate) fn end_page(&mut self, address: u64) {
        for generation in [&mut self.kernel, &mut self.user] {
            if generation.holds(address) {
                generation.end();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_end_with_what_they_rest_on() {
        let mut g = Generations::new();
        let numbers = |g: &Generations| (g.number(false), g.number(true));
        g.note(false, 0xffff_ffff_8100_0000, true, true);
        g.note(true, 0x40_1000, false, false);
        g.end_local();
        assert_eq!(numbers(&g), (0, 1));
        g.note(true, 0x40_1000, false, false);
        // Another page, the same one, and another piece of the kernel's.
        g.end_page(0x7fff_0000_0000);
        assert_eq!(numbers(&g), (0, 1));
        g.end_page(0x40_1fff);
        assert_eq!(numbers(&g), (0, 2));
        g.end_page(0xffff_ffff_8134_5678);
        assert_eq!(numbers(&g), (1, 2));
        g.end();
        assert_eq!(numbers(&g), (2, 3));
        // A kernel without global pages.
        g.note(false, 0x1000, false, false);
        g.end_local();
        assert_eq!(numbers(&g), (3, 3));
    }
}
