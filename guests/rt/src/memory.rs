//! The memory routines that compiled code calls, and volatile access.
//!
//! `core` for a hosted target expects a C library to bring these.

use core::arch::{asm, global_asm};

// The precompiled `core` names the unwinder's personality in frame data that the
// linker script discards; nothing ever calls it.
global_asm!(
    ".text",
    ".global rust_eh_personality",
    "rust_eh_personality: ud2"
);

/// Copies `n` bytes forwards.
///
/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(dst: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller promises both ranges; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") n => _, inout("rdi") dst => _, inout("rsi") src => _,
            options(nostack, preserves_flags));
    }
    dst
}

/// Copies `n` bytes between ranges that may overlap.
///
/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(dst: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    if (dst as usize).wrapping_sub(src as usize) >= n {
        // SAFETY: a forward copy never reads a byte it has overwritten here.
        return unsafe { memcpy(dst, src, n) };
    }
    // SAFETY: the caller promises both ranges; the direction flag is restored.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") n => _,
            inout("rdi") dst.wrapping_add(n).wrapping_sub(1) => _,
            inout("rsi") src.wrapping_add(n).wrapping_sub(1) => _, options(nostack));
    }
    dst
}

/// Fills `n` bytes with the low byte of `value`.
///
/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(dst: *mut u8, value: i32, n: usize) -> *mut u8 {
    // SAFETY: the caller promises the range; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") n => _, inout("rdi") dst => _, in("al") value as u8,
            options(nostack, preserves_flags));
    }
    dst
}

/// Compares `n` bytes.
///
/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let mut i = 0;
    while i < n {
        // SAFETY: i < n, and the caller promises n readable bytes at both.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        i += 1;
    }
    0
}

/// Compares `n` bytes, non-zero when they differ.
///
/// # Safety
/// As `bcmp`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: same contract.
    unsafe { memcmp(a, b, n) }
}

/// Reads guest memory at a linear address that compiled code does not own,
/// with one access of the type's width (1, 2, 4 or 8 bytes), aligned or not.
pub fn read<T: Copy>(address: u64) -> T {
    let value: u64;
    // SAFETY: an access to memory outside every Rust object; an unmapped
    // address faults, which ends the guest with a message.
    unsafe {
        match size_of::<T>() {
            1 => {
                asm!("movzx {:e}, byte ptr [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags))
            }
            2 => {
                asm!("movzx {:e}, word ptr [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags))
            }
            4 => {
                asm!("mov {:e}, [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags))
            }
            8 => {
                asm!("mov {}, [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags))
            }
            _ => panic!("no single access has this width"),
        }
        core::mem::transmute_copy(&value)
    }
}

/// Writes guest memory at a linear address that compiled code does not own,
/// with one access of the type's width (1, 2, 4 or 8 bytes), aligned or not.
pub fn write<T: Copy>(address: u64, value: T) {
    let at = &raw const value;
    // SAFETY: as in `read`; the value is read through its own width.
    unsafe {
        match size_of::<T>() {
            1 => {
                asm!("mov byte ptr [{}], {}", in(reg) address, in(reg_byte) *at.cast::<u8>(), options(nostack, preserves_flags))
            }
            2 => {
                asm!("mov word ptr [{}], {:x}", in(reg) address, in(reg) *at.cast::<u16>(), options(nostack, preserves_flags))
            }
            4 => {
                asm!("mov dword ptr [{}], {:e}", in(reg) address, in(reg) *at.cast::<u32>(), options(nostack, preserves_flags))
            }
            8 => {
                asm!("mov qword ptr [{}], {}", in(reg) address, in(reg) *at.cast::<u64>(), options(nostack, preserves_flags))
            }
            _ => panic!("no single access has this width"),
        }
    }
}

/// Copies bytes to a linear address outside of Rust's objects.
pub fn write_bytes(address: u64, bytes: &[u8]) {
    for (i, b) in bytes.iter().enumerate() {
        write(address + i as u64, *b);
    }
}

/// Fills `len` bytes at a linear address.
pub fn fill(address: u64, len: u64, value: u8) {
    // SAFETY: as in `read`.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") address => _, in("al") value,
            options(nostack, preserves_flags));
    }
}
