//! The relation between CPUID bits and instructions.
//!
//! An instruction may execute only if every feature that iced names for it is
//! in the set derived from the CPUID that the guest sees, whatever the host has.

use iced_x86::CpuidFeature;

/// Which output register of CPUID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reg {
    /// EAX.
    Eax = 0,
    /// EBX.
    Ebx = 1,
    /// ECX.
    Ecx = 2,
    /// EDX.
    Edx = 3,
}

/// Where CPUID announces a feature.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bit {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry.
    pub subleaf: u32,
    /// The register.
    pub reg: Reg,
    /// The bit, 0 to 31.
    pub bit: u32,
}

const fn bit(leaf: u32, subleaf: u32, reg: Reg, bit: u32) -> Bit {
    Bit {
        leaf,
        subleaf,
        reg,
        bit,
    }
}

use CpuidFeature as F;
use Reg::{Eax, Ebx, Ecx, Edx};

/// Part of every x86-64 processor: not announced, always there.
const ALWAYS: &[CpuidFeature] = &[
    F::INTEL8086,
    F::INTEL8086_ONLY,
    F::INTEL186,
    F::INTEL286,
    F::INTEL286_ONLY,
    F::INTEL386,
    F::INTEL386_ONLY,
    F::INTEL486,
    F::X64,
    F::CPUID,
    F::MULTIBYTENOP,
    F::PAUSE,
    F::FPU287,
    F::FPU387,
    F::RDPMC,
    F::SMM,
];

/// Features with instructions of their own, and where they are announced
/// (Intel SDM Vol. 2 CPUID; AMD APM Vol. 3 appendix E). A feature that is in
/// neither list is never executed.
pub const ANNOUNCED: &[(CpuidFeature, Bit)] = &[
    (F::FPU, bit(1, 0, Edx, 0)),
    (F::TSC, bit(1, 0, Edx, 4)),
    (F::MSR, bit(1, 0, Edx, 5)),
    (F::CX8, bit(1, 0, Edx, 8)),
    (F::SEP, bit(1, 0, Edx, 11)),
    (F::CMOV, bit(1, 0, Edx, 15)),
    (F::CLFSH, bit(1, 0, Edx, 19)),
    (F::MMX, bit(1, 0, Edx, 23)),
    (F::FXSR, bit(1, 0, Edx, 24)),
    (F::SSE, bit(1, 0, Edx, 25)),
    (F::SSE2, bit(1, 0, Edx, 26)),
    (F::SSE3, bit(1, 0, Ecx, 0)),
    (F::PCLMULQDQ, bit(1, 0, Ecx, 1)),
    (F::SSSE3, bit(1, 0, Ecx, 9)),
    (F::FMA, bit(1, 0, Ecx, 12)),
    (F::CMPXCHG16B, bit(1, 0, Ecx, 13)),
    (F::SSE4_1, bit(1, 0, Ecx, 19)),
    (F::SSE4_2, bit(1, 0, Ecx, 20)),
    (F::MOVBE, bit(1, 0, Ecx, 22)),
    (F::POPCNT, bit(1, 0, Ecx, 23)),
    (F::AES, bit(1, 0, Ecx, 25)),
    (F::XSAVE, bit(1, 0, Ecx, 26)),
    (F::AVX, bit(1, 0, Ecx, 28)),
    (F::F16C, bit(1, 0, Ecx, 29)),
    (F::RDRAND, bit(1, 0, Ecx, 30)),
    (F::FSGSBASE, bit(7, 0, Ebx, 0)),
    (F::BMI1, bit(7, 0, Ebx, 3)),
    (F::AVX2, bit(7, 0, Ebx, 5)),
    (F::BMI2, bit(7, 0, Ebx, 8)),
    (F::INVPCID, bit(7, 0, Ebx, 10)),
    (F::RDSEED, bit(7, 0, Ebx, 18)),
    (F::ADX, bit(7, 0, Ebx, 19)),
    (F::SMAP, bit(7, 0, Ebx, 20)),
    (F::CLFLUSHOPT, bit(7, 0, Ebx, 23)),
    (F::CLWB, bit(7, 0, Ebx, 24)),
    (F::SHA, bit(7, 0, Ebx, 29)),
    (F::GFNI, bit(7, 0, Ecx, 8)),
    (F::VAES, bit(7, 0, Ecx, 9)),
    (F::VPCLMULQDQ, bit(7, 0, Ecx, 10)),
    (F::RDPID, bit(7, 0, Ecx, 22)),
    (F::SERIALIZE, bit(7, 0, Edx, 14)),
    (F::AVX_VNNI, bit(7, 1, Eax, 4)),
    (F::AVX_IFMA, bit(7, 1, Eax, 23)),
    (F::XSAVEOPT, bit(0xd, 1, Eax, 0)),
    (F::XSAVEC, bit(0xd, 1, Eax, 1)),
    (F::XSAVES, bit(0xd, 1, Eax, 3)),
    (F::LZCNT, bit(0x8000_0001, 0, Ecx, 5)),
    (F::PREFETCHW, bit(0x8000_0001, 0, Ecx, 8)),
    (F::SYSCALL, bit(0x8000_0001, 0, Edx, 11)),
    (F::RDTSCP, bit(0x8000_0001, 0, Edx, 27)),
];

/// A set of instruction-set features.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features([u64; 4]);

impl Features {
    /// What the CPUID values that `read` returns for a leaf and subleaf allow.
    pub fn from_cpuid(mut read: impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let mut set = Self::default();
        for &f in ALWAYS {
            set.insert(f);
        }
        for &(f, b) in ANNOUNCED {
            if read(b.leaf, b.subleaf)[b.reg as usize] >> b.bit & 1 != 0 {
                set.insert(f);
            }
        }
        set
    }

    /// Every feature that the core could ever execute, on any host.
    pub fn all() -> Self {
        Self::from_cpuid(|_, _| [!0; 4])
    }

    /// Adds a feature.
    pub fn insert(&mut self, f: CpuidFeature) {
        self.0[f as usize / 64 % 4] |= 1 << (f as usize % 64);
    }

    /// Removes a feature.
    pub fn remove(&mut self, f: CpuidFeature) {
        self.0[f as usize / 64 % 4] &= !(1 << (f as usize % 64));
    }

    /// Whether the set has `f`.
    pub fn contains(&self, f: CpuidFeature) -> bool {
        self.0[f as usize / 64 % 4] >> (f as usize % 64) & 1 != 0
    }

    /// Whether a guest with this set may use an instruction that belongs to
    /// `features`: it has each of them that CPUID can announce.
    pub fn permits(&self, features: &[CpuidFeature]) -> bool {
        features
            .iter()
            .all(|&f| self.contains(f) || ANNOUNCED.iter().all(|&(a, _)| a != f))
    }

    /// Whether the set has all of `features`.
    pub fn contains_all(&self, features: &[CpuidFeature]) -> bool {
        features.iter().all(|&f| self.contains(f))
    }
}
