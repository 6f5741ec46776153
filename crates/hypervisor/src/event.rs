//! Doorbells and interrupt events: what passes between guest and devices by an
//! event of the host, without a vCPU leaving for the machine.

use alloc::{boxed::Box, format, string::String, sync::Arc, vec::Vec};
use core::fmt;

use caisson_memory::{Gpa, Vtl};

use crate::{HypervisorError, Msi, Space};

/// What the host's own calls know an event by: for a thread that waits for many
/// things at once, or for another process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum RawEvent {
    /// A file descriptor, readable while a signal waits to be heard (Unix).
    Descriptor(i32),
    /// A handle of an event that resets itself when it is heard (Windows).
    Handle(usize),
}

/// An event of the host: one side signals it, the other waits for it. Signals
/// that nobody has heard yet count as one.
pub trait Event: Send + Sync {
    /// Signals it. Never blocks.
    fn signal(&self);

    /// Hears it: whether it was signalled since it was last heard. Never blocks.
    fn take(&self) -> bool;

    /// Whether a signal waits to be heard.
    fn is_signalled(&self) -> bool;

    /// Its name in the host's calls, valid for as long as the event lives.
    fn raw(&self) -> RawEvent;
}

/// Makes the events that a backend takes.
pub trait Events: Send + Sync {
    /// A new event, not signalled.
    ///
    /// # Errors
    /// The host out of resources.
    fn event(&self) -> Result<Arc<dyn Event>, HypervisorError>;

    /// A way to wait for many of them.
    ///
    /// # Errors
    /// The host out of resources.
    fn waiter(&self) -> Result<Box<dyn EventWaiter>, HypervisorError>;
}

/// Lets one thread wait for many events. Events can be added while it waits.
pub trait EventWaiter: Send + Sync {
    /// From now on, a signal of `event` ends the wait and is reported as
    /// `token`, once; signals that come while nobody waits count as one. Nobody
    /// need hear the event otherwise.
    ///
    /// # Errors
    /// An event of another kind of host, or one that was added before; the host
    /// out of resources.
    fn add(&self, event: Arc<dyn Event>, token: u64) -> Result<(), HypervisorError>;

    /// Waits until an event is signalled or [`EventWaiter::wake`] is called, and
    /// puts the tokens of what is signalled into `tokens`, which it empties first.
    fn wait(&self, tokens: &mut Vec<u64>);

    /// Ends the present wait, or the next.
    fn wake(&self);
}

/// Which writes ring a doorbell.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DoorbellMatch {
    /// Every write that begins at the address.
    Any,
    /// Writes of this many bytes: 1, 2, 4 or 8 (ports: 1, 2 or 4).
    Length(u8),
    /// Writes of this value in this many bytes.
    Value {
        /// As in [`Self::Length`].
        length: u8,
        /// Little-endian; fits into `length` bytes.
        value: u64,
    },
}

/// A doorbell: a guest write that means "look here" and nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Doorbell {
    /// Ports or memory.
    pub space: Space,
    /// The first byte that the write goes to.
    pub address: Gpa,
    /// Which writes count.
    pub matches: DoorbellMatch,
}

impl Doorbell {
    /// Whether a guest can make such a write at all.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn check(&self) -> Result<(), String> {
        let longest = match self.space {
            Space::Mmio => 8,
            Space::Pio => 4,
        };
        let length = match self.matches {
            DoorbellMatch::Any => 1,
            DoorbellMatch::Length(length) | DoorbellMatch::Value { length, .. } => length,
        };
        if !length.is_power_of_two() || length > longest {
            return Err(format!(
                "{self}: a write has 1 to {longest} bytes, a power of two, not {length}"
            ));
        }
        if let DoorbellMatch::Value { length, value } = self.matches
            && length < 8
            && value >> (8 * length) != 0
        {
            return Err(format!(
                "{self}: the value {value:#x} does not fit into {length} bytes"
            ));
        }
        let last = self.address.0.checked_add(u64::from(length) - 1);
        let inside = match self.space {
            Space::Mmio => last.is_some(),
            Space::Pio => last.is_some_and(|last| last <= 0xffff),
        };
        if !inside {
            return Err(format!("{self}: the address space ends before that"));
        }
        Ok(())
    }
}

impl fmt::Display for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.space {
            Space::Mmio => write!(f, "the doorbell at {}", self.address),
            Space::Pio => write!(f, "the doorbell at port {:#x}", self.address.0),
        }
    }
}

/// The power to take guest writes as doorbells.
///
/// A doorbell is a short cut, never the only way: a backend may bring such a
/// write to the [`IoBus`](crate::IoBus) all the same (a vector store, say), and
/// the device answers it there as it would without a doorbell. Reads, and writes
/// that do not match, always go to the bus.
pub trait Doorbells: Events {
    /// From now on, and until the answer is dropped, `event` is signalled by
    /// writes of `vtl` that match, and they do not reach the bus. One event may
    /// serve several doorbells.
    ///
    /// # Errors
    /// A doorbell that no write can ring; one that some registered doorbell's
    /// writes would ring too; an event of another host; the host out of resources.
    fn register(
        &self,
        vtl: Vtl,
        doorbell: Doorbell,
        event: Arc<dyn Event>,
    ) -> Result<Box<dyn DoorbellHandle>, HypervisorError>;
}

/// A registered doorbell; to drop it unregisters it.
pub trait DoorbellHandle: Send + Sync {
    /// What was registered.
    fn doorbell(&self) -> Doorbell;
}

/// The power to turn an event into an interrupt.
pub trait InterruptEvents: Events {
    /// From now on, and until the answer is dropped, a signal of `event` raises
    /// `msi` in `vtl`. `None`: it begins masked. An event belongs to one
    /// interrupt, and nobody else hears it while that is not masked.
    ///
    /// # Errors
    /// As [`InterruptEvent::update`]; an event that belongs to another
    /// interrupt, or to another kind of host.
    fn register(
        &self,
        vtl: Vtl,
        event: Arc<dyn Event>,
        msi: Option<Msi>,
    ) -> Result<Box<dyn InterruptEvent>, HypervisorError>;
}

/// An event that raises an interrupt; to drop it unregisters it.
pub trait InterruptEvent: Send + Sync {
    /// Changes the message, or masks the interrupt (`None`). Once this returns,
    /// the old message comes no more. A signal that comes while it is masked
    /// waits, and raises the interrupt once it is not.
    ///
    /// # Errors
    /// A message that no local APIC hears (the interrupt is then masked); the
    /// host out of routes or memory (then all stays as it was).
    fn update(&self, msi: Option<Msi>) -> Result<(), HypervisorError>;

    /// Whether it is masked and a signal waits: the pending bit of MSI-X (PCI
    /// Local Bus 3.0 §6.8.2.10).
    fn is_pending(&self) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doorbell(space: Space, address: u64, matches: DoorbellMatch) -> Doorbell {
        Doorbell {
            space,
            address: Gpa(address),
            matches,
        }
    }

    #[test]
    fn doorbells_that_can_ring_are_taken() {
        for (space, address, matches) in [
            (Space::Mmio, 0xfe00_0000, DoorbellMatch::Any),
            (Space::Mmio, u64::MAX, DoorbellMatch::Any),
            (Space::Mmio, u64::MAX - 7, DoorbellMatch::Length(8)),
            (Space::Pio, 0xfffc, DoorbellMatch::Length(4)),
            (Space::Pio, 0xffff, DoorbellMatch::Length(1)),
            (
                Space::Mmio,
                0,
                DoorbellMatch::Value {
                    length: 8,
                    value: u64::MAX,
                },
            ),
            (
                Space::Pio,
                0,
                DoorbellMatch::Value {
                    length: 2,
                    value: 0xffff,
                },
            ),
        ] {
            assert_eq!(doorbell(space, address, matches).check(), Ok(()));
        }
    }

    #[test]
    fn doorbells_that_cannot_ring_are_refused_with_their_address() {
        for (space, address, matches) in [
            (Space::Mmio, u64::MAX - 6, DoorbellMatch::Length(8)),
            (Space::Mmio, 0x1000, DoorbellMatch::Length(0)),
            (Space::Mmio, 0x1000, DoorbellMatch::Length(3)),
            (Space::Mmio, 0x1000, DoorbellMatch::Length(16)),
            (Space::Pio, 0x1000, DoorbellMatch::Length(8)),
            (Space::Pio, 0xfffd, DoorbellMatch::Length(4)),
            (Space::Pio, 0x1_0000, DoorbellMatch::Any),
            (
                Space::Mmio,
                0x1000,
                DoorbellMatch::Value {
                    length: 1,
                    value: 0x100,
                },
            ),
        ] {
            let bad = doorbell(space, address, matches);
            let refusal = bad.check().unwrap_err();
            assert!(refusal.starts_with(&format!("{bad}: ")), "{refusal}");
        }
    }
}
