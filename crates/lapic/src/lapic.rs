//! The APIC of one vCPU: its registers, and the arbitration between interrupts.

use crate::{
    base::{self, Mode},
    bus::Identity,
    lvt::{LocalEvent, Lvt},
    mailbox::{Mailbox, Received},
    message::{DeliveryMode, Destination, Ipi, Message, Shorthand},
    regs::{self, DEFAULT_BASE},
    state::LapicState,
};

/// What is fixed when a vCPU is made.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The APIC id: 32 bits in x2APIC mode, of which xAPIC mode shows the low 8.
    pub id: u32,
    /// Whether this is the vCPU that starts the machine (IA32_APIC_BASE bit 8).
    pub bootstrap: bool,
    /// The number of guest physical address bits (CPUID 0x80000008), 36 to 52: limits IA32_APIC_BASE.
    pub physical_address_bits: u8,
    /// Whether software may switch EOI broadcasts off (SVR bit 12) and tell the IOAPIC itself. Leave it off unless the
    /// machine's IOAPIC has an EOI register (version 0x20).
    pub directed_eoi: bool,
}

impl Config {
    /// A configuration with 46 address bits and without directed EOI.
    pub const fn new(id: u32, bootstrap: bool) -> Self {
        Self {
            id,
            bootstrap,
            physical_address_bits: 46,
            directed_eoi: false,
        }
    }
}

/// A general-protection exception, #GP(0), that the access raises instead of taking effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the access raises #GP(0)")]
pub struct GeneralProtection;

/// What an access to the APIC does beyond it, to be carried out by the vCPU's thread before the next instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Effects {
    /// Send this to [`crate::ApicBus::send`].
    pub ipi: Option<Ipi>,
    /// Tell the IOAPICs that this level-triggered vector has ended.
    pub eoi: Option<u8>,
    /// [`Lapic::next_timer_deadline`] may have changed.
    pub timer_changed: bool,
    /// Publish [`Lapic::identity`] with [`crate::ApicBus::publish`].
    pub identity_changed: bool,
}

/// What the vCPU may be interrupted with once its IF allows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// An interrupt of the APIC; take it with [`Lapic::accept`].
    Vector(u8),
    /// An interrupt whose vector comes from the 8259 (INTA cycle); take it with [`Lapic::accept_ext_int`].
    ExtInt,
}

/// The local APIC of one vCPU. Owned and called by the vCPU's thread only.
#[derive(Clone, Debug)]
pub struct Lapic {
    pub(crate) config: Config,
    pub(crate) state: LapicState,
}

impl Lapic {
    /// An APIC as after power-on: xAPIC mode, software-disabled.
    pub fn new(config: Config) -> Self {
        let mut lapic = Self {
            config,
            state: LapicState::default(),
        };
        lapic.reset();
        lapic
    }

    /// Returns to the state after power-on.
    pub fn reset(&mut self) {
        let bsp = if self.config.bootstrap { base::BSP } else { 0 };
        self.state = LapicState {
            id: self.config.id,
            apic_base: DEFAULT_BASE | base::ENABLE | bsp,
            lint0: self.state.lint0,
            ..LapicState::default()
        };
        self.state.reset_registers();
    }

    /// What an INIT does: all registers but the id and IA32_APIC_BASE return to their power-on values
    /// (SDM "Local APIC State After It Receives an INIT-Deassert IPI").
    pub fn init(&mut self) {
        self.state.reset_registers();
    }

    /// Programs what PC firmware leaves behind for an operating system that uses the 8259 (MP specification, "Virtual
    /// Wire Mode"): APIC enabled with spurious vector 0xFF, LINT0 as ExtINT, LINT1 as NMI. For machines that start a
    /// kernel without firmware; on the bootstrap vCPU.
    pub fn program_virtual_wire(&mut self) {
        self.state.svr = 0xFF | regs::SVR_ENABLE;
        self.state.lvt[Lvt::Lint0 as usize] = 7 << 8;
        self.state.lvt[Lvt::Lint1 as usize] = 4 << 8;
    }

    /// The APIC id.
    pub fn id(&self) -> u32 {
        self.state.id
    }

    /// Whether software has enabled the APIC (SVR bit 8) and IA32_APIC_BASE has too: only then are interrupts with a
    /// vector accepted.
    pub fn is_enabled(&self) -> bool {
        self.state.svr & regs::SVR_ENABLE != 0 && self.mode() != Mode::Disabled
    }

    /// What the bus has to know for routing.
    pub fn identity(&self) -> Identity {
        Identity {
            mode: self.mode(),
            enabled: self.is_enabled(),
            logical_id: (self.state.ldr >> 24) as u8,
            flat: self.state.dfr >> 28 == 0xF,
        }
    }

    /// Takes over what was posted to `mailbox`. When an INIT was among it, the caller also publishes
    /// [`Lapic::identity`] anew.
    pub fn collect(&mut self, mailbox: &Mailbox) -> Received {
        let taken = mailbox.take();
        let mut received = Received {
            init: taken.init,
            start_up: taken.start_up,
            nmi: taken.nmi,
        };
        if taken.init {
            self.init();
        } else if self.is_enabled() {
            let LapicState { irr, tmr, .. } = &mut self.state;
            irr.merge(taken.vectors, taken.level, tmr);
            if taken.vectors[0] & 0xFFFF != 0 {
                irr.drop_illegal();
                self.error(regs::ESR_RECEIVE_ILLEGAL_VECTOR);
            }
            self.state.ext_int |= taken.ext_int;
        }
        for event in [
            self.set_lint0(taken.lint0),
            taken.lint1.then(|| self.pulse_lint1()).flatten(),
        ] {
            match event {
                Some(LocalEvent::Nmi) => received.nmi = true,
                Some(LocalEvent::Init) => {
                    self.init();
                    received.init = true;
                }
                None => {}
            }
        }
        received
    }

    /// Accepts an interrupt with a vector, as if a message had brought it.
    pub fn inject(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            self.error(regs::ESR_RECEIVE_ILLEGAL_VECTOR);
        } else if self.is_enabled() {
            self.state.irr.insert(vector);
            self.state.tmr.set(vector, level);
        }
    }

    /// The processor priority: 0 to 255 (SDM "Task and Processor Priorities").
    #[inline]
    pub fn processor_priority(&self) -> u8 {
        let in_service = self.state.isr.highest().unwrap_or(0) & 0xF0;
        if self.state.tpr & 0xF0 >= in_service {
            self.state.tpr
        } else {
            in_service
        }
    }

    /// The vector of the highest-priority interrupt that the processor priority lets through.
    #[inline]
    pub fn highest_pending(&self) -> Option<u8> {
        let vector = self.state.irr.highest()?;
        (vector & 0xF0 > self.processor_priority() & 0xF0).then_some(vector)
    }

    /// What the vCPU is to be interrupted with, if its IF is set. An interrupt of the 8259 goes first: it has no
    /// priority within the APIC.
    #[inline]
    pub fn pending(&self) -> Option<Pending> {
        if self.ext_int_pending() {
            return Some(Pending::ExtInt);
        }
        self.highest_pending().map(Pending::Vector)
    }

    fn ext_int_pending(&self) -> bool {
        if self.state.ext_int {
            return true;
        }
        self.state.lint0
            && (self.mode() == Mode::Disabled
                || self.state.lvt(Lvt::Lint0).delivers(DeliveryMode::ExtInt))
    }

    /// Moves `vector`, which [`Lapic::pending`] gave, from requested to in service: the vCPU is being interrupted.
    pub fn accept(&mut self, vector: u8) {
        self.state.irr.remove(vector);
        self.state.isr.insert(vector);
    }

    /// Notes that the vCPU is being interrupted with a vector that the caller is about to get from the 8259.
    pub fn accept_ext_int(&mut self) {
        self.state.ext_int = false;
    }

    /// CR8: bits 7 to 4 of the task priority.
    #[inline]
    pub fn cr8(&self) -> u8 {
        self.state.tpr >> 4
    }

    /// Writes CR8; the caller has raised #GP for values above 15.
    #[inline]
    pub fn set_cr8(&mut self, value: u8) {
        self.state.tpr = value << 4;
    }

    /// Ends the interrupt in service with the highest priority (SDM "Signaling Interrupt Servicing Completion").
    pub(crate) fn end_of_interrupt(&mut self) -> Effects {
        let Some(vector) = self.state.isr.highest() else {
            return Effects::default();
        };
        self.state.isr.remove(vector);
        self.lint0_ended(vector);
        let broadcast = self.state.tmr.contains(vector)
            && self.state.svr & regs::SVR_SUPPRESS_EOI_BROADCAST == 0;
        Effects {
            eoi: broadcast.then_some(vector),
            ..Effects::default()
        }
    }

    /// Notes an error in the ESR's hidden half and raises the error interrupt for a new one.
    pub(crate) fn error(&mut self, bit: u32) {
        if self.state.esr_pending & bit != 0 || self.mode() == Mode::Disabled {
            return;
        }
        self.state.esr_pending |= bit;
        // An error entry with an illegal vector sets the bit that this call or an earlier one has set: no recursion
        // past one step.
        let _ = self.fire(Lvt::Error);
    }

    /// Sends what the ICR says (SDM "Issuing Interprocessor Interrupts").
    pub(crate) fn send_ipi(&mut self, x2apic: bool) -> Effects {
        let low = self.state.icr as u32;
        let high = (self.state.icr >> 32) as u32;
        let none = Effects::default();
        let Some(mode) = DeliveryMode::from_bits(low >> 8, false) else {
            return none;
        };
        let vector = low as u8;
        if mode.has_vector() && vector < 16 {
            self.error(regs::ESR_SEND_ILLEGAL_VECTOR);
            return none;
        }
        let (asserted, level) = (low & (1 << 14) != 0, low & (1 << 15) != 0);
        if mode == DeliveryMode::Init && level && !asserted {
            return none;
        }
        let logical = low & (1 << 11) != 0;
        let destination = if x2apic {
            Destination::from_x2apic(high, logical)
        } else {
            Destination::from_xapic(high >> 24, logical)
        };
        let (shorthand, destination) = match (low >> 18) & 3 {
            0 => (Shorthand::None, destination),
            1 if mode.has_vector() => {
                self.inject(vector, false);
                return none;
            }
            1 => (Shorthand::None, Destination::Physical(self.state.id)),
            2 => (Shorthand::AllIncludingSelf, Destination::Broadcast),
            _ => (Shorthand::AllExcludingSelf, Destination::Broadcast),
        };
        // IPIs with a vector are edge-triggered whatever the ICR says.
        let message = Message {
            vector,
            mode,
            level: false,
            destination,
        };
        Effects {
            ipi: Some(Ipi { message, shorthand }),
            ..none
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timer::Time;

    const T0: Time = Time { nanos: 0, tsc: 0 };

    fn enabled() -> Lapic {
        let mut lapic = Lapic::new(Config::new(3, false));
        assert!(write(&mut lapic, 0xF0, 0x1FF).identity_changed);
        lapic
    }

    fn write(lapic: &mut Lapic, offset: u64, value: u32) -> Effects {
        lapic.write_mmio(offset, &value.to_le_bytes(), T0)
    }

    fn read(lapic: &mut Lapic, offset: u64) -> u32 {
        let mut data = [0; 4];
        lapic.read_mmio(offset, &mut data, T0);
        u32::from_le_bytes(data)
    }

    #[test]
    fn higher_classes_interrupt_lower_ones() {
        let mut lapic = enabled();
        lapic.inject(0x31, false);
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x31)));
        lapic.accept(0x31);
        assert_eq!(lapic.pending(), None);
        assert_eq!(read(&mut lapic, 0xA0), 0x30, "PPR");
        lapic.inject(0x3F, false);
        assert_eq!(lapic.pending(), None, "same class waits");
        lapic.inject(0x40, false);
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x40)));
        lapic.accept(0x40);
        assert_eq!(write(&mut lapic, 0xB0, 0), Effects::default());
        assert_eq!(lapic.pending(), None, "0x31 is in service still");
        let _ = write(&mut lapic, 0xB0, 0);
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x3F)));
    }

    #[test]
    fn task_priority_holds_back_its_class_and_below() {
        let mut lapic = enabled();
        lapic.inject(0x5F, false);
        lapic.set_cr8(5);
        assert_eq!(read(&mut lapic, 0x80), 0x50);
        assert_eq!(lapic.pending(), None);
        let _ = write(&mut lapic, 0x80, 0x4F);
        assert_eq!(lapic.cr8(), 4);
        assert_eq!(
            read(&mut lapic, 0xA0),
            0x4F,
            "PPR shows the subclass of the TPR"
        );
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x5F)));
        lapic.accept(0x5F);
        assert_eq!(read(&mut lapic, 0xA0), 0x50);
        let _ = write(&mut lapic, 0x80, 0x52);
        assert_eq!(read(&mut lapic, 0xA0), 0x52, "equal class: the TPR wins");
    }

    #[test]
    fn only_level_interrupts_broadcast_their_end() {
        let mut lapic = enabled();
        lapic.inject(0x41, true);
        lapic.accept(0x41);
        assert_eq!(read(&mut lapic, 0x1A0), 1 << 1, "TMR");
        assert_eq!(write(&mut lapic, 0xB0, 0).eoi, Some(0x41));
        lapic.inject(0x41, false);
        lapic.accept(0x41);
        assert_eq!(write(&mut lapic, 0xB0, 0).eoi, None);
        assert_eq!(
            write(&mut lapic, 0xB0, 0),
            Effects::default(),
            "nothing in service"
        );
    }

    #[test]
    fn eoi_broadcast_can_be_suppressed_where_offered() {
        for directed_eoi in [false, true] {
            let mut lapic = Lapic::new(Config {
                directed_eoi,
                ..Config::new(0, true)
            });
            let _ = write(&mut lapic, 0xF0, 0x11FF);
            assert_eq!(
                read(&mut lapic, 0xF0),
                if directed_eoi { 0x11FF } else { 0x1FF }
            );
            assert_eq!(read(&mut lapic, 0x30) & (1 << 24) != 0, directed_eoi);
            lapic.inject(0x41, true);
            lapic.accept(0x41);
            assert_eq!(write(&mut lapic, 0xB0, 0).eoi.is_some(), !directed_eoi);
        }
    }

    #[test]
    fn a_software_disabled_apic_keeps_what_it_has_and_accepts_no_more() {
        let mut lapic = enabled();
        lapic.inject(0x41, false);
        let _ = write(&mut lapic, 0xF0, 0xFF);
        lapic.inject(0x51, false);
        assert_eq!(lapic.highest_pending(), Some(0x41));
        let mailbox = Mailbox::new();
        mailbox.post(DeliveryMode::Fixed, 0x61, false);
        mailbox.post(DeliveryMode::Nmi, 0, false);
        assert!(lapic.collect(&mailbox).nmi);
        assert_eq!(lapic.highest_pending(), Some(0x41));
    }

    #[test]
    fn illegal_vectors_are_errors() {
        let mut lapic = enabled();
        let _ = write(&mut lapic, 0x370, 0xFE);
        lapic.inject(0x0F, false);
        assert_eq!(lapic.pending(), Some(Pending::Vector(0xFE)));
        lapic.accept(0xFE);
        let _ = write(&mut lapic, 0xB0, 0);
        assert_eq!(read(&mut lapic, 0x280), 0, "not latched before a write");
        let _ = write(&mut lapic, 0x280, 0);
        assert_eq!(read(&mut lapic, 0x280), 0x40);
        assert_eq!(write(&mut lapic, 0x300, 0x0F).ipi, None);
        assert_eq!(lapic.pending(), Some(Pending::Vector(0xFE)));
        let _ = write(&mut lapic, 0x280, 0);
        assert_eq!(read(&mut lapic, 0x280), 0x20);
        let _ = write(&mut lapic, 0x280, 0);
        assert_eq!(read(&mut lapic, 0x280), 0);
    }

    #[test]
    fn an_error_interrupt_with_an_illegal_vector_ends() {
        let mut lapic = enabled();
        let _ = write(&mut lapic, 0x370, 0x01);
        let _ = read(&mut lapic, 0x3F0);
        let _ = write(&mut lapic, 0x280, 0);
        assert_eq!(read(&mut lapic, 0x280), 0xC0);
        assert_eq!(lapic.pending(), None);
    }

    #[test]
    fn ipis_carry_their_destination() {
        let mut lapic = enabled();
        let _ = write(&mut lapic, 0x310, 0x0500_0000);
        let ipi = write(&mut lapic, 0x300, 0x0000_C4FE).ipi.unwrap();
        assert_eq!(ipi.message.mode, DeliveryMode::Nmi);
        assert_eq!(ipi.message.destination, Destination::Physical(5));
        let ipi = write(&mut lapic, 0x300, 0x0000_0841).ipi.unwrap();
        assert_eq!(ipi.message.destination, Destination::Logical(5));
        assert_eq!(
            (ipi.message.mode, ipi.message.vector),
            (DeliveryMode::Fixed, 0x41)
        );
        let _ = write(&mut lapic, 0x310, 0xFF00_0000);
        let ipi = write(&mut lapic, 0x300, 0x0000_0641).ipi.unwrap();
        assert_eq!(ipi.message.destination, Destination::Broadcast);
        assert_eq!(ipi.message.mode, DeliveryMode::StartUp);
        let ipi = write(&mut lapic, 0x300, 0x000C_4500).ipi.unwrap();
        assert_eq!(ipi.shorthand, Shorthand::AllExcludingSelf);
        assert_eq!(ipi.message.mode, DeliveryMode::Init);
        let ipi = write(&mut lapic, 0x300, 0x0008_0041).ipi.unwrap();
        assert_eq!(ipi.shorthand, Shorthand::AllIncludingSelf);
        assert_eq!(read(&mut lapic, 0x300), 0x0008_0041);
    }

    #[test]
    fn init_de_assert_and_reserved_modes_send_nothing() {
        let mut lapic = enabled();
        assert_eq!(write(&mut lapic, 0x300, 0x0000_8500).ipi, None);
        assert_eq!(write(&mut lapic, 0x300, 0x0000_0341).ipi, None);
        assert_eq!(write(&mut lapic, 0x300, 0x0000_0741).ipi, None);
        assert!(
            write(&mut lapic, 0x300, 0x0000_0500).ipi.is_some(),
            "edge INIT without the level bit"
        );
    }

    #[test]
    fn a_self_ipi_is_local() {
        let mut lapic = enabled();
        assert_eq!(write(&mut lapic, 0x300, 0x0004_0099).ipi, None);
        assert_eq!(lapic.highest_pending(), Some(0x99));
    }

    #[test]
    fn init_resets_all_but_id_and_base() {
        let mut lapic = enabled();
        let base = lapic.apic_base() | 1 << 10;
        let _ = lapic.set_apic_base(base, T0).unwrap();
        lapic.inject(0x41, true);
        lapic.set_cr8(9);
        let mailbox = Mailbox::new();
        mailbox.post(DeliveryMode::Fixed, 0x61, false);
        mailbox.post(DeliveryMode::Init, 0, false);
        mailbox.post(DeliveryMode::StartUp, 0x8F, false);
        let received = lapic.collect(&mailbox);
        assert_eq!(
            received,
            Received {
                init: true,
                start_up: Some(0x8F),
                nmi: false
            }
        );
        assert_eq!((lapic.apic_base(), lapic.mode()), (base, Mode::X2Apic));
        assert_eq!(
            (lapic.pending(), lapic.cr8(), lapic.is_enabled()),
            (None, 0, false)
        );
        assert_eq!(lapic.read_msr(0x802, T0), Ok(3));
        assert_eq!(lapic.read_msr(0x832, T0), Ok(0x10000));
    }

    #[test]
    fn posted_interrupts_keep_their_trigger_mode() {
        let mut lapic = enabled();
        let mailbox = Mailbox::new();
        mailbox.post(DeliveryMode::Fixed, 0x71, true);
        mailbox.post(DeliveryMode::Fixed, 0x81, false);
        mailbox.post(DeliveryMode::Fixed, 0x05, false);
        let _ = lapic.collect(&mailbox);
        lapic.accept(0x81);
        assert_eq!(write(&mut lapic, 0xB0, 0).eoi, None);
        lapic.accept(0x71);
        assert_eq!(write(&mut lapic, 0xB0, 0).eoi, Some(0x71));
        let _ = write(&mut lapic, 0x280, 0);
        assert_eq!(read(&mut lapic, 0x280), 0x40, "vector 5 was illegal");
    }

    #[test]
    fn virtual_wire_mode_passes_the_8259_through() {
        let mut lapic = Lapic::new(Config::new(0, true));
        let mailbox = Mailbox::new();
        mailbox.set_lint0(true);
        let _ = lapic.collect(&mailbox);
        assert_eq!(lapic.pending(), None, "masked after reset");
        lapic.program_virtual_wire();
        lapic.set_cr8(15);
        assert_eq!(
            lapic.pending(),
            Some(Pending::ExtInt),
            "the task priority does not hold it back"
        );
        lapic.accept_ext_int();
        mailbox.set_lint0(false);
        mailbox.pulse_lint1();
        assert!(lapic.collect(&mailbox).nmi);
        assert_eq!(lapic.pending(), None);
    }

    #[test]
    fn a_disabled_apic_is_a_pair_of_pins() {
        let mut lapic = Lapic::new(Config::new(0, true));
        let _ = lapic.set_apic_base(DEFAULT_BASE | base::BSP, T0).unwrap();
        let mailbox = Mailbox::new();
        mailbox.set_lint0(true);
        mailbox.pulse_lint1();
        assert!(lapic.collect(&mailbox).nmi);
        assert_eq!(lapic.pending(), Some(Pending::ExtInt));
    }

    #[test]
    fn an_ext_int_message_is_taken_once() {
        let mut lapic = enabled();
        let mailbox = Mailbox::new();
        mailbox.post(DeliveryMode::ExtInt, 0, false);
        let _ = lapic.collect(&mailbox);
        assert_eq!(lapic.pending(), Some(Pending::ExtInt));
        lapic.accept_ext_int();
        assert_eq!(lapic.pending(), None);
    }
}
