//! The CPUID leaves of a guest: what this crate executes, where the host can.

use alloc::vec::Vec;

use super::{Reg, Reg::*};
use crate::vector::state_area;

/// One leaf of CPUID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry; `None` where the leaf ignores it.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX on return.
    pub regs: [u32; 4],
}

/// What the table depends on besides the host's processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Machine {
    /// Number of vCPUs, at least 1. APIC ids are 0 to `vcpus - 1`.
    pub vcpus: u32,
    /// Frequency of the guest's TSC, in Hz.
    pub tsc_hz: u64,
    /// Frequency of the local APIC's timer, in Hz: the "core crystal clock".
    pub apic_timer_hz: u32,
    /// Offer 57-bit linear addresses. Off by default where a choice is made:
    /// every page walk then has one level more.
    pub la57: bool,
}

/// Bits that are offered if the host has them: the host executes the instructions.
#[rustfmt::skip]
const FROM_HOST: &[(u32, u32, Reg, &[u32])] = &[
    // FPU CX8 CMOV MMX FXSR SSE SSE2
    (1, 0, Edx, &[0, 8, 15, 23, 24, 25, 26]),
    // SSE3 PCLMULQDQ SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES AVX F16C RDRAND
    (1, 0, Ecx, &[0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 28, 29, 30]),
    // BMI1 AVX2 BMI2 RDSEED ADX SHA
    (7, 0, Ebx, &[3, 5, 8, 18, 19, 29]),
    // GFNI VAES VPCLMULQDQ
    (7, 0, Ecx, &[8, 9, 10]),
    // AVX-VNNI AVX-IFMA
    (7, 1, Eax, &[4, 23]),
    // LZCNT
    (0x8000_0001, 0, Ecx, &[5]),
];

/// Bits that are offered on every host: the core does it all itself.
#[rustfmt::skip]
const EMULATED: &[(u32, u32, Reg, &[u32])] = &[
    // DE PSE TSC MSR PAE APIC SEP MTRR PGE PAT PSE36 CLFLUSH
    (1, 0, Edx, &[2, 3, 4, 5, 6, 9, 11, 12, 13, 16, 17, 19]),
    // PCID x2APIC TSC-deadline XSAVE hypervisor
    (1, 0, Ecx, &[17, 21, 24, 26, 31]),
    // ARAT
    (6, 0, Eax, &[2]),
    // FSGSBASE SMEP ERMS INVPCID FCS/FDS-deprecated SMAP CLFLUSHOPT CLWB
    (7, 0, Ebx, &[0, 7, 9, 10, 13, 20, 23, 24]),
    // UMIP RDPID
    (7, 0, Ecx, &[2, 22]),
    // FSRM SERIALIZE
    (7, 0, Edx, &[4, 14]),
    // XSAVEOPT XSAVEC XGETBV(1) XSAVES
    (0xd, 1, Eax, &[0, 1, 2, 3]),
    // LAHF PREFETCHW
    (0x8000_0001, 0, Ecx, &[0, 8]),
    // SYSCALL NX 1-GiB-pages RDTSCP LM
    (0x8000_0001, 0, Edx, &[11, 20, 26, 27, 29]),
    // invariant TSC
    (0x8000_0007, 0, Edx, &[8]),
];

/// Further bits for guests that see an Intel processor.
#[rustfmt::skip]
const INTEL: &[(u32, u32, Reg, &[u32])] = &[
    // SPEC_CTRL STIBP ARCH_CAPABILITIES
    (7, 0, Edx, &[26, 27, 29]),
];

/// Further bits for guests that see an AMD processor.
#[rustfmt::skip]
const AMD: &[(u32, u32, Reg, &[u32])] = &[
    // SSB_NO BTC_NO
    (0x8000_0008, 0, Ebx, &[26, 29]),
    // LFENCE-serializing null-selector-clears-base automatic-IBRS SRSO_NO
    (0x8000_0021, 0, Eax, &[2, 6, 8, 29]),
    // TSA_SQ_NO TSA_L1_NO
    (0x8000_0021, 0, Ecx, &[1, 2]),
    // What AMD repeats of leaf 1.
    (0x8000_0001, 0, Edx, &[0, 2, 3, 4, 5, 6, 8, 9, 12, 13, 15, 16, 17, 23, 24]),
];

/// IA32_ARCH_CAPABILITIES (MSR 10Ah) of guests that see an Intel processor: no
/// guest instruction executes speculatively with the guest's own privileges, so
/// no mitigation inside the guest is of use. RDCL_NO, IBRS_ALL,
/// SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO,
/// FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO. A guest that
/// sees it also writes IA32_SPEC_CTRL (48h) and IA32_PRED_CMD (49h).
pub const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// The name in leaf 4000_0000h.
pub const SIGNATURE: [u8; 12] = *b"Caisson VMM\0";

const HYPERVISOR: u32 = 0x4000_0000;
const EXTENDED: u32 = 0x8000_0000;
const AMD_NAME: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
const HYGON_NAME: [u32; 3] = [0x6f67_7948, 0x656e_6975, 0x6e65_476e];

/// Width of guest physical addresses on a host with CPUID `host`, in bits.
pub fn phys_bits(mut host: impl FnMut(u32, u32) -> [u32; 4]) -> u8 {
    let bits = if host(EXTENDED, 0)[0] >= EXTENDED + 8 {
        host(EXTENDED + 8, 0)[0] as u8
    } else {
        36
    };
    bits.clamp(36, 46)
}

struct Builder {
    leaves: Vec<Leaf>,
}

impl Builder {
    fn leaf(&mut self, leaf: u32, regs: [u32; 4]) {
        self.leaves.push(Leaf {
            leaf,
            subleaf: None,
            regs,
        });
    }

    fn subleaf(&mut self, leaf: u32, subleaf: u32, regs: [u32; 4]) {
        self.leaves.push(Leaf {
            leaf,
            subleaf: Some(subleaf),
            regs,
        });
    }

    fn or(&mut self, leaf: u32, subleaf: u32, reg: Reg, value: u32) {
        if let Some(l) = self
            .leaves
            .iter_mut()
            .find(|l| l.leaf == leaf && l.subleaf.is_none_or(|s| s == subleaf))
        {
            l.regs[reg as usize] |= value;
        }
    }
}

fn mask(bits: &[u32]) -> u32 {
    bits.iter().fold(0, |m, b| m | 1 << b)
}

/// The guest's leaves on a host with CPUID `host`. Fields that differ between
/// vCPUs or change at run time are as after reset; see [`for_vcpu`].
pub fn table(mut host: impl FnMut(u32, u32) -> [u32; 4], machine: &Machine) -> Vec<Leaf> {
    let mut b = Builder { leaves: Vec::new() };
    let [host_max, n0, n2, n1] = host(0, 0);
    let amd = [n0, n1, n2] == AMD_NAME || [n0, n1, n2] == HYGON_NAME;
    let host_extended = host(EXTENDED, 0)[0];
    let mut host = |leaf: u32, subleaf: u32| {
        let max = if leaf >= EXTENDED {
            host_extended
        } else {
            host_max
        };
        if leaf <= max {
            host(leaf, subleaf)
        } else {
            [0; 4]
        }
    };
    let vcpus = machine.vcpus.max(1);
    // Bits of an APIC id that number vCPUs.
    let id_bits = vcpus.next_power_of_two().trailing_zeros();
    let ids = 1u32 << id_bits;

    b.leaf(0, [0x16, n0, n2, n1]);
    let signature = host(1, 0)[0];
    // CLFLUSH works on 8 × 8 bytes.
    let threads = if vcpus > 1 { 1 << 28 } else { 0 };
    b.leaf(1, [signature, 8 << 8 | ids.min(255) << 16, 0, threads]);
    if !amd {
        // "See leaf 4."
        b.leaf(2, [0x00fe_ff01, 0xf0, 0, 0]);
    }
    caches(&mut b, &mut host, ids);
    b.leaf(6, [0; 4]);
    b.subleaf(7, 0, [1, 0, 0, 0]);
    b.subleaf(7, 1, [0; 4]);
    b.subleaf(0xb, 0, [0, 1, 1 << 8, 0]);
    b.subleaf(0xb, 1, [id_bits, vcpus, 2 << 8 | 1, 0]);
    b.subleaf(0xb, 2, [0, 0, 2, 0]);
    let avx = host(1, 0)[2] >> 28 & 1 != 0;
    let (xcr0, area) = if avx {
        (7, state_area(7))
    } else {
        (3, state_area(3))
    };
    b.subleaf(0xd, 0, [xcr0, state_area(1), area, 0]);
    b.subleaf(0xd, 1, [0, state_area(1), 0, 0]);
    if avx {
        b.subleaf(0xd, 2, [area - state_area(1), state_area(1), 0, 0]);
    }
    let crystal = machine.apic_timer_hz.max(1000);
    let (numerator, denominator) = tsc_ratio(machine.tsc_hz, crystal);
    b.leaf(0x15, [denominator, numerator, crystal, 0]);
    let mhz = ((machine.tsc_hz / 1_000_000).min(0xffff)) as u32;
    b.leaf(0x16, [mhz, mhz, 100, 0]);

    let word = |i: usize| {
        let s = &SIGNATURE[4 * i..];
        u32::from_le_bytes([s[0], s[1], s[2], s[3]])
    };
    b.leaf(HYPERVISOR, [HYPERVISOR, word(0), word(1), word(2)]);

    let max = EXTENDED + if amd { 0x21 } else { 8 };
    b.leaf(EXTENDED, [max, n0, n2, n1]);
    if !amd {
        b.leaves.last_mut().expect("just pushed").regs[1..].fill(0);
    }
    b.leaf(EXTENDED + 1, [if amd { signature } else { 0 }, 0, 0, 0]);
    for i in 2..=6 {
        b.leaf(EXTENDED + i, host(EXTENDED + i, 0));
    }
    b.leaf(EXTENDED + 7, [0; 4]);
    let linear = if machine.la57 { 57 } else { 48 };
    let count = if amd {
        id_bits << 12 | (vcpus - 1).min(255)
    } else {
        0
    };
    b.leaf(
        EXTENDED + 8,
        [u32::from(phys_bits(&mut host)) | linear << 8, 0, count, 0],
    );
    if amd {
        b.leaf(EXTENDED + 0x21, [0; 4]);
    }

    for &(leaf, subleaf, reg, bits) in FROM_HOST {
        let value = host(leaf, subleaf)[reg as usize] & mask(bits);
        b.or(leaf, subleaf, reg, value);
    }
    let vendor = if amd { AMD } else { INTEL };
    for &(leaf, subleaf, reg, bits) in EMULATED.iter().chain(vendor) {
        b.or(leaf, subleaf, reg, mask(bits));
    }
    if machine.la57 {
        b.or(7, 0, Ecx, 1 << 16);
    }
    b.leaves
}

/// Leaf 4: the host's caches; the last level is everybody's, others one vCPU's.
fn caches(b: &mut Builder, host: &mut impl FnMut(u32, u32) -> [u32; 4], ids: u32) {
    let levels: Vec<[u32; 4]> = (0..8)
        .map(|i| host(4, i))
        .take_while(|r| r[0] & 0x1f != 0)
        .collect();
    let last = levels.iter().map(|r| r[0] >> 5 & 7).max().unwrap_or(0);
    for (i, r) in levels.iter().enumerate() {
        let sharing = if r[0] >> 5 & 7 == last && last > 2 {
            ids
        } else {
            1
        };
        let eax = r[0] & 0x3ff | (sharing - 1).min(0xfff) << 14 | (ids - 1).min(63) << 26;
        b.subleaf(4, i as u32, [eax, r[1], r[2], r[3]]);
    }
    b.subleaf(4, levels.len() as u32, [0; 4]);
}

/// The TSC's frequency as a fraction of the crystal clock's. Linux multiplies the
/// crystal's kHz by the numerator in 32 bits, which must not overflow.
fn tsc_ratio(tsc_hz: u64, crystal_hz: u32) -> (u32, u32) {
    let (tsc_khz, crystal_khz) = ((tsc_hz / 1000).max(1), u64::from(crystal_hz / 1000).max(1));
    let denominator = (u64::from(u32::MAX) / tsc_khz).saturating_sub(1).max(1);
    let numerator = (tsc_khz * denominator + crystal_khz / 2) / crystal_khz;
    (numerator.max(1) as u32, denominator as u32)
}

/// The values of a leaf in `leaves`, or zeros. A basic leaf beyond the highest
/// one answers as Intel's processors do: with the highest one's values.
pub fn lookup(leaves: &[Leaf], leaf: u32, subleaf: u32) -> [u32; 4] {
    let find = |leaf: u32| {
        leaves
            .iter()
            .find(|l| l.leaf == leaf && l.subleaf.is_none_or(|s| s == subleaf))
            .map_or([0; 4], |l| l.regs)
    };
    let max = find(0)[0];
    if leaf > max && leaf < HYPERVISOR {
        let vendor = find(0);
        let amd = [vendor[1], vendor[3], vendor[2]];
        return if amd == AMD_NAME || amd == HYGON_NAME {
            [0; 4]
        } else {
            find(max)
        };
    }
    find(leaf)
}

/// What of a vCPU shows in CPUID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VcpuState {
    /// The (x2)APIC id.
    pub apic_id: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// XCR0.
    pub xcr0: u64,
}

/// Fills the fields of `regs`, looked up for `leaf` and `subleaf`, that are a vCPU's own.
pub fn for_vcpu(leaf: u32, subleaf: u32, mut regs: [u32; 4], vcpu: &VcpuState) -> [u32; 4] {
    match (leaf, subleaf) {
        (1, _) => {
            regs[1] = regs[1] & 0x00ff_ffff | vcpu.apic_id.min(255) << 24;
            regs[2] = regs[2] & !(1 << 27) | u32::from(vcpu.osxsave) << 27;
        }
        (0xb, _) => {
            // Subleaves beyond the last level echo their number.
            if subleaf > 2 {
                regs[2] = subleaf & 0xff;
            }
            regs[3] = vcpu.apic_id;
        }
        (0xd, 0 | 1) => regs[1] = state_area(vcpu.xcr0),
        _ => {}
    }
    regs
}
