//! The only place where guest bytes are moved.
//!
//! The guest changes its memory while we read it. Copies therefore go through
//! `rep movsb`, which the compiler can neither split from nor merge with other
//! accesses; on other hosts through volatile byte copies.

use core::sync::atomic::{AtomicU16, Ordering};

/// Copies `n` bytes between guest memory and a Rust buffer, either way.
///
/// # Safety
/// Both ranges must be mapped for `n` bytes and not overlap.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, n: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller vouches for both ranges; DF is clear by the ABI.
    unsafe {
        core::arch::asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..n {
        // SAFETY: the caller vouches for both ranges.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) }
    }
}

/// Sets `n` bytes of guest memory.
///
/// # Safety
/// The range must be mapped for `n` bytes.
pub(crate) unsafe fn fill(to: *mut u8, byte: u8, n: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller vouches for the range; DF is clear by the ABI.
    unsafe {
        core::arch::asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") byte,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..n {
        // SAFETY: the caller vouches for the range.
        unsafe { to.add(i).write_volatile(byte) }
    }
}

/// # Safety
/// `p` must be mapped and aligned.
pub(crate) unsafe fn load_u16(p: *mut u16, order: Ordering) -> u16 {
    // SAFETY: mapped and aligned by contract; guest memory has no Rust references into it.
    unsafe { AtomicU16::from_ptr(p) }.load(order)
}

/// # Safety
/// `p` must be mapped and aligned.
pub(crate) unsafe fn store_u16(p: *mut u16, v: u16, order: Ordering) {
    // SAFETY: mapped and aligned by contract; guest memory has no Rust references into it.
    unsafe { AtomicU16::from_ptr(p) }.store(v, order);
}
