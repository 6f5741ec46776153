//! Numbers that nobody planned for.

use caisson_guest_rt::tsc;

/// A xorshift generator, another sequence at each start.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        Self(tsc::now() | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Less than `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    /// One of `choices`.
    pub(crate) fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A value for a register: often one at the edge of something.
    pub(crate) fn value(&mut self) -> u64 {
        let any = self.next();
        match any >> 60 {
            0 => 0,
            1 => u64::MAX,
            2 => u64::from(u32::MAX),
            3 => 1 << (any & 63),
            4 => any & 0xFF,
            5 => any & 0xFFFF_FFFF,
            6 => any & !0xFFF,
            7 => 0x300_0001,
            _ => any,
        }
    }
}
