//! The names of CPUID's feature bits, and which features need which.
//!
//! Names are those of Linux's `/proc/cpuinfo`, so that what a message lists can
//! be looked for there; where Linux shows none, the manual's own in its style.
//! Bits are from Intel SDM Vol. 2 (CPUID) and AMD APM Vol. 3 appendix E.

/// Where the bit of a feature is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Feature {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry; 0 where the leaf ignores it.
    pub subleaf: u32,
    /// EAX, EBX, ECX, EDX: 0 to 3.
    pub register: usize,
    /// 0 to 31.
    pub bit: u32,
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// A register that holds features: leaf, subleaf, register, the bits that are
/// features, and their names. Not features: what says how something is
/// enumerated (HTT, CMP_LEGACY), follows the guest's own settings (OSXSAVE,
/// OSPKE, APIC), is told by the hypervisor (HYPERVISOR), is a number (MAWAU), says
/// that something is *not* done any more (FDP_EXCPTN_ONLY, ZERO_FCS_FDS), or
/// repeats another leaf's bit (AMD's copy of leaf 1).
pub(super) struct Register {
    pub(super) leaf: u32,
    pub(super) subleaf: u32,
    pub(super) register: usize,
    pub(super) mask: u32,
    names: &'static [(u32, &'static str)],
}

const fn register(
    leaf: u32,
    subleaf: u32,
    register: usize,
    mask: u32,
    names: &'static [(u32, &'static str)],
) -> Register {
    Register {
        leaf,
        subleaf,
        register,
        mask,
        names,
    }
}

#[rustfmt::skip]
pub(super) const REGISTERS: &[Register] = &[
    register(1, 0, EDX, !(1 << 9 | 1 << 28), &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"),
        (7, "mce"), (8, "cx8"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"),
        (15, "cmov"), (16, "pat"), (17, "pse36"), (18, "pn"), (19, "clflush"), (21, "dts"),
        (22, "acpi"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"), (27, "ss"),
        (29, "tm"), (30, "ia64"), (31, "pbe"),
    ]),
    register(1, 0, ECX, !(1 << 27 | 1 << 31), &[
        (0, "pni"), (1, "pclmulqdq"), (2, "dtes64"), (3, "monitor"), (4, "ds_cpl"), (5, "vmx"),
        (6, "smx"), (7, "est"), (8, "tm2"), (9, "ssse3"), (10, "cid"), (11, "sdbg"),
        (12, "fma"), (13, "cx16"), (14, "xtpr"), (15, "pdcm"), (17, "pcid"), (18, "dca"),
        (19, "sse4_1"), (20, "sse4_2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"),
        (24, "tsc_deadline_timer"), (25, "aes"), (26, "xsave"), (28, "avx"), (29, "f16c"),
        (30, "rdrand"),
    ]),
    register(6, 0, EAX, !0, &[
        (0, "dtherm"), (1, "ida"), (2, "arat"), (4, "pln"), (6, "pts"), (7, "hwp"),
        (8, "hwp_notify"), (9, "hwp_act_window"), (10, "hwp_epp"), (11, "hwp_pkg_req"),
        (19, "hfi"),
    ]),
    register(6, 0, ECX, 0xff, &[(0, "aperfmperf"), (3, "epb")]),
    register(7, 0, EBX, !(1 << 6 | 1 << 13), &[
        (0, "fsgsbase"), (1, "tsc_adjust"), (2, "sgx"), (3, "bmi1"), (4, "hle"), (5, "avx2"),
        (7, "smep"), (8, "bmi2"), (9, "erms"), (10, "invpcid"), (11, "rtm"), (12, "cqm"),
        (14, "mpx"), (15, "rdt_a"), (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"),
        (19, "adx"), (20, "smap"), (21, "avx512ifma"), (23, "clflushopt"), (24, "clwb"),
        (25, "intel_pt"), (26, "avx512pf"), (27, "avx512er"), (28, "avx512cd"), (29, "sha_ni"),
        (30, "avx512bw"), (31, "avx512vl"),
    ]),
    register(7, 0, ECX, !(1 << 4 | 0x1f << 17), &[
        (0, "prefetchwt1"), (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (5, "waitpkg"),
        (6, "avx512_vbmi2"), (7, "shstk"), (8, "gfni"), (9, "vaes"), (10, "vpclmulqdq"),
        (11, "avx512_vnni"), (12, "avx512_bitalg"), (13, "tme"), (14, "avx512_vpopcntdq"),
        (16, "la57"), (22, "rdpid"), (23, "key_locker"), (24, "bus_lock_detect"),
        (25, "cldemote"), (27, "movdiri"), (28, "movdir64b"), (29, "enqcmd"), (30, "sgx_lc"),
        (31, "pks"),
    ]),
    register(7, 0, EDX, !0, &[
        (1, "sgx_keys"), (2, "avx512_4vnniw"), (3, "avx512_4fmaps"), (4, "fsrm"), (5, "uintr"),
        (8, "avx512_vp2intersect"), (9, "srbds_ctrl"), (10, "md_clear"),
        (11, "rtm_always_abort"), (13, "tsx_force_abort"), (14, "serialize"),
        (15, "hybrid_cpu"), (16, "tsxldtrk"), (18, "pconfig"), (19, "arch_lbr"), (20, "ibt"),
        (22, "amx_bf16"), (23, "avx512_fp16"), (24, "amx_tile"), (25, "amx_int8"),
        (26, "spec_ctrl"), (27, "stibp"), (28, "flush_l1d"), (29, "arch_capabilities"),
        (30, "core_capabilities"), (31, "ssbd"),
    ]),
    register(7, 1, EAX, !0, &[
        (0, "sha512"), (1, "sm3"), (2, "sm4"), (3, "rao_int"), (4, "avx_vnni"),
        (5, "avx512_bf16"), (6, "lass"), (7, "cmpccxadd"), (8, "arch_perfmon_ext"),
        (10, "fzrm"), (11, "fsrs"), (12, "fsrc"), (17, "fred"), (18, "lkgs"), (19, "wrmsrns"),
        (21, "amx_fp16"), (22, "hreset"), (23, "avx_ifma"), (26, "lam"), (27, "msrlist"),
    ]),
    register(7, 1, EBX, !0, &[(0, "intel_ppin")]),
    register(7, 1, ECX, !0, &[(5, "msr_imm")]),
    register(7, 1, EDX, !0, &[
        (4, "avx_vnni_int8"), (5, "avx_ne_convert"), (8, "amx_complex"), (10, "avx_vnni_int16"),
        (14, "prefetchiti"), (15, "user_msr"), (17, "uiret_uif"), (18, "cet_sss"), (19, "avx10"),
    ]),
    register(7, 2, EDX, !0, &[
        (0, "psfd"), (1, "ipred_ctrl"), (2, "rrsba_ctrl"), (3, "ddpd_u"), (4, "bhi_ctrl"),
        (5, "mcdt_no"),
    ]),
    register(0xd, 1, EAX, !0, &[
        (0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd"),
    ]),
    register(0x8000_0001, 0, ECX, !(1 << 1), &[
        (0, "lahf_lm"), (2, "svm"), (3, "extapic"), (4, "cr8_legacy"), (5, "abm"), (6, "sse4a"),
        (7, "misalignsse"), (8, "3dnowprefetch"), (9, "osvw"), (10, "ibs"), (11, "xop"),
        (12, "skinit"), (13, "wdt"), (15, "lwp"), (16, "fma4"), (17, "tce"),
        (19, "nodeid_msr"), (21, "tbm"), (22, "topoext"), (23, "perfctr_core"),
        (24, "perfctr_nb"), (26, "bpext"), (27, "ptsc"), (28, "perfctr_llc"), (29, "mwaitx"),
    ]),
    register(0x8000_0001, 0, EDX, !AMD_COPIES, &[
        (11, "syscall"), (19, "mp"), (20, "nx"), (22, "mmxext"), (25, "fxsr_opt"),
        (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm"), (30, "3dnowext"), (31, "3dnow"),
    ]),
    register(0x8000_0007, 0, EDX, !0, &[(8, "nonstop_tsc"), (9, "cpb"), (12, "proc_feedback")]),
    register(0x8000_0008, 0, EBX, !0, &[
        (0, "clzero"), (1, "irperf"), (2, "xsaveerptr"), (4, "rdpru"), (9, "wbnoinvd"),
        (12, "amd_ibpb"), (14, "amd_ibrs"), (15, "amd_stibp"), (17, "amd_stibp_always_on"),
        (19, "amd_ibrs_same_mode"), (23, "amd_ppin"), (24, "amd_ssbd"), (25, "virt_ssbd"),
        (26, "amd_ssb_no"), (27, "cppc"), (28, "amd_psfd"), (29, "btc_no"), (30, "ibpb_ret"),
        (31, "brs"),
    ]),
    register(0x8000_0021, 0, EAX, !0, &[
        (0, "no_nested_data_bp"), (2, "lfence_rdtsc"), (6, "null_sel_clr_base"),
        (7, "upper_addr_ignore"), (8, "autoibrs"), (9, "no_smm_ctl_msr"), (20, "prefetchi"),
        (27, "sbpb"), (28, "ibpb_brtype"), (29, "srso_no"), (30, "srso_user_kernel_no"),
    ]),
    register(0x8000_0021, 0, ECX, !0, &[(1, "tsa_sq_no"), (2, "tsa_l1_no")]),
];

/// The bits of 8000_0001h:EDX that repeat leaf 1's on AMD's processors, and are
/// reserved on Intel's.
pub(super) const AMD_COPIES: u32 = 0x0183_f3ff;

/// Other names under which features are known: Intel's and AMD's manuals, QEMU, GCC.
const ALIASES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("cmpxchg16b", "cx16"),
    ("cmpxchg8b", "cx8"),
    ("lzcnt", "abm"),
    ("lahf", "lahf_lm"),
    ("lahf_sahf", "lahf_lm"),
    ("pclmul", "pclmulqdq"),
    ("rdrnd", "rdrand"),
    ("sha", "sha_ni"),
    ("avx512_ifma", "avx512ifma"),
    ("avx512_vbmi", "avx512vbmi"),
    ("bmi", "bmi1"),
    ("clfsh", "clflush"),
    ("tsc_deadline", "tsc_deadline_timer"),
    ("invtsc", "nonstop_tsc"),
    ("prefetchw", "3dnowprefetch"),
    ("gbpages", "pdpe1gb"),
    ("ibrs", "spec_ctrl"),
    ("ibpb", "spec_ctrl"),
    ("spec_ctrl_ssbd", "ssbd"),
    ("intel_stibp", "stibp"),
];

/// Features that mean nothing, or that guests take for granted to be there
/// together, without another one: (feature, what it needs). Intel SDM Vol. 1
/// §13.1 to §14.7 and §15.2 to §15.4 (detection), Vol. 3 §4.10.1.
#[rustfmt::skip]
const NEEDS: &[(&str, &str)] = &[
    ("lm", "pae"), ("lm", "syscall"), ("nx", "pae"), ("la57", "lm"), ("pcid", "lm"),
    ("pdpe1gb", "lm"), ("lahf_lm", "lm"), ("cx16", "cx8"), ("invpcid", "pcid"),
    ("mmx", "fpu"), ("fxsr", "fpu"), ("sse", "fxsr"), ("sse2", "sse"),
    ("pni", "sse2"), ("ssse3", "pni"), ("sse4_1", "ssse3"), ("sse4_2", "sse4_1"),
    ("sse4a", "pni"), ("aes", "sse2"), ("pclmulqdq", "sse2"), ("sha_ni", "sse2"),
    ("gfni", "sse2"),
    ("xsave", "fxsr"), ("xsaveopt", "xsave"), ("xsavec", "xsave"), ("xgetbv1", "xsave"),
    ("xsaves", "xsave"), ("xfd", "xsave"), ("pku", "xsave"), ("mpx", "xsave"),
    ("shstk", "xsaves"), ("ibt", "xsaves"),
    ("avx", "xsave"), ("avx", "sse4_2"), ("avx2", "avx"), ("fma", "avx"), ("f16c", "avx"),
    ("fma4", "avx"), ("xop", "avx"),
    ("vaes", "avx"), ("vaes", "aes"), ("vpclmulqdq", "avx"), ("vpclmulqdq", "pclmulqdq"),
    ("avx_vnni", "avx2"), ("avx_ifma", "avx2"), ("avx_vnni_int8", "avx2"),
    ("avx_vnni_int16", "avx2"), ("avx_ne_convert", "avx2"), ("sha512", "avx2"),
    ("sm3", "avx"), ("sm4", "avx2"),
    ("avx512f", "avx2"), ("avx512f", "fma"), ("avx512f", "f16c"),
    ("avx512dq", "avx512f"), ("avx512cd", "avx512f"), ("avx512bw", "avx512f"),
    ("avx512vl", "avx512f"), ("avx512ifma", "avx512f"), ("avx512pf", "avx512f"),
    ("avx512er", "avx512f"), ("avx512vbmi", "avx512bw"), ("avx512_vbmi2", "avx512bw"),
    ("avx512_vnni", "avx512f"), ("avx512_bitalg", "avx512bw"),
    ("avx512_vpopcntdq", "avx512f"), ("avx512_bf16", "avx512bw"),
    ("avx512_fp16", "avx512bw"), ("avx512_4vnniw", "avx512f"), ("avx512_4fmaps", "avx512f"),
    ("avx512_vp2intersect", "avx512f"), ("avx10", "avx512f"),
    ("amx_tile", "xfd"), ("amx_int8", "amx_tile"), ("amx_bf16", "amx_tile"),
    ("amx_fp16", "amx_tile"), ("amx_complex", "amx_tile"),
    ("x2apic", "msr"), ("tsc_deadline_timer", "tsc"), ("rdtscp", "tsc"),
    ("nonstop_tsc", "tsc"), ("tsc_adjust", "tsc"), ("stibp", "spec_ctrl"),
    ("ssbd", "spec_ctrl"),
];

/// What the components of XCR0 and IA32_XSS belong to (Intel SDM Vol. 1 §13.1):
/// the bit, its name, and the features of which one must be there.
#[rustfmt::skip]
pub(super) const COMPONENTS: &[(u32, &str, &[&str])] = &[
    (2, "AVX", &["avx"]),
    (3, "MPX bounds", &["mpx"]),
    (4, "MPX control", &["mpx"]),
    (5, "AVX-512 opmask", &["avx512f"]),
    (6, "AVX-512 upper halves", &["avx512f"]),
    (7, "AVX-512 upper registers", &["avx512f"]),
    (8, "processor trace", &["intel_pt"]),
    (9, "PKRU", &["pku"]),
    (10, "PASID", &["enqcmd"]),
    (11, "CET user", &["shstk", "ibt"]),
    (12, "CET supervisor", &["shstk"]),
    (14, "user interrupts", &["uintr"]),
    (15, "LBR", &["arch_lbr"]),
    (16, "HWP", &["hwp"]),
    (17, "AMX configuration", &["amx_tile"]),
    (18, "AMX tiles", &["amx_tile"]),
];

impl Feature {
    /// The feature that is called `name` in `/proc/cpuinfo`, or by one of the other
    /// names in use. Dots and dashes count as underscores: `sse4.1` is `sse4_1`.
    pub fn named(name: &str) -> Option<Self> {
        let same = |known: &str| {
            known.len() == name.len()
                && known.bytes().zip(name.bytes()).all(|(known, typed)| {
                    known == typed.to_ascii_lowercase()
                        || known == b'_' && matches!(typed, b'.' | b'-')
                })
        };
        let name = ALIASES
            .iter()
            .find(|(alias, _)| same(alias))
            .map(|(_, name)| *name);
        REGISTERS.iter().find_map(|r| {
            let (bit, _) = r.names.iter().find(|(_, known)| match name {
                Some(name) => *known == name,
                None => same(known),
            })?;
            Some(Self {
                leaf: r.leaf,
                subleaf: r.subleaf,
                register: r.register,
                bit: *bit,
            })
        })
    }

    /// Its name, if it has one.
    pub fn name(&self) -> Option<&'static str> {
        REGISTERS
            .iter()
            .find(|r| (r.leaf, r.subleaf, r.register) == (self.leaf, self.subleaf, self.register))?
            .names
            .iter()
            .find(|(bit, _)| *bit == self.bit)
            .map(|(_, name)| *name)
    }

    /// The names of all features, without the other names that some have.
    pub fn names() -> impl Iterator<Item = &'static str> {
        REGISTERS
            .iter()
            .flat_map(|r| r.names.iter().map(|(_, name)| *name))
    }

    /// Every feature with a name, and one that it cannot do without.
    pub fn dependencies() -> impl Iterator<Item = (&'static str, &'static str)> {
        NEEDS.iter().copied()
    }
}

impl core::fmt::Display for Feature {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if let Some(name) = self.name() {
            return f.write_str(name);
        }
        let register = ["EAX", "EBX", "ECX", "EDX"][self.register & 3];
        match self.leaf {
            7 | 0xd => write!(f, "CPUID {:X}.{} {register}", self.leaf, self.subleaf)?,
            leaf if leaf < 10 => write!(f, "CPUID {leaf} {register}")?,
            leaf => write!(f, "CPUID {leaf:X}h {register}")?,
        }
        write!(f, " bit {}", self.bit)
    }
}

#[cfg(test)]
mod tests {
    use alloc::{collections::BTreeSet, string::ToString};

    use super::*;

    #[test]
    fn each_bit_has_one_name_and_each_name_one_bit() {
        let mut names = BTreeSet::new();
        for r in REGISTERS {
            let mut bits = 0;
            for (bit, name) in r.names {
                assert!(names.insert(*name), "{name} is there twice");
                assert_eq!(bits >> bit & 1, 0, "{name} shares its bit");
                bits |= 1 << bit;
                let feature = Feature::named(name).unwrap();
                assert_eq!(feature.name(), Some(*name));
            }
            assert_eq!(bits & !r.mask, 0, "leaf {:x}: {bits:x}", r.leaf);
        }
        for (alias, name) in ALIASES {
            assert!(!names.contains(alias), "{alias} is a name already");
            assert_eq!(Feature::named(alias).unwrap().name(), Some(*name));
        }
    }

    #[test]
    fn names_are_taken_as_people_write_them() {
        let sse41 = Feature::named("sse4_1");
        assert_eq!(sse41.unwrap().bit, 19);
        for name in ["sse4.1", "SSE4-1"] {
            assert_eq!(Feature::named(name), sse41);
        }
        for name in ["sse41", "", "sse4_1 "] {
            assert_eq!(Feature::named(name), None);
        }
        assert_eq!(
            Feature::named("spec-ctrl").unwrap().to_string(),
            "spec_ctrl"
        );
    }

    #[test]
    fn bits_without_a_name_say_where_they_are() {
        let bit = |leaf, subleaf, register, bit| {
            Feature {
                leaf,
                subleaf,
                register,
                bit,
            }
            .to_string()
        };
        assert_eq!(bit(7, 0, ECX, 15), "CPUID 7.0 ECX bit 15");
        assert_eq!(bit(1, 0, EDX, 10), "CPUID 1 EDX bit 10");
        assert_eq!(bit(0x8000_0001, 0, ECX, 14), "CPUID 80000001h ECX bit 14");
    }

    #[test]
    fn dependencies_name_features_and_have_no_circle() {
        for (feature, needs) in Feature::dependencies() {
            for name in [feature, needs] {
                assert_eq!(Feature::named(name).unwrap().name(), Some(name));
            }
        }
        for (_, _, owners) in COMPONENTS {
            for owner in *owners {
                assert!(Feature::named(owner).is_some(), "{owner}");
            }
        }
        // What is left when everything without an unmet need is taken away is a circle.
        let mut rest: alloc::vec::Vec<_> = Feature::dependencies().collect();
        loop {
            let before = rest.len();
            let open = rest.clone();
            rest.retain(|(_, needs)| open.iter().any(|(feature, _)| feature == needs));
            if rest.len() == before {
                break;
            }
        }
        assert_eq!(rest, []);
    }
}
