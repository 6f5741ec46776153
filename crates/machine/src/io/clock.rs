//! Machine time and the time of day.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use caisson_device::{Clock, WallClock, WallTime};
use caisson_hypervisor::Partition;

/// Machine time: the partition's clock, moved so that a restored machine goes on where it was saved.
pub(crate) struct MachineClock {
    partition: Arc<dyn Partition>,
    offset: AtomicU64,
}

impl MachineClock {
    pub(crate) fn new(partition: Arc<dyn Partition>) -> Self {
        Self {
            partition,
            offset: AtomicU64::new(0),
        }
    }

    /// Makes the time now `now`. Only while the clock stands.
    pub(crate) fn set(&self, now: u64) {
        self.offset
            .store(now.wrapping_sub(self.partition.now_ns()), Ordering::SeqCst);
    }
}

impl Clock for MachineClock {
    fn now(&self) -> u64 {
        self.partition
            .now_ns()
            .wrapping_add(self.offset.load(Ordering::Relaxed))
    }
}

/// The host's time of day.
pub(crate) struct HostWallClock;

impl WallClock for HostWallClock {
    fn now(&self) -> WallTime {
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => WallTime {
                seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                nanos: since.subsec_nanos(),
            },
            // A host whose clock is before 1970 has no time of day worth keeping.
            Err(_) => WallTime {
                seconds: 0,
                nanos: 0,
            },
        }
    }
}
