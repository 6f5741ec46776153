//! What a virtio device is, whatever carries it.

use alloc::vec::Vec;
use core::task::{Context, Poll};

use caisson_device::{Inspector, StateError, StateRecord};

use crate::{Fault, Queues};

/// What a device is to its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    /// The device ID (§5).
    pub id: u16,
    /// The class code of its PCI function.
    pub class: u32,
}

/// A virtio device, driven by a transport.
///
/// # Order of calls
///
/// 1. [`kind`](Self::kind), [`queue_sizes`](Self::queue_sizes) and [`features`](Self::features) are asked when the
///    transport is made, and never change.
/// 2. [`reset`](Self::reset) whenever the driver or the machine resets the device; also before the first use.
/// 3. [`activate`](Self::activate) when the driver has set `DRIVER_OK`.
/// 4. [`poll`](Self::poll) from then on: once at first, and each time that its waker was woken or the driver notified a
///    queue; not after a [`Fault`], until the device is reset and activated again.
/// 5. [`restore`](Self::restore) instead of 2 and 3 when the machine is restored; `poll` follows if the device was
///    active.
///
/// The configuration space can be accessed at any time.
pub trait VirtioDevice: Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// The largest size of each of its queues, a power of two up to 32768.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The feature bits of its type (0 to 23, 50 and up) that it offers.
    fn features(&self) -> u64;

    /// A read of its configuration space at `offset`. `data` holds zeros on entry.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// A write to its configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Whether its configuration changed in a way that the driver is to be told of, since this was asked last.
    fn take_config_change(&mut self) -> bool {
        false
    }

    /// The driver is ready; it has accepted `features`.
    fn activate(&mut self, features: u64) {
        let _ = features;
    }

    /// Makes progress on its queues, as plain futures: takes buffers, starts what they ask for, completes what is done.
    /// The work per call is bounded; a device with more to do wakes `cx` itself.
    ///
    /// # Errors
    /// The driver broke a rule, or the device cannot go on.
    fn poll(&mut self, cx: &mut Context<'_>, queues: &mut Queues<'_>) -> Result<(), Fault>;

    /// Ready once nothing outside of the device works for it any more that may touch guest memory; what is done then
    /// is reported at the next [`poll`](Self::poll). Asked before a reset, of the device or of a queue, and before the
    /// device is saved. The device starts nothing meanwhile.
    fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let _ = cx;
        Poll::Ready(())
    }

    /// Queue `queue` alone was reset (§2.6.1): what was taken from it is forgotten.
    fn reset_queue(&mut self, queue: u16);

    /// Forgets everything that a driver did.
    fn reset(&mut self);

    /// Its state, with the buffers that it has taken and not completed. See [`caisson_device::Device::save`].
    ///
    /// # Errors
    /// It cannot be encoded.
    fn save(&self) -> Result<StateRecord, StateError>;

    /// Takes over a state.
    ///
    /// # Errors
    /// See [`caisson_device::Device::restore`].
    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError>;

    /// Shows its state.
    fn inspect(&self, inspector: &mut Inspector);
}
