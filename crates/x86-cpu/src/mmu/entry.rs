//! Reading and updating one paging-structure entry in guest memory.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::state::Cpu;

/// Bits of paging-structure entries, the same in all formats.
pub(super) mod bit {
    pub(in crate::mmu) const P: u64 = 1;
    pub(in crate::mmu) const RW: u64 = 1 << 1;
    pub(in crate::mmu) const US: u64 = 1 << 2;
    pub(in crate::mmu) const A: u64 = 1 << 5;
    pub(in crate::mmu) const D: u64 = 1 << 6;
    pub(in crate::mmu) const PS: u64 = 1 << 7;
    pub(in crate::mmu) const G: u64 = 1 << 8;
    pub(in crate::mmu) const XD: u64 = 1 << 63;
}

/// Where an entry is.
pub(super) struct Slot {
    host: *mut u8,
    gpa: u64,
    /// 8 bytes rather than 4.
    wide: bool,
    writable: bool,
}

impl Slot {
    /// The naturally aligned entry at `gpa`.
    pub(super) fn find(cpu: &mut Cpu, gpa: u64, wide: bool) -> Self {
        match cpu.env().host_page(gpa >> 12) {
            Some(page) => Self {
                // SAFETY: a host page is 4096 bytes, and an aligned entry is inside it.
                host: unsafe { page.host.add((gpa & 0xfff) as usize) },
                gpa,
                wide,
                writable: page.writable,
            },
            None => Self {
                host: core::ptr::null_mut(),
                gpa,
                wide,
                writable: false,
            },
        }
    }

    /// The entry's value; all-ones where there is no memory.
    pub(super) fn load(&self) -> u64 {
        if self.host.is_null() {
            return if self.wide { !0 } else { 0xffff_ffff };
        }
        // SAFETY: `host` is naturally aligned guest memory that stays mapped
        // while the vCPU runs, and is only accessed atomically here; the guest's
        // own accesses are single host instructions.
        unsafe {
            if self.wide {
                AtomicU64::from_ptr(self.host.cast()).load(Ordering::Acquire)
            } else {
                u64::from(AtomicU32::from_ptr(self.host.cast()).load(Ordering::Acquire))
            }
        }
    }

    /// Sets `bits` in an entry that was read as `old`. `None` if the entry has
    /// changed since: the walk must start again.
    pub(super) fn set(&self, cpu: &mut Cpu, old: u64, bits: u64) -> Option<u64> {
        if old & bits == bits || !self.writable {
            return Some(old);
        }
        let new = old | bits;
        // SAFETY: as in `load`.
        let done = unsafe {
            if self.wide {
                AtomicU64::from_ptr(self.host.cast())
                    .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
            } else {
                AtomicU32::from_ptr(self.host.cast())
                    .compare_exchange(old as u32, new as u32, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
            }
        };
        if !done {
            return None;
        }
        // The page may hold translated code, or be watched for other reasons.
        let len = if self.wide { 8 } else { 4 };
        if cpu.env().code_written(self.gpa, len) {
            cpu.break_block = true;
        }
        Some(new)
    }
}
