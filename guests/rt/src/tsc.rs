//! Time stamp counter and bounded waiting.

use crate::port::{inb, outb};
use core::arch::x86_64::{_mm_lfence, _rdtsc};
use core::sync::atomic::{AtomicU64, Ordering};

static HZ: AtomicU64 = AtomicU64::new(0);

/// Reads the counter, ordered after earlier loads.
pub fn now() -> u64 {
    // SAFETY: every long-mode processor has both instructions.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

/// Ticks per second, measured once against PIT channel 2: the least of three
/// measurements, since a host that is busy elsewhere makes one too long.
pub fn hz() -> u64 {
    let known = HZ.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    let hz = measure().min(measure()).min(measure());
    HZ.store(hz, Ordering::Relaxed);
    hz
}

/// Ticks per second, over 10 ms.
fn measure() -> u64 {
    let count: u16 = 11932;
    outb(0x61, inb(0x61) & !3);
    outb(0x43, 0xB0);
    outb(0x42, count as u8);
    outb(0x42, (count >> 8) as u8);
    outb(0x61, inb(0x61) & !2 | 1);
    let start = now();
    let mut polls = 0u32;
    while inb(0x61) & 0x20 == 0 {
        polls += 1;
        assert!(
            polls < 20_000_000,
            "PIT channel 2 never reached its terminal count"
        );
    }
    (now() - start) * 100
}

/// Ticks in a number of microseconds.
pub fn micros(us: u64) -> u64 {
    (u128::from(hz()) * u128::from(us) / 1_000_000) as u64
}

/// Spins for a number of microseconds.
pub fn delay(us: u64) {
    let end = now() + micros(us);
    while now() < end {
        crate::cpu::pause();
    }
}

/// Waits until `done` holds, at most `us` microseconds; gives whether it held.
pub fn wait_until(us: u64, mut done: impl FnMut() -> bool) -> bool {
    let end = now() + micros(us);
    while !done() {
        if now() > end {
            return done();
        }
        crate::cpu::pause();
    }
    true
}
