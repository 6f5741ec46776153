//! Guest physical addresses and virtual trust levels.

use core::fmt;

/// log2 of the guest page size that every table in Caisson counts in.
pub const PAGE_SHIFT: u32 = 12;
/// Size of a small guest page in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// A guest physical address, in bytes from zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The address `bytes` further on, or `None` past the end of the address space.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(a) => Some(Self(a)),
            None => None,
        }
    }

    /// The number of the 4 KiB page that holds this address.
    pub const fn page(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A virtual trust level (Hyper-V TLFS, "Virtual Secure Mode"). A machine
/// without trust levels runs everything in [`Vtl::VTL0`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Vtl(u8);

impl Vtl {
    /// How many levels there are; per-VTL state is an array of this length.
    pub const COUNT: usize = 3;
    /// The guest operating system's level.
    pub const VTL0: Self = Self(0);
    /// The secure kernel's level.
    pub const VTL1: Self = Self(1);
    /// The paravisor's level.
    pub const VTL2: Self = Self(2);

    /// The level numbered `n`, if there is one.
    pub const fn new(n: u8) -> Option<Self> {
        if (n as usize) < Self::COUNT {
            Some(Self(n))
        } else {
            None
        }
    }

    /// The level's number, 0 to 2, for indexing per-VTL arrays.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}
