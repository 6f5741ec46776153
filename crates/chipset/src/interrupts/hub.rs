//! Where all interrupt lines meet: the wiring between devices, 8259 pair, I/O APIC and processor.

use alloc::{sync::Arc, vec::Vec};

use caisson_device::{
    Access, AddressRange, Claim, Device, Inspector, MAX_LINE_SOURCES, MsiSink, Outcome, ResetKind,
    SaveState, StateError, StateRecord, le_value, put_le,
};
use serde::{Deserialize, Serialize};

use super::{
    ioapic::{Ioapic, IoapicState, PINS},
    pic::{PicPair, PicState},
};

/// How many lines there are: 0 to 23.
pub const LINES: usize = PINS;
/// Where the I/O APIC's registers are.
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;

/// Where the 8259 pair's INTR output ends: LINT0 of the bootstrap processor's local APIC. Called under the hub's lock;
/// an implementation posts to the vCPU and never calls the hub.
pub trait IntrOutput: Send + Sync {
    /// The output now has this level.
    fn set_intr(&self, level: bool);
}

/// All interrupt controllers of the machine as one device, and the end of all [`caisson_device::Line`]s.
///
/// The wiring:
/// - Lines 0 to 15 are the ISA interrupts. Each goes to the 8259 input and the I/O APIC input of its number, except
///   line 0 (the PIT), whose I/O APIC input is number 2, as the MADT's interrupt source override has to tell, and line
///   2, which the cascade takes.
/// - Lines 16 to 23 go to the I/O APIC alone.
/// - The 8259 pair's output goes to [`IntrOutput`] and, as in a PC, to input 0 of the I/O APIC, where an operating
///   system may find it as an ExtINT.
///
/// It is used behind one lock: devices raise lines while their own lock is held, so the order is device, then hub. The
/// hub calls nothing but [`MsiSink`] and [`IntrOutput`].
pub struct InterruptHub {
    pic: PicPair,
    ioapic: Ioapic,
    /// Which sources assert each line, source 0 in bit 0.
    sources: [u64; LINES],
    intr: Arc<dyn IntrOutput>,
    intr_level: bool,
}

#[derive(Serialize, Deserialize)]
struct HubState {
    pic: PicState,
    ioapic: IoapicState,
    sources: [u64; LINES],
}

impl SaveState for HubState {
    const ID: &'static str = "interrupts";
    const VERSION: u16 = 1;
}

const PIC_MASTER: u32 = 0;
const PIC_SLAVE: u32 = 1;
const ELCR: u32 = 2;

impl InterruptHub {
    /// Controllers after power-on, with all lines low.
    pub fn new(msi: Arc<dyn MsiSink>, intr: Arc<dyn IntrOutput>) -> Self {
        Self {
            pic: PicPair::default(),
            ioapic: Ioapic::new(msi),
            sources: [0; LINES],
            intr,
            intr_level: false,
        }
    }

    /// Source `source` of line `line` now drives `level`: what [`caisson_device::LineSink::set`] comes to. Lines and
    /// sources that do not exist are ignored.
    pub fn set_line(&mut self, line: u32, source: u8, level: bool) {
        let Some(sources) = self.sources.get_mut(line as usize) else {
            return;
        };
        if source >= MAX_LINE_SOURCES {
            return;
        }
        let before = *sources;
        *sources = if level {
            before | 1 << source
        } else {
            before & !(1 << source)
        };
        let (before, after) = (before != 0, *sources != 0);
        if before == after {
            return;
        }
        if line < 16 {
            self.pic.set_irq(line as u8, after);
            self.update_intr();
        }
        match line {
            0 => self.ioapic.set_pin(2, after),
            2 => {}
            line => self.ioapic.set_pin(line as usize, after),
        }
    }

    /// Whether any source asserts line `line`.
    pub fn line_level(&self, line: u32) -> bool {
        self.sources
            .get(line as usize)
            .is_some_and(|sources| *sources != 0)
    }

    /// The processor's interrupt-acknowledge cycle: the vector of the 8259 pair's most urgent request.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = self.pic.acknowledge();
        // The output drops at the end of each acknowledge cycle, so that a further request makes a new edge.
        self.drive_intr(false);
        self.update_intr();
        vector
    }

    /// A local APIC has ended the level-triggered interrupt with `vector`.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }

    fn update_intr(&mut self) {
        let level = self.pic.output();
        if level != self.intr_level {
            self.drive_intr(level);
        }
    }

    fn drive_intr(&mut self, level: bool) {
        self.intr_level = level;
        self.intr.set_intr(level);
        self.ioapic.set_pin(0, level);
    }
}

impl Device for InterruptHub {
    fn name(&self) -> &str {
        "interrupts"
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![
            Claim::new(AddressRange::pio(0x20, 2), "8259 master"),
            Claim::new(AddressRange::pio(0xA0, 2), "8259 slave"),
            Claim::new(AddressRange::pio(0x4D0, 2), "ELCR"),
            Claim::new(AddressRange::mmio(IOAPIC_BASE, 0x1000), "IOAPIC"),
        ]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        match at.region {
            PIC_MASTER | PIC_SLAVE => {
                let chip = at.region as usize;
                at.read_each(data, |offset| self.pic.read(chip, offset == 1));
                self.update_intr();
            }
            ELCR => at.read_each(data, |offset| self.pic.elcr(offset as usize)),
            _ => {
                let value = u64::from(self.ioapic.read(at.offset & !3));
                put_le(data, value >> (8 * (at.offset & 3)));
            }
        }
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        match at.region {
            PIC_MASTER | PIC_SLAVE => {
                let chip = at.region as usize;
                at.write_each(data, |offset, value| {
                    self.pic.write(chip, offset == 1, value)
                });
                self.update_intr();
            }
            ELCR => {
                at.write_each(data, |offset, value| {
                    self.pic.set_elcr(offset as usize, value)
                });
                self.update_intr();
            }
            // Only the selector can be written with less than 32 bits.
            _ if data.len() == 4 || at.offset == 0 => {
                self.ioapic.write(at.offset, le_value(data) as u32);
            }
            _ => {}
        }
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {
        self.pic.reset();
        self.ioapic.reset();
        self.drive_intr(false);
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        HubState {
            pic: self.pic.save(),
            ioapic: self.ioapic.save(),
            sources: self.sources,
        }
        .to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = HubState::from_record(record)?;
        self.pic.restore(&state.pic).ok_or_else(|| {
            HubState::invalid("an 8259 register holds a value that it cannot have")
        })?;
        self.ioapic.restore(&state.ioapic).ok_or_else(|| {
            HubState::invalid("an IOAPIC register holds a value that it cannot have")
        })?;
        self.sources = state.sources;
        self.intr_level = self.pic.output();
        self.intr.set_intr(self.intr_level);
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        let asserted = (0..LINES)
            .filter(|line| self.sources[*line] != 0)
            .fold(0u64, |set, line| set | 1 << line);
        inspector.hex("asserted lines", asserted);
        inspector.child("8259", |inspector| self.pic.inspect(inspector));
        inspector.child("IOAPIC", |inspector| self.ioapic.inspect(inspector));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_device::{
        Space,
        testing::{RecordedMsis, port_read, port_write, read, write},
    };
    use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    #[derive(Default)]
    struct Lint0 {
        level: AtomicBool,
        edges: AtomicU32,
    }

    impl IntrOutput for Lint0 {
        fn set_intr(&self, level: bool) {
            let before = self.level.swap(level, Ordering::SeqCst);
            self.edges
                .fetch_add(u32::from(level && !before), Ordering::SeqCst);
        }
    }

    fn hub() -> (InterruptHub, Arc<RecordedMsis>, Arc<Lint0>) {
        let (msis, intr) = (RecordedMsis::new(), Arc::<Lint0>::default());
        let mut hub = InterruptHub::new(msis.clone(), intr.clone());
        hub.reset(ResetKind::PowerOn);
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, 1),
            (0xA0, 0x11),
            (0xA1, 0x28),
            (0xA1, 2),
            (0xA1, 1),
        ] {
            port_write(&mut hub, port, 1, value);
        }
        (hub, msis, intr)
    }

    fn redirect(hub: &mut InterruptHub, pin: u64, low: u64) {
        write(hub, Space::Mmio, IOAPIC_BASE, 1, 0x10 + 2 * pin);
        write(hub, Space::Mmio, IOAPIC_BASE + 0x10, 4, low);
    }

    #[test]
    fn isa_lines_reach_both_controllers() {
        let (mut hub, msis, intr) = hub();
        redirect(&mut hub, 4, 0x44);
        hub.set_line(4, 0, true);
        assert_eq!(msis.take()[0].data, 0x4044);
        assert!(intr.level.load(Ordering::SeqCst));
        assert_eq!(hub.acknowledge(), 0x24);
        assert!(!intr.level.load(Ordering::SeqCst));
    }

    #[test]
    fn the_timer_is_input_two_of_the_ioapic() {
        let (mut hub, msis, _) = hub();
        redirect(&mut hub, 2, 0x42);
        redirect(&mut hub, 0, 0x1_0040);
        hub.set_line(0, 0, true);
        assert_eq!(msis.take()[0].data, 0x4042);
        assert_eq!(hub.acknowledge(), 0x20);
    }

    #[test]
    fn pci_lines_reach_the_ioapic_alone() {
        let (mut hub, msis, intr) = hub();
        redirect(&mut hub, 20, 0x8050);
        hub.set_line(20, 0, true);
        hub.set_line(20, 1, true);
        assert_eq!(msis.take().len(), 1);
        assert!(!intr.level.load(Ordering::SeqCst));
        hub.set_line(20, 0, false);
        hub.end_of_interrupt(0x50);
        assert_eq!(msis.take().len(), 1, "the other source asserts it still");
        hub.set_line(20, 1, false);
        hub.end_of_interrupt(0x50);
        assert_eq!(msis.take(), []);
    }

    #[test]
    fn the_8259_can_be_had_through_the_ioapic() {
        let (mut hub, msis, _) = hub();
        redirect(&mut hub, 0, 0x700);
        hub.set_line(1, 0, true);
        hub.set_line(3, 0, true);
        assert_eq!(msis.take()[0].data, 0x4700);
        assert_eq!(hub.acknowledge(), 0x21);
        assert_eq!(msis.take().len(), 0, "3 waits for the end of 1");
        port_write(&mut hub, 0x20, 1, 0x20);
        assert_eq!(msis.take().len(), 1);
        assert_eq!(hub.acknowledge(), 0x23);
    }

    #[test]
    fn each_acknowledge_makes_a_new_edge() {
        let (mut hub, _, intr) = hub();
        hub.set_line(3, 0, true);
        hub.set_line(8, 0, true);
        assert_eq!(hub.acknowledge(), 0x28);
        port_write(&mut hub, 0xA0, 1, 0x20);
        port_write(&mut hub, 0x20, 1, 0x20);
        assert_eq!(hub.acknowledge(), 0x23);
        assert_eq!(intr.edges.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn ports_of_each_width() {
        let (mut hub, ..) = hub();
        port_write(&mut hub, 0x4D0, 2, 0x0C20);
        assert_eq!(port_read(&mut hub, 0x4D0, 2), 0x0C20);
        port_write(&mut hub, 0x21, 1, 0xFB);
        assert_eq!(port_read(&mut hub, 0x20, 2), 0xFB00);
        write(&mut hub, Space::Mmio, IOAPIC_BASE, 4, 1);
        assert_eq!(
            read(&mut hub, Space::Mmio, IOAPIC_BASE + 0x10, 4),
            0x0017_0020
        );
        assert_eq!(read(&mut hub, Space::Mmio, IOAPIC_BASE + 0x12, 2), 0x17);
        assert_eq!(read(&mut hub, Space::Mmio, IOAPIC_BASE + 0x20, 8), 0);
    }

    #[test]
    fn state_survives_save_and_restore() {
        let (mut hub, ..) = self::hub();
        redirect(&mut hub, 9, 0x8031);
        hub.set_line(9, 3, true);
        let record = hub.save().unwrap();
        let (mut other, msis, intr) = self::hub();
        other.restore(&record).unwrap();
        assert!(intr.level.load(Ordering::SeqCst), "INTR is driven");
        assert_eq!(other.save().unwrap(), record);
        other.set_line(9, 3, true);
        assert_eq!(
            msis.take(),
            [],
            "a device that drives its line again changes nothing"
        );
        other.end_of_interrupt(0x31);
        assert_eq!(msis.take().len(), 1);
    }

    #[test]
    fn lines_that_do_not_exist_are_ignored() {
        let (mut hub, msis, _) = hub();
        hub.set_line(24, 0, true);
        hub.set_line(u32::MAX, 0, true);
        hub.set_line(3, 64, true);
        assert!(!hub.line_level(3));
        assert_eq!(msis.take(), []);
    }
}
