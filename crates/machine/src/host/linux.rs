//! Linux.

use core::num::NonZeroU64;

use rustix::thread::set_current_timer_slack;

/// Precise waits for a thread.
pub(crate) struct PreciseTimers;

impl PreciseTimers {
    /// Asks the host. One that refuses leaves the thread's timers as they are.
    pub(crate) fn new() -> Self {
        // A microsecond. The default slack, fifty times as much, is meant for threads with less to lose.
        let _ = set_current_timer_slack(NonZeroU64::new(1_000));
        Self
    }
}
