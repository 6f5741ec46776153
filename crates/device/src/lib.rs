//! What every device is made of: the [`Device`] trait, the address map that finds the device behind an access,
//! and the few handles through which a device may affect the world.
//!
//! Devices are sans-I/O: they know no thread, file, lock or host clock. A device is a state machine that is handed
//! accesses ([`Device::read`], [`Device::write`]), expired timers ([`Device::timer`]) and wake-ups ([`Device::poll`]),
//! and whose only effects go through what its constructor was given:
//!
//! | handle | effect |
//! |---|---|
//! | [`Line`] | drive a numbered, possibly shared interrupt input |
//! | [`MsiSink`] | send a message-signalled interrupt |
//! | [`Timer`] | be called back at a machine time |
//! | [`Clock`], [`WallClock`] | read machine time, read the time of day |
//! | [`PowerSink`] | ask for power-off, reset or exit |
//! | [`ByteSink`] | send bytes of a serial port or a debug console out |
//! | [`ClaimSink`] | move a range that it answers |
//! | [`DoorbellSink`] | be woken by a write instead of being handed it |
//!
//! The owner of a device serialises calls to it (one lock per device is enough). Handles may be called while that
//! lock is held, so their implementations must never call back into a device.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

mod access;
mod address_map;
mod bytes;
mod claims;
mod device;
mod inspect;
mod interrupt;
mod power;
mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod time;

pub use access::{Access, AddressRange, Outcome, Space, le_value, put_le};
pub use address_map::{
    AddressMap, AddressMapBuilder, ClaimError, Claimant, ClaimedRange, Hint, Piece, Pieces,
};
pub use bytes::ByteSink;
pub use claims::{ClaimSink, DoorbellSink};
pub use device::{Claim, Device, ResetKind};
pub use inspect::{Inspector, Value};
pub use interrupt::{Line, LineSink, Lines, MAX_LINE_SOURCES, Msi, MsiSink, TooManySources};
pub use power::{PowerRequest, PowerSink};
pub use state::{MAX_BODY_LEN, SaveState, StateError, StateRecord};
pub use time::{Clock, NANOS_PER_SECOND, Timer, TimerKey, TimerService, WallClock, WallTime};
