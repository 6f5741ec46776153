//! Memory movement, in assembly so that both builds run the same instructions.

use core::arch::asm;
use core::hint::black_box;

/// Bytes that one unit moves or fills.
pub const LEN: usize = 8192;

#[repr(align(64))]
struct Buffer([u64; LEN / 8]);

/// A loop of eight-byte loads and stores.
pub fn words(units: u64) -> u64 {
    let (source, mut target) = (Buffer([0x0123_4567; LEN / 8]), Buffer([0; LEN / 8]));
    for _ in 0..units {
        // SAFETY: copies LEN bytes between two buffers of that size.
        unsafe {
            asm!("2: mov {t}, [{s}]", "mov [{d}], {t}", "add {s}, 8", "add {d}, 8", "dec {n}", "jnz 2b",
                s = inout(reg) source.0.as_ptr() => _, d = inout(reg) target.0.as_mut_ptr() => _,
                n = inout(reg) LEN / 8 => _, t = out(reg) _, options(nostack));
        }
    }
    black_box(&target).0[LEN / 8 - 1] ^ units
}

/// `REP MOVSQ`.
pub fn rep_movs(units: u64) -> u64 {
    let (source, mut target) = (Buffer([0x0123_4567; LEN / 8]), Buffer([0; LEN / 8]));
    for _ in 0..units {
        // SAFETY: copies LEN bytes between two buffers of that size.
        unsafe {
            asm!("rep movsq", inout("rsi") source.0.as_ptr() => _, inout("rdi") target.0.as_mut_ptr() => _,
                inout("rcx") LEN / 8 => _, options(nostack, preserves_flags));
        }
    }
    black_box(&target).0[LEN / 8 - 1] ^ units
}

/// `REP STOSQ`.
pub fn rep_stos(units: u64) -> u64 {
    let mut target = Buffer([0; LEN / 8]);
    for unit in 0..units {
        // SAFETY: fills LEN bytes of a buffer of that size.
        unsafe {
            asm!("rep stosq", inout("rdi") target.0.as_mut_ptr() => _, inout("rcx") LEN / 8 => _,
                in("rax") unit, options(nostack, preserves_flags));
        }
    }
    black_box(&target).0[LEN / 8 - 1] ^ units << 32
}
