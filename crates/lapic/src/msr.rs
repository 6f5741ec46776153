//! The registers in x2APIC mode: MSRs 0x800 to 0x8FF (SDM "x2APIC Register Address Space", "Reserved Bit Checking").

use crate::{
    base::Mode,
    lapic::{Effects, GeneralProtection, Lapic},
    lvt::Lvt,
    regs::{self, X2APIC_MSR_FIRST, X2APIC_MSR_LAST},
    timer::Time,
};

const ICR_RESERVED: u64 = 0xFFF3_2000;

impl Lapic {
    fn x2apic_register(&self, msr: u32) -> Result<u32, GeneralProtection> {
        if self.mode() == Mode::X2Apic && (X2APIC_MSR_FIRST..=X2APIC_MSR_LAST).contains(&msr) {
            Ok(msr - X2APIC_MSR_FIRST)
        } else {
            Err(GeneralProtection)
        }
    }

    /// Reads the x2APIC register at `msr`.
    ///
    /// # Errors
    /// #GP outside x2APIC mode, for MSRs that are no register, and for the write-only ones.
    pub fn read_msr(&mut self, msr: u32, now: Time) -> Result<u64, GeneralProtection> {
        match self.x2apic_register(msr)? {
            regs::ID => Ok(self.state.id.into()),
            regs::LDR => Ok(x2apic_logical_id(self.state.id).into()),
            regs::ICR => Ok(self.state.icr),
            regs::EOI => Err(GeneralProtection),
            register => self
                .read_register(register, now)
                .map(u64::from)
                .ok_or(GeneralProtection),
        }
    }

    /// Writes the x2APIC register at `msr`.
    ///
    /// # Errors
    /// #GP outside x2APIC mode, for MSRs that are no register, for the read-only ones, and for reserved bits.
    pub fn write_msr(
        &mut self,
        msr: u32,
        value: u64,
        now: Time,
    ) -> Result<Effects, GeneralProtection> {
        let register = self.x2apic_register(msr)?;
        if register == regs::ICR {
            if value & ICR_RESERVED != 0 {
                return Err(GeneralProtection);
            }
            self.state.icr = value & !u64::from(regs::ICR_STATUS);
            return Ok(self.send_ipi(true));
        }
        let value = u32::try_from(value).map_err(|_| GeneralProtection)?;
        let allowed = match register {
            regs::TPR | regs::SELF_IPI => 0xFF,
            regs::EOI | regs::ESR => 0,
            regs::SVR => self.svr_writable(),
            regs::TIMER_INITIAL => u32::MAX,
            regs::TIMER_DIVIDE => regs::DIVIDE_WRITABLE,
            _ => Lvt::of_register(register)
                .ok_or(GeneralProtection)?
                .defined(),
        };
        if value & !allowed != 0 {
            return Err(GeneralProtection);
        }
        if register == regs::SELF_IPI {
            if value < 16 {
                self.error(regs::ESR_SEND_ILLEGAL_VECTOR);
            } else {
                self.inject(value as u8, false);
            }
            return Ok(Effects::default());
        }
        self.write_register(register, value, now)
            .ok_or(GeneralProtection)
    }
}

/// The logical id of an x2APIC: its cluster of 16 in the upper half, its place within it in the lower
/// (SDM "Deriving Logical x2APIC ID from the Local x2APIC ID").
pub(crate) fn x2apic_logical_id(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xF)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Destination, Pending};

    const T0: Time = Time { nanos: 0, tsc: 0 };
    const GP: GeneralProtection = GeneralProtection;

    fn x2apic(id: u32) -> Lapic {
        let mut lapic = Lapic::new(Config::new(id, false));
        let _ = lapic
            .set_apic_base(lapic.apic_base() | 1 << 10, T0)
            .unwrap();
        let _ = lapic.write_msr(0x80F, 0x1FF, T0).unwrap();
        lapic
    }

    #[test]
    fn msrs_fault_outside_x2apic_mode() {
        let mut lapic = Lapic::new(Config::new(0, false));
        assert_eq!(lapic.read_msr(0x802, T0), Err(GP));
        assert_eq!(lapic.write_msr(0x80B, 0, T0), Err(GP));
    }

    #[test]
    fn which_registers_can_be_read() {
        let readable = [0x802, 0x803, 0x808, 0x80A, 0x80D, 0x80F, 0x828, 0x830]
            .into_iter()
            .chain(0x810..=0x827)
            .chain(0x832..=0x839)
            .chain([0x83E]);
        let readable: std::vec::Vec<u32> = readable.collect();
        let mut lapic = x2apic(0);
        for msr in 0x7FF..=0x900 {
            assert_eq!(
                lapic.read_msr(msr, T0).is_ok(),
                readable.contains(&msr),
                "{msr:#x}"
            );
        }
    }

    #[test]
    fn which_bits_can_be_written() {
        // Each bit that may be set on its own, per register; every other one faults.
        let writable: [(u32, u64); 14] = [
            (0x808, 0xFF),
            (0x80B, 0),
            (0x80F, 0x3FF),
            (0x828, 0),
            (0x830, 0xFFFF_FFFF_000C_DFFF),
            (0x832, 0x7_10FF),
            (0x833, 0x1_17FF),
            (0x834, 0x1_17FF),
            (0x835, 0x1_F7FF),
            (0x836, 0x1_F7FF),
            (0x837, 0x1_10FF),
            (0x838, 0xFFFF_FFFF),
            (0x83E, 0xB),
            (0x83F, 0xFF),
        ];
        for msr in 0x7FF..=0x900 {
            let mask = writable
                .iter()
                .find(|(writable, _)| *writable == msr)
                .map(|(_, mask)| *mask);
            let mut lapic = x2apic(0);
            assert_eq!(
                lapic.write_msr(msr, 0, T0).is_ok(),
                mask.is_some(),
                "{msr:#x}"
            );
            for bit in 0..64 {
                let mut lapic = x2apic(0);
                let allowed = mask.is_some_and(|mask| mask >> bit & 1 != 0);
                assert_eq!(
                    lapic.write_msr(msr, 1 << bit, T0).is_ok(),
                    allowed,
                    "{msr:#x} bit {bit}"
                );
            }
        }
    }

    #[test]
    fn ids_have_32_bits() {
        let mut lapic = x2apic(0x1234);
        assert_eq!(lapic.read_msr(0x802, T0), Ok(0x1234));
        assert_eq!(lapic.read_msr(0x80D, T0), Ok(0x0123_0010));
    }

    #[test]
    fn one_write_sends_to_a_32_bit_destination() {
        let mut lapic = x2apic(0);
        let effects = lapic.write_msr(0x830, 0x0000_1234_0000_0041, T0).unwrap();
        assert_eq!(
            effects.ipi.unwrap().message.destination,
            Destination::Physical(0x1234)
        );
        let effects = lapic.write_msr(0x830, 0x0000_00FF_0000_0041, T0).unwrap();
        assert_eq!(
            effects.ipi.unwrap().message.destination,
            Destination::Physical(0xFF)
        );
        let effects = lapic.write_msr(0x830, 0xFFFF_FFFF_0000_0841, T0).unwrap();
        assert_eq!(
            effects.ipi.unwrap().message.destination,
            Destination::Broadcast
        );
        assert_eq!(lapic.read_msr(0x830, T0), Ok(0xFFFF_FFFF_0000_0841));
    }

    #[test]
    fn self_ipi_is_local() {
        let mut lapic = x2apic(0);
        assert_eq!(lapic.write_msr(0x83F, 0x99, T0), Ok(Effects::default()));
        assert_eq!(lapic.pending(), Some(Pending::Vector(0x99)));
        let _ = lapic.write_msr(0x83F, 0x0F, T0);
        let _ = lapic.write_msr(0x828, 0, T0);
        assert_eq!(lapic.read_msr(0x828, T0), Ok(0x20));
    }
}
