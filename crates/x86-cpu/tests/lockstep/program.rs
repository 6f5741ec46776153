//! Random programs: straight code with forward branches, calls and one loop.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic as M};

/// xorshift64*.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            rng.next();
        }
        rng
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Opcodes of one byte, those that translated code has and a few that it has not.
const ONE: &[u8] = &[
    0x50, 0x51, 0x54, 0x55, 0x58, 0x59, 0x5c, 0x5f, 0x63, 0x68, 0x69, 0x6a, 0x6b, 0x80, 0x81, 0x83,
    0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8b, 0x8d, 0x8f, 0x90, 0x91, 0x94, 0x97, 0x98,
    0x99, 0x9c, 0x9e, 0x9f, 0xa4, 0xa5, 0xa8, 0xa9, 0xaa, 0xab, 0xb0, 0xb4, 0xb7, 0xb8, 0xbc, 0xbf,
    0xc0, 0xc1, 0xc6, 0xc7, 0xc9, 0xd0, 0xd1, 0xd2, 0xd3, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfc, 0xfe,
    0xff,
];
/// Opcodes behind 0F.
const TWO: &[u8] = &[
    0x10, 0x11, 0x1f, 0x40, 0x42, 0x44, 0x47, 0x4c, 0x4f, 0x58, 0x90, 0x92, 0x94, 0x96, 0x9f, 0xa3,
    0xa4, 0xa5, 0xab, 0xac, 0xad, 0xaf, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xb8, 0xba, 0xbb, 0xbc, 0xbd,
    0xbe, 0xbf, 0xc0, 0xc1, 0xc7, 0xc8, 0xcc, 0xcf, 0xef,
];

/// Opcodes of vector instructions behind 0F.
const VECTOR: &[u8] = &[
    0x10, 0x10, 0x11, 0x11, 0x12, 0x13, 0x14, 0x16, 0x17, 0x28, 0x29, 0x2a, 0x2a, 0x2c, 0x2d, 0x2e,
    0x2f, 0x50, 0x51, 0x52, 0x53, 0x54, 0x57, 0x58, 0x58, 0x59, 0x59, 0x5a, 0x5a, 0x5b, 0x5c, 0x5d,
    0x5e, 0x5f, 0x60, 0x61, 0x62, 0x66, 0x67, 0x6c, 0x6d, 0x6e, 0x6e, 0x6f, 0x6f, 0x70, 0x71, 0x72,
    0x73, 0x74, 0x75, 0x77, 0x7c, 0x7d, 0x7e, 0x7e, 0x7f, 0x7f, 0xae, 0xc2, 0xc6, 0xd0, 0xd1, 0xd2,
    0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xda, 0xdb, 0xdf, 0xe0, 0xe3, 0xe5, 0xe6, 0xe7, 0xe8, 0xeb, 0xef,
    0xf1, 0xf2, 0xf3, 0xf4, 0xf6, 0xf8, 0xfb, 0xfe,
];
/// Those behind 0F 38.
const VECTOR_38: &[u8] = &[
    0x00, 0x01, 0x04, 0x08, 0x0b, 0x17, 0x1c, 0x1d, 0x1e, 0x20, 0x23, 0x25, 0x28, 0x29, 0x2b, 0x30,
    0x33, 0x35, 0x37, 0x38, 0x3b, 0x3f, 0x40, 0x41, 0x45, 0x46, 0x47, 0x58, 0x59, 0x78, 0x79, 0x96,
    0x98, 0x99, 0x9a, 0x9d, 0x9f, 0xa6, 0xa8, 0xa9, 0xac, 0xb6, 0xb7, 0xb8, 0xb9, 0xbb, 0xbe, 0xdb,
    0xdc, 0xdf,
];
/// Those behind 0F 3A.
const VECTOR_3A: &[u8] = &[
    0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0e, 0x0f, 0x16, 0x18, 0x19, 0x22, 0x44, 0xdf,
];

/// One instruction that goes on behind itself.
fn instruction(rng: &mut Rng) -> Vec<u8> {
    loop {
        let mut b = Vec::new();
        for (odds, prefix) in [
            (6, 0x66),
            (30, 0xf3),
            (60, 0xf2),
            (25, 0xf0),
            (40, 0x65),
            (40, 0x67),
        ] {
            if rng.one_in(odds) {
                b.push(prefix);
            }
        }
        if !rng.one_in(3) {
            b.push(0x40 | rng.below(16) as u8);
        }
        let vector = rng.one_in(6);
        if vector {
            b.clear();
            let map = rng.pick(&[1, 1, 1, 1, 2, 3]);
            let opcode = rng.pick(match map {
                1 => VECTOR,
                2 => VECTOR_38,
                _ => VECTOR_3A,
            });
            let escape: &[u8] = match map {
                1 => &[0x0f],
                2 => &[0x0f, 0x38],
                _ => &[0x0f, 0x3a],
            };
            match rng.below(4) {
                0 => {
                    b.extend([0x66, 0x40 | rng.below(16) as u8]);
                    b.extend_from_slice(escape);
                    b.push(opcode);
                }
                1 => {
                    b.extend(rng.pick(&[None, Some(0x66), Some(0xf3), Some(0xf2)]));
                    b.extend_from_slice(escape);
                    b.push(opcode);
                }
                2 if map == 1 => b.extend([0xc5, rng.next() as u8, opcode]),
                _ => {
                    let registers = rng.next() as u8 & 0xe0;
                    let w = if rng.one_in(3) { 0x80 } else { 0 };
                    b.extend([0xc4, registers | map, w | rng.next() as u8 & 0x7f, opcode]);
                }
            }
        }
        match rng.below(5) {
            _ if vector => {}
            0 => b.push((rng.below(8) << 3 | rng.below(6)) as u8),
            1..=2 => b.push(rng.pick(ONE)),
            _ => b.extend([0x0f, rng.pick(TWO)]),
        }
        b.push(if rng.one_in(2) { 0xc0 } else { 0 } | rng.next() as u8);
        let wide = rng.one_in(4);
        for i in 0..10 {
            b.push(match (i, wide) {
                (0, _) | (_, true) => rng.next() as u8,
                (1, _) => rng.below(8) as u8,
                _ => 0,
            });
        }
        let mut d = Decoder::with_ip(64, &b, 0, DecoderOptions::NONE);
        let insn = d.decode();
        if insn.is_invalid() || insn.len() > 15 || !wanted(&insn) {
            continue;
        }
        b.truncate(insn.len());
        return b;
    }
}

/// Multiplications leave flags as they were on some processors, which the
/// interpreting tier does not show: a test of their own has them.
fn wanted(insn: &Instruction) -> bool {
    let string = insn.is_string_instruction();
    insn.flow_control() == FlowControl::Next
        && !matches!(
            insn.mnemonic(),
            M::Mul
                | M::Imul
                | M::Div
                | M::Idiv
                | M::Rdrand
                | M::Rdseed
                | M::Rdpid
                | M::Popf
                | M::Popfq
        )
        && !(string && (insn.has_rep_prefix() || insn.has_repne_prefix()))
        && !(0..insn.op_count()).any(|i| insn.op_register(i).is_segment_register())
}

/// Multiplications and divisions, each followed by TEST, and HLT.
pub(crate) fn multiplications(rng: &mut Rng) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..1 + rng.below(8) {
        loop {
            let mut b = Vec::new();
            if rng.one_in(4) {
                b.push(0x66);
            }
            b.push(0x40 | rng.below(16) as u8);
            let digit = 4 + rng.below(4) as u8;
            match rng.below(4) {
                0 => b.extend([0x0f, 0xaf, rng.next() as u8]),
                1 => b.extend([rng.pick(&[0x69, 0x6b]), rng.next() as u8]),
                _ => {
                    let modrm = rng.next() as u8 & 0xc7 | digit << 3;
                    b.extend([rng.pick(&[0xf6, 0xf7]), modrm]);
                }
            }
            b.extend([rng.next() as u8, rng.below(8) as u8, 0, 0, 0, 0, 0, 0, 0]);
            let insn = Decoder::with_ip(64, &b, 0, DecoderOptions::NONE).decode();
            if !insn.is_invalid() {
                code.extend_from_slice(&b[..insn.len()]);
                break;
            }
        }
        code.extend([0x85, 0xc0]);
    }
    code.push(0xf4);
    code
}

/// A program at page offset 0. It ends in HLT.
pub(crate) fn random(rng: &mut Rng) -> Vec<u8> {
    let pieces: Vec<Vec<u8>> = (0..4 + rng.below(24)).map(|_| instruction(rng)).collect();
    let mut code = Vec::new();
    // The loop's counter is at an address that nothing else names.
    let looped = rng.one_in(2);
    for (i, piece) in pieces.iter().enumerate() {
        code.extend_from_slice(piece);
        let next = pieces.get(i + 1).map_or(0, Vec::len);
        match rng.below(14) {
            // Over the next instruction.
            0 if next < 100 => code.extend([0x70 | rng.below(16) as u8, next as u8]),
            1 => code.extend([0xeb, next as u8]),
            2 => code.extend([rng.pick(&[0xe0, 0xe1, 0xe2, 0xe3]), next as u8]),
            3 => code.extend([0x0f, 0x80 | rng.below(16) as u8, next as u8, 0, 0, 0]),
            // A call of what follows, and its return address dropped.
            4 => code.extend([0xe8, 0, 0, 0, 0, 0x41, 0x5b]),
            // A call over a RET to there.
            5 => code.extend([0xeb, 1, 0xc3, 0xe8, 0xfa, 0xff, 0xff, 0xff]),
            // lea r11, [rip + 3]; jmp or push and ret to what follows.
            6 => code.extend([0x4c, 0x8d, 0x1d, 3, 0, 0, 0, 0x41, 0xff, 0xe3]),
            7 => code.extend([0x4c, 0x8d, 0x1d, 3, 0, 0, 0, 0x41, 0x53, 0xc3]),
            // lea r11, [rip + 3]; call r11; pop r9
            8 => code.extend([0x4c, 0x8d, 0x1d, 3, 0, 0, 0, 0x41, 0xff, 0xd3, 0x41, 0x59]),
            _ => {}
        }
    }
    if looped {
        // dec byte [abs COUNTER]; jnz start
        code.extend([0xfe, 0x0c, 0x25]);
        code.extend((super::machine::COUNTER as u32).to_le_bytes());
        let back = -(code.len() as i32 + 6);
        code.extend([0x0f, 0x85]);
        code.extend(back.to_le_bytes());
    }
    code.push(0xf4);
    code
}

pub(crate) fn print(code: &[u8]) {
    let mut d = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    while d.can_decode() {
        let at = d.position();
        let insn = d.decode();
        println!(
            "{at:4x}: {:02x?} {:?}",
            &code[at..at + insn.len()],
            insn.code()
        );
    }
}
