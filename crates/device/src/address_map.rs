//! Which device answers an address: an immutable sorted map that exits read without a lock.
//!
//! A map is built once ([`AddressMapBuilder`]), published behind an atomically replaceable pointer by its user, and
//! never changed: claiming or releasing a range makes a new map from the old one.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::fmt;

use crate::{Access, AddressRange, Space};

/// A claimed range and what answers it.
#[derive(Clone, Debug)]
pub struct ClaimedRange<T> {
    /// The addresses.
    pub range: AddressRange,
    /// Who claimed them.
    pub claimant: Claimant,
    /// What answers accesses.
    pub target: T,
}

impl<T> ClaimedRange<T> {
    /// The access that `address`, which is in the range, means to the device.
    pub fn access(&self, address: u64) -> Access {
        Access {
            space: self.range.space,
            address,
            region: self.claimant.region,
            offset: address.wrapping_sub(self.range.base),
        }
    }
}

/// Who claimed a range, for error messages and for [`Access::region`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimant {
    /// The device's name.
    pub owner: Arc<str>,
    /// The index of the range among the device's claims.
    pub region: u32,
    /// The device's name for the range.
    pub label: &'static str,
}

impl fmt::Display for Claimant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.label.is_empty() {
            write!(f, "\"{}\"", self.owner)
        } else {
            write!(f, "\"{}\" ({})", self.owner, self.label)
        }
    }
}

/// A range that cannot be claimed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// Some of the range belongs to another claim.
    #[error(transparent)]
    Overlap(Box<Overlap>),
    /// The range is empty or runs past the end of its space.
    #[error(
        "{claimant} cannot have {range}: a range holds at least one address and ends within its space"
    )]
    Invalid {
        /// The range asked for.
        range: AddressRange,
        /// Who asked.
        claimant: Claimant,
    },
}

/// Two claims that want the same addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{claimant} cannot have {range}: it overlaps {other_range} of {other}; move one of the two devices"
)]
pub struct Overlap {
    /// The range asked for.
    pub range: AddressRange,
    /// Who asked.
    pub claimant: Claimant,
    /// The range that is in the way.
    pub other_range: AddressRange,
    /// Whose it is.
    pub other: Claimant,
}

/// A caller's memory of its last hit, which makes the next access to the same range cheap. Each vCPU thread keeps its
/// own; a stale hint is harmless.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hint {
    mmio: u32,
    pio: u32,
}

impl Hint {
    fn slot(&mut self, space: Space) -> &mut u32 {
        match space {
            Space::Mmio => &mut self.mmio,
            Space::Pio => &mut self.pio,
        }
    }
}

/// The claimed ranges of both spaces, sorted. `T` is what an access is handed to.
#[derive(Clone, Debug)]
pub struct AddressMap<T> {
    mmio: Vec<ClaimedRange<T>>,
    pio: Vec<ClaimedRange<T>>,
}

impl<T> Default for AddressMap<T> {
    fn default() -> Self {
        Self {
            mmio: Vec::new(),
            pio: Vec::new(),
        }
    }
}

impl<T> AddressMap<T> {
    /// The claimed ranges of `space`, in ascending order.
    pub fn ranges(&self, space: Space) -> &[ClaimedRange<T>] {
        match space {
            Space::Mmio => &self.mmio,
            Space::Pio => &self.pio,
        }
    }

    /// The claim that holds `address`, found from `hint` or by binary search; `hint` remembers it.
    #[inline]
    pub fn find(&self, space: Space, address: u64, hint: &mut Hint) -> Option<&ClaimedRange<T>> {
        let ranges = self.ranges(space);
        let slot = hint.slot(space);
        if let Some(claimed) = ranges.get(*slot as usize)
            && claimed.range.contains(address)
        {
            return Some(claimed);
        }
        let after = ranges.partition_point(|claimed| claimed.range.base <= address);
        let index = after.checked_sub(1)?;
        let claimed = ranges.get(index)?;
        if !claimed.range.contains(address) {
            return None;
        }
        *slot = index as u32;
        Some(claimed)
    }

    /// Splits an access of `len` bytes at `address` into the pieces that lie within one claim or within none. Nearly
    /// every access is one piece. Bytes past the end of the space are unclaimed.
    pub fn pieces<'m, 'h>(
        &'m self,
        space: Space,
        address: u64,
        len: usize,
        hint: &'h mut Hint,
    ) -> Pieces<'m, 'h, T> {
        Pieces {
            map: self,
            hint,
            space,
            address,
            start: 0,
            len,
        }
    }

    /// Starts a new map from the claims of this one.
    pub fn to_builder(&self) -> AddressMapBuilder<T>
    where
        T: Clone,
    {
        AddressMapBuilder { map: self.clone() }
    }
}

/// A part of an access: all of its bytes are in one claim, or in none.
#[derive(Debug)]
pub struct Piece<'m, T> {
    /// The claim, `None` for bytes that nobody claims: those read as all-ones and ignore writes.
    pub claimed: Option<&'m ClaimedRange<T>>,
    /// The address of the first byte.
    pub address: u64,
    /// The first byte of the piece in the access's buffer.
    pub start: usize,
    /// One past the last byte of the piece in the access's buffer.
    pub end: usize,
}

/// The pieces of an access, in ascending order. Made by [`AddressMap::pieces`].
#[derive(Debug)]
pub struct Pieces<'m, 'h, T> {
    map: &'m AddressMap<T>,
    hint: &'h mut Hint,
    space: Space,
    address: u64,
    start: usize,
    len: usize,
}

impl<'m, T> Iterator for Pieces<'m, '_, T> {
    type Item = Piece<'m, T>;

    fn next(&mut self) -> Option<Piece<'m, T>> {
        let start = self.start;
        if start >= self.len {
            return None;
        }
        let left = (self.len - start) as u64;
        let in_space = self
            .address
            .checked_add(start as u64)
            .filter(|address| *address <= self.space.last_address());
        let (claimed, address, taken) = match in_space {
            None => (None, self.address.wrapping_add(start as u64), left),
            Some(address) => match self.map.find(self.space, address, self.hint) {
                Some(claimed) => {
                    let room = claimed.range.len - (address - claimed.range.base);
                    (Some(claimed), address, left.min(room))
                }
                None => {
                    let ranges = self.map.ranges(self.space);
                    let next = ranges.partition_point(|claimed| claimed.range.base <= address);
                    let gap = ranges
                        .get(next)
                        .map_or(left, |next| next.range.base - address);
                    (None, address, left.min(gap))
                }
            },
        };
        self.start = start + taken as usize;
        Some(Piece {
            claimed,
            address,
            start,
            end: self.start,
        })
    }
}

/// Makes an [`AddressMap`].
#[derive(Clone, Debug)]
pub struct AddressMapBuilder<T> {
    map: AddressMap<T>,
}

impl<T> Default for AddressMapBuilder<T> {
    fn default() -> Self {
        Self {
            map: AddressMap::default(),
        }
    }
}

impl<T> AddressMapBuilder<T> {
    /// A map without claims.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `range` to `target` on behalf of `claimant`.
    ///
    /// # Errors
    /// When the range is empty, leaves its space or overlaps a claim; the builder is then unchanged.
    pub fn claim(
        &mut self,
        range: AddressRange,
        claimant: Claimant,
        target: T,
    ) -> Result<(), ClaimError> {
        let Some(last) = range.last() else {
            return Err(ClaimError::Invalid { range, claimant });
        };
        let ranges = match range.space {
            Space::Mmio => &mut self.map.mmio,
            Space::Pio => &mut self.map.pio,
        };
        let index = ranges.partition_point(|claimed| claimed.range.base <= range.base);
        let before = index.checked_sub(1).and_then(|before| ranges.get(before));
        let in_the_way = before
            .filter(|before| before.range.contains(range.base))
            .or_else(|| ranges.get(index).filter(|after| after.range.base <= last));
        if let Some(other) = in_the_way {
            return Err(ClaimError::Overlap(Box::new(Overlap {
                range,
                claimant,
                other_range: other.range,
                other: other.claimant.clone(),
            })));
        }
        ranges.insert(
            index,
            ClaimedRange {
                range,
                claimant,
                target,
            },
        );
        Ok(())
    }

    /// Takes back every claim of `owner` and returns how many there were.
    pub fn release(&mut self, owner: &str) -> usize {
        let before = self.map.mmio.len() + self.map.pio.len();
        self.map
            .mmio
            .retain(|claimed| &*claimed.claimant.owner != owner);
        self.map
            .pio
            .retain(|claimed| &*claimed.claimant.owner != owner);
        before - self.map.mmio.len() - self.map.pio.len()
    }

    /// Takes back the claim of exactly `range` and returns whether there was one.
    pub fn release_range(&mut self, range: AddressRange) -> bool {
        let ranges = match range.space {
            Space::Mmio => &mut self.map.mmio,
            Space::Pio => &mut self.map.pio,
        };
        let before = ranges.len();
        ranges.retain(|claimed| claimed.range != range);
        ranges.len() != before
    }

    /// The finished map.
    pub fn build(self) -> AddressMap<T> {
        self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{string::ToString, vec, vec::Vec};

    fn claimant(owner: &str) -> Claimant {
        Claimant {
            owner: owner.into(),
            region: 0,
            label: "",
        }
    }

    fn map(ranges: &[(u64, u64, &'static str)]) -> AddressMap<&'static str> {
        let mut builder = AddressMapBuilder::new();
        for (base, len, name) in ranges {
            builder
                .claim(
                    AddressRange {
                        space: Space::Pio,
                        base: *base,
                        len: *len,
                    },
                    claimant(name),
                    *name,
                )
                .unwrap();
        }
        builder.build()
    }

    fn split(
        map: &AddressMap<&'static str>,
        address: u64,
        len: usize,
    ) -> Vec<(Option<&'static str>, u64, usize)> {
        map.pieces(Space::Pio, address, len, &mut Hint::default())
            .map(|piece| {
                (
                    piece.claimed.map(|claimed| claimed.target),
                    piece.address,
                    piece.end - piece.start,
                )
            })
            .collect()
    }

    #[test]
    fn an_overlap_names_both_owners() {
        let mut builder = map(&[(0x60, 1, "i8042"), (0x3f8, 8, "uart0")]).to_builder();
        let second = Claimant {
            owner: "uart1".into(),
            region: 2,
            label: "registers",
        };
        let error = builder
            .claim(AddressRange::pio(0x3f0, 9), second, "uart1")
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"uart1\" (registers) cannot have port range 0x3f0-0x3f8: it overlaps port range 0x3f8-0x3ff of \
             \"uart0\"; move one of the two devices"
        );
        assert_eq!(builder.build().ranges(Space::Pio).len(), 2);
    }

    #[test]
    fn spaces_do_not_overlap_each_other() {
        let mut builder = AddressMapBuilder::new();
        builder
            .claim(AddressRange::pio(0x60, 1), claimant("a"), 1)
            .unwrap();
        builder
            .claim(AddressRange::mmio(0x60, 1), claimant("b"), 2)
            .unwrap();
        let map = builder.build();
        let mut hint = Hint::default();
        assert_eq!(map.find(Space::Pio, 0x60, &mut hint).unwrap().target, 1);
        assert_eq!(map.find(Space::Mmio, 0x60, &mut hint).unwrap().target, 2);
    }

    #[test]
    fn invalid_ranges_are_refused() {
        let mut builder = AddressMapBuilder::new();
        for range in [
            AddressRange::pio(0, 0),
            AddressRange::pio(0xFFFF, 2),
            AddressRange::mmio(u64::MAX, 2),
        ] {
            assert!(matches!(
                builder.claim(range, claimant("x"), ()),
                Err(ClaimError::Invalid { .. })
            ));
        }
        builder
            .claim(AddressRange::mmio(u64::MAX, 1), claimant("top"), ())
            .unwrap();
        assert!(
            builder
                .build()
                .find(Space::Mmio, u64::MAX, &mut Hint::default())
                .is_some()
        );
    }

    #[test]
    fn accesses_are_split_at_claims() {
        let map = map(&[
            (0x60, 1, "data"),
            (0x61, 1, "port b"),
            (0x64, 1, "command"),
            (0xFFFE, 2, "last"),
        ]);
        assert_eq!(split(&map, 0x60, 1), [(Some("data"), 0x60, 1)]);
        assert_eq!(
            split(&map, 0x60, 8),
            [
                (Some("data"), 0x60, 1),
                (Some("port b"), 0x61, 1),
                (None, 0x62, 2),
                (Some("command"), 0x64, 1),
                (None, 0x65, 3)
            ]
        );
        assert_eq!(
            split(&map, 0xFFFF, 4),
            [(Some("last"), 0xFFFF, 1), (None, 0x10000, 3)]
        );
        assert_eq!(split(&map, 0x60, 0), []);
    }

    #[test]
    fn the_end_of_memory_is_not_passed() {
        let mut builder = AddressMapBuilder::new();
        builder
            .claim(AddressRange::mmio(u64::MAX - 3, 4), claimant("top"), ())
            .unwrap();
        let map = builder.build();
        let lens: Vec<_> = map
            .pieces(Space::Mmio, u64::MAX - 1, 8, &mut Hint::default())
            .map(|piece| (piece.claimed.is_some(), piece.start, piece.end))
            .collect();
        assert_eq!(lens, [(true, 0, 2), (false, 2, 8)]);
    }

    #[test]
    fn a_stale_hint_is_harmless() {
        let big = map(&[(0, 1, "a"), (10, 1, "b"), (20, 1, "c")]);
        let small = map(&[(20, 1, "c")]);
        let mut hint = Hint::default();
        assert_eq!(big.find(Space::Pio, 20, &mut hint).unwrap().target, "c");
        assert_eq!(small.find(Space::Pio, 20, &mut hint).unwrap().target, "c");
        assert!(small.find(Space::Pio, 10, &mut hint).is_none());
    }

    #[test]
    fn release_takes_back_all_claims_of_an_owner() {
        let mut builder = map(&[(0, 4, "a"), (8, 4, "b"), (16, 4, "a")]).to_builder();
        assert_eq!(builder.release("a"), 2);
        assert_eq!(builder.release("a"), 0);
        assert!(builder.release_range(AddressRange::pio(8, 4)));
        assert!(!builder.release_range(AddressRange::pio(8, 4)));
        assert!(builder.build().ranges(Space::Pio).is_empty());
    }

    proptest! {
        #[test]
        fn the_map_answers_like_a_table(
            claims in prop::collection::vec((0u64..256, 0u64..24), 0..24),
            probes in prop::collection::vec((0u64..280, 0usize..9), 1..64),
        ) {
            let mut table = vec![None; 300];
            let mut builder = AddressMapBuilder::new();
            for (id, (base, len)) in claims.into_iter().enumerate() {
                let free = len > 0 && table[base as usize..(base + len) as usize].iter().all(Option::is_none);
                let claimed = builder.claim(AddressRange::mmio(base, len), claimant("x"), id);
                prop_assert_eq!(claimed.is_ok(), free);
                if free {
                    table[base as usize..(base + len) as usize].fill(Some(id));
                }
            }
            let map = builder.build();
            let mut hint = Hint::default();
            for (address, len) in probes {
                let mut seen = vec![];
                for piece in map.pieces(Space::Mmio, address, len, &mut hint) {
                    prop_assert_eq!(piece.start, seen.len());
                    prop_assert_eq!(piece.address, address + piece.start as u64);
                    prop_assert!(piece.end > piece.start);
                    seen.extend(core::iter::repeat_n(piece.claimed.map(|c| c.target), piece.end - piece.start));
                }
                prop_assert_eq!(&seen[..], &table[address as usize..address as usize + len]);
            }
        }
    }
}
