//! The parts of an encoded 64-bit integer instruction.
//!
//! The decoder says what an instruction means; to encode it anew with other
//! registers its bytes are needed too.

/// An instruction's bytes, taken apart. Instructions with a VEX, EVEX or XOP
/// prefix have none of the shapes that translated code copies, and come out as
/// one-byte opcodes that no list names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw<'a> {
    /// 66.
    pub(super) operand16: bool,
    /// 67.
    pub(super) address32: bool,
    /// The last of F2 and F3.
    pub(super) repeat: Option<u8>,
    /// F0.
    pub(super) lock: bool,
    /// The REX prefix, 0 if there is none.
    pub(super) rex: u8,
    pub(super) map: Map,
    /// The last byte of the opcode.
    pub(super) opcode: u8,
    /// What follows the opcode: ModRM and so on.
    rest: &'a [u8],
}

/// Opcode maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Map {
    /// One byte.
    One,
    /// 0F.
    Two,
    /// 0F 38 or 0F 3A.
    Other,
}

impl<'a> Raw<'a> {
    /// Takes `bytes` apart, one whole instruction that the decoder accepted.
    pub(super) fn new(bytes: &'a [u8]) -> Option<Self> {
        let mut raw = Self {
            operand16: false,
            address32: false,
            repeat: None,
            lock: false,
            rex: 0,
            map: Map::One,
            opcode: 0,
            rest: &[],
        };
        let mut at = 0;
        loop {
            let byte = *bytes.get(at)?;
            at += 1;
            match byte {
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => raw.rex = 0,
                0x66 => (raw.operand16, raw.rex) = (true, 0),
                0x67 => (raw.address32, raw.rex) = (true, 0),
                0xf0 => (raw.lock, raw.rex) = (true, 0),
                0xf2 | 0xf3 => (raw.repeat, raw.rex) = (Some(byte), 0),
                // A REX prefix counts only right before the opcode.
                0x40..=0x4f => raw.rex = byte,
                _ => {
                    raw.opcode = byte;
                    break;
                }
            }
        }
        if raw.opcode == 0x0f {
            raw.map = Map::Two;
            raw.opcode = *bytes.get(at)?;
            at += 1;
            if matches!(raw.opcode, 0x38 | 0x3a) {
                raw.map = Map::Other;
                raw.opcode = *bytes.get(at)?;
                at += 1;
            }
        }
        raw.rest = bytes.get(at..)?;
        Some(raw)
    }

    /// REX.W.
    pub(super) fn wide(&self) -> bool {
        self.rex & 8 != 0
    }

    /// The ModRM byte.
    pub(super) fn modrm(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    /// ModRM's register, with REX.R.
    pub(super) fn reg(&self) -> Option<u8> {
        Some(self.modrm()? >> 3 & 7 | (self.rex & 4) << 1)
    }

    /// ModRM's other register, with REX.B, if it is one.
    pub(super) fn rm(&self) -> Option<u8> {
        let m = self.modrm()?;
        (m >= 0xc0).then_some(m & 7 | (self.rex & 1) << 3)
    }

    /// The register in the opcode's low three bits, with REX.B.
    pub(super) fn low(&self) -> u8 {
        self.opcode & 7 | (self.rex & 1) << 3
    }

    /// The immediate of an instruction with a ModRM byte.
    pub(super) fn immediate(&self) -> Option<&'a [u8]> {
        let m = self.modrm()?;
        let mut len = 1;
        if m < 0xc0 {
            let mut base = m & 7;
            if base == 4 {
                base = self.rest.get(1)? & 7;
                len += 1;
            }
            len += match m >> 6 {
                0 if base == 5 => 4,
                0 => 0,
                1 => 1,
                _ => 4,
            };
        }
        self.rest.get(len..)
    }

    /// What follows the opcode of an instruction without ModRM byte.
    pub(super) fn tail(&self) -> &'a [u8] {
        self.rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_where_they_should_be() {
        // lock add word ptr fs:[r9+r12*4+0x11223344], 0x5566
        let b = [
            0x64, 0xf0, 0x66, 0x43, 0x81, 0x84, 0xa1, 0x44, 0x33, 0x22, 0x11, 0x66, 0x55,
        ];
        let r = Raw::new(&b).unwrap();
        assert!(r.lock && r.operand16 && !r.wide() && r.rex == 0x43 && r.map == Map::One);
        assert_eq!((r.opcode, r.reg(), r.rm()), (0x81, Some(0), None));
        assert_eq!(r.immediate().unwrap(), [0x66, 0x55]);
        // movzx r8d, sil
        let b = [0x44, 0x0f, 0xb6, 0xc6];
        let r = Raw::new(&b).unwrap();
        assert_eq!(
            (r.map, r.opcode, r.reg(), r.rm()),
            (Map::Two, 0xb6, Some(8), Some(6))
        );
        // mov eax, [rip+4]; mov eax, [abs 0x10], imul ecx, [rax+1], 7
        assert!(
            Raw::new(&[0x8b, 5, 4, 0, 0, 0])
                .unwrap()
                .immediate()
                .unwrap()
                .is_empty()
        );
        let b = [0x8b, 4, 0x25, 0x10, 0, 0, 0];
        assert!(Raw::new(&b).unwrap().immediate().unwrap().is_empty());
        assert_eq!(
            Raw::new(&[0x6b, 0x48, 1, 7]).unwrap().immediate().unwrap(),
            [7]
        );
        // A REX prefix before another prefix is nothing.
        let b = [0x48, 0x66, 0x01, 0xc0];
        assert_eq!(Raw::new(&b).unwrap().rex, 0);
        assert!(Raw::new(&[0x66, 0x0f]).is_none());
    }
}
