//! CPUID as data: a table of leaves, the same for every backend.

use alloc::{
    format,
    string::{String, ToString},
    vec::Vec,
};

use serde::{Deserialize, Serialize};

use super::features::{COMPONENTS, Feature, REGISTERS};

/// The leaf with the widths of addresses.
const WIDTHS: u32 = 0x8000_0008;
/// CPUID.1:ECX.XSAVE.
const XSAVE: Feature = Feature {
    leaf: 1,
    subleaf: 0,
    register: 2,
    bit: 26,
};
/// The least vector area: legacy region and header.
const XSAVE_MIN: u32 = 576;

/// One leaf of CPUID.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry; `None` where the leaf ignores it.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX on return.
    pub regs: [u32; 4],
}

/// All leaves that a guest can see; others read as zero, or as the highest
/// basic leaf where the processor does that.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CpuidTable {
    entries: Vec<CpuidEntry>,
}

impl CpuidTable {
    /// A table of `entries`; a later entry of the same leaf replaces an earlier one.
    pub fn new(entries: impl IntoIterator<Item = CpuidEntry>) -> Self {
        let mut t = Self::default();
        for e in entries {
            t.set(e);
        }
        t
    }

    /// Adds or replaces a leaf.
    pub fn set(&mut self, entry: CpuidEntry) {
        match self
            .entries
            .iter_mut()
            .find(|e| e.leaf == entry.leaf && e.subleaf == entry.subleaf)
        {
            Some(e) => *e = entry,
            None => self.entries.push(entry),
        }
    }

    /// Takes away what `other` lacks: features, components of the vector state,
    /// bits of addresses. What is left works on both. Caches and names stay.
    pub fn restrict(&mut self, other: &Self) {
        for e in &mut self.entries {
            let theirs = other.get(e.leaf, e.subleaf.unwrap_or(0));
            for r in REGISTERS {
                if is(e, r.leaf, r.subleaf) {
                    e.regs[r.register] &= theirs[r.register] | !r.mask;
                }
            }
            if is(e, 0xd, 0) {
                e.regs[0] &= theirs[0];
                e.regs[3] &= theirs[3];
            } else if is(e, 0xd, 1) {
                e.regs[2] &= theirs[2];
                e.regs[3] &= theirs[3];
            }
        }
        if let Some(e) = self.entries.iter_mut().find(|e| is(e, WIDTHS, 0)) {
            let (mine, theirs) = (e.regs[0], other.widths());
            let [physical, linear] = [mine & 0xff, mine >> 8 & 0xff];
            e.regs[0] =
                mine & !0xffff | physical.min(theirs.0.into()) | linear.min(theirs.1.into()) << 8;
        }
        self.settle_xsave();
    }

    /// What a guest was promised by this table that `offered` does not give, by
    /// name: features as in `/proc/cpuinfo` (bits without a name by their place),
    /// components of the vector state that are absent or laid out otherwise, and
    /// widths of addresses. Empty: a guest that has seen this table can run where
    /// `offered` is the most there is.
    pub fn lacking(&self, offered: &Self) -> Vec<String> {
        let mut lacking = Vec::new();
        for r in REGISTERS {
            let [mine, theirs] = [self, offered].map(|t| t.get(r.leaf, r.subleaf)[r.register]);
            let missing = mine & !theirs & r.mask;
            lacking.extend((0..32).filter(|bit| missing >> bit & 1 != 0).map(|bit| {
                let feature = Feature {
                    leaf: r.leaf,
                    subleaf: r.subleaf,
                    register: r.register,
                    bit,
                };
                feature.to_string()
            }));
        }
        if self.has(XSAVE) && offered.has(XSAVE) {
            self.lacking_components(offered, &mut lacking);
        }
        let (mine, theirs) = (self.widths(), offered.widths());
        for (mine, theirs, kind) in [(mine.0, theirs.0, "physical"), (mine.1, theirs.1, "linear")] {
            if mine > theirs {
                lacking.push(format!("{mine}-bit {kind} addresses (here {theirs})"));
            }
        }
        lacking
    }

    fn lacking_components(&self, offered: &Self, lacking: &mut Vec<String>) {
        let (mine, theirs) = (self.components(), offered.components());
        for bit in (2..63).filter(|bit| mine >> bit & 1 != 0) {
            let name = COMPONENTS
                .iter()
                .find(|(known, ..)| *known == bit)
                .map_or("unnamed", |(_, name, _)| name);
            if theirs >> bit & 1 == 0 {
                lacking.push(format!("XSAVE component {bit} ({name})"));
                continue;
            }
            let [mine, theirs] = [self, offered].map(|t| {
                let [size, offset, flags, _] = t.get(0xd, bit);
                // Whether it is aligned matters in the compacted form only, but there it does.
                (size, offset, flags & 3)
            });
            if mine != theirs {
                lacking.push(format!(
                    "XSAVE component {bit} ({name}) of {} bytes at {} (here {} at {})",
                    mine.0, mine.1, theirs.0, theirs.1
                ));
            }
        }
    }

    /// XCR0 and IA32_XSS bits that may be set.
    fn components(&self) -> u64 {
        let [xcr0, _, _, xcr0_high] = self.get(0xd, 0);
        let [_, _, xss, xss_high] = self.get(0xd, 1);
        u64::from(xcr0 | xss) | u64::from(xcr0_high | xss_high) << 32
    }

    /// Bits of physical and linear addresses (Intel SDM Vol. 3 §4.1.4).
    fn widths(&self) -> (u8, u8) {
        match self.get(WIDTHS, 0)[0].to_le_bytes() {
            [0, ..] => (36, 48),
            [physical, linear, ..] => (physical, linear),
        }
    }

    /// Whether it promises `feature`.
    pub fn has(&self, feature: Feature) -> bool {
        let register = self.get(feature.leaf, feature.subleaf)[feature.register & 3];
        register >> (feature.bit & 31) & 1 != 0
    }

    /// Promises `feature` or takes it back. Call [`settle_xsave`](Self::settle_xsave)
    /// after the last.
    pub fn promise(&mut self, feature: Feature, promised: bool) {
        let (register, bit) = (feature.register & 3, 1 << (feature.bit & 31));
        let entry = self
            .entries
            .iter_mut()
            .find(|e| is(e, feature.leaf, feature.subleaf));
        match entry {
            Some(e) if promised => e.regs[register] |= bit,
            Some(e) => e.regs[register] &= !bit,
            None if promised => {
                let mut regs = [0; 4];
                regs[register] = bit;
                let subleaf = matches!(feature.leaf, 7 | 0xd).then_some(feature.subleaf);
                self.entries.push(CpuidEntry {
                    leaf: feature.leaf,
                    subleaf,
                    regs,
                });
            }
            None => {}
        }
    }

    /// Makes leaf 0Dh, the vector state's layout, agree with the features: no
    /// component without the feature that it belongs to, sizes as of the components
    /// that are left.
    pub fn settle_xsave(&mut self) {
        if !self.has(XSAVE) {
            self.entries.retain(|e| e.leaf != 0xd);
            return;
        }
        let mut orphans = 0u64;
        for (bit, _, owners) in COMPONENTS {
            let owned = owners
                .iter()
                .any(|owner| Feature::named(owner).is_some_and(|owner| self.has(owner)));
            if !owned {
                orphans |= 1 << bit;
            }
        }
        for (subleaf, low, high) in [(0, 0, 3), (1, 2, 3)] {
            if let Some(e) = self.entries.iter_mut().find(|e| is(e, 0xd, subleaf)) {
                e.regs[low] &= !(orphans as u32);
                e.regs[high] &= !((orphans >> 32) as u32);
            }
        }
        let components = self.components();
        self.entries.retain(|e| {
            e.leaf != 0xd
                || e.subleaf
                    .is_none_or(|s| s < 2 || components >> s.min(63) & 1 != 0)
        });
        let [xcr0, _, _, xcr0_high] = self.get(0xd, 0);
        let user = u64::from(xcr0) | u64::from(xcr0_high) << 32;
        let size = (2..63)
            .filter(|bit| user >> bit & 1 != 0)
            .map(|bit| {
                let [size, offset, ..] = self.get(0xd, bit);
                size.saturating_add(offset)
            })
            .fold(XSAVE_MIN, u32::max);
        for e in &mut self.entries {
            if is(e, 0xd, 0) {
                // With XCR0 as after reset, and with all that it can enable.
                (e.regs[1], e.regs[2]) = (XSAVE_MIN, size);
            } else if is(e, 0xd, 1) {
                e.regs[1] = XSAVE_MIN;
            }
        }
    }

    /// The leaf's values, or zeros.
    pub fn get(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
            .map_or([0; 4], |e| e.regs)
    }

    /// The entries, for display and for saving.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }
}

fn is(e: &CpuidEntry, leaf: u32, subleaf: u32) -> bool {
    e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, subleaf: impl Into<Option<u32>>, regs: [u32; 4]) -> CpuidEntry {
        CpuidEntry {
            leaf,
            subleaf: subleaf.into(),
            regs,
        }
    }

    /// XSAVE, AVX and AVX-512 with Intel's layout.
    fn avx512() -> CpuidTable {
        CpuidTable::new([
            entry(1, None, [0, 0, 1 << 26 | 1 << 28, 0]),
            entry(7, 0, [0, 1 << 5 | 1 << 16, 0, 0]),
            entry(0xd, 0, [0xe7, 2696, 2696, 0]),
            entry(0xd, 1, [1, 0, 0, 0]),
            entry(0xd, 2, [256, 576, 0, 0]),
            entry(0xd, 5, [64, 1088, 0, 0]),
            entry(0xd, 6, [512, 1152, 0, 0]),
            entry(0xd, 7, [1024, 1664, 0, 0]),
            entry(WIDTHS, None, [46 | 48 << 8, 0, 0, 0]),
        ])
    }

    fn feature(name: &str) -> Feature {
        Feature::named(name).unwrap()
    }

    #[test]
    fn restricting_takes_features_and_leaves_the_rest() {
        let mut a = CpuidTable::new([
            entry(1, None, [0x906ea, 0x0800, !0, !0]),
            entry(7, 0, [1, 0xff, 0xff, 0xff]),
            entry(2, None, [1, 2, 3, 4]),
            entry(WIDTHS, None, [0xff_3930, 1, 2, 3]),
        ]);
        let b = CpuidTable::new([
            entry(1, None, [0, 0, 1, 2]),
            entry(WIDTHS, None, [0x302e, 0, 0, 0]),
        ]);
        a.restrict(&b);
        assert_eq!(
            a.get(1, 0),
            [0x906ea, 0x0800, 1 | 1 << 27 | 1 << 31, 2 | 1 << 9 | 1 << 28]
        );
        // What is left of leaf 7 is no feature: two deprecations, and OSPKE.
        assert_eq!(a.get(7, 0), [1, 1 << 6, 1 << 4, 0]);
        assert_eq!(a.get(2, 0), [1, 2, 3, 4]);
        assert_eq!(a.get(WIDTHS, 0), [0xff_302e, 0, 2, 3]);
    }

    #[test]
    fn nothing_is_lacking_after_restricting() {
        let mut most = avx512();
        let mut less = most.clone();
        less.promise(feature("avx512f"), false);
        less.settle_xsave();
        assert!(less.lacking(&most).is_empty());
        assert_eq!(
            most.lacking(&less),
            [
                "avx512f",
                "XSAVE component 5 (AVX-512 opmask)",
                "XSAVE component 6 (AVX-512 upper halves)",
                "XSAVE component 7 (AVX-512 upper registers)",
            ]
        );
        most.restrict(&less);
        assert!(most.lacking(&less).is_empty());
        assert_eq!(most.get(0xd, 0), [7, 576, 832, 0]);
        assert_eq!(most.get(0xd, 5), [0; 4]);
        less.promise(feature("xsave"), false);
        assert_eq!(most.lacking(&less), ["xsave"]);
        less.settle_xsave();
        most.restrict(&less);
        assert_eq!(most.get(0xd, 0), [0; 4]);
    }

    #[test]
    fn layouts_and_widths_are_promises() {
        let (mine, mut theirs) = (avx512(), avx512());
        theirs.set(entry(0xd, 5, [64, 832, 0, 0]));
        theirs.set(entry(WIDTHS, None, [39 | 48 << 8, 0, 0, 0]));
        assert_eq!(
            mine.lacking(&theirs),
            [
                "XSAVE component 5 (AVX-512 opmask) of 64 bytes at 1088 (here 64 at 832)",
                "46-bit physical addresses (here 39)",
            ]
        );
        // Bits that nobody has named are promises too; what the guest's own settings show is not.
        let strange = CpuidTable::new([
            entry(1, None, [0, 0, 1 << 16 | 1 << 27, 1 << 9]),
            entry(7, 2, [0, 0, 0, 1 << 31]),
        ]);
        assert_eq!(
            strange.lacking(&CpuidTable::default()),
            ["CPUID 1 ECX bit 16", "CPUID 7.2 EDX bit 31"]
        );
    }

    #[test]
    fn promises_are_given_and_taken_back() {
        let mut table = CpuidTable::default();
        let sha = feature("sha_ni");
        table.promise(sha, false);
        assert_eq!(table, CpuidTable::default());
        table.promise(sha, true);
        assert!(table.has(sha));
        assert_eq!(table.entries()[0].subleaf, Some(0));
        table.promise(sha, false);
        assert!(!table.has(sha));
    }
}
