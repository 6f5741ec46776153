//! The inline TLB probe and single-copy-atomic loads and stores.

use core::arch::asm;

use crate::{state::Cpu, tlb};

/// The host address of `size` readable bytes at `address`, on a TLB hit.
///
/// # Safety
/// `cpu` must be live, with `tlb` pointing at one of its arrays.
#[inline(always)]
pub unsafe fn probe_read(cpu: *mut Cpu, address: u64, size: u64) -> Option<*mut u8> {
    // SAFETY: the slot is in bounds by construction; the caller vouches for `cpu`.
    unsafe {
        let e = (*cpu).tlb.add(tlb::slot(address));
        let offset = address ^ (*e).tag_r;
        if offset <= 4096 - size {
            Some((*e).host.add(offset as usize))
        } else {
            None
        }
    }
}

/// The host address of `size` writable bytes at `address`, on a TLB hit.
///
/// # Safety
/// As [`probe_read`].
#[inline(always)]
pub unsafe fn probe_write(cpu: *mut Cpu, address: u64, size: u64) -> Option<*mut u8> {
    // SAFETY: as in `probe_read`.
    unsafe {
        let e = (*cpu).tlb.add(tlb::slot(address));
        let offset = address ^ (*e).tag_w;
        if offset <= 4096 - size {
            Some((*e).host.add(offset as usize))
        } else {
            None
        }
    }
}

/// An integer that is loaded and stored by one host instruction, so that a
/// guest access is as atomic as the host's of the same size and alignment.
pub trait Word: Copy {
    /// Size in bytes.
    const SIZE: u64;
    /// Loads from guest memory.
    ///
    /// # Safety
    /// `p` must be mapped for `SIZE` bytes.
    unsafe fn load(p: *const u8) -> Self;
    /// Stores to guest memory.
    ///
    /// # Safety
    /// `p` must be mapped for `SIZE` bytes.
    unsafe fn store(p: *mut u8, v: Self);
    /// Zero-extends.
    fn wide(self) -> u64;
    /// Truncates.
    fn narrow(v: u64) -> Self;
}

macro_rules! word {
    ($t:ty, $class:ident, $ptr:literal, $load:literal, $modifier:literal) => {
        impl Word for $t {
            const SIZE: u64 = size_of::<$t>() as u64;
            #[inline(always)]
            unsafe fn load(p: *const u8) -> Self {
                let v: $t;
                // SAFETY: the caller vouches for the address.
                unsafe {
                    asm!(concat!("mov {v", $modifier, "}, ", $ptr, " ptr [{p}]"), v = out($class) v, p = in(reg) p,
                        options(nostack, preserves_flags, readonly));
                }
                v
            }
            #[inline(always)]
            unsafe fn store(p: *mut u8, v: Self) {
                // SAFETY: the caller vouches for the address.
                unsafe {
                    asm!(concat!("mov ", $ptr, " ptr [{p}], {v", $modifier, "}"), v = in($class) v, p = in(reg) p,
                        options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            fn wide(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn narrow(v: u64) -> Self {
                v as $t
            }
        }
    };
}
word!(u8, reg_byte, "byte", "mov", "");
word!(u16, reg, "word", "mov", ":x");
word!(u32, reg, "dword", "mov", ":e");
word!(u64, reg, "qword", "mov", ":r");
