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

use caisson_hypervisor::x86::same_tsc_frequency;

/// Fraction bits of the guest's ticks per tick of the host.
const RATIO_BITS: u32 = 40;

/// How long the TSC is measured where the processor does not say its frequency.
const CALIBRATION: Duration = Duration::from_millis(3);
/// How often both clocks are read for one moment.
const READINGS: usize = 16;

/// The clock of one partition. Guest TSC and machine nanoseconds are two scales
/// of one counter.
#[derive(Debug)]
pub(crate) struct Clock {
    hz: u64,
    /// Guest ticks per host tick, with [`RATIO_BITS`]; `None` is one.
    ratio: Option<u64>,
    /// Guest TSC = host TSC in guest ticks + this (wrapping), while running.
    offset: AtomicU64,
    /// Guest TSC at which time stands, while stopped.
    stopped_at: AtomicU64,
    running: AtomicBool,
}

impl Clock {
    /// A running clock whose guest TSC starts at zero and ticks at `hz`, as the
    /// host's if that is `None` or as good as the same.
    pub(crate) fn new(hz: Option<u64>) -> Self {
        Self::beside(host_tsc_hz(), hz)
    }

    fn beside(host: u64, hz: Option<u64>) -> Self {
        let hz = hz.unwrap_or(host).max(1);
        let same = same_tsc_frequency(hz, host);
        let ratio = (u128::from(hz) << RATIO_BITS) / u128::from(host.max(1));
        let clock = Self {
            hz,
            ratio: (!same).then(|| u64::try_from(ratio).unwrap_or(u64::MAX)),
            offset: AtomicU64::new(0),
            stopped_at: AtomicU64::new(0),
            running: AtomicBool::new(true),
        };
        clock.set_tsc(0);
        clock
    }

    /// The host's TSC in ticks of the guest's.
    #[inline]
    fn host(&self) -> u64 {
        match self.ratio {
            None => host_tsc(),
            Some(ratio) => ((u128::from(host_tsc()) * u128::from(ratio)) >> RATIO_BITS) as u64,
        }
    }

    pub(crate) fn hz(&self) -> u64 {
        self.hz
    }

    /// The guest's TSC, before any vCPU's own adjustment.
    #[inline]
    pub(crate) fn tsc(&self) -> u64 {
        if self.running.load(Ordering::Relaxed) {
            self.host()
                .wrapping_add(self.offset.load(Ordering::Relaxed))
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
            .store(tsc.wrapping_sub(self.host()), Ordering::Relaxed);
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
    let origin = Instant::now();
    let start = moment(origin);
    std::thread::sleep(CALIBRATION);
    let end = moment(origin);
    let nanos = end.nanos.saturating_sub(start.nanos).max(1);
    let hz = u128::from(end.tsc.wrapping_sub(start.tsc)) * 1_000_000_000 / nanos;
    (hz as u64).max(1_000_000)
}

/// Both clocks at one moment.
struct Moment {
    tsc: u64,
    /// Since the origin.
    nanos: u128,
    /// TSC ticks that reading them took.
    took: u64,
}

/// Of several readings the one that took the least time: a host that does something else between
/// the two clocks would set them apart.
fn moment(origin: Instant) -> Moment {
    let read = || {
        let before = host_tsc();
        let nanos = origin.elapsed().as_nanos();
        let took = host_tsc().wrapping_sub(before);
        let tsc = before.wrapping_add(took / 2);
        Moment { tsc, nanos, took }
    };
    let mut best = read();
    for _ in 1..READINGS {
        let next = read();
        if next.took < best.took {
            best = next;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stopped_time_is_not_seen() {
        let c = Clock::new(None);
        c.set_running(false);
        let a = c.tsc();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(a, c.tsc());
        c.set_running(true);
        assert!(c.tsc() >= a);
        c.set_tsc(1 << 40);
        assert!(c.tsc() >= 1 << 40);
    }

    #[test]
    fn another_frequency_is_kept_and_a_measured_one_is_the_hosts() {
        let host = host_tsc_hz();
        let near = Clock::new(Some(host + host / 10_000));
        assert_eq!((near.hz(), near.ratio), (host + host / 10_000, None));
        // Half as fast as a host whose TSC is said to tick twice as fast as it does.
        let slow = Clock::beside(2 * host, Some(host));
        let (before, at) = (host_tsc(), slow.tsc());
        std::thread::sleep(Duration::from_millis(20));
        let (ticks, passed) = (slow.tsc() - at, host_tsc() - before);
        assert!(ticks <= passed / 2 && ticks > 0, "{ticks} of {passed}");
        slow.set_running(false);
        slow.set_tsc(1 << 50);
        slow.set_running(true);
        assert!(slow.tsc() >= 1 << 50);
    }
}
