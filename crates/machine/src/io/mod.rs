//! Between the vCPUs and the devices: the bus, the clock, timers, and the locks around devices.

pub(crate) mod bus;
pub(crate) mod claims;
pub(crate) mod clock;
pub(crate) mod doorbells;
pub(crate) mod interrupts;
pub(crate) mod slot;
pub(crate) mod sources;
pub(crate) mod worker;
