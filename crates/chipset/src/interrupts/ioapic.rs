//! The I/O APIC (Intel 82093AA data sheet; EOI register as in later chipsets' data sheets).

use alloc::sync::Arc;

use caisson_device::{Inspector, Msi, MsiSink};
use serde::{Deserialize, Serialize};

/// How many inputs it has.
pub const PINS: usize = 24;

const VERSION: u32 = 0x20 | ((PINS as u32 - 1) << 16);
const ID_MASK: u32 = 0x0F00_0000;

const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
/// Vector to mask, and the destination with its seven extension bits.
const WRITABLE: u64 = 0xFFFE_0000_0001_FFFF & !READ_ONLY;

/// The saved state of an [`Ioapic`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    id: u32,
    select: u8,
    /// The levels of the inputs, input 0 in bit 0.
    pins: u32,
    redirection: [u64; PINS],
}

/// An I/O APIC with 24 inputs. Its interrupts leave as MSIs.
///
/// A masked edge is lost, as the data sheet says; a masked level is delivered when the mask goes. An entry's
/// destination may use bits 49 to 55 as upper bits of a 15-bit id, which end up in bits 5 to 11 of the MSI's address.
pub struct Ioapic {
    state: IoapicState,
    msi: Arc<dyn MsiSink>,
}

impl Ioapic {
    /// An I/O APIC after power-on: all inputs masked.
    pub fn new(msi: Arc<dyn MsiSink>) -> Self {
        let state = IoapicState {
            id: 0,
            select: 0,
            pins: 0,
            redirection: [MASKED; PINS],
        };
        Self { state, msi }
    }

    /// Returns to the state after power-on. The levels of the inputs stay.
    pub fn reset(&mut self) {
        self.state = IoapicState {
            id: 0,
            select: 0,
            pins: self.state.pins,
            redirection: [MASKED; PINS],
        };
    }

    /// Drives input `pin`, 0 to 23.
    pub fn set_pin(&mut self, pin: usize, level: bool) {
        if pin >= PINS {
            return;
        }
        let bit = 1 << pin;
        let rises = level && self.state.pins & bit == 0;
        self.state.pins = if level {
            self.state.pins | bit
        } else {
            self.state.pins & !bit
        };
        let entry = self.state.redirection[pin];
        if is_level(entry) {
            self.serve_level(pin);
        } else if rises && entry & MASKED == 0 {
            self.send(entry);
        }
    }

    /// A local APIC has ended the level-triggered interrupt with `vector`.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS {
            let entry = self.state.redirection[pin];
            if entry as u8 == vector && entry & REMOTE_IRR != 0 {
                self.state.redirection[pin] &= !REMOTE_IRR;
                self.serve_level(pin);
            }
        }
    }

    fn serve_level(&mut self, pin: usize) {
        let entry = self.state.redirection[pin];
        if is_level(entry) && self.state.pins & 1 << pin != 0 && entry & (MASKED | REMOTE_IRR) == 0
        {
            self.state.redirection[pin] |= REMOTE_IRR;
            self.send(entry);
        }
    }

    fn send(&self, entry: u64) {
        let destination = entry >> 56;
        let extension = entry >> 49 & 0x7F;
        let logical = entry >> 11 & 1;
        let trigger = if is_level(entry) { 1 << 15 } else { 0 };
        self.msi.send(Msi {
            address: 0xFEE0_0000 | destination << 12 | extension << 5 | logical << 2,
            data: (entry & 0x7FF) as u32 | 1 << 14 | trigger,
        });
    }

    /// Reads the 32-bit register at `offset`: 0 selector, 0x10 window.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            0x00 => self.state.select.into(),
            0x10 => self.read_selected(),
            _ => 0,
        }
    }

    fn read_selected(&self) -> u32 {
        match self.state.select {
            0 => self.state.id,
            1 => VERSION,
            2 => self.state.id,
            select => match self.entry(select) {
                Some((pin, 0)) => self.state.redirection[pin] as u32,
                Some((pin, _)) => (self.state.redirection[pin] >> 32) as u32,
                None => 0,
            },
        }
    }

    /// The input and half (0 low, 1 high) of the entry at index `select`.
    fn entry(&self, select: u8) -> Option<(usize, u8)> {
        let index = select.checked_sub(0x10)?;
        let pin = usize::from(index >> 1);
        (pin < PINS).then_some((pin, index & 1))
    }

    /// Writes the 32-bit register at `offset`: 0 selector, 0x10 window, 0x40 EOI.
    pub(super) fn write(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.state.select = value as u8,
            0x10 => self.write_selected(value),
            0x40 => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }

    fn write_selected(&mut self, value: u32) {
        if self.state.select == 0 {
            self.state.id = value & ID_MASK;
        }
        let Some((pin, half)) = self.entry(self.state.select) else {
            return;
        };
        let entry = &mut self.state.redirection[pin];
        let written = match half {
            0 => *entry & !0xFFFF_FFFF | u64::from(value),
            _ => *entry & 0xFFFF_FFFF | u64::from(value) << 32,
        };
        *entry = *entry & REMOTE_IRR | written & WRITABLE;
        if !is_level(*entry) {
            *entry &= !REMOTE_IRR;
        }
        self.serve_level(pin);
    }

    pub(super) fn save(&self) -> IoapicState {
        self.state.clone()
    }

    /// Takes over a saved state; `None` when no I/O APIC can be in it.
    pub(super) fn restore(&mut self, state: &IoapicState) -> Option<()> {
        let valid = state.id & !ID_MASK == 0
            && state.pins >> PINS == 0
            && state.redirection.iter().all(|entry| {
                entry & !(WRITABLE | REMOTE_IRR) == 0
                    && (is_level(*entry) || entry & REMOTE_IRR == 0)
            });
        valid.then(|| self.state = state.clone())
    }

    pub(super) fn inspect(&self, inspector: &mut Inspector) {
        inspector.hex("pins", self.state.pins);
        for (pin, entry) in self.state.redirection.iter().enumerate() {
            if entry & MASKED == 0 {
                inspector.hex(alloc::format!("entry {pin}"), *entry);
            }
        }
    }
}

/// Whether an entry reacts to the level: only those that deliver a vector can.
fn is_level(entry: u64) -> bool {
    entry & LEVEL != 0 && entry >> 8 & 7 <= 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_device::testing::RecordedMsis;
    use std::vec::Vec;

    fn ioapic() -> (Ioapic, Arc<RecordedMsis>) {
        let msis = RecordedMsis::new();
        (Ioapic::new(msis.clone()), msis)
    }

    fn program(ioapic: &mut Ioapic, pin: u32, entry: u64) {
        ioapic.write(0, 0x11 + 2 * pin);
        ioapic.write(0x10, (entry >> 32) as u32);
        ioapic.write(0, 0x10 + 2 * pin);
        ioapic.write(0x10, entry as u32);
    }

    fn low(ioapic: &mut Ioapic, pin: u32) -> u32 {
        ioapic.write(0, 0x10 + 2 * pin);
        ioapic.read(0x10)
    }

    #[test]
    fn identification() {
        let (mut ioapic, _) = ioapic();
        ioapic.write(0, 1);
        assert_eq!(ioapic.read(0x10), 0x0017_0020);
        ioapic.write(0, 0);
        ioapic.write(0x10, u32::MAX);
        assert_eq!(ioapic.read(0x10), 0x0F00_0000);
        for select in [3, 0x0F, 0x40, 0xFF] {
            ioapic.write(0, select);
            ioapic.write(0x10, u32::MAX);
            assert_eq!(ioapic.read(0x10), 0, "{select:#x}");
        }
        assert_eq!(low(&mut ioapic, 23), 0x10000);
    }

    #[test]
    fn edges_are_sent_once() {
        let (mut ioapic, msis) = ioapic();
        program(&mut ioapic, 4, 0x0300_0000_0000_0031);
        ioapic.set_pin(4, true);
        ioapic.set_pin(4, true);
        ioapic.set_pin(4, false);
        assert_eq!(
            msis.take(),
            [Msi {
                address: 0xFEE0_3000,
                data: 0x4031
            }]
        );
    }

    #[test]
    fn masked_edges_are_lost() {
        let (mut ioapic, msis) = ioapic();
        program(&mut ioapic, 4, 0x1_0031);
        ioapic.set_pin(4, true);
        program(&mut ioapic, 4, 0x31);
        assert_eq!(msis.take(), []);
    }

    #[test]
    fn levels_wait_for_the_end_of_interrupt() {
        let (mut ioapic, msis) = ioapic();
        program(&mut ioapic, 9, 0x0100_0000_0000_A931);
        ioapic.set_pin(9, true);
        assert_eq!(
            msis.take(),
            [Msi {
                address: 0xFEE0_1004,
                data: 0xC131
            }]
        );
        assert_eq!(low(&mut ioapic, 9), 0xE931, "remote IRR");
        ioapic.end_of_interrupt(0x32);
        assert_eq!(msis.take(), []);
        ioapic.end_of_interrupt(0x31);
        assert_eq!(msis.take().len(), 1, "still asserted");
        ioapic.set_pin(9, false);
        ioapic.write(0x40, 0x31);
        assert_eq!(msis.take(), []);
        assert_eq!(low(&mut ioapic, 9), 0xA931);
    }

    #[test]
    fn a_masked_level_is_delivered_when_the_mask_goes() {
        let (mut ioapic, msis) = ioapic();
        program(&mut ioapic, 9, 0x1_8031);
        ioapic.set_pin(9, true);
        assert_eq!(msis.take(), []);
        program(&mut ioapic, 9, 0x8031);
        assert_eq!(msis.take().len(), 1);
    }

    #[test]
    fn remote_irr_cannot_be_written_and_goes_with_the_level_bit() {
        let (mut ioapic, _) = ioapic();
        program(&mut ioapic, 9, 0xD031);
        assert_eq!(low(&mut ioapic, 9), 0x8031);
        ioapic.set_pin(9, true);
        assert_eq!(low(&mut ioapic, 9), 0xC031);
        program(&mut ioapic, 9, 0x1_0031);
        assert_eq!(
            low(&mut ioapic, 9),
            0x1_0031,
            "as Linux clears a stuck interrupt"
        );
    }

    #[test]
    fn delivery_modes_without_a_vector_are_edges() {
        let (mut ioapic, msis) = ioapic();
        for (pin, mode) in [(0, 7), (1, 4), (2, 2), (3, 5)] {
            program(&mut ioapic, pin, 0x8000 | mode << 8);
            ioapic.set_pin(pin as usize, true);
            ioapic.set_pin(pin as usize, true);
        }
        let data: Vec<_> = msis.take().iter().map(|msi| msi.data).collect();
        assert_eq!(data, [0x4700, 0x4400, 0x4200, 0x4500]);
        assert_eq!(low(&mut ioapic, 0) & 0x4000, 0);
    }

    #[test]
    fn destinations_have_up_to_fifteen_bits() {
        let (mut ioapic, msis) = ioapic();
        program(&mut ioapic, 4, 0x34 << 56 | 0x12 << 49 | 0x31);
        ioapic.set_pin(4, true);
        assert_eq!(msis.take()[0].address, 0xFEE3_4240);
    }

    #[test]
    fn inputs_that_do_not_exist_are_ignored() {
        let (mut ioapic, msis) = ioapic();
        ioapic.set_pin(24, true);
        ioapic.set_pin(usize::MAX, true);
        assert_eq!(msis.take(), []);
    }
}
