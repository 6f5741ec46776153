//! A device and the lock around it.

use std::sync::Arc;

use caisson_device::Device;
use parking_lot::{Mutex, MutexGuard};

/// A device in its place in the machine. `D` is the device's own type where the machine needs more of it than
/// [`Device`] offers; on the bus it is a [`DeviceSlot`].
pub(crate) struct Slot<D: ?Sized> {
    name: Arc<str>,
    device: Mutex<D>,
}

/// A slot whose device is only known as a [`Device`].
pub(crate) type DeviceSlot = Slot<dyn Device>;

impl<D: Device> Slot<D> {
    pub(crate) fn new(device: D) -> Arc<Self> {
        Arc::new(Self {
            name: device.name().into(),
            device: Mutex::new(device),
        })
    }
}

impl<D: ?Sized> Slot<D> {
    /// The device's name, without taking the lock.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The device. A thread holds one slot at a time, save that a device may drive the interrupt controllers from
    /// within a call, and the PCI configuration ports call the function that they address.
    pub(crate) fn lock(&self) -> MutexGuard<'_, D> {
        self.device.lock()
    }
}
