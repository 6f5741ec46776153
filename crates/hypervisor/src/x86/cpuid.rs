//! CPUID as data: a table of leaves, the same for every backend.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

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
