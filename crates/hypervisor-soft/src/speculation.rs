//! The MSRs by which guests are told of speculation faults, and ask for
//! protection from them (Intel SDM Vol. 4 table 2-2).
//!
//! No guest instruction is executed ahead with the guest's own privileges, so
//! what guests ask for is remembered and changes nothing.

use caisson_hypervisor::x86::{CpuidTable, Feature};
use caisson_x86_cpu::cpuid::ARCH_CAPABILITIES;

/// IA32_SPEC_CTRL.
pub(crate) const SPEC_CTRL: u32 = 0x48;
const PRED_CMD: u32 = 0x49;
const ARCH_CAPABILITIES_MSR: u32 = 0x10a;

/// IA32_SPEC_CTRL bits, and the features that bring them: IBRS, STIBP, SSBD.
const CONTROLS: [(u64, &str); 3] = [(1, "spec_ctrl"), (1 << 1, "stibp"), (1 << 2, "ssbd")];
/// IA32_PRED_CMD: indirect branch prediction barrier.
const BARRIER: u64 = 1;
/// IA32_ARCH_CAPABILITIES: IBRS need be set only once, which is of no use to a
/// guest that cannot set it.
const IBRS_ALL: u64 = 1 << 1;

/// One vCPU's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Speculation {
    /// Bits of IA32_SPEC_CTRL that the guest may set; zero: no such MSR.
    controls: u64,
    /// What IA32_ARCH_CAPABILITIES says, if there is one.
    capabilities: Option<u64>,
    control: u64,
}

impl Speculation {
    /// After power-on, for a guest that sees `cpuid`.
    pub(crate) fn new(cpuid: &CpuidTable) -> Self {
        let has = |name| Feature::named(name).is_some_and(|f| cpuid.has(f));
        let controls = CONTROLS
            .iter()
            .filter(|(_, feature)| has(feature))
            .fold(0, |mask, (bit, _)| mask | bit);
        let capabilities = if has("spec_ctrl") {
            ARCH_CAPABILITIES
        } else {
            ARCH_CAPABILITIES & !IBRS_ALL
        };
        Self {
            controls,
            capabilities: has("arch_capabilities").then_some(capabilities),
            control: 0,
        }
    }

    /// Power-on values.
    pub(crate) fn reset(&mut self) {
        self.control = 0;
    }

    /// `None`: another's MSR, or none that the guest has.
    pub(crate) fn read(&self, index: u32) -> Option<u64> {
        match index {
            SPEC_CTRL if self.controls != 0 => Some(self.control),
            ARCH_CAPABILITIES_MSR => self.capabilities,
            _ => None,
        }
    }

    /// `None`: another's MSR, or none that the guest has. `Some(false)`: #GP(0).
    pub(crate) fn write(&mut self, index: u32, value: u64) -> Option<bool> {
        match index {
            SPEC_CTRL if self.controls != 0 => {
                let valid = value & !self.controls == 0;
                if valid {
                    self.control = value;
                }
                Some(valid)
            }
            PRED_CMD if self.controls != 0 => Some(value & !BARRIER == 0),
            ARCH_CAPABILITIES_MSR if self.capabilities.is_some() => Some(false),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(features: &[&str]) -> Speculation {
        let mut cpuid = CpuidTable::default();
        for name in features {
            cpuid.promise(Feature::named(name).unwrap(), true);
        }
        Speculation::new(&cpuid)
    }

    #[test]
    fn guests_have_the_msrs_that_their_cpuid_promises() {
        let mut none = with(&[]);
        for index in [SPEC_CTRL, PRED_CMD, ARCH_CAPABILITIES_MSR] {
            assert_eq!((none.read(index), none.write(index, 0)), (None, None));
        }
        let told = with(&["arch_capabilities"]);
        assert_eq!(
            told.read(ARCH_CAPABILITIES_MSR),
            Some(ARCH_CAPABILITIES & !IBRS_ALL)
        );
        assert_eq!(told.read(SPEC_CTRL), None);
        let mut all = with(&["arch_capabilities", "spec_ctrl", "stibp"]);
        assert_eq!(all.read(ARCH_CAPABILITIES_MSR), Some(ARCH_CAPABILITIES));
        assert_eq!(all.write(SPEC_CTRL, 3), Some(true));
        assert_eq!(all.write(SPEC_CTRL, 4), Some(false));
        assert_eq!(all.read(SPEC_CTRL), Some(3));
        assert_eq!(
            (all.write(PRED_CMD, 1), all.write(PRED_CMD, 2)),
            (Some(true), Some(false))
        );
        assert_eq!(
            (all.read(PRED_CMD), all.write(ARCH_CAPABILITIES_MSR, 0)),
            (None, Some(false))
        );
        all.reset();
        assert_eq!(all.read(SPEC_CTRL), Some(0));
    }
}
