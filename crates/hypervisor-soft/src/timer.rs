//! One thread per partition that tells running vCPUs that their APIC timer has
//! expired. A halted vCPU waits for its own deadline and does not need it.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use caisson_x86_cpu::state::request;
use parking_lot::{Condvar, Mutex};

use crate::shared::Shared;

/// No deadline.
pub(crate) const NEVER: u64 = u64::MAX;

/// The longest the thread sleeps without looking at the clock, which may have
/// been stopped or moved meanwhile.
const LONGEST: Duration = Duration::from_millis(500);

/// The deadlines of all vCPUs, in machine nanoseconds.
#[derive(Debug)]
pub(crate) struct Timers {
    deadlines: Box<[AtomicU64]>,
    /// The time for which the thread sleeps; guarded by the mutex, read without it.
    sleeping_until: AtomicU64,
    lock: Mutex<bool>,
    changed: Condvar,
}

impl Timers {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self {
            deadlines: (0..vcpus).map(|_| AtomicU64::new(NEVER)).collect(),
            sleeping_until: AtomicU64::new(0),
            lock: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    /// Sets vCPU `index`'s deadline.
    pub(crate) fn set(&self, index: usize, nanos: u64) {
        self.deadlines[index].store(nanos, Ordering::SeqCst);
        if nanos < self.sleeping_until.load(Ordering::SeqCst) {
            let _guard = self.lock.lock();
            self.changed.notify_one();
        }
    }

    /// Ends the thread.
    pub(crate) fn stop(&self) {
        *self.lock.lock() = true;
        self.changed.notify_one();
    }
}

/// Starts the thread.
pub(crate) fn spawn(shared: &Arc<Shared>) -> std::io::Result<()> {
    let weak = Arc::downgrade(shared);
    let timers = shared.timers.clone();
    thread::Builder::new()
        .name("soft-timer".into())
        .spawn(move || run(&weak, &timers))?;
    Ok(())
}

fn run(shared: &Weak<Shared>, timers: &Timers) {
    let mut stopped = timers.lock.lock();
    while !*stopped {
        let Some(s) = shared.upgrade() else { return };
        let now = s.clock.nanos();
        let mut next = NEVER;
        for (i, d) in timers.deadlines.iter().enumerate() {
            let at = d.load(Ordering::SeqCst);
            if at <= now {
                // The vCPU sets a new deadline when it has looked at its timer.
                if d.compare_exchange(at, NEVER, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
                {
                    s.vcpus[i].request(request::EVENT);
                }
            } else {
                next = next.min(at);
            }
        }
        drop(s);
        timers.sleeping_until.store(next, Ordering::SeqCst);
        // A deadline set between the scan and here is either seen now or finds
        // `sleeping_until` and waits for the lock to notify.
        let earliest = timers
            .deadlines
            .iter()
            .map(|d| d.load(Ordering::SeqCst))
            .min();
        if earliest.is_some_and(|e| e < next) {
            continue;
        }
        let sleep = Duration::from_nanos(next.saturating_sub(now)).min(LONGEST);
        timers.changed.wait_for(&mut stopped, sleep);
    }
}
