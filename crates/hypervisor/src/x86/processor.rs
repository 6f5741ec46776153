//! From a description of a processor to the CPUID that its guests see.

use alloc::{string::String, vec::Vec};

use super::{
    CpuidEntry, CpuidTable, Feature, Level,
    features::{AMD_COPIES, COMPONENTS},
};

/// Whose rules the guest takes the processor to follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vendor {
    /// `GenuineIntel`.
    Intel,
    /// `AuthenticAMD`.
    Amd,
}

/// What a processor starts from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Base {
    /// Everything that the backend offers on this host.
    Host,
    /// A fixed model.
    Level(Level),
}

/// A processor as its owner describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Processor {
    /// What it starts from.
    pub base: Base,
    /// Features besides.
    pub add: Vec<Feature>,
    /// Features that it is not to have.
    pub remove: Vec<Feature>,
    /// Its vendor, if not the base's. Models are Intel's.
    pub vendor: Option<Vendor>,
    /// The brand string, if not the base's: at most [`BRAND_LEN`] bytes of ASCII.
    pub brand: Option<String>,
    /// Family, if not the base's: 0 to 270.
    pub family: Option<u16>,
    /// Model number, if not the base's.
    pub model: Option<u8>,
    /// Stepping, if not the base's: 0 to 15.
    pub stepping: Option<u8>,
    /// Bits of a physical address, if not the base's: 36 to 52. A model has
    /// [`ADDRESS_BITS`], or as many as its memory needs.
    pub address_bits: Option<u8>,
}

/// The longest brand string (Intel SDM Vol. 2, CPUID leaves 8000_0002h to 8000_0004h).
pub const BRAND_LEN: usize = 47;
/// Bits of a physical address of a model: what the least of the hosts of x86-64-v3
/// has. 512 GiB.
pub const ADDRESS_BITS: u8 = 39;
/// Widths that can be asked for.
const ADDRESS_BITS_ALLOWED: core::ops::RangeInclusive<u8> = 36..=52;
/// The name of the hypervisor in leaf 4000_0000h.
pub const HYPERVISOR_NAME: [u8; 12] = *b"Caisson VMM\0";

/// A processor that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessorError {
    /// A feature without one that it needs.
    #[error(
        "\"{feature}\" needs \"{needs}\", which this processor does not have; add \"{needs}\", or remove \"{feature}\" too"
    )]
    Needs {
        /// What is there.
        feature: &'static str,
        /// What is not.
        needs: &'static str,
    },
    /// A feature that is both added and removed.
    #[error("\"{0}\" is both added and removed; drop one of the two")]
    Both(Feature),
    /// A number out of range.
    #[error("{what} is {value}, which no processor has; {range}")]
    Range {
        /// The key.
        what: &'static str,
        /// What was asked for.
        value: u16,
        /// What there is.
        range: &'static str,
    },
    /// A brand string that CPUID has no room for.
    #[error("the brand string must be 1 to {BRAND_LEN} printable ASCII characters")]
    Brand,
}

const LEAF_0: u32 = 0;
const HYPERVISOR_LEAF: u32 = 0x4000_0000;
const EXTENDED: u32 = 0x8000_0000;
/// The highest basic leaf of a model: the TSC's and the processor's frequency.
const LAST_BASIC: u32 = 0x16;
/// CPUID.1:ECX.HYPERVISOR; CPUID.1:EDX.APIC and HTT.
const HYPERVISOR: u32 = 1 << 31;
const APIC: u32 = 1 << 9;
const HTT: u32 = 1 << 28;
/// CPUID.1:EBX: CLFLUSH works on 8 × 8 bytes.
const CLFLUSH_LINE: u32 = 8 << 8;
/// CPUID.2: the caches are in leaf 4; 64-byte prefetching.
const SEE_LEAF_4: [u32; 4] = [0x00fe_ff01, 0xf0, 0, 0];

/// The components that models have, as Intel lays them out: bit, size, offset.
const LAYOUT: [(u32, u32, u32); 5] = [
    (2, 256, 576),
    (5, 64, 1088),
    (6, 512, 1152),
    (7, 1024, 1664),
    (9, 8, 2688),
];

/// A cache of 64-byte lines.
struct Cache {
    level: u32,
    /// 1 data, 2 instructions, 3 both.
    kind: u32,
    ways: u32,
    sets: u32,
}

const CACHES: [Cache; 4] = [
    // 32 KiB and 32 KiB, 256 KiB, 8 MiB.
    Cache {
        level: 1,
        kind: 1,
        ways: 8,
        sets: 64,
    },
    Cache {
        level: 1,
        kind: 2,
        ways: 8,
        sets: 64,
    },
    Cache {
        level: 2,
        kind: 3,
        ways: 8,
        sets: 512,
    },
    Cache {
        level: 3,
        kind: 3,
        ways: 16,
        sets: 8192,
    },
];
/// The same as AMD's leaves 8000_0005h and 8000_0006h have it: ECX and EDX, of L1;
/// EBX (TLBs), ECX and EDX, of L2 and L3.
const AMD_L1: [u32; 2] = [32 << 24 | 8 << 16 | 1 << 8 | 64; 2];
const L2: u32 = 256 << 16 | 6 << 12 | 1 << 8 | 64;
const AMD_L3: u32 = 16 << 18 | 8 << 12 | 1 << 8 | 64;

impl Processor {
    /// `base` and nothing else.
    pub fn new(base: Base) -> Self {
        Self {
            base,
            add: Vec::new(),
            remove: Vec::new(),
            vendor: None,
            brand: None,
            family: None,
            model: None,
            stepping: None,
            address_bits: None,
        }
    }

    /// The CPUID of `vcpus` vCPUs of it, on a backend that offers `offered`, with at
    /// least `address_bits` bits of physical address. A model's takes nothing from
    /// `offered` but the clock's frequencies (leaves 15h and 16h). Whether `offered`
    /// has everything is for [`CpuidTable::lacking`] to say.
    ///
    /// # Errors
    /// The description contradicts itself.
    pub fn table(
        &self,
        offered: &CpuidTable,
        vcpus: u32,
        address_bits: u8,
    ) -> Result<CpuidTable, ProcessorError> {
        self.check_values()?;
        let mut t = match self.base {
            Base::Host => offered.clone(),
            Base::Level(level) => skeleton(level, offered, vcpus),
        };
        for feature in &self.add {
            t.promise(*feature, true);
        }
        for feature in &self.remove {
            t.promise(*feature, false);
        }
        self.check_needs(&t)?;
        // Subleaves of 7 that there is something in, and extended leaves.
        let last = (1..=2).filter(|s| t.get(7, *s) != [0; 4]).max();
        if let Some(last) = last {
            edit(&mut t, 7, Some(0), |r| r[0] = r[0].max(last));
        }
        let last = t.entries().iter().map(|e| e.leaf).max();
        edit(&mut t, EXTENDED, None, |r| {
            r[0] = r[0].max(last.unwrap_or(0))
        });
        self.name(&mut t);
        self.identify(&mut t, vcpus);
        let width = match (self.address_bits, self.base) {
            (Some(bits), _) => Some(bits),
            (None, Base::Level(_)) => Some(address_bits.max(ADDRESS_BITS)),
            (None, Base::Host) => None,
        };
        if let Some(width) = width {
            edit(&mut t, EXTENDED + 8, None, |r| {
                r[0] = r[0] & !0xff | u32::from(width)
            });
        }
        if let Base::Level(_) = self.base {
            lay_out(&mut t, offered);
        }
        t.settle_xsave();
        Ok(t)
    }

    fn check_values(&self) -> Result<(), ProcessorError> {
        let range = |what, value, range| Err(ProcessorError::Range { what, value, range });
        if let Some(bits) = self.address_bits
            && !ADDRESS_BITS_ALLOWED.contains(&bits)
        {
            return range("address-bits", bits.into(), "choose 36 to 52");
        }
        if let Some(family) = self.family
            && family > 270
        {
            return range("family", family, "choose 0 to 270");
        }
        if let Some(stepping) = self.stepping
            && stepping > 15
        {
            return range("stepping", stepping.into(), "choose 0 to 15");
        }
        if let (Some(family), Some(model)) = (self.family, self.model)
            && !has_long_model(family)
            && model > 15
        {
            return range("model", model.into(), "in this family, choose 0 to 15");
        }
        if let Some(brand) = &self.brand {
            let printable = brand.bytes().all(|b| matches!(b, b' '..=b'~'));
            if !printable || brand.is_empty() || brand.len() > BRAND_LEN {
                return Err(ProcessorError::Brand);
            }
        }
        match self.add.iter().find(|f| self.remove.contains(f)) {
            Some(both) => Err(ProcessorError::Both(*both)),
            None => Ok(()),
        }
    }

    /// Whether what was added finds what it needs, and what was removed is needed by nothing.
    fn check_needs(&self, t: &CpuidTable) -> Result<(), ProcessorError> {
        for (feature, needs) in Feature::dependencies() {
            let (Some(first), Some(second)) = (Feature::named(feature), Feature::named(needs))
            else {
                continue;
            };
            let concerned = self.add.contains(&first) || self.remove.contains(&second);
            if concerned && t.has(first) && !t.has(second) {
                return Err(ProcessorError::Needs { feature, needs });
            }
        }
        Ok(())
    }

    /// Vendor and brand.
    fn name(&self, t: &mut CpuidTable) {
        if let Some(vendor) = self.vendor.or(match self.base {
            Base::Level(_) => Some(Vendor::Intel),
            Base::Host => None,
        }) {
            let name: [u32; 3] = match vendor {
                Vendor::Intel => words(b"GenuineIntel"),
                Vendor::Amd => words(b"AuthenticAMD"),
            };
            edit(t, LEAF_0, None, |r| {
                (r[1], r[3], r[2]) = (name[0], name[1], name[2])
            });
            edit(t, EXTENDED, None, |r| match vendor {
                Vendor::Intel => r[1..].fill(0),
                Vendor::Amd => (r[1], r[3], r[2]) = (name[0], name[1], name[2]),
            });
        }
        let brand = match (&self.brand, self.base) {
            (Some(brand), _) => brand.as_str(),
            (None, Base::Level(level)) => level.brand(),
            (None, Base::Host) => return,
        };
        let mut padded = [0; 48];
        for (to, from) in padded.iter_mut().zip(brand.bytes().take(BRAND_LEN)) {
            *to = from;
        }
        for (leaf, part) in (EXTENDED + 2..).zip(padded.chunks_exact(16)) {
            let mut regs = [0; 4];
            for (to, word) in regs.iter_mut().zip(part.chunks_exact(4)) {
                *to = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            }
            edit(t, leaf, None, |r| *r = regs);
        }
    }

    /// Family, model and stepping, and what only one of the vendors has.
    fn identify(&self, t: &mut CpuidTable, vcpus: u32) {
        let (family, model, stepping) = match self.base {
            Base::Level(level) => level.signature(),
            Base::Host => from_signature(t.get(1, 0)[0]),
        };
        let family = self.family.unwrap_or(family);
        let model = self.model.unwrap_or(model);
        let signature = to_signature(family, model, self.stepping.unwrap_or(stepping));
        edit(t, 1, None, |r| r[0] = signature);
        let amd = t.get(LEAF_0, 0)[1] == words(b"AuthenticAMD")[0];
        let fixed = matches!(self.base, Base::Level(_));
        if !fixed && self.vendor.is_none() {
            if amd {
                edit(t, EXTENDED + 1, None, |r| r[0] = signature);
            }
            return;
        }
        let copies = t.get(1, 0)[3] & AMD_COPIES;
        edit(t, EXTENDED + 1, None, |r| {
            r[0] = if amd { signature } else { 0 };
            r[3] = r[3] & !AMD_COPIES | if amd { copies } else { 0 };
        });
        if !fixed {
            return;
        }
        let count = if amd {
            id_bits(vcpus) << 12 | (vcpus.max(1) - 1).min(255)
        } else {
            0
        };
        edit(t, EXTENDED + 8, None, |r| r[2] = count);
        if amd {
            edit(t, EXTENDED + 5, None, |r| *r = [0, 0, AMD_L1[0], AMD_L1[1]]);
            edit(t, EXTENDED + 6, None, |r| *r = [0, 0, L2, AMD_L3]);
            return;
        }
        edit(t, EXTENDED + 6, None, |r| *r = [0, 0, L2, 0]);
        edit(t, 2, None, |r| *r = SEE_LEAF_4);
        let ids = 1u32 << id_bits(vcpus);
        for (subleaf, cache) in (0..).zip(&CACHES) {
            let sharing = if cache.level > 2 { ids } else { 1 };
            let eax = cache.kind
                | cache.level << 5
                // Self-initialising.
                | 1 << 8
                | (sharing - 1).min(0xfff) << 14
                | (ids - 1).min(0x3f) << 26;
            let ebx = (cache.ways - 1) << 22 | (64 - 1);
            edit(t, 4, Some(subleaf), |r| *r = [eax, ebx, cache.sets - 1, 0]);
        }
        edit(t, 4, Some(CACHES.len() as u32), |r| *r = [0; 4]);
    }
}

/// The leaves that all models have, with the model's features.
fn skeleton(level: Level, offered: &CpuidTable, vcpus: u32) -> CpuidTable {
    let vcpus = vcpus.max(1);
    let (width, ids) = (id_bits(vcpus), 1u32 << id_bits(vcpus));
    let threads = if vcpus > 1 { HTT } else { 0 };
    let leaf = |leaf, regs| CpuidEntry {
        leaf,
        subleaf: None,
        regs,
    };
    let subleaf = |leaf, subleaf, regs| CpuidEntry {
        leaf,
        subleaf: Some(subleaf),
        regs,
    };
    let name = words(&HYPERVISOR_NAME);
    let mut t = CpuidTable::new([
        leaf(LEAF_0, [LAST_BASIC, 0, 0, 0]),
        leaf(
            1,
            [
                0,
                CLFLUSH_LINE | ids.min(255) << 16,
                HYPERVISOR,
                APIC | threads,
            ],
        ),
        leaf(6, [0; 4]),
        subleaf(7, 0, [0; 4]),
        // One package, a core per vCPU.
        subleaf(0xb, 0, [0, 1, 1 << 8, 0]),
        subleaf(0xb, 1, [width, vcpus, 2 << 8 | 1, 0]),
        subleaf(0xb, 2, [0, 0, 2, 0]),
        leaf(0x15, offered.get(0x15, 0)),
        leaf(LAST_BASIC, offered.get(LAST_BASIC, 0)),
        leaf(
            HYPERVISOR_LEAF,
            [HYPERVISOR_LEAF, name[0], name[1], name[2]],
        ),
        leaf(EXTENDED, [EXTENDED + 8, 0, 0, 0]),
        leaf(EXTENDED + 1, [0; 4]),
        leaf(EXTENDED + 7, [0; 4]),
        leaf(EXTENDED + 8, [48 << 8, 0, 0, 0]),
    ]);
    for feature in level.features() {
        t.promise(feature, true);
    }
    t
}

/// The components of the vector state that the features call for. What no model
/// has is laid out as the host has it.
fn lay_out(t: &mut CpuidTable, offered: &CpuidTable) {
    if !Feature::named("xsave").is_some_and(|f| t.has(f)) {
        return;
    }
    let (mut xcr0, mut xss) = (3u64, 0u64);
    for (bit, _, owners) in COMPONENTS {
        let mut owners = owners.iter().filter_map(|owner| Feature::named(owner));
        if !owners.any(|owner| t.has(owner)) {
            continue;
        }
        let regs = match LAYOUT.iter().find(|(known, ..)| known == bit) {
            Some((_, size, offset)) => [*size, *offset, 0, 0],
            None => offered.get(0xd, *bit),
        };
        // ECX bit 0: a component of IA32_XSS.
        *(if regs[2] & 1 == 0 {
            &mut xcr0
        } else {
            &mut xss
        }) |= 1 << bit;
        edit(t, 0xd, Some(*bit), |r| *r = regs);
    }
    edit(t, 0xd, Some(0), |r| {
        (r[0], r[3]) = (xcr0 as u32, (xcr0 >> 32) as u32)
    });
    edit(t, 0xd, Some(1), |r| {
        (r[2], r[3]) = (xss as u32, (xss >> 32) as u32)
    });
}

fn edit(t: &mut CpuidTable, leaf: u32, subleaf: Option<u32>, change: impl FnOnce(&mut [u32; 4])) {
    let mut regs = t.get(leaf, subleaf.unwrap_or(0));
    change(&mut regs);
    t.set(CpuidEntry {
        leaf,
        subleaf,
        regs,
    });
}

fn words(name: &[u8; 12]) -> [u32; 3] {
    let word = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
    [word(0), word(4), word(8)]
}

/// Bits of an APIC id that number vCPUs.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.clamp(1, 1 << 16).next_power_of_two().trailing_zeros()
}

/// Whether the family's model numbers have eight bits.
fn has_long_model(family: u16) -> bool {
    family == 6 || family >= 15
}

/// CPUID.1:EAX (Intel SDM Vol. 2, figure 3-6).
fn to_signature(family: u16, model: u8, stepping: u8) -> u32 {
    let (family, model) = (u32::from(family), u32::from(model));
    let extended_model = if has_long_model(family as u16) {
        model >> 4
    } else {
        0
    };
    family.saturating_sub(15).min(0xff) << 20
        | extended_model << 16
        | family.min(15) << 8
        | (model & 15) << 4
        | u32::from(stepping & 15)
}

fn from_signature(eax: u32) -> (u16, u8, u8) {
    let family = match (eax >> 8 & 15) as u16 {
        15 => 15 + (eax >> 20 & 0xff) as u16,
        family => family,
    };
    let extended = if has_long_model(family) {
        eax >> 16 & 15
    } else {
        0
    };
    (
        family,
        (extended << 4 | eax >> 4 & 15) as u8,
        (eax & 15) as u8,
    )
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    fn named(names: &[&str]) -> Vec<Feature> {
        names.iter().map(|n| Feature::named(n).unwrap()).collect()
    }

    fn level(level: Level) -> Processor {
        Processor::new(Base::Level(level))
    }

    /// A host with everything that models have, and AVX-512 laid out as `opmask` says.
    fn host(opmask: u32) -> CpuidTable {
        let mut p = level(Level::V4);
        p.add = named(&["pku", "sha_ni", "vaes"]);
        let mut t = p.table(&CpuidTable::default(), 1, 46).unwrap();
        edit(&mut t, 0xd, Some(5), |r| r[1] = opmask);
        t
    }

    #[test]
    fn a_model_is_the_same_on_every_host() {
        let mut other = host(832);
        other.promise(Feature::named("pcid").unwrap(), false);
        edit(&mut other, 0x15, None, |r| *r = [1, 2, 3, 0]);
        for (model, vcpus) in Level::ALL.into_iter().zip([1, 2, 5, 64]) {
            let here = level(model).table(&host(1088), vcpus, 36).unwrap();
            let mut there = level(model).table(&other, vcpus, 36).unwrap();
            assert_eq!(there.get(0x15, 0), [1, 2, 3, 0]);
            edit(&mut there, 0x15, None, |r| *r = [0; 4]);
            assert_eq!(here, there);
            assert!(here.lacking(&host(1088)).is_empty());
            assert_eq!(here.get(EXTENDED + 8, 0)[0], 0x3027);
            let names: Vec<_> = Feature::names()
                .filter(|n| here.has(Feature::named(n).unwrap()))
                .collect();
            assert_eq!(names.len(), model.feature_names().count());
        }
        let v4 = level(Level::V4).table(&other, 1, 41).unwrap();
        assert_eq!(
            v4.lacking(&other),
            [
                "pcid",
                "XSAVE component 5 (AVX-512 opmask) of 64 bytes at 1088 (here 64 at 832)"
            ]
        );
        assert_eq!(v4.get(EXTENDED + 8, 0)[0], 0x3029);
    }

    #[test]
    fn the_vector_state_follows_the_features() {
        let of = |model| level(model).table(&host(1088), 1, 36).unwrap();
        assert_eq!(of(Level::V2).get(0xd, 0), [0; 4]);
        assert_eq!(of(Level::V3).get(0xd, 0), [7, 576, 832, 0]);
        assert_eq!(of(Level::V3).get(0xd, 2), [256, 576, 0, 0]);
        assert_eq!(of(Level::V3).get(0xd, 1), [1, 576, 0, 0]);
        assert_eq!(of(Level::V4).get(0xd, 0), [0xe7, 576, 2688, 0]);
        let mut p = level(Level::V4);
        p.add = named(&["pku"]);
        let t = p.table(&host(1088), 1, 36).unwrap();
        assert_eq!(t.get(0xd, 0), [0x2e7, 576, 2696, 0]);
    }

    #[test]
    fn features_are_added_and_removed_with_what_they_need() {
        let build = |base, add: &[&str], remove: &[&str]| {
            Processor {
                add: named(add),
                remove: named(remove),
                ..Processor::new(base)
            }
            .table(&host(1088), 1, 36)
        };
        let v2 = Base::Level(Level::V2);
        let t = build(v2, &["aes", "sha-ni"], &["cx16"]).unwrap();
        assert!(t.has(named(&["sha_ni"])[0]) && !t.has(named(&["cx16"])[0]));
        let error = build(v2, &["avx2"], &[]).unwrap_err().to_string();
        assert!(error.contains("\"avx2\" needs \"avx\""), "{error}");
        assert!(build(v2, &["avx2", "avx", "xsave"], &[]).is_ok());
        let error = build(Base::Host, &[], &["avx"]).unwrap_err().to_string();
        assert!(error.contains("needs \"avx\", which"), "{error}");
        let error = build(v2, &["aes"], &["aes"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"aes\" is both added and removed; drop one of the two"
        );
        // Nothing of the host is left behind.
        let t = build(
            Base::Host,
            &[],
            &["avx512vl", "avx512dq", "avx512cd", "avx512bw", "avx512f"],
        );
        assert_eq!(t.unwrap().get(0xd, 0), [0x207, 576, 2696, 0]);
        // A leaf that no model has gets its place in leaf 7's count.
        assert_eq!(build(v2, &["fsrc"], &[]).unwrap().get(7, 0)[0], 1);
        let t = build(v2, &["autoibrs"], &[]).unwrap();
        assert_eq!(t.get(EXTENDED, 0)[0], EXTENDED + 0x21);
        assert_eq!(build(v2, &[], &[]).unwrap().get(7, 0)[0], 0);
    }

    #[test]
    fn names_and_numbers_are_the_owners_choice() {
        let mut p = level(Level::V3);
        p.vendor = Some(Vendor::Amd);
        p.brand = Some("Zen of Caisson".into());
        (p.family, p.model, p.stepping) = (Some(25), Some(0x21), Some(2));
        let t = p.table(&host(1088), 3, 40).unwrap();
        assert_eq!(t.get(1, 0)[0], 0x00a2_0f12);
        assert_eq!(t.get(EXTENDED + 1, 0)[0], 0x00a2_0f12);
        assert_eq!(t.get(0, 0)[1..], [0x6874_7541, 0x444d_4163, 0x6974_6e65]);
        assert_eq!(t.get(EXTENDED, 0)[1..], t.get(0, 0)[1..]);
        assert_eq!(&t.get(EXTENDED + 2, 0)[0].to_le_bytes(), b"Zen ");
        assert_eq!(
            t.get(EXTENDED + 1, 0)[3] & AMD_COPIES,
            t.get(1, 0)[3] & AMD_COPIES
        );
        assert_eq!(t.get(EXTENDED + 8, 0)[2], 2 << 12 | 2);
        assert_eq!((t.get(2, 0), t.get(4, 0)), ([0; 4], [0; 4]));
        assert!(
            t.lacking(&host(1088)).is_empty(),
            "AMD's copies are no features"
        );
        // Back on Intel, with one number changed.
        let mut back = Processor::new(Base::Host);
        back.vendor = Some(Vendor::Intel);
        back.stepping = Some(9);
        let t = back.table(&t, 3, 40).unwrap();
        assert_eq!(t.get(1, 0)[0], 0x00a2_0f19);
        assert_eq!(t.get(EXTENDED + 1, 0)[3] & AMD_COPIES, 0);
        assert_eq!(t.get(EXTENDED, 0)[1..], [0; 3]);
    }

    #[test]
    fn numbers_that_no_processor_has_are_refused() {
        let refused = |change: fn(&mut Processor)| {
            let mut p = level(Level::V1);
            change(&mut p);
            p.table(&host(1088), 1, 36).unwrap_err().to_string()
        };
        assert!(refused(|p| p.family = Some(271)).contains("family is 271"));
        assert!(refused(|p| p.stepping = Some(16)).contains("0 to 15"));
        assert!(refused(|p| p.address_bits = Some(53)).contains("address-bits is 53"));
        assert!(refused(|p| (p.family, p.model) = (Some(5), Some(16))).contains("model is 16"));
        assert!(refused(|p| p.brand = Some("é".into())).contains("ASCII"));
        assert!(refused(|p| p.brand = Some(alloc::string::String::new())).contains("brand"));
    }

    #[test]
    fn signatures_come_back() {
        for signature in [
            0x000a_0671,
            0x00a2_0f12,
            0x0000_0f61,
            0x0005_0654,
            0x0000_0513,
        ] {
            let (family, model, stepping) = from_signature(signature);
            assert_eq!(
                to_signature(family, model, stepping),
                signature,
                "{signature:x}"
            );
        }
        assert_eq!(from_signature(0x000a_0671), (6, 167, 1));
    }
}
