//! The jump cache of translated code: from RIP to code, for branches whose
//! target is not known or lies in another page.
//!
//! An entry holds as long as the stamp under which it was made: translations,
//! code and mode are the same.

use alloc::{boxed::Box, vec};
use core::mem::offset_of;

use crate::state::Cpu;

/// log2 of the number of entries.
pub(super) const BITS: u32 = 14;
/// log2 of an entry's size.
pub(super) const ENTRY_BITS: u8 = 5;

/// An entry.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(super) struct Entry {
    rip: u64,
    stamp: u64,
    code: *const u8,
}

const _: () = assert!(size_of::<Entry>() == 1 << ENTRY_BITS);

/// Where an entry has what.
pub(super) mod entry {
    use super::{Entry, offset_of};

    pub(crate) const RIP: i32 = offset_of!(Entry, rip) as i32;
    pub(crate) const STAMP: i32 = offset_of!(Entry, stamp) as i32;
    pub(crate) const CODE: i32 = offset_of!(Entry, code) as i32;
}

/// No stamp is this one.
const NEVER: u64 = u64::MAX;

/// The jump cache.
#[derive(Debug)]
pub(super) struct Jumps(Box<[Entry]>);

impl Jumps {
    pub(super) fn new() -> Self {
        let empty = Entry {
            rip: 0,
            stamp: NEVER,
            code: core::ptr::null(),
        };
        Self(vec![empty; 1 << BITS].into())
    }

    pub(super) fn clear(&mut self) {
        for e in &mut *self.0 {
            e.stamp = NEVER;
        }
    }

    pub(super) fn address(&self) -> *const Entry {
        self.0.as_ptr()
    }

    /// `code` is what to run at `rip` under `stamp`.
    pub(super) fn set(&mut self, rip: u64, stamp: u64, code: *const u8) {
        let slot = (rip ^ rip >> 12) as usize & ((1 << BITS) - 1);
        self.0[slot] = Entry { rip, stamp, code };
    }
}

/// What must be unchanged for a RIP to mean the same code.
pub(super) fn stamp(cpu: &Cpu) -> u64 {
    const MODE_BITS: u32 = 20;
    const _: () = assert!(crate::state::mode::FLAT < 1 << MODE_BITS);
    cpu.generation() << MODE_BITS | u64::from(cpu.mode)
}
