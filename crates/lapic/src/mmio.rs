//! The registers in xAPIC mode: 32 bits wide, 16 bytes apart, in memory.

use crate::{
    base::Mode,
    lapic::{Effects, Lapic},
    lvt::Lvt,
    regs,
    timer::Time,
};

impl Lapic {
    /// Reads `data.len()` bytes at `offset` from [`Lapic::mmio_base`]. The SDM defines aligned 32-bit reads only; here,
    /// as on common processors, narrower ones see the register's bytes, and bytes between registers read as zero.
    /// Outside xAPIC mode all bytes read as ones, as memory that nobody answers does.
    pub fn read_mmio(&mut self, offset: u64, data: &mut [u8], now: Time) {
        if self.mode() != Mode::XApic {
            data.fill(0xFF);
            return;
        }
        let value = match u32::try_from(offset >> 4) {
            Ok(register) => self.read_xapic(register, now),
            Err(_) => 0,
        };
        let register = value.to_le_bytes();
        for (index, byte) in (offset as usize & 0xF..).zip(data) {
            *byte = register.get(index).copied().unwrap_or(0);
        }
    }

    /// Writes `data` at `offset` from [`Lapic::mmio_base`]. Only aligned 32-bit writes have an effect; the SDM leaves
    /// the others undefined.
    pub fn write_mmio(&mut self, offset: u64, data: &[u8], now: Time) -> Effects {
        let (Ok(data), true, Mode::XApic) =
            (<[u8; 4]>::try_from(data), offset & 0xF == 0, self.mode())
        else {
            return Effects::default();
        };
        let value = u32::from_le_bytes(data);
        let Ok(register) = u32::try_from(offset >> 4) else {
            return Effects::default();
        };
        match register {
            regs::LDR => {
                self.state.ldr = value & 0xFF00_0000;
                Effects {
                    identity_changed: true,
                    ..Effects::default()
                }
            }
            regs::DFR => {
                self.state.dfr = value | regs::DFR_FIXED;
                Effects {
                    identity_changed: true,
                    ..Effects::default()
                }
            }
            regs::ICR => {
                let high = self.state.icr & 0xFFFF_FFFF_0000_0000;
                self.state.icr = high | u64::from(value & regs::ICR_WRITABLE);
                self.send_ipi(false)
            }
            regs::ICR_HIGH => {
                self.state.icr =
                    (self.state.icr & 0xFFFF_FFFF) | (u64::from(value & 0xFF00_0000) << 32);
                Effects::default()
            }
            regs::ID
            | regs::VERSION
            | regs::APR
            | regs::PPR
            | regs::RRD
            | regs::ISR..=regs::IRR_LAST
            | regs::TIMER_CURRENT => Effects::default(),
            _ => match self.write_register(register, value, now) {
                Some(effects) => effects,
                None => {
                    self.error(regs::ESR_ILLEGAL_REGISTER);
                    Effects::default()
                }
            },
        }
    }

    fn read_xapic(&mut self, register: u32, now: Time) -> u32 {
        match register {
            regs::ID => self.state.id << 24,
            regs::LDR => self.state.ldr,
            regs::DFR => self.state.dfr,
            regs::ICR => self.state.icr as u32,
            regs::ICR_HIGH => (self.state.icr >> 32) as u32,
            regs::APR | regs::EOI | regs::RRD => 0,
            _ => match self.read_register(register, now) {
                Some(value) => value,
                None => {
                    self.error(regs::ESR_ILLEGAL_REGISTER);
                    0
                }
            },
        }
    }

    /// Reads a register that both modes have in the same form; `None` when it is not one.
    pub(crate) fn read_register(&mut self, register: u32, now: Time) -> Option<u32> {
        Some(match register {
            regs::VERSION if self.config.directed_eoi => {
                regs::VERSION_VALUE | regs::VERSION_DIRECTED_EOI
            }
            regs::VERSION => regs::VERSION_VALUE,
            regs::TPR => self.state.tpr.into(),
            regs::PPR => self.processor_priority().into(),
            regs::SVR => self.state.svr,
            regs::ISR..=regs::ISR_LAST => self.state.isr.register(register - regs::ISR),
            regs::TMR..=regs::TMR_LAST => self.state.tmr.register(register - regs::TMR),
            regs::IRR..=regs::IRR_LAST => {
                self.advance_timer(now);
                self.state.irr.register(register - regs::IRR)
            }
            regs::ESR => self.state.esr,
            regs::LVT_FIRST..=regs::LVT_LAST => self.state.lvt(Lvt::of_register(register)?).bits,
            regs::TIMER_INITIAL => self.state.timer.initial,
            regs::TIMER_CURRENT => self.timer_current(now),
            regs::TIMER_DIVIDE => self.state.timer.divide,
            _ => return None,
        })
    }

    /// Writes a register that both modes have in the same form; `None` when it is not one.
    pub(crate) fn write_register(
        &mut self,
        register: u32,
        value: u32,
        now: Time,
    ) -> Option<Effects> {
        Some(match register {
            regs::TPR => {
                self.state.tpr = value as u8;
                Effects::default()
            }
            regs::EOI => self.end_of_interrupt(),
            regs::SVR => {
                self.advance_timer(now);
                self.state.svr = value & self.svr_writable();
                if self.state.svr & regs::SVR_ENABLE == 0 {
                    self.mask_lvt();
                }
                Effects {
                    identity_changed: true,
                    timer_changed: true,
                    ..Effects::default()
                }
            }
            regs::ESR => {
                self.state.esr = core::mem::take(&mut self.state.esr_pending);
                Effects::default()
            }
            regs::LVT_FIRST => self.write_timer_lvt(value, now),
            regs::LVT_THERMAL..=regs::LVT_LAST => {
                self.write_lvt(Lvt::of_register(register)?, value);
                Effects::default()
            }
            regs::TIMER_INITIAL => self.write_timer_initial(value, now),
            regs::TIMER_DIVIDE => self.write_timer_divide(value, now),
            _ => return None,
        })
    }

    pub(crate) fn svr_writable(&self) -> u32 {
        let suppress = if self.config.directed_eoi {
            regs::SVR_SUPPRESS_EOI_BROADCAST
        } else {
            0
        };
        0xFF | regs::SVR_ENABLE | regs::SVR_FOCUS | suppress
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;

    const T0: Time = Time { nanos: 0, tsc: 0 };

    fn read<const N: usize>(lapic: &mut Lapic, offset: u64) -> [u8; N] {
        let mut data = [0xAA; N];
        lapic.read_mmio(offset, &mut data, T0);
        data
    }

    #[test]
    fn values_after_reset() {
        let mut lapic = Lapic::new(Config::new(0x12, false));
        for (offset, expected) in [
            (0x20, 0x1200_0000),
            (0x30, 0x0005_0014),
            (0x80, 0),
            (0xA0, 0),
            (0xD0, 0),
            (0xE0, 0xFFFF_FFFF),
            (0xF0, 0xFF),
            (0x280, 0),
            (0x300, 0),
            (0x310, 0),
            (0x320, 0x1_0000),
            (0x330, 0x1_0000),
            (0x340, 0x1_0000),
            (0x350, 0x1_0000),
            (0x360, 0x1_0000),
            (0x370, 0x1_0000),
            (0x380, 0),
            (0x390, 0),
            (0x3E0, 0),
        ] {
            assert_eq!(
                u32::from_le_bytes(read(&mut lapic, offset)),
                expected,
                "{offset:#x}"
            );
        }
    }

    #[test]
    fn widths_other_than_32_bits() {
        let mut lapic = Lapic::new(Config::new(0, false));
        assert_eq!(read::<1>(&mut lapic, 0x32), [0x05]);
        assert_eq!(read::<2>(&mut lapic, 0x30), [0x14, 0x00]);
        assert_eq!(read::<8>(&mut lapic, 0x30), [0x14, 0, 5, 0, 0, 0, 0, 0]);
        assert_eq!(read::<4>(&mut lapic, 0x34), [0; 4]);
        let _ = lapic.write_mmio(0x80, &[0x20], T0);
        let _ = lapic.write_mmio(0x80, &[0x20, 0], T0);
        let _ = lapic.write_mmio(0x80, &[0x20; 8], T0);
        let _ = lapic.write_mmio(0x84, &[0x20; 4], T0);
        assert_eq!(read::<4>(&mut lapic, 0x80), [0; 4]);
    }

    #[test]
    fn accesses_to_what_is_no_register_are_errors() {
        for offset in [0x00, 0x40, 0x290, 0x2F0, 0x3A0, 0x3F0, 0x400, 0xFF0] {
            let mut lapic = Lapic::new(Config::new(0, false));
            assert_eq!(read(&mut lapic, offset), [0; 4]);
            let _ = lapic.write_mmio(0x280, &[0; 4], T0);
            assert_eq!(
                read(&mut lapic, 0x280),
                [0x80, 0, 0, 0],
                "read of {offset:#x}"
            );
            let _ = lapic.write_mmio(0x280, &[0; 4], T0);
            let _ = lapic.write_mmio(offset, &[0; 4], T0);
            let _ = lapic.write_mmio(0x280, &[0; 4], T0);
            assert_eq!(
                read(&mut lapic, 0x280),
                [0x80, 0, 0, 0],
                "write of {offset:#x}"
            );
        }
    }

    #[test]
    fn read_only_registers_stay() {
        for offset in (0x100..=0x270)
            .step_by(16)
            .chain([0x20, 0x30, 0x90, 0xA0, 0xC0, 0x390])
        {
            let mut lapic = Lapic::new(Config::new(0, false));
            let before: [u8; 4] = read(&mut lapic, offset);
            assert_eq!(lapic.write_mmio(offset, &[0xFF; 4], T0), Effects::default());
            assert_eq!(read(&mut lapic, offset), before, "{offset:#x}");
            let _ = lapic.write_mmio(0x280, &[0; 4], T0);
            assert_eq!(read(&mut lapic, 0x280), [0; 4], "{offset:#x}");
        }
    }

    #[test]
    fn only_existing_bits_are_kept() {
        let mut lapic = Lapic::new(Config::new(0, false));
        for (offset, expected) in [
            (0x80, 0xFF),
            (0xD0, 0xFF00_0000),
            (0xF0, 0x3FF),
            (0x310, 0xFF00_0000),
            (0x3E0, 0xB),
            (0x380, u32::MAX),
        ] {
            let _ = lapic.write_mmio(offset, &[0xFF; 4], T0);
            assert_eq!(
                u32::from_le_bytes(read(&mut lapic, offset)),
                expected,
                "{offset:#x}"
            );
        }
        let _ = lapic.write_mmio(0xE0, &[0; 4], T0);
        assert_eq!(u32::from_le_bytes(read(&mut lapic, 0xE0)), 0x0FFF_FFFF);
    }

    #[test]
    fn nothing_answers_in_x2apic_mode() {
        let mut lapic = Lapic::new(Config::new(0, false));
        let _ = lapic
            .set_apic_base(lapic.apic_base() | 1 << 10, T0)
            .unwrap();
        assert_eq!(read(&mut lapic, 0x30), [0xFF; 4]);
        assert_eq!(
            lapic.write_mmio(0xF0, &[0xFF, 1, 0, 0], T0),
            Effects::default()
        );
        assert!(!lapic.is_enabled());
    }
}
