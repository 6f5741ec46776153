//! A small deterministic generator (SplitMix64) and boundary values.

pub(crate) struct Rng(pub u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// 0 to `n` - 1.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// An integer that is likely to be at a border of something.
    pub(crate) fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 => self.pick(&[
                0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255,
            ]),
            1 => (self.next() % 512) as i64 as u64,
            2 => 0u64.wrapping_sub(self.next() % 300),
            3 => 1u64 << self.below(64),
            4 => (1u64 << self.below(64)).wrapping_sub(1),
            5 => {
                let v = self.next() as i32;
                v as i64 as u64
            }
            _ => self.next(),
        }
    }

    fn float32(&mut self) -> u32 {
        let sign = (self.next() as u32 & 1) << 31;
        sign | match self.below(12) {
            0 => 0,
            1 => self.next() as u32 & 0x7f_ffff,
            2 => 0x0080_0000 + self.below(4) as u32,
            3 => 0x7f7f_ffff - self.below(4) as u32,
            4 => 0x7f80_0000,
            5 => 0x7fc0_0000 | self.next() as u32 & 0x3f_ffff,
            6 => 0x7f80_0001 | self.next() as u32 & 0x3f_ffff,
            7 => 0x3f80_0000 + (self.below(9) as u32) * 0x40_0000,
            8 => 0x4f00_0000 + self.below(3) as u32,
            9 => (self.next() as u32 & 0xff_ffff) | 0x3f00_0000,
            _ => self.next() as u32 & 0x7fff_ffff,
        }
    }

    fn float64(&mut self) -> u64 {
        let sign = (self.next() & 1) << 63;
        sign | match self.below(12) {
            0 => 0,
            1 => self.next() & 0xf_ffff_ffff_ffff,
            2 => 0x0010_0000_0000_0000 + self.below(4) as u64,
            3 => 0x7fef_ffff_ffff_ffff - self.below(4) as u64,
            4 => 0x7ff0_0000_0000_0000,
            5 => 0x7ff8_0000_0000_0000 | self.next() & 0x7_ffff_ffff_ffff,
            6 => 0x7ff0_0000_0000_0001 | self.next() & 0x7_ffff_ffff_ffff,
            7 => 0x3ff0_0000_0000_0000 + (self.below(9) as u64) * 0x8_0000_0000_0000,
            8 => 0x41e0_0000_0000_0000 + self.below(3) as u64,
            9 => 0x36a0_0000_0000_0000 + (self.next() & 0x1ff_ffff_ffff_ffff),
            _ => self.next() & 0x7fff_ffff_ffff_ffff,
        }
    }

    /// An 80-bit number: mantissa, sign and exponent.
    pub(crate) fn float80(&mut self) -> (u64, u16) {
        let sign = (self.next() as u16 & 1) << 15;
        let (mantissa, exponent) = match self.below(12) {
            0 => (0, 0),
            1 => (self.next() >> 1, 0),
            2 => (1 << 63, 1 + self.below(3) as u16),
            3 => (!0, 0x7ffe),
            4 => (1 << 63, 0x7fff),
            5 => (3 << 62 | self.next() >> 2, 0x7fff),
            6 => (1 << 63 | self.next() >> 2 | 1, 0x7fff),
            7 => (1 << 63, 0x3fff + self.below(9) as u16),
            8 => (self.next() | 1 << 63, 0x3fff + self.below(66) as u16),
            // An unsupported encoding.
            9 => (self.next() >> 1, self.next() as u16 & 0x7fff),
            10 => (self.next() | 1 << 63, 0x3fff - self.below(1100) as u16),
            _ => (self.next() | 1 << 63, self.next() as u16 & 0x7fff),
        };
        (mantissa, sign | exponent)
    }

    /// Bytes that look like numbers of some kind.
    pub(crate) fn fill(&mut self, out: &mut [u8]) {
        let kind = self.below(6);
        for chunk in out.chunks_mut(8) {
            let v = match kind {
                0 | 1 => u64::from(self.float32()) | u64::from(self.float32()) << 32,
                2 | 3 => self.float64(),
                4 => self.integer(),
                _ => self.next(),
            };
            let n = chunk.len();
            chunk.copy_from_slice(&v.to_le_bytes()[..n]);
        }
    }
}
