//! Why a kernel could not be loaded.

use alloc::string::String;
use core::fmt;

use crate::{FileKind, GpaRange, ImportError, KernelKind};

/// A byte count as people write it: `1 MiB`, `1020 KiB`, `17 bytes`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 4] = [
            (1 << 40, "TiB"),
            (1 << 30, "GiB"),
            (1 << 20, "MiB"),
            (1 << 10, "KiB"),
        ];
        for (unit, name) in UNITS {
            if self.0 < unit {
                continue;
            }
            if self.0.is_multiple_of(unit) {
                return write!(f, "{} {name}", self.0 / unit);
            }
            // One decimal, unless it would hide what a smaller unit says exactly.
            if self.0 / unit >= 10 {
                let tenths = u128::from(self.0) * 10 / u128::from(unit);
                return write!(f, "{}.{} {name}", tenths / 10, tenths % 10);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

/// Why [`load`](crate::load) refused. Messages do not name the kernel file: the
/// caller knows its path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file is of none of the accepted kinds.
    #[error("this is {found}, not a kernel that can be started{hint}; accepted are {accepted}",
        hint = .found.hint(), accepted = KernelKind::ACCEPTED)]
    NotAKernel {
        /// What the file is.
        found: FileKind,
    },
    /// The file does not offer the protocol that was asked for.
    #[error("this kernel cannot be started as {wanted}: {reason}")]
    WrongProtocol {
        /// The protocol asked for.
        wanted: KernelKind,
        /// What is missing.
        reason: String,
    },
    /// The file ends before what its headers promise.
    #[error(
        "the {kind} is truncated: {what} needs {needed} bytes but the file has {have}; \
        fetch or build it again"
    )]
    Truncated {
        /// The kind of kernel.
        kind: KernelKind,
        /// What ends too early.
        what: &'static str,
        /// How long the file would have to be at least.
        needed: u64,
        /// How long it is.
        have: u64,
    },
    /// A header says something impossible.
    #[error("the {kind} is corrupt: {reason}")]
    Corrupt {
        /// The kind of kernel.
        kind: KernelKind,
        /// What is impossible.
        reason: String,
    },
    /// A kernel that needs something which is not supported.
    #[error("the {kind} cannot be started: {reason}")]
    Unsupported {
        /// The kind of kernel.
        kind: KernelKind,
        /// What it needs.
        reason: String,
    },
    /// Something has a fixed address where there is no RAM.
    #[error("the {what} has to be at {range} ({size}), which is not all usable RAM: the machine has {ram} of memory, \
        usable at {usable}; give it more, or use a kernel linked for other addresses",
        size = Size(.range.len()), ram = Size(*.ram))]
    OutsideRam {
        /// What was to be placed.
        what: &'static str,
        /// Where it has to be.
        range: GpaRange,
        /// The RAM of the machine in bytes.
        ram: u64,
        /// The usable ranges.
        usable: String,
    },
    /// Two things have to be at the same place.
    #[error("the {what} has to be at {range}, where something else of this kernel already is")]
    Overlap {
        /// What was to be placed.
        what: &'static str,
        /// Where it has to be.
        range: GpaRange,
    },
    /// No room is left for something that could be anywhere.
    #[error("the {what} of {size} does not fit: the machine has {ram} of memory, and the largest free \
        range where it may be ({within}) is {largest}; give the machine more memory",
        size = Size(*.len), ram = Size(*.ram), largest = Size(*.largest))]
    NoRoom {
        /// What was to be placed.
        what: &'static str,
        /// Its length in bytes.
        len: u64,
        /// Where it might have been.
        within: GpaRange,
        /// The longest free run in there, in bytes.
        largest: u64,
        /// The RAM of the machine in bytes.
        ram: u64,
    },
    /// The command line is longer than the kernel reads.
    #[error("the kernel command line is {len} bytes long, but this kernel reads at most {max}")]
    CmdlineTooLong {
        /// Its length in bytes.
        len: usize,
        /// The most that the kernel accepts.
        max: u64,
    },
    /// A command line or module string with a NUL byte in it.
    #[error("the {what} contains a NUL byte at offset {at}, where the kernel would stop reading")]
    NulByte {
        /// Which string.
        what: &'static str,
        /// Offset of the byte.
        at: usize,
    },
    /// An import list that contradicts itself or the memory map.
    #[error(transparent)]
    Import(#[from] ImportError),
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn sizes_read_well() {
        for (n, text) in [
            (0, "0 bytes"),
            (17, "17 bytes"),
            (1 << 20, "1 MiB"),
            ((1 << 20) - 4096, "1020 KiB"),
            (57 * (1 << 20) + (1 << 19), "57.5 MiB"),
            (6 << 30, "6 GiB"),
            ((3 << 30) + 4096, "3072.0 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(Size(n).to_string(), text);
        }
    }
}
