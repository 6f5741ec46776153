//! The memory functions that the compiler calls, which are otherwise in the C library, and memory
//! from the kernel.

use crate::sys;

/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI.
    unsafe {
        core::arch::asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _,
            inout("rcx") len => _, options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: a forward copy does not overwrite what is still to be read.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: the caller vouches for both ranges; a backward copy does not overwrite what is still
    // to be read, and the direction flag is cleared again as the ABI demands.
    unsafe {
        core::arch::asm!("std", "rep movsb", "cld",
            inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _,
            inout("rcx") len => _, options(nostack));
    }
    to
}

/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range; the direction flag is clear by the ABI.
    unsafe {
        core::arch::asm!("rep stosb", inout("rdi") to => _, inout("rcx") len => _,
            in("al") value as u8, options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    let mut at = 0;
    while at < len {
        // SAFETY: the caller vouches for `len` bytes at both.
        let (x, y) = unsafe { (*a.add(at), *b.add(at)) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        at += 1;
    }
    0
}

/// # Safety
/// As C's `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, len) }
}

/// # Safety
/// As C's `strlen`.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let end: *const u8;
    // SAFETY: the caller vouches for a NUL byte to stop at; the direction flag is clear by the ABI.
    // Not a loop, which the compiler could turn into a call of this very function.
    unsafe {
        core::arch::asm!("repne scasb", inout("rdi") text => end, inout("rcx") usize::MAX => _,
            in("al") 0u8, options(nostack, readonly));
    }
    end as usize - text as usize - 1
}

/// Zeroed memory that lasts as long as the program; empty if the kernel has none to give.
pub fn allocate(len: usize) -> &'static mut [u8] {
    match sys::map_anonymous(len) {
        // SAFETY: the kernel gave a fresh, zeroed, writable mapping of `len` bytes that nobody
        // else knows of and that is never unmapped.
        Ok(address) => unsafe { core::slice::from_raw_parts_mut(address as *mut u8, len) },
        Err(_) => &mut [],
    }
}
