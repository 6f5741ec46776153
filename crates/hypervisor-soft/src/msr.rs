//! MSRs that belong to neither the core nor the APIC (Intel SDM Vol. 4).

/// IA32_TIME_STAMP_COUNTER.
pub(crate) const TSC: u32 = 0x10;
/// IA32_APIC_BASE.
pub(crate) const APIC_BASE: u32 = 0x1b;
/// IA32_TSC_ADJUST.
pub(crate) const TSC_ADJUST: u32 = 0x3b;
/// IA32_TSC_DEADLINE.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

const PLATFORM_ID: u32 = 0x17;
const BIOS_SIGN_ID: u32 = 0x8b;
const MTRRCAP: u32 = 0xfe;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const DEBUGCTL: u32 = 0x1d9;
const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Variable ranges that MTRRCAP announces.
const VARIABLE: usize = 8;
const MTRR_VARIABLE_LAST: u32 = 0x200 + 2 * VARIABLE as u32 - 1;

/// Memory type range registers. They are kept, and mean nothing: the software
/// CPU has no caches of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mtrrs {
    variable: [u64; 2 * VARIABLE],
    fixed: [u64; 11],
    default_type: u64,
}

impl Default for Mtrrs {
    fn default() -> Self {
        // Enabled, write-back by default, as firmware leaves them.
        Self {
            variable: [0; 2 * VARIABLE],
            fixed: [0x0606_0606_0606_0606; 11],
            default_type: 0xc06,
        }
    }
}

fn is_type(t: u64) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6)
}

impl Mtrrs {
    /// All registers, for saving.
    pub(crate) fn entries(&self) -> Vec<(u32, u64)> {
        let variable = self
            .variable
            .iter()
            .enumerate()
            .map(|(i, v)| (0x200 + i as u32, *v));
        let fixed = MTRR_FIXED.iter().zip(self.fixed).map(|(i, v)| (*i, v));
        variable
            .chain(fixed)
            .chain([(MTRR_DEF_TYPE, self.default_type)])
            .collect()
    }

    pub(crate) fn read(&self, index: u32, _phys_bits: u8) -> Option<u64> {
        match index {
            MTRRCAP => Some(VARIABLE as u64 | 1 << 8 | 1 << 10),
            MTRR_DEF_TYPE => Some(self.default_type),
            0x200..=MTRR_VARIABLE_LAST => Some(self.variable[(index - 0x200) as usize]),
            _ => MTRR_FIXED
                .iter()
                .position(|&f| f == index)
                .map(|i| self.fixed[i]),
        }
    }

    /// `None`: not an MTRR. `Some(false)`: #GP(0).
    pub(crate) fn write(&mut self, index: u32, value: u64, phys_bits: u8) -> Option<bool> {
        let address_bits = !0 << phys_bits;
        let (slot, valid) = match index {
            MTRRCAP => return Some(false),
            MTRR_DEF_TYPE => {
                let valid = value & !0xcff == 0 && is_type(value & 0xff);
                (&mut self.default_type, valid)
            }
            0x200..=MTRR_VARIABLE_LAST => {
                let valid = if index & 1 == 0 {
                    value & (address_bits | 0xf00) == 0 && is_type(value & 0xff)
                } else {
                    value & (address_bits | 0x7ff) == 0
                };
                (&mut self.variable[(index - 0x200) as usize], valid)
            }
            _ => {
                let i = MTRR_FIXED.iter().position(|&f| f == index)?;
                (
                    &mut self.fixed[i],
                    value.to_le_bytes().iter().all(|&t| is_type(t.into())),
                )
            }
        };
        if valid {
            *slot = value;
        }
        Some(valid)
    }
}

/// MSRs with a value that never changes.
pub(crate) fn read_constant(index: u32) -> Option<u64> {
    match index {
        PLATFORM_ID | MCG_CAP | MCG_STATUS | DEBUGCTL => Some(0),
        // A microcode revision high enough that no guest thinks of errata.
        BIOS_SIGN_ID => Some(0xffff_ffff << 32),
        _ => None,
    }
}

/// Writes that are allowed and do nothing.
pub(crate) fn write_ignored(index: u32, value: u64) -> bool {
    match index {
        BIOS_SIGN_ID => true,
        MCG_STATUS | DEBUGCTL => value == 0,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mtrrs_refuse_reserved_bits_and_types() {
        let mut m = Mtrrs::default();
        assert_eq!(m.write(0x200, 2, 40), Some(false));
        assert_eq!(m.write(0x201, 1 << 41, 40), Some(false));
        assert_eq!(m.write(0x201, 0xff_f000_0800, 40), Some(true));
        assert_eq!(m.read(0x201, 40), Some(0xff_f000_0800));
        assert_eq!(m.write(MTRR_DEF_TYPE, 0x1000, 40), Some(false));
        assert_eq!(m.write(0x1234, 0, 40), None);
    }
}
