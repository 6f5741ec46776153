//! The fixed processor models: what their guests see, on every host alike.
//!
//! The levels are the micro-architecture levels of the x86-64 psABI (table 3.1):
//! what a compiler's `-march=x86-64-v3` may use, a guest with the model
//! `x86-64-v3` has. A level says nothing of what operating systems need
//! besides, so each model has more. What that is was chosen so that the hosts
//! that are asked for the level have it, of either vendor, and that the
//! software CPU has it:
//!
//! * x86-64-v1: the interrupt controller and its timer, a TSC that never stops,
//!   no-execute pages, and IA32_ARCH_CAPABILITIES, which tells the guest from
//!   which speculation faults the host is free. No PCID (AMD has it since Zen 3).
//! * x86-64-v2 adds RDTSCP, and IA32_SPEC_CTRL and IA32_PRED_CMD.
//! * x86-64-v3 adds AES, PCLMULQDQ, RDRAND, XSAVEOPT, FSGSBASE and SMEP: every
//!   processor with AVX2 has them. Not SMAP, ADX and RDSEED (Intel's since
//!   Broadwell), nor ERMS (AMD's since Zen 3).
//! * x86-64-v4 adds what Skylake-SP, Zen 4 and everything after them have.
//!
//! **A model never changes.** Guests that were saved under a version of Caisson
//! must find the same processor under the next: a change is a new model.

use super::Feature;

/// A model of the psABI's levels.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Level {
    /// The baseline: SSE2.
    V1,
    /// SSE4.2 and POPCNT.
    V2,
    /// AVX2, BMI, FMA.
    V3,
    /// AVX-512.
    V4,
}

/// What the psABI lists for the level and not for the one before. OSFXSR, OSXSAVE
/// and SCE, which it lists too, are the operating system's to switch on.
#[rustfmt::skip]
const LISTED: [&[&str]; 4] = [
    &["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"],
    &["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"],
    &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"],
    &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
];

/// What the model has besides, and the one before has not.
#[rustfmt::skip]
const BESIDES: [&[&str]; 4] = [
    &["de", "pse", "tsc", "msr", "pae", "sep", "mtrr", "pge", "pat", "pse36", "clflush",
      "x2apic", "tsc_deadline_timer", "arat", "nx", "lm", "nonstop_tsc", "arch_capabilities"],
    &["rdtscp", "spec_ctrl"],
    &["aes", "pclmulqdq", "rdrand", "xsaveopt", "fsgsbase", "smep"],
    &["pcid", "invpcid", "smap", "adx", "rdseed", "erms", "3dnowprefetch", "clflushopt", "clwb",
      "pdpe1gb", "xsavec", "xgetbv1", "xsaves"],
];

impl Level {
    /// All, the least first.
    pub const ALL: [Self; 4] = [Self::V1, Self::V2, Self::V3, Self::V4];

    /// The name that `--cpu` takes: `x86-64-v3`.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "x86-64-v1",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// The names of all its features.
    pub fn feature_names(self) -> impl Iterator<Item = &'static str> {
        LISTED
            .iter()
            .zip(&BESIDES)
            .take(self as usize + 1)
            .flat_map(|(listed, besides)| listed.iter().chain(besides.iter()).copied())
    }

    /// All its features.
    pub(super) fn features(self) -> impl Iterator<Item = Feature> {
        self.feature_names().filter_map(Feature::named)
    }

    /// Family, model and stepping: those of the processors of Intel's that brought
    /// the level (Intel SDM Vol. 4 table 2-1), so that guests know what they run on:
    /// Core 2, Westmere, Haswell and Skylake-SP.
    pub(super) fn signature(self) -> (u16, u8, u8) {
        match self {
            Self::V1 => (6, 0x0f, 11),
            Self::V2 => (6, 0x2c, 2),
            Self::V3 => (6, 0x3c, 4),
            Self::V4 => (6, 0x55, 4),
        }
    }

    /// The brand string.
    pub(super) fn brand(self) -> &'static str {
        match self {
            Self::V1 => "Caisson x86-64-v1",
            Self::V2 => "Caisson x86-64-v2",
            Self::V3 => "Caisson x86-64-v3",
            Self::V4 => "Caisson x86-64-v4",
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_feature_is_known_and_has_what_it_needs() {
        for level in Level::ALL {
            let mut names = BTreeSet::new();
            for name in level.feature_names() {
                let feature = Feature::named(name).unwrap_or_else(|| panic!("{name}"));
                assert_eq!(feature.name(), Some(name), "not by another name");
                assert!(names.insert(name), "{name} is there twice");
            }
            for (feature, needs) in Feature::dependencies() {
                assert!(
                    !names.contains(feature) || names.contains(needs),
                    "{}: {feature} needs {needs}",
                    level.name()
                );
            }
        }
    }

    #[test]
    fn models_never_change() {
        // Adding to this list, or taking from it, breaks saved guests: make a new model.
        let of = |level: Level| {
            let mut names: alloc::vec::Vec<_> = level.feature_names().collect();
            names.sort_unstable();
            names.join(" ")
        };
        assert_eq!(
            of(Level::V2),
            "arat arch_capabilities clflush cmov cx16 cx8 de fpu fxsr lahf_lm lm mmx msr mtrr \
             nonstop_tsc nx pae pat pge pni popcnt pse pse36 rdtscp sep spec_ctrl sse sse2 sse4_1 \
             sse4_2 ssse3 syscall tsc tsc_deadline_timer x2apic"
        );
        assert_eq!(Level::V1.feature_names().count(), 26);
        assert_eq!(Level::V3.feature_names().count(), 35 + 15);
        assert_eq!(Level::V4.feature_names().count(), 50 + 18);
    }
}
