//! The software TLB: three direct-mapped arrays, one per kind of privilege.
//!
//! An entry's tag is the linear page address itself, so `address ^ tag` is the
//! page offset on a hit and at least 4096 on a miss: one comparison covers tag,
//! page crossing and canonical form. An empty slot holds an address that can
//! never index it, so no address that a guest can make up matches it.

use alloc::{boxed::Box, vec, vec::Vec};

/// log2 of the number of entries in one array.
pub const TLB_BITS: u32 = 12;
/// Entries in one array.
pub const TLB_SIZE: usize = 1 << TLB_BITS;

/// One slot. `tag_r`, `tag_w` and `host` are read by hot code at fixed offsets.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct TlbEntry {
    /// Linear page that may be read, or an impossible one.
    pub tag_r: u64,
    /// Linear page that may be written directly.
    pub tag_w: u64,
    /// Host address of the page's first byte.
    pub host: *mut u8,
    /// Guest physical page address, with flag bits of [`meta`] below bit 12.
    pub meta: u64,
}

/// Flag bits in [`TlbEntry::meta`].
pub mod meta {
    /// The translation is global (survives a CR3 load).
    pub const GLOBAL: u64 = 1;
    /// The translation belongs to a user page.
    pub const USER: u64 = 2;
    /// The translation is a piece of a page larger than 4 KiB, which INVLPG
    /// anywhere in that page must drop.
    pub const LARGE: u64 = 4;
}

/// A tag that no address indexing slot `slot` can equal.
const fn poison(slot: usize) -> u64 {
    ((!slot as u64) & (TLB_SIZE as u64 - 1)) << 12
}

const fn empty(slot: usize) -> TlbEntry {
    TlbEntry {
        tag_r: poison(slot),
        tag_w: poison(slot),
        host: core::ptr::null_mut(),
        meta: 0,
    }
}

/// The slot that `address` indexes.
#[inline(always)]
pub const fn slot(address: u64) -> usize {
    (address >> 12) as usize & (TLB_SIZE - 1)
}

/// The bit of [`Tlb::large`] for the GiB of `address`.
const fn gib(address: u64) -> u64 {
    1 << (address >> 30 & 63)
}

/// All arrays of one vCPU, with the log of filled slots that makes flushes
/// cost what was filled.
pub struct Tlb {
    entries: Box<[TlbEntry]>,
    log: [Vec<u16>; Tlb::ARRAYS],
    /// Where pieces of large pages may be present: a bit for each GiB, modulo 64.
    large: u64,
    /// By guest physical page, modulo its length: the only entry that may have a
    /// write tag for such a page, [`NOBODY`] or [`SEVERAL`].
    writers: Box<[u16; WRITERS]>,
}

const WRITERS: usize = 4096;
const NOBODY: u16 = u16::MAX;
const SEVERAL: u16 = u16::MAX - 1;
const _: () = assert!(Tlb::ARRAYS * TLB_SIZE <= SEVERAL as usize);

/// Where [`Tlb::writers`] has guest physical page `page`.
fn writer_slot(page: u64) -> usize {
    page as usize & (WRITERS - 1)
}

/// Entry `i` gets a write tag for guest physical page `page`.
fn note_writer(writers: &mut [u16; WRITERS], page: u64, i: usize) {
    let writer = &mut writers[writer_slot(page)];
    if *writer != i as u16 {
        *writer = if *writer == NOBODY { i as u16 } else { SEVERAL };
    }
}

impl Tlb {
    /// Array for CPL 0 to 2 with EFLAGS.AC clear, and for implicit accesses.
    pub const KERNEL: usize = 0;
    /// Array for CPL 3.
    pub const USER: usize = 1;
    /// Array for CPL 0 to 2 with EFLAGS.AC set under SMAP.
    pub const KERNEL_AC: usize = 2;
    /// Number of arrays.
    pub const ARRAYS: usize = 3;

    /// Empty arrays.
    pub fn new() -> Self {
        let entries = (0..Self::ARRAYS * TLB_SIZE)
            .map(|i| empty(i & (TLB_SIZE - 1)))
            .collect();
        Self {
            entries,
            log: core::array::from_fn(|_| vec![]),
            large: 0,
            writers: Box::new([NOBODY; WRITERS]),
        }
    }

    /// Address of array `index`'s first entry.
    pub fn array(&mut self, index: usize) -> *mut TlbEntry {
        self.entries[index * TLB_SIZE..][..TLB_SIZE].as_mut_ptr()
    }

    /// The entry of array `index` that `address` would use.
    pub fn entry(&mut self, index: usize, address: u64) -> &mut TlbEntry {
        &mut self.entries[index * TLB_SIZE + slot(address)]
    }

    /// Puts a translation into array `index`. `write` gives it a write tag too.
    pub fn fill(
        &mut self,
        index: usize,
        address: u64,
        gpa: u64,
        host: *mut u8,
        write: bool,
        flags: u64,
    ) {
        let s = slot(address);
        let e = &mut self.entries[index * TLB_SIZE + s];
        if e.host.is_null() {
            self.log[index].push(s as u16);
        }
        if flags & meta::LARGE != 0 {
            self.large |= gib(address);
        }
        if write {
            note_writer(&mut self.writers, gpa >> 12, index * TLB_SIZE + s);
        }
        let tag = address & !0xfff;
        *e = TlbEntry {
            tag_r: tag,
            tag_w: if write { tag } else { poison(s) },
            host,
            meta: gpa & !0xfff | flags,
        };
    }

    /// Forgets everything; with `keep_global`, all but global translations.
    pub fn flush(&mut self, keep_global: bool) {
        if !keep_global {
            self.large = 0;
        }
        self.writers.fill(NOBODY);
        for index in 0..Self::ARRAYS {
            let entries = &mut self.entries[index * TLB_SIZE..][..TLB_SIZE];
            self.log[index].retain(|&s| {
                let e = &mut entries[s as usize];
                if keep_global && e.meta & meta::GLOBAL != 0 {
                    if e.tag_w == e.tag_r {
                        note_writer(
                            &mut self.writers,
                            e.meta >> 12,
                            index * TLB_SIZE + s as usize,
                        );
                    }
                    return true;
                }
                *e = empty(s as usize);
                false
            });
        }
    }

    /// Forgets the translation of `address` in every array. Of large pages, all
    /// pieces in the same GiB go.
    pub fn flush_page(&mut self, address: u64) {
        if self.large & gib(address) != 0 {
            self.flush_large(address);
        }
        let s = slot(address);
        for index in 0..Self::ARRAYS {
            let e = &mut self.entries[index * TLB_SIZE + s];
            if e.tag_r == address & !0xfff {
                // The slot stays in the log: it is empty, which a flush tolerates,
                // and `host` non-null keeps it from being logged twice.
                e.tag_r = poison(s);
                e.tag_w = poison(s);
            }
        }
    }

    fn flush_large(&mut self, address: u64) {
        for index in 0..Self::ARRAYS {
            let entries = &mut self.entries[index * TLB_SIZE..][..TLB_SIZE];
            for &s in &self.log[index] {
                let e = &mut entries[s as usize];
                if e.meta & meta::LARGE != 0 && (e.tag_r ^ address) >> 30 == 0 {
                    e.tag_r = poison(s as usize);
                    e.tag_w = poison(s as usize);
                }
            }
        }
    }

    /// Takes back the write tags of guest physical page `page`. `true` if there
    /// was one.
    pub fn drop_write_tags(&mut self, page: u64) -> bool {
        match self.writers[writer_slot(page)] {
            NOBODY => false,
            SEVERAL => {
                let mut found = false;
                for index in 0..Self::ARRAYS {
                    for i in 0..self.log[index].len() {
                        let s = usize::from(self.log[index][i]);
                        found |= self.drop_write_tag(index * TLB_SIZE + s, page);
                    }
                }
                found
            }
            only => self.drop_write_tag(only.into(), page),
        }
    }

    /// Takes back the write tag of entry `i` if it is for `page`.
    fn drop_write_tag(&mut self, i: usize, page: u64) -> bool {
        let e = &mut self.entries[i];
        let drop = e.meta >> 12 == page && e.tag_w == e.tag_r;
        if drop {
            e.tag_w = poison(i & (TLB_SIZE - 1));
        }
        drop
    }
}

impl Default for Tlb {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_address_matches_an_empty_slot() {
        let mut t = Tlb::new();
        for a in [
            0,
            0xfff,
            0x1000,
            !0,
            1 << 47,
            0xffff_8000_0000_0000,
            1 << 62,
            0x00ff_f000,
        ] {
            let e = t.entry(Tlb::KERNEL, a);
            assert!(a ^ e.tag_r >= 4096 && a ^ e.tag_w >= 4096, "{a:#x}");
        }
    }

    #[test]
    fn flushes_keep_what_they_should() {
        let mut t = Tlb::new();
        let host = 0x1000 as *mut u8;
        t.fill(Tlb::USER, 0x5000, 0x9000, host, true, 0);
        t.fill(Tlb::KERNEL, 0x6000, 0xa000, host, true, meta::GLOBAL);
        assert!(t.drop_write_tags(9) && !t.drop_write_tags(9));
        t.flush(true);
        assert_ne!(t.entry(Tlb::USER, 0x5000).tag_r, 0x5000);
        assert_eq!(t.entry(Tlb::KERNEL, 0x6000).tag_r, 0x6000);
        t.flush_page(0x6123);
        assert_ne!(t.entry(Tlb::KERNEL, 0x6000).tag_r, 0x6000);
        t.fill(Tlb::KERNEL, 0x6000, 0xa000, host, true, 0);
        t.fill(Tlb::USER, 0x7000, 0xb000, host, true, meta::LARGE);
        t.flush_page(0x1f_0000);
        assert_eq!(t.entry(Tlb::KERNEL, 0x6000).tag_r, 0x6000);
        assert_ne!(t.entry(Tlb::USER, 0x7000).tag_r, 0x7000);
        t.flush(false);
        assert_ne!(t.entry(Tlb::KERNEL, 0x6000).tag_r, 0x6000);
    }
}
