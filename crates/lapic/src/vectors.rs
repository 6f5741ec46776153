//! A set of interrupt vectors: the shape of IRR, ISR and TMR.

use serde::{Deserialize, Serialize};

/// A set of the vectors 0 to 255.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorSet {
    words: [u64; 4],
}

impl VectorSet {
    /// The empty set.
    pub const EMPTY: Self = Self { words: [0; 4] };

    /// The set of the vectors whose bits are set, vector 0 in bit 0 of the first word.
    pub const fn from_words(words: [u64; 4]) -> Self {
        Self { words }
    }

    fn place(vector: u8) -> (usize, u64) {
        (usize::from(vector >> 6), 1 << (vector & 63))
    }

    /// Adds `vector`.
    pub fn insert(&mut self, vector: u8) {
        let (word, bit) = Self::place(vector);
        self.words[word] |= bit;
    }

    /// Removes `vector`.
    pub fn remove(&mut self, vector: u8) {
        let (word, bit) = Self::place(vector);
        self.words[word] &= !bit;
    }

    /// Adds or removes `vector`.
    pub fn set(&mut self, vector: u8, member: bool) {
        if member {
            self.insert(vector)
        } else {
            self.remove(vector)
        }
    }

    /// Whether `vector` is in the set.
    pub fn contains(&self, vector: u8) -> bool {
        let (word, bit) = Self::place(vector);
        self.words[word] & bit != 0
    }

    /// The highest vector of the set, which has the highest priority.
    #[inline]
    pub fn highest(&self) -> Option<u8> {
        let word = self.words.iter().rposition(|word| *word != 0)?;
        Some((word * 64) as u8 + (63 - self.words[word].leading_zeros() as u8))
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.words == [0; 4]
    }

    /// Adds all of `other`, whose trigger modes are in `level`, recording them in `tmr`.
    pub(crate) fn merge(&mut self, other: [u64; 4], level: [u64; 4], tmr: &mut Self) {
        for index in 0..4 {
            self.words[index] |= other[index];
            tmr.words[index] = (tmr.words[index] & !other[index]) | (level[index] & other[index]);
        }
    }

    /// The 32 vectors from `index` × 32, as the register with that index holds them; index 0 to 7.
    pub fn register(&self, index: u32) -> u32 {
        let word = self.words[(index as usize / 2) & 3];
        (word >> ((index & 1) * 32)) as u32
    }

    /// Sets the 32 vectors from `index` × 32.
    pub(crate) fn set_register(&mut self, index: u32, value: u32) {
        let word = &mut self.words[(index as usize / 2) & 3];
        let shift = (index & 1) * 32;
        *word = (*word & !(0xFFFF_FFFF << shift)) | (u64::from(value) << shift);
    }

    /// Removes the vectors 0 to 15, which cannot be interrupts.
    pub(crate) fn drop_illegal(&mut self) {
        self.words[0] &= !0xFFFF;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn highest_is_the_highest_member() {
        let mut set = VectorSet::EMPTY;
        assert_eq!(set.highest(), None);
        for vector in [16u8, 63, 64, 127, 128, 191, 192, 255] {
            set.insert(vector);
            assert_eq!(set.highest(), Some(vector));
        }
        set.remove(255);
        assert_eq!(set.highest(), Some(192));
    }

    #[test]
    fn registers_hold_32_vectors_each() {
        let mut set = VectorSet::EMPTY;
        for index in 0..8 {
            set.set_register(index, 1 << index);
        }
        for index in 0..8u8 {
            assert_eq!(set.register(index.into()), 1 << index);
            assert!(set.contains(index * 32 + index));
        }
    }
}
