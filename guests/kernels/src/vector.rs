//! Floating point, vector units and divisions.

use core::arch::{asm, x86_64::*};
use core::hint::black_box;

const SIDE: usize = 16;

/// Products of 16 × 16 matrices of doubles, one scalar operation at a time.
pub fn float(units: u64) -> u64 {
    let mut a = [[0f64; SIDE]; SIDE];
    let mut b = a;
    for i in 0..SIDE {
        for j in 0..SIDE {
            a[i][j] = (i * 3 + j) as f64 / 7.0;
            b[i][j] = (i + j * 5) as f64 / 11.0;
        }
    }
    let mut total = 0f64;
    for unit in 0..units {
        a[0][0] = unit as f64 / 3.0;
        for row in black_box(&a) {
            for j in 0..SIDE {
                let mut sum = 0f64;
                for k in 0..SIDE {
                    sum += row[k] * black_box(&b)[k][j];
                }
                total = total * 0.5 + sum;
            }
        }
    }
    total.to_bits()
}

/// Elements of each vector of [`avx2`].
const LEN: usize = 1024;

#[repr(align(64))]
struct Floats([f32; LEN]);

/// `y = a * x + y` over 1024 floats with 256-bit operations, in assembly so that
/// both builds run the same instructions. Needs AVX2, and the operating system's
/// consent to it.
pub fn avx2(units: u64) -> u64 {
    let x = Floats(core::array::from_fn(|i| i as f32 / 64.0));
    let mut y = Floats([1.0; LEN]);
    let factor = 0.25f32;
    for _ in 0..units {
        // SAFETY: reads and writes LEN floats of two arrays of that size; whoever
        // calls this has AVX2.
        unsafe {
            asm!(
                "vbroadcastss ymm0, dword ptr [{a}]",
                "2: vmulps ymm1, ymm0, ymmword ptr [{x}]",
                "vaddps ymm1, ymm1, ymmword ptr [{y}]",
                "vmovups ymmword ptr [{y}], ymm1",
                "add {x}, 32", "add {y}, 32", "dec {n}", "jnz 2b",
                "vzeroupper",
                a = in(reg) &factor, x = inout(reg) x.0.as_ptr() => _, y = inout(reg) y.0.as_mut_ptr() => _,
                n = inout(reg) LEN / 8 => _, out("xmm0") _, out("xmm1") _, options(nostack));
        }
    }
    let sum = black_box(&y).0.iter().fold(0u64, |sum, v| {
        sum.wrapping_mul(31).wrapping_add(v.to_bits().into())
    });
    sum.wrapping_add(units)
}

/// The length of strings of 0 to 255 bytes with 128-bit comparisons, as the C
/// library's `strlen` does.
pub fn string(units: u64) -> u64 {
    #[repr(align(64))]
    struct Text([u8; 4096]);
    let mut text = Text([b'x'; 4096]);
    let mut at = 0;
    for len in (5..250).step_by(17) {
        at += len;
        text.0[at] = 0;
        at += 1;
    }
    let end = at;
    let mut sum = 0u64;
    for unit in 0..units {
        let mut at = 0;
        while at < end {
            let len = length(&black_box(&text).0[at..]);
            sum = sum.wrapping_mul(7).wrapping_add(len as u64 ^ unit);
            at += len + 1;
        }
    }
    sum
}

/// Bytes before the first zero, or before the last 16.
fn length(text: &[u8]) -> usize {
    // SAFETY: SSE2 is part of the architecture; each piece has 16 bytes.
    unsafe {
        let zero = _mm_setzero_si128();
        for (i, piece) in text.chunks_exact(16).enumerate() {
            let equal = _mm_cmpeq_epi8(_mm_loadu_si128(piece.as_ptr().cast()), zero);
            let mask = _mm_movemask_epi8(equal);
            if mask != 0 {
                return i * 16 + mask.trailing_zeros() as usize;
            }
        }
    }
    text.len() - 16
}

/// Greatest common divisors, by division.
pub fn divide(units: u64) -> u64 {
    let mut sum = 0u64;
    for unit in 0..units {
        for i in 0..16u64 {
            let (mut a, mut b) = black_box((0x1234_5678_9abc_def1 >> i, 0xfedc_ba98_7653 >> i));
            while b != 0 {
                (a, b) = (b, a % b);
            }
            sum = sum.wrapping_mul(3).wrapping_add(a ^ unit);
        }
    }
    sum
}
