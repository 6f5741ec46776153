//! Model-specific registers: all that there could be.

use crate::random::Random;
use crate::rescue::attempt;
use caisson_guest_rt::cpu;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, Ordering};

/// Where processors and hypervisors have theirs.
const DENSE: [Range<u32>; 6] = [
    0..0x2000,
    0x4000_0000..0x4000_0200,
    0x4B56_4D00..0x4B56_4E00,
    0xC000_0000..0xC000_0400,
    0xC001_0000..0xC001_0400,
    0xC001_1000..0xC001_1100,
];
/// The rest of the space is walked in steps of this, a prime, so that each time round it meets others.
const STRIDE: u32 = 0x1_0003;
/// Registers of a round.
const ATTEMPTS: u32 = 64;

/// How far the two walks are.
static NEXT: AtomicU32 = AtomicU32::new(0);
static FAR: AtomicU32 = AtomicU32::new(0);

extern "C" fn look(index: u64) {
    _ = cpu::rdmsr(index as u32);
}

extern "C" fn rewrite(index: u64) {
    cpu::wrmsr(index as u32, cpu::rdmsr(index as u32));
}

/// One register and what to write to it.
struct Change {
    index: u32,
    value: u64,
}

extern "C" fn change(argument: u64) {
    // SAFETY: `round` passes the address of a `Change` that lives through the call.
    let Change { index, value } = unsafe { (argument as *const Change).read() };
    cpu::wrmsr(index, value);
}

/// The `n`th register of the dense ranges, which repeat.
fn dense(n: u32) -> u32 {
    let total: u32 = DENSE.iter().map(|range| range.end - range.start).sum();
    let mut n = n % total;
    for range in DENSE {
        let len = range.end - range.start;
        if n < len {
            return range.start + n;
        }
        n -= len;
    }
    0
}

/// The next registers: read, written back, and written with something else.
pub(crate) fn round(random: &mut Random) {
    for n in 0..ATTEMPTS {
        let index = if n % 4 == 0 {
            FAR.fetch_add(STRIDE, Ordering::Relaxed)
        } else {
            dense(NEXT.fetch_add(1, Ordering::Relaxed))
        };
        attempt(look, index.into());
        attempt(rewrite, index.into());
        let what = Change {
            index,
            value: random.value(),
        };
        attempt(change, &raw const what as u64);
    }
}
