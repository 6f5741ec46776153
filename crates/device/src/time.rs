//! Time as a device sees it: machine time, alarms on it, and the time of day.

use alloc::sync::Arc;
use core::fmt;

/// Nanoseconds in a second.
pub const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// Machine time: nanoseconds since the machine was first switched on, monotonic, standing still while the machine is
/// paused, carried over by save and restore.
pub trait Clock: Send + Sync {
    /// The machine time now, in nanoseconds.
    fn now(&self) -> u64;
}

/// The time of day on the host, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WallTime {
    /// Seconds since 1970-01-01 00:00:00 UTC; negative before it.
    pub seconds: i64,
    /// Nanoseconds within the second, below 1,000,000,000.
    pub nanos: u32,
}

/// Reads the time of day, which unlike [`Clock`] goes on while the machine is paused or saved, and may jump.
pub trait WallClock: Send + Sync {
    /// The time of day now.
    fn now(&self) -> WallTime;
}

/// Which timer of which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TimerKey {
    /// The device, as numbered by whoever made the [`Timer`].
    pub device: u32,
    /// The device's own number for the timer, handed to [`crate::Device::timer`].
    pub id: u32,
}

/// Keeps alarms on the machine clock. Expiry is delivered by calling [`crate::Device::timer`], never from within
/// [`TimerService::arm`], even for a time that has passed.
pub trait TimerService: Send + Sync {
    /// Sets the alarm of `key` to machine time `at`, replacing an earlier setting.
    fn arm(&self, key: TimerKey, at: u64);

    /// Removes the alarm of `key`, if any. An expiry already under way may still arrive.
    fn cancel(&self, key: TimerKey);
}

/// One alarm of a device on the machine clock.
#[derive(Clone)]
pub struct Timer {
    service: Arc<dyn TimerService>,
    key: TimerKey,
}

impl Timer {
    /// The timer `key` of `service`.
    pub fn new(service: Arc<dyn TimerService>, key: TimerKey) -> Self {
        Self { service, key }
    }

    /// Asks for [`crate::Device::timer`] at machine time `at` (nanoseconds), instead of any earlier request.
    pub fn arm(&self, at: u64) {
        self.service.arm(self.key, at);
    }

    /// Withdraws the request.
    pub fn cancel(&self) {
        self.service.cancel(self.key);
    }

    /// Arms for `Some` time, cancels for `None`.
    pub fn set(&self, at: Option<u64>) {
        match at {
            Some(at) => self.arm(at),
            None => self.cancel(),
        }
    }

    /// The number that [`crate::Device::timer`] will be called with.
    pub fn id(&self) -> u32 {
        self.key.id
    }
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timer({} of device {})", self.key.id, self.key.device)
    }
}
