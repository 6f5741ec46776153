//! What goes where in guest memory before the first instruction.

use alloc::{borrow::Cow, string::String, vec::Vec};

use caisson_memory::{Gpa, Vtl};

use crate::{GpaRange, MemoryMap};

/// The contents of an import.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ImportData<'a> {
    /// These bytes.
    Bytes(Cow<'a, [u8]>),
    /// So many zero bytes. Memory of a fresh machine is zero already; after a
    /// guest has run it is not.
    Zero(u64),
}

impl ImportData<'_> {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(b) => b.len() as u64,
            Self::Zero(n) => *n,
        }
    }

    /// Whether there is nothing to import.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What kind of memory an import becomes, for isolated guests and IGVM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum PageKind {
    /// Private memory whose contents the author of the guest chose: kernel,
    /// initrd, modules, command line.
    Image,
    /// Contents that the VMM makes up to describe this machine: memory map,
    /// ACPI tables. A guest that trusts nothing has to check them.
    Parameters,
}

/// A run of bytes to put in guest memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Import<'a> {
    /// What it is, for messages and inspection: `kernel`, `initrd`, …
    pub name: &'static str,
    /// Where it goes; need not be page-aligned.
    pub gpa: Gpa,
    /// The trust level it belongs to.
    pub vtl: Vtl,
    /// What kind of memory it becomes.
    pub kind: PageKind,
    /// Whether its contents are part of the launch digest.
    pub measured: bool,
    /// The contents.
    pub data: ImportData<'a>,
}

impl Import<'_> {
    /// The addresses it covers. Imports in a list never wrap around.
    pub fn range(&self) -> GpaRange {
        GpaRange {
            start: self.gpa.0,
            end: self.gpa.0.saturating_add(self.data.len()),
        }
    }
}

/// Why an import does not belong in a list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// Not all of it would be in memory.
    #[error("the {name} would be at {range}, outside guest memory")]
    OutsideMemory {
        /// The import's name.
        name: &'static str,
        /// Where it was to be.
        range: GpaRange,
    },
    /// Another import is there.
    #[error("the {name} at {range} overlaps the {other} at {other_range}")]
    Overlap {
        /// The import's name.
        name: &'static str,
        /// Where it was to be.
        range: GpaRange,
        /// Who is there.
        other: &'static str,
        /// Where that is.
        other_range: GpaRange,
    },
}

/// Imports in address order that are all in memory and do not overlap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ImportList<'a> {
    imports: Vec<Import<'a>>,
}

impl<'a> ImportList<'a> {
    /// An empty list.
    pub const fn new() -> Self {
        Self {
            imports: Vec::new(),
        }
    }

    /// Adds `import`; one without bytes is dropped.
    ///
    /// # Errors
    /// It leaves the memory of `map` or overlaps an earlier import of the same
    /// trust level or another.
    pub fn push(&mut self, map: &MemoryMap, import: Import<'a>) -> Result<(), ImportError> {
        if import.data.is_empty() {
            return Ok(());
        }
        let range = import.range();
        let wraps = import.gpa.checked_add(import.data.len()).is_none();
        if wraps || !map.is_backed(&range) {
            return Err(ImportError::OutsideMemory {
                name: import.name,
                range,
            });
        }
        let at = self.imports.partition_point(|i| i.gpa < import.gpa);
        let before = at.checked_sub(1).and_then(|i| self.imports.get(i));
        for other in before.into_iter().chain(self.imports.get(at)) {
            let other_range = other.range();
            if !range.intersection(&other_range).is_empty() {
                return Err(ImportError::Overlap {
                    name: import.name,
                    range,
                    other: other.name,
                    other_range,
                });
            }
        }
        self.imports.insert(at, import);
        Ok(())
    }

    /// Adds all of `other`.
    ///
    /// # Errors
    /// As [`Self::push`]; the imports before the offending one stay.
    pub fn append(&mut self, map: &MemoryMap, other: Self) -> Result<(), ImportError> {
        other
            .imports
            .into_iter()
            .try_for_each(|i| self.push(map, i))
    }

    /// The imports in address order.
    pub fn iter(&self) -> core::slice::Iter<'_, Import<'a>> {
        self.imports.iter()
    }

    /// The first import of that name.
    pub fn find(&self, name: &str) -> Option<&Import<'a>> {
        self.imports.iter().find(|i| i.name == name)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.imports.len()
    }

    /// Whether there is nothing to import.
    pub fn is_empty(&self) -> bool {
        self.imports.is_empty()
    }

    /// The same list with its own copy of every byte.
    pub fn into_owned(self) -> ImportList<'static> {
        let imports = self.imports.into_iter().map(|i| Import {
            name: i.name,
            gpa: i.gpa,
            vtl: i.vtl,
            kind: i.kind,
            measured: i.measured,
            data: match i.data {
                ImportData::Bytes(b) => ImportData::Bytes(Cow::Owned(b.into_owned())),
                ImportData::Zero(n) => ImportData::Zero(n),
            },
        });
        ImportList {
            imports: imports.collect(),
        }
    }

    /// What a guest would read at `gpa`: the imported bytes, zero elsewhere.
    /// For inspection and tests.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) {
        buf.fill(0);
        let Some(wanted) = GpaRange::at(gpa, buf.len() as u64) else {
            return;
        };
        for import in &self.imports {
            let both = wanted.intersection(&import.range());
            if both.is_empty() {
                continue;
            }
            if let ImportData::Bytes(b) = &import.data {
                let to = (both.start - wanted.start) as usize..(both.end - wanted.start) as usize;
                let from = (both.start - import.gpa.0) as usize..(both.end - import.gpa.0) as usize;
                buf[to].copy_from_slice(&b[from]);
            }
        }
    }

    /// One line per import, for inspection.
    pub fn describe(&self) -> String {
        use core::fmt::Write;
        let mut out = String::new();
        for i in &self.imports {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{} {} ({} bytes)", i.range(), i.name, i.data.len());
        }
        out
    }
}

impl<'a, 'l> IntoIterator for &'l ImportList<'a> {
    type Item = &'l Import<'a>;
    type IntoIter = core::slice::Iter<'l, Import<'a>>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn import(name: &'static str, gpa: u64, len: usize) -> Import<'static> {
        Import {
            name,
            gpa: Gpa(gpa),
            vtl: Vtl::VTL0,
            kind: PageKind::Image,
            measured: true,
            data: ImportData::Bytes(vec![7; len].into()),
        }
    }

    #[test]
    fn stays_sorted_and_refuses_overlap() {
        let map = MemoryMap::new(2 << 20, 40).unwrap();
        let mut list = ImportList::new();
        list.push(&map, import("b", 0x3000, 0x1000)).unwrap();
        list.push(&map, import("a", 0x1000, 0x2000)).unwrap();
        list.push(&map, import("empty", 0x1000, 0)).unwrap();
        assert_eq!(list.iter().map(|i| i.name).collect::<Vec<_>>(), ["a", "b"]);
        for (gpa, len) in [
            (0xfff, 2),
            (0x1000, 1),
            (0x2fff, 2),
            (0x3fff, 1),
            (0x500, 0x8000),
        ] {
            assert!(matches!(
                list.push(&map, import("c", gpa, len)),
                Err(ImportError::Overlap { .. })
            ));
        }
        list.push(&map, import("c", 0x4000, 1)).unwrap();
    }

    #[test]
    fn refuses_what_is_outside_memory() {
        let map = MemoryMap::new(2 << 20, 40).unwrap();
        let mut list = ImportList::new();
        for gpa in [(2 << 20) - 1, 2 << 20, 0xfec0_0000, 1 << 32, u64::MAX] {
            let e = list.push(&map, import("x", gpa, 2));
            assert!(
                matches!(e, Err(ImportError::OutsideMemory { .. })),
                "{gpa:#x}"
            );
        }
        let huge = Import {
            data: ImportData::Zero(u64::MAX),
            ..import("x", 0x1000, 0)
        };
        assert!(list.push(&map, huge).is_err());
    }

    #[test]
    fn reads_back_across_imports() {
        let map = MemoryMap::new(2 << 20, 40).unwrap();
        let mut list = ImportList::new();
        list.push(&map, import("a", 0x1000, 2)).unwrap();
        list.push(&map, import("b", 0x1003, 2)).unwrap();
        let mut buf = [9; 7];
        list.read(0xfff, &mut buf);
        assert_eq!(buf, [0, 7, 7, 0, 7, 7, 0]);
    }
}
