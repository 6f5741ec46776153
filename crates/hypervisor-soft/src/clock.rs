//! Guest time: the host's invariant TSC, shifted so that stopped time is not
//! seen.

use std::{
    arch::x86_64::{__cpuid, _rdtsc},
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// How long the TSC is measured where the processor does not say its frequency.
const CALIBRATION: Duration = Duration::from_millis(10);

/// The clock of one partition. Guest TSC and machine nanoseconds are two scales
/// of one counter.
#[derive(Debug)]
pub(crate) struct Clock {
    hz: u64,
    /// Guest TSC = host TSC + this (wrapping), while running.
    offset: AtomicU64,
    /// Guest TSC at which time stands, while stopped.
    stopped_at: AtomicU64,
    running: AtomicBool,
}

impl Clock {
    /// A running clock whose guest TSC starts at zero.
    pub(crate) fn new() -> Self {
        let now = host_tsc();
        Self {
            hz: host_tsc_hz(),
            offset: AtomicU64::new(now.wrapping_neg()),
            stopped_at: AtomicU64::new(0),
            running: AtomicBool::new(true),
        }
    }

    pub(crate) fn hz(&self) -> u64 {
        self.hz
    }

    /// The guest's TSC, before any vCPU's own adjustment.
    #[inline]
    pub(crate) fn tsc(&self) -> u64 {
        if self.running.load(Ordering::Relaxed) {
            host_tsc().wrapping_add(self.offset.load(Ordering::Relaxed))
        } else {
            self.stopped_at.load(Ordering::Relaxed)
        }
    }

    /// Machine nanoseconds.
    #[inline]
    pub(crate) fn nanos(&self) -> u64 {
        self.nanos_at(self.tsc())
    }

    /// The machine nanoseconds at which the guest's TSC is `tsc`.
    pub(crate) fn nanos_at(&self, tsc: u64) -> u64 {
        (u128::from(tsc) * 1_000_000_000 / u128::from(self.hz)) as u64
    }

    /// Moves guest time so that the TSC reads `tsc` now.
    pub(crate) fn set_tsc(&self, tsc: u64) {
        self.offset
            .store(tsc.wrapping_sub(host_tsc()), Ordering::Relaxed);
        self.stopped_at.store(tsc, Ordering::Relaxed);
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    pub(crate) fn set_running(&self, running: bool) {
        if running == self.running.load(Ordering::Relaxed) {
            return;
        }
        let now = self.tsc();
        self.set_tsc(now);
        self.running.store(running, Ordering::Relaxed);
    }
}

fn host_tsc() -> u64 {
    // SAFETY: RDTSC is part of the x86-64 baseline.
    unsafe { _rdtsc() }
}

/// The host's TSC frequency in Hz: from CPUID leaf 15h where it says, else
/// measured once against the monotonic clock.
pub(crate) fn host_tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| from_cpuid().unwrap_or_else(measure))
}

fn from_cpuid() -> Option<u64> {
    let highest = __cpuid(0).eax;
    if highest < 0x15 {
        return None;
    }
    let leaf = __cpuid(0x15);
    let known = leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0;
    known.then(|| u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax))
}

fn measure() -> u64 {
    let (t0, i0) = (host_tsc(), Instant::now());
    std::thread::sleep(CALIBRATION);
    let (i1, t1) = (i0.elapsed(), host_tsc());
    let hz = u128::from(t1.wrapping_sub(t0)) * 1_000_000_000 / i1.as_nanos().max(1);
    (hz as u64).max(1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stopped_time_is_not_seen() {
        let c = Clock::new();
        c.set_running(false);
        let a = c.tsc();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(a, c.tsc());
        c.set_running(true);
        assert!(c.tsc() >= a);
        c.set_tsc(1 << 40);
        assert!(c.tsc() >= 1 << 40);
    }
}
