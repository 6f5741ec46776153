//! The life of a device.

use alloc::vec::Vec;
use core::task::{Context, Poll};

use crate::{Access, AddressRange, Inspector, Outcome, StateError, StateRecord};

/// One range that a device answers, with the name shown for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The addresses.
    pub range: AddressRange,
    /// What the range is within the device, for error messages and `inspect`: `"data"`, `"PM timer"`.
    pub label: &'static str,
}

impl Claim {
    /// A claim of `range`, called `label`.
    pub const fn new(range: AddressRange, label: &'static str) -> Self {
        Self { range, label }
    }
}

/// Why a device is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResetKind {
    /// The machine was switched on: everything is at its power-on value.
    PowerOn,
    /// The guest, or a person, pressed reset. What a battery or a wall clock keeps (CMOS, time of day) and what the
    /// outside has queued (bytes typed into a serial port) survives; the rest is as after [`ResetKind::PowerOn`].
    System,
}

/// A device: a state machine driven by accesses, timers and wake-ups.
///
/// # Order of calls
///
/// 1. The constructor puts the device in its power-on state. It may use none of its handles: nothing is running yet.
/// 2. [`claims`](Device::claims) is called once, when the device is put on the bus. The ranges do not change
///    afterwards; what moves them (PCI BARs) is the business of the bus that the device sits on.
/// 3. Either [`restore`](Device::restore) is called once, or [`reset`](Device::reset) with
///    [`ResetKind::PowerOn`]: from here on the handles work, and both end with every [`crate::Line`] driven to
///    the level that the state calls for and every [`crate::Timer`] armed that the state needs.
/// 4. Then, in any order and any number of times: [`read`](Device::read), [`write`](Device::write),
///    [`timer`](Device::timer), [`poll`](Device::poll), [`reset`](Device::reset), [`inspect`](Device::inspect).
///    `poll` is called once at the start of this phase.
/// 5. [`save`](Device::save) is called with all vCPUs stopped and the machine clock stopped: no access, timer or poll
///    arrives between `save` calls of different devices. The machine may continue after it.
///
/// # What a device may assume
///
/// - Calls are serialised and `&mut self` is all the locking there is.
/// - The guest is hostile: addresses, widths, values and their order are arbitrary. A device does not panic, does a
///   bounded amount of work per call, and allocates nothing whose size the guest chooses without a limit.
/// - A saved state is hostile too: `restore` checks every value that is later used as an index, a length or a time.
///   After an error from `restore` the device may only be dropped.
/// - Handles may be called from within any of the calls of phase 3 and 4, and return without calling the device.
pub trait Device: Send {
    /// The device's name on this machine, unique and stable across save and restore: `"uart0"`.
    fn name(&self) -> &str;

    /// The ranges this device answers. The index of a claim is the [`Access::region`] of accesses to it.
    fn claims(&self) -> Vec<Claim>;

    /// Answers a read of `data.len()` bytes, 1 to 8. `data` holds all-ones on entry: a device that does not decode
    /// the access leaves it so.
    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome;

    /// Performs a write of `data.len()` bytes, 1 to 8. Writes that the device does not decode have no effect.
    fn write(&mut self, at: Access, data: &[u8]) -> Outcome;

    /// The timer that the device knows as `id` reached the time it was armed for. The machine clock is at or past that
    /// time. A call may be late or spurious (armed again or cancelled meanwhile): the device looks at the clock.
    fn timer(&mut self, id: u32) {
        let _ = id;
    }

    /// Lets the device make progress on work that does not finish within an access: its queues, as plain futures.
    /// Called once at the start and then each time the waker of `cx` was woken. The work done per call is bounded; a
    /// device with more to do wakes `cx` itself.
    fn poll(&mut self, cx: &mut Context<'_>) {
        let _ = cx;
    }

    /// Ready once nothing outside of the device works for it any more that may touch guest memory (storage, say). The
    /// machine asks before it saves or resets, with all vCPUs stopped, and calls nothing else of the device until it is;
    /// [`poll`](Device::poll) is called when the machine goes on.
    fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let _ = cx;
        Poll::Ready(())
    }

    /// Puts the device into the state of `kind`, lowers its lines and cancels its timers where that state says so.
    fn reset(&mut self, kind: ResetKind);

    /// The device's whole guest-visible state, as a versioned record.
    ///
    /// # Errors
    /// When the state cannot be encoded, or the device cannot be saved now and says why.
    fn save(&self) -> Result<StateRecord, StateError>;

    /// Takes over the state of a record that [`save`](Device::save) of this or an older version of Caisson made.
    ///
    /// # Errors
    /// When the record belongs to another kind of device, is from a newer version, or holds values that no device
    /// of this kind can have.
    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError>;

    /// Shows the device's state to a person or a tool. Has no side effects, not even those of register reads.
    fn inspect(&self, inspector: &mut Inspector);
}
