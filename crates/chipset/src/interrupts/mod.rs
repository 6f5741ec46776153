//! The machine's interrupt controllers, and the hub where all lines meet.
//!
//! - [`PicPair`]: two cascaded Intel 8259A with the ELCR of PCI-era chipsets.
//! - [`Ioapic`]: one 82093AA-compatible I/O APIC with 24 pins and, as version 0x20, an EOI register.
//! - [`InterruptHub`]: both, wired as in a PC, as one device behind one lock.
//!
//! Left out: the IMCR (0x22/0x23), which machines that start in virtual-wire mode do not have, and pin polarity:
//! a line is asserted or not, so the IOAPIC's polarity bit is stored and has no effect.

mod hub;
mod ioapic;
mod pic;

pub use hub::{IOAPIC_BASE, InterruptHub, IntrOutput, LINES};
pub use ioapic::{Ioapic, IoapicState, PINS};
pub use pic::{PicPair, PicState};
