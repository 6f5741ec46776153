//! An APIC's state, neutral to backends.

use serde::{Deserialize, Serialize};

use crate::{
    base::Mode,
    lapic::Lapic,
    lvt::{self, Lvt},
    regs,
    timer::TimerState,
    vectors::VectorSet,
};

/// The whole state of an APIC, part of a vCPU's saved state. A mailbox is not part of it: it is collected before a vCPU
/// is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// The APIC id, 32 bits.
    pub id: u32,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// Task-priority register.
    pub tpr: u8,
    /// Logical-destination register of xAPIC mode.
    pub ldr: u32,
    /// Destination-format register of xAPIC mode.
    pub dfr: u32,
    /// Spurious-interrupt vector register.
    pub svr: u32,
    /// Interrupts in service.
    pub isr: VectorSet,
    /// Which of the requested and served interrupts are level-triggered.
    pub tmr: VectorSet,
    /// Requested interrupts.
    pub irr: VectorSet,
    /// Error-status register as it reads.
    pub esr: u32,
    /// Errors since the ESR was last written.
    pub esr_pending: u32,
    /// Interrupt-command register, with the destination in the upper half in the form of the current mode.
    pub icr: u64,
    /// Local vector table: timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; lvt::COUNT],
    /// The timer.
    pub timer: TimerState,
    /// The level of pin LINT0.
    pub lint0: bool,
    /// An ExtINT message waits for its INTA cycle.
    pub ext_int: bool,
}

/// A state that no APIC can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the local APIC's saved state is impossible: {0}; save the machine again")]
pub struct InvalidState(pub &'static str);

impl LapicState {
    /// Puts all registers but id and IA32_APIC_BASE to their values after reset.
    pub(crate) fn reset_registers(&mut self) {
        *self = Self {
            id: self.id,
            apic_base: self.apic_base,
            lint0: self.lint0,
            dfr: u32::MAX,
            svr: regs::SVR_RESET,
            lvt: [lvt::MASKED; lvt::COUNT],
            ..Self::default()
        };
    }
}

impl Lapic {
    /// The state to save. The vCPU's mailbox has been collected.
    pub fn save(&self) -> LapicState {
        self.state.clone()
    }

    /// Takes over a saved state. The caller then publishes [`Lapic::identity`].
    ///
    /// # Errors
    /// When registers hold bits that do not exist, or the state is that of an APIC with another id.
    pub fn restore(&mut self, state: &LapicState) -> Result<(), InvalidState> {
        if state.id != self.config.id {
            return Err(InvalidState("it belongs to an APIC with another id"));
        }
        if Mode::of(state.apic_base).is_none() {
            return Err(InvalidState(
                "IA32_APIC_BASE has x2APIC mode set in a disabled APIC",
            ));
        }
        let valid = state.ldr & 0x00FF_FFFF == 0
            && state.dfr & regs::DFR_FIXED == regs::DFR_FIXED
            && state.svr & !self.svr_writable() == 0
            && state.timer.divide & !regs::DIVIDE_WRITABLE == 0;
        if !valid {
            return Err(InvalidState("a register has reserved bits set"));
        }
        for (index, value) in (regs::LVT_FIRST..).zip(state.lvt) {
            if Lvt::of_register(index).is_none_or(|entry| value & !entry.defined() != 0) {
                return Err(InvalidState(
                    "a local vector table entry has reserved bits set",
                ));
            }
        }
        let mut state = state.clone();
        for set in [&mut state.irr, &mut state.isr, &mut state.tmr] {
            let before = *set;
            set.drop_illegal();
            if before != *set {
                return Err(InvalidState("a vector below 16 is requested or in service"));
            }
        }
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Time};

    const T0: Time = Time { nanos: 0, tsc: 0 };

    fn busy() -> Lapic {
        let mut lapic = Lapic::new(Config::new(2, false));
        for (offset, value) in [
            (0xF0u64, 0x1FFu32),
            (0x320, 0x2_0040),
            (0x3E0, 0xB),
            (0x380, 5000),
            (0xD0, 0x0400_0000),
        ] {
            let _ = lapic.write_mmio(offset, &value.to_le_bytes(), T0);
        }
        lapic.inject(0x55, true);
        lapic.inject(0x66, false);
        lapic.accept(0x66);
        lapic
    }

    #[test]
    fn a_restored_apic_goes_on_where_it_was() {
        let mut first = busy();
        let mut second = Lapic::new(Config::new(2, false));
        second.restore(&first.save()).unwrap();
        assert_eq!(second.save(), first.save());
        assert_eq!(second.next_timer_deadline(), first.next_timer_deadline());
        let later = Time {
            nanos: 12_345,
            tsc: 0,
        };
        assert_eq!(second.advance_timer(later), first.advance_timer(later));
        assert_eq!(second.save(), first.save());
    }

    #[test]
    fn impossible_states_are_refused() {
        let good = busy().save();
        let bad: [fn(&mut LapicState); 8] = [
            |state| state.id = 3,
            |state| state.apic_base = 0xFEE0_0400,
            |state| state.ldr = 1,
            |state| state.svr = 1 << 20,
            |state| state.timer.divide = 4,
            |state| state.lvt[5] = 0x700,
            |state| state.irr.insert(15),
            |state| state.dfr = 0,
        ];
        for (index, spoil) in bad.into_iter().enumerate() {
            let mut state = good.clone();
            spoil(&mut state);
            let mut lapic = Lapic::new(Config::new(2, false));
            let before = lapic.save();
            assert!(lapic.restore(&state).is_err(), "case {index}");
            assert_eq!(lapic.save(), before, "case {index}");
        }
    }
}
