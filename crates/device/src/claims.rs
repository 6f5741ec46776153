//! Ranges that move while the machine runs, and writes that need not reach the device.

use crate::{Claim, Space};

/// Publishes the ranges that a device answers besides those of [`crate::Device::claims`]: what a guest places with base
/// address registers.
///
/// Called while the lock of the device is held: an implementation may take a lock of its own, but never calls a device.
pub trait ClaimSink: Send + Sync {
    /// From now on region `region` of the device ([`crate::Access::region`]) is `claim`, or nowhere. vCPUs that are
    /// in the middle of an access may still bring one with the region's earlier place.
    ///
    /// A range that overlaps another device's is not answered until that one is gone: a guest may place devices as it
    /// likes, and the one that was there first stays.
    fn set(&self, region: u32, claim: Option<Claim>);
}

/// Takes the writes that mean "look at your queues" and nothing else.
///
/// The same rule as for [`ClaimSink`] holds. A doorbell is a short cut, never the only way: such a write may reach
/// [`crate::Device::write`] all the same, and means the same there.
pub trait DoorbellSink: Send + Sync {
    /// From now on writes that begin at one of `doorbells` may lead to [`crate::Device::poll`] without reaching the
    /// device otherwise. Replaces what was set before.
    fn set(&self, doorbells: &[(Space, u64)]);
}
