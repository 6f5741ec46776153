//! IA32_APIC_BASE: where the APIC is and in which mode (SDM "Local APIC Status and Location", "x2APIC State
//! Transitions").

use crate::{
    lapic::{Effects, GeneralProtection, Lapic},
    timer::Time,
};

/// The mode that IA32_APIC_BASE puts the APIC in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Globally disabled: the processor behaves as one without an APIC, with its INTR and NMI pins.
    Disabled,
    /// Registers in memory, 8-bit ids.
    XApic,
    /// Registers in MSRs, 32-bit ids.
    X2Apic,
}

pub(crate) const BSP: u64 = 1 << 8;
pub(crate) const EXTD: u64 = 1 << 10;
pub(crate) const ENABLE: u64 = 1 << 11;
const ADDRESS: u64 = !0xFFF;

impl Mode {
    /// The mode in an IA32_APIC_BASE value; `None` for the combination that does not exist.
    pub(crate) fn of(base: u64) -> Option<Mode> {
        match (base & ENABLE != 0, base & EXTD != 0) {
            (false, false) => Some(Mode::Disabled),
            (true, false) => Some(Mode::XApic),
            (true, true) => Some(Mode::X2Apic),
            (false, true) => None,
        }
    }
}

impl Lapic {
    /// The mode that the APIC is in.
    #[inline]
    pub fn mode(&self) -> Mode {
        Mode::of(self.state.apic_base).unwrap_or(Mode::Disabled)
    }

    /// The value of IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.state.apic_base
    }

    /// Where the registers are in guest physical memory, [`crate::MMIO_LEN`] bytes; `None` unless in xAPIC mode.
    pub fn mmio_base(&self) -> Option<u64> {
        (self.mode() == Mode::XApic).then_some(self.state.apic_base & ADDRESS)
    }

    /// Writes IA32_APIC_BASE.
    ///
    /// # Errors
    /// #GP for reserved bits and for the transitions that the SDM forbids: x2APIC mode can only be entered from xAPIC
    /// mode and only be left by disabling the APIC.
    pub fn set_apic_base(&mut self, value: u64, now: Time) -> Result<Effects, GeneralProtection> {
        let address_bits = (1u64 << self.config.physical_address_bits) - 1;
        if value & !((ADDRESS & address_bits) | BSP | EXTD | ENABLE) != 0 {
            return Err(GeneralProtection);
        }
        let before = self.mode();
        let after = Mode::of(value).ok_or(GeneralProtection)?;
        match (before, after) {
            (Mode::X2Apic, Mode::XApic) | (Mode::Disabled, Mode::X2Apic) => {
                return Err(GeneralProtection);
            }
            _ => {}
        }
        self.advance_timer(now);
        self.state.apic_base = value;
        if before == after {
            return Ok(Effects::default());
        }
        match after {
            Mode::Disabled => self.state.reset_registers(),
            Mode::XApic => {}
            // The destination in the ICR has another form now; LDR and DFR are gone.
            Mode::X2Apic => {
                self.state.icr &= 0xFFFF_FFFF;
                self.state.ldr = 0;
                self.state.dfr = u32::MAX;
            }
        }
        Ok(Effects {
            identity_changed: true,
            timer_changed: true,
            ..Effects::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lapic::Config;

    const T0: Time = Time { nanos: 0, tsc: 0 };
    const BASE: u64 = crate::DEFAULT_BASE;

    #[test]
    fn transitions_follow_the_state_diagram() {
        const DISABLED: u64 = BASE;
        const XAPIC: u64 = BASE | ENABLE;
        const X2APIC: u64 = BASE | ENABLE | EXTD;
        const INVALID: u64 = BASE | EXTD;
        let allowed = [
            (
                DISABLED,
                [
                    (DISABLED, true),
                    (XAPIC, true),
                    (X2APIC, false),
                    (INVALID, false),
                ],
            ),
            (
                XAPIC,
                [
                    (DISABLED, true),
                    (XAPIC, true),
                    (X2APIC, true),
                    (INVALID, false),
                ],
            ),
            (
                X2APIC,
                [
                    (DISABLED, true),
                    (XAPIC, false),
                    (X2APIC, true),
                    (INVALID, false),
                ],
            ),
        ];
        for (from, targets) in allowed {
            for (to, expected) in targets {
                let mut lapic = Lapic::new(Config::new(0, false));
                if from == DISABLED {
                    let _ = lapic.set_apic_base(DISABLED, T0).unwrap();
                } else if from == X2APIC {
                    let _ = lapic.set_apic_base(X2APIC, T0).unwrap();
                }
                assert_eq!(lapic.apic_base(), from);
                assert_eq!(
                    lapic.set_apic_base(to, T0).is_ok(),
                    expected,
                    "{from:#x} -> {to:#x}"
                );
                assert_eq!(lapic.apic_base(), if expected { to } else { from });
            }
        }
    }

    #[test]
    fn reserved_bits_fault() {
        let mut lapic = Lapic::new(Config {
            physical_address_bits: 40,
            ..Config::new(0, true)
        });
        assert_eq!(lapic.apic_base(), BASE | ENABLE | BSP);
        for bit in (0..8).chain([9]).chain(40..64) {
            assert!(
                lapic.set_apic_base(BASE | ENABLE | 1 << bit, T0).is_err(),
                "bit {bit}"
            );
        }
        for bit in [8, 12, 39] {
            assert!(
                lapic.set_apic_base(BASE | ENABLE | 1 << bit, T0).is_ok(),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn registers_are_lost_when_disabled_and_kept_on_the_way_to_x2apic() {
        let mut lapic = Lapic::new(Config::new(7, false));
        for (offset, value) in [
            (0xF0, 0x1AAu32),
            (0xE0, 0),
            (0xD0, 1 << 31),
            (0x310, 1 << 31),
        ] {
            let _ = lapic.write_mmio(offset, &value.to_le_bytes(), T0);
        }
        let effects = lapic.set_apic_base(BASE | ENABLE | EXTD, T0).unwrap();
        assert!(effects.identity_changed);
        assert_eq!(lapic.read_msr(0x80F, T0), Ok(0x1AA));
        assert_eq!(lapic.read_msr(0x830, T0), Ok(0));
        let page = lapic.to_page(T0);
        assert_eq!(page[0xE0..0xE4], [0xFF; 4], "the DFR is not kept");
        assert_eq!(lapic.mmio_base(), None);
        let _ = lapic.set_apic_base(BASE, T0).unwrap();
        let _ = lapic.set_apic_base(BASE | ENABLE, T0).unwrap();
        let mut svr = [0; 4];
        lapic.read_mmio(0xF0, &mut svr, T0);
        assert_eq!(u32::from_le_bytes(svr), 0xFF);
        assert_eq!(lapic.mmio_base(), Some(BASE));
    }
}
