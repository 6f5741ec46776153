//! How a driver finds a device and talks to it (§4).

pub mod mmio;
pub mod pci;
