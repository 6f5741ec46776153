//! The local vector table: interrupts that arise in the processor itself or at its two pins (SDM "Local Vector
//! Table").

use crate::{base::Mode, lapic::Lapic, message::DeliveryMode, regs, state::LapicState};

/// An entry of the local vector table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Lvt {
    /// The APIC timer.
    Timer,
    /// The thermal sensor.
    Thermal,
    /// A performance counter's overflow.
    Performance,
    /// Pin LINT0: the 8259's output.
    Lint0,
    /// Pin LINT1: the NMI button.
    Lint1,
    /// An error noted in the ESR.
    Error,
}

/// What a local interrupt does that is not a matter of the APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalEvent {
    /// The vCPU gets an NMI.
    Nmi,
    /// The vCPU gets an INIT, which the APIC has yet to go through ([`Lapic::init`]).
    Init,
}

/// The number of entries.
pub(crate) const COUNT: usize = 6;

pub(crate) const MASKED: u32 = 1 << 16;
const STATUS: u32 = 1 << 12;
const REMOTE_IRR: u32 = 1 << 14;
const LEVEL_TRIGGERED: u32 = 1 << 15;
const READ_ONLY: u32 = STATUS | REMOTE_IRR;

const ALL: [Lvt; COUNT] = [
    Lvt::Timer,
    Lvt::Thermal,
    Lvt::Performance,
    Lvt::Lint0,
    Lvt::Lint1,
    Lvt::Error,
];

impl Lvt {
    /// The entry with register number `register`.
    pub(crate) fn of_register(register: u32) -> Option<Lvt> {
        ALL.get(register.checked_sub(regs::LVT_FIRST)? as usize)
            .copied()
    }

    /// The bits that software can change.
    pub(crate) fn writable(self) -> u32 {
        match self {
            Lvt::Timer => 0x7_00FF,
            Lvt::Thermal | Lvt::Performance => 0x1_07FF,
            Lvt::Lint0 | Lvt::Lint1 => 0x1_A7FF,
            Lvt::Error => 0x1_00FF,
        }
    }

    /// The bits that exist; writing any other in x2APIC mode is a fault.
    pub(crate) fn defined(self) -> u32 {
        match self {
            Lvt::Lint0 | Lvt::Lint1 => self.writable() | READ_ONLY,
            _ => self.writable() | STATUS,
        }
    }
}

/// The value of an entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LvtValue {
    pub(crate) bits: u32,
    has_mode: bool,
}

impl LvtValue {
    fn vector(self) -> u8 {
        self.bits as u8
    }

    pub(crate) fn masked(self) -> bool {
        self.bits & MASKED != 0
    }

    fn mode(self) -> Option<DeliveryMode> {
        if self.has_mode {
            DeliveryMode::from_bits(self.bits >> 8, true)
        } else {
            Some(DeliveryMode::Fixed)
        }
    }

    pub(crate) fn delivers(self, mode: DeliveryMode) -> bool {
        !self.masked() && self.mode() == Some(mode)
    }

    fn level_triggered(self) -> bool {
        self.bits & LEVEL_TRIGGERED != 0
    }
}

impl LapicState {
    pub(crate) fn lvt(&self, entry: Lvt) -> LvtValue {
        LvtValue {
            bits: self.lvt[entry as usize],
            has_mode: !matches!(entry, Lvt::Timer | Lvt::Error),
        }
    }
}

impl Lapic {
    /// Stores `value` into an entry, keeping what software cannot change.
    pub(crate) fn write_lvt(&mut self, entry: Lvt, value: u32) {
        let writable = entry.writable();
        let slot = &mut self.state.lvt[entry as usize];
        *slot = (*slot & READ_ONLY) | (value & writable);
        if self.state.svr & regs::SVR_ENABLE == 0 {
            *slot |= MASKED;
        }
        if *slot & (MASKED | LEVEL_TRIGGERED) != LEVEL_TRIGGERED {
            *slot &= !REMOTE_IRR;
        }
        if entry == Lvt::Lint0 {
            self.lint0_level();
        }
    }

    /// Masks all entries: what disabling the APIC by software does.
    pub(crate) fn mask_lvt(&mut self) {
        for entry in &mut self.state.lvt {
            *entry |= MASKED;
        }
    }

    /// The source of `entry` interrupts: [`Lvt::Thermal`] and [`Lvt::Performance`] for those who emulate these; the
    /// APIC raises the others itself. Returns what the vCPU has to do about it, if anything.
    pub fn fire(&mut self, entry: Lvt) -> Option<LocalEvent> {
        let value = self.state.lvt(entry);
        if value.masked() || self.mode() == Mode::Disabled {
            return None;
        }
        if entry == Lvt::Performance {
            self.state.lvt[entry as usize] |= MASKED;
        }
        match value.mode()? {
            DeliveryMode::Fixed => {
                self.inject(value.vector(), false);
                None
            }
            DeliveryMode::Nmi => Some(LocalEvent::Nmi),
            DeliveryMode::Init => Some(LocalEvent::Init),
            DeliveryMode::ExtInt => {
                self.state.ext_int |= entry != Lvt::Lint0;
                None
            }
            DeliveryMode::Smi | DeliveryMode::LowestPriority | DeliveryMode::StartUp => None,
        }
    }

    /// Notes the level of pin LINT0. Its rise is an edge for an edge-triggered entry.
    pub(crate) fn set_lint0(&mut self, level: bool) -> Option<LocalEvent> {
        let rises = level && !self.state.lint0;
        self.state.lint0 = level;
        let value = self.state.lvt(Lvt::Lint0);
        if value.level_triggered() && value.delivers(DeliveryMode::Fixed) {
            self.lint0_level();
            return None;
        }
        if rises { self.fire(Lvt::Lint0) } else { None }
    }

    /// Requests the interrupt of a level-triggered LINT0 that is high and not yet being served.
    fn lint0_level(&mut self) {
        let value = self.state.lvt(Lvt::Lint0);
        if self.state.lint0
            && value.level_triggered()
            && value.delivers(DeliveryMode::Fixed)
            && value.bits & REMOTE_IRR == 0
            && value.vector() >= 16
        {
            self.state.lvt[Lvt::Lint0 as usize] |= REMOTE_IRR;
            self.inject(value.vector(), false);
        }
    }

    /// Lets a level-triggered LINT0 interrupt again once `vector` has ended.
    pub(crate) fn lint0_ended(&mut self, vector: u8) {
        let value = self.state.lvt(Lvt::Lint0);
        if value.bits & REMOTE_IRR != 0 && value.vector() == vector {
            self.state.lvt[Lvt::Lint0 as usize] &= !REMOTE_IRR;
            self.lint0_level();
        }
    }

    /// A rising edge at pin LINT1.
    pub(crate) fn pulse_lint1(&mut self) -> Option<LocalEvent> {
        if self.mode() == Mode::Disabled {
            return Some(LocalEvent::Nmi);
        }
        self.fire(Lvt::Lint1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Mailbox, Pending, Time};

    const T0: Time = Time { nanos: 0, tsc: 0 };

    fn write(lapic: &mut Lapic, offset: u64, value: u32) {
        let _ = lapic.write_mmio(offset, &value.to_le_bytes(), T0);
    }

    fn read(lapic: &mut Lapic, offset: u64) -> u32 {
        let mut data = [0; 4];
        lapic.read_mmio(offset, &mut data, T0);
        u32::from_le_bytes(data)
    }

    fn enabled() -> Lapic {
        let mut lapic = Lapic::new(Config::new(0, true));
        write(&mut lapic, 0xF0, 0x1FF);
        lapic
    }

    #[test]
    fn entries_are_masked_while_software_disabled() {
        let mut lapic = Lapic::new(Config::new(0, true));
        write(&mut lapic, 0x350, 0x700);
        assert_eq!(read(&mut lapic, 0x350), 0x10700);
        write(&mut lapic, 0xF0, 0x1FF);
        write(&mut lapic, 0x350, 0x700);
        assert_eq!(read(&mut lapic, 0x350), 0x700);
        write(&mut lapic, 0xF0, 0x0FF);
        for offset in (0x320..=0x370).step_by(16) {
            assert_ne!(read(&mut lapic, offset) & MASKED, 0, "{offset:#x}");
        }
    }

    #[test]
    fn entries_keep_only_defined_bits() {
        let mut lapic = enabled();
        for (offset, expected) in [
            (0x320, 0x7_00FF),
            (0x330, 0x1_07FF),
            (0x340, 0x1_07FF),
            (0x350, 0x1_A7FF),
            (0x360, 0x1_A7FF),
            (0x370, 0x1_00FF),
        ] {
            write(&mut lapic, offset, u32::MAX);
            assert_eq!(read(&mut lapic, offset), expected, "{offset:#x}");
        }
    }

    #[test]
    fn a_performance_interrupt_masks_itself() {
        let mut lapic = enabled();
        write(&mut lapic, 0x340, 0x400);
        assert_eq!(lapic.fire(Lvt::Performance), Some(LocalEvent::Nmi));
        assert_eq!(lapic.fire(Lvt::Performance), None);
        assert_eq!(read(&mut lapic, 0x340), 0x10400);
    }

    #[test]
    fn edge_triggered_lint0_interrupts_once_per_rise() {
        let mut lapic = enabled();
        write(&mut lapic, 0x350, 0x31);
        let mailbox = Mailbox::new();
        mailbox.set_lint0(true);
        let _ = lapic.collect(&mailbox);
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x31)));
        lapic.accept(0x31);
        write(&mut lapic, 0xB0, 0);
        let _ = lapic.collect(&mailbox);
        assert_eq!(lapic.pending(), None);
        mailbox.set_lint0(false);
        let _ = lapic.collect(&mailbox);
        mailbox.set_lint0(true);
        let _ = lapic.collect(&mailbox);
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x31)));
    }

    #[test]
    fn level_triggered_lint0_interrupts_until_it_falls() {
        let mut lapic = enabled();
        let mailbox = Mailbox::new();
        mailbox.set_lint0(true);
        let _ = lapic.collect(&mailbox);
        write(&mut lapic, 0x350, 0x8031);
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x31)));
        lapic.accept(0x31);
        assert_eq!(lapic.pending(), None);
        assert_eq!(read(&mut lapic, 0x350), 0xC031, "remote IRR");
        write(&mut lapic, 0xB0, 0);
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x31)));
        lapic.accept(0x31);
        mailbox.set_lint0(false);
        let _ = lapic.collect(&mailbox);
        write(&mut lapic, 0xB0, 0);
        assert_eq!(lapic.pending(), None);
        assert_eq!(read(&mut lapic, 0x350), 0x8031);
    }

    #[test]
    fn init_through_a_pin_resets_the_apic() {
        let mut lapic = enabled();
        write(&mut lapic, 0x360, 0x500);
        lapic.inject(0x41, false);
        let mailbox = Mailbox::new();
        mailbox.pulse_lint1();
        assert!(lapic.collect(&mailbox).init);
        assert!(!lapic.is_enabled());
        assert_eq!(lapic.pending(), None);
    }
}
