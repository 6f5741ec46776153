//! A local APIC for any vCPU, at any trust level, on any backend.
//!
//! Specification: Intel SDM Vol. 3A, chapter "Advanced Programmable Interrupt Controller (APIC)", cited below by
//! section title. Two parts:
//!
//! - [`Lapic`] is one vCPU's APIC as plain state. The vCPU's thread owns it and calls it for each access; what an
//!   access does elsewhere comes back as [`Effects`].
//! - [`ApicBus`] is what all threads share: a lock-free [`Mailbox`] per vCPU into which interrupts are posted, and a
//!   mirror of what routing needs to know of each APIC. Any thread may deliver a [`Message`] (an MSI or an IPI).
//!
//! ```
//! use caisson_lapic::{ApicBus, Config, Lapic, Message, Time};
//!
//! let bus = ApicBus::new(&[0, 1]);
//! let mut lapic = Lapic::new(Config::new(1, false));
//! let now = Time { nanos: 0, tsc: 0 };
//! let _ = lapic.write_mmio(0xF0, &0x1FFu32.to_le_bytes(), now);
//! bus.publish(1, lapic.identity());
//!
//! let mut kicked = vec![];
//! bus.deliver(&Message::from_msi(0xFEE0_1000, 0x41).unwrap(), None, |vcpu| kicked.push(vcpu));
//! assert_eq!(kicked, [1]);
//! lapic.collect(bus.mailbox(1).unwrap());
//! assert_eq!(lapic.highest_pending(), Some(0x41));
//! ```
//!
//! Left out: the corrected-machine-check LVT entry (the version register announces the six entries that exist),
//! writable xAPIC ids (the SDM calls them model specific), focus-processor checking and remote read, which current
//! processors do not have either. SMIs are accepted and dropped: there is no system-management mode to enter.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod base;
mod bus;
mod lapic;
mod lvt;
mod mailbox;
mod message;
mod mmio;
mod msr;
mod page;
mod regs;
mod state;
mod timer;
mod vectors;

pub use base::Mode;
pub use bus::{ApicBus, Identity};
pub use lapic::{Config, Effects, GeneralProtection, Lapic, Pending};
pub use lvt::{LocalEvent, Lvt};
pub use mailbox::{Mailbox, Received};
pub use message::{DeliveryMode, Destination, Ipi, Message, Shorthand};
pub use page::PAGE_LEN;
pub use regs::{DEFAULT_BASE, MMIO_LEN, X2APIC_MSR_FIRST, X2APIC_MSR_LAST};
pub use state::{InvalidState, LapicState};
pub use timer::{BUS_HZ, Deadline, Time};
pub use vectors::VectorSet;
