//! Instructions seen before: what they were lowered to, found by their bytes.
//!
//! Compilers use few encodings for most of what they say, so that code that is new
//! consists of instructions that are not. Only plain integer instructions of 64-bit
//! code are kept, whose micro-operation depends on nothing but their bytes and the
//! mode: no relative address, no operand kept elsewhere.

use alloc::{boxed::Box, vec};

use super::Note;
use crate::{ops::branch, uop::Uop};

/// Entries; 64 KiB, the most that stays in a processor's nearer caches.
const ENTRIES: usize = 1024;
/// Longest instruction that is kept, in bytes: one word.
const LONGEST: usize = 8;
/// No instruction has these bytes: the second of two operation codes would be
/// missing.
const NOTHING: u64 = u64::MAX;

/// Micro-operations of instructions seen before, of one vCPU.
pub(crate) struct Memo {
    entries: Box<[Entry]>,
}

#[derive(Clone, Copy)]
struct Entry {
    /// The instruction's bytes, the rest zero. No instruction is the beginning of
    /// another, so that its length need not be compared.
    bytes: u64,
    uop: Uop,
    note: Note,
    mode: u32,
}

impl Memo {
    pub(crate) fn new() -> Self {
        let nothing = Entry {
            bytes: NOTHING,
            uop: Uop {
                handler: branch::fall,
                imm: 0,
                disp: 0,
                off: 0,
                aux: 0,
                len: 0,
                left: 0,
                dst: 0,
                src: 0,
                base: 0,
                index: 0,
                scale: 0,
                seg: 0,
            },
            note: Note::NOTHING,
            mode: 0,
        };
        Self {
            entries: vec![nothing; ENTRIES].into(),
        }
    }

    /// Forgets everything: the same bytes may mean something else from now on.
    pub(crate) fn clear(&mut self) {
        for entry in &mut self.entries {
            entry.bytes = NOTHING;
        }
    }

    fn slot(bytes: u64) -> usize {
        (bytes.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize
    }

    /// What the instruction at the start of `code`, 64-bit code of `mode`, was
    /// lowered to, with the place and the number of the instruction left to fill in.
    pub(super) fn recall(&self, code: &[u8], mode: u32) -> Option<(&Uop, Note)> {
        let (bytes, _) = key(code)?;
        let entry = &self.entries[Self::slot(bytes)];
        (entry.bytes == bytes && entry.mode == mode).then_some((&entry.uop, entry.note))
    }

    /// Keeps what the instruction at the start of `code`, 64-bit code of `mode`, was
    /// lowered to, if it is of those that [`Self::recall`] looks for.
    pub(super) fn keep(&mut self, code: &[u8], mode: u32, uop: &Uop, note: Note) {
        if let Some((bytes, len)) = key(code)
            && len == uop.len
        {
            self.entries[Self::slot(bytes)] = Entry {
                bytes,
                uop: *uop,
                note,
                mode,
            };
        }
    }
}

/// The bytes of the first instruction of `code` and their number, if it is of the
/// common ones. What is kept is compared with the decoder's length, so that a
/// mistake here costs time only.
fn key(code: &[u8]) -> Option<(u64, u8)> {
    let word = u64::from_le_bytes(*code.first_chunk::<LONGEST>()?);
    let len = length(word)?;
    (len <= LONGEST as u32).then(|| (word & (!0 >> (64 - 8 * len)), len as u8))
}

/// The opcode is of the common ones.
const KNOWN: u8 = 1 << 7;
/// A ModRM byte follows.
const MODRM: u8 = 1 << 0;
/// The immediate's bytes, times two.
const IMM8: u8 = 1 << 1;
const IMM32: u8 = 4 << 1;

/// What follows each opcode of one byte (Intel SDM volume 2, appendix A, table A-2).
const ONE: [u8; 256] = {
    let mut table = [0; 256];
    let mut op = 0;
    while op < 256 {
        table[op] = match op {
            0x00..0x40 => match op & 7 {
                0..4 => KNOWN | MODRM,
                4 => KNOWN | IMM8,
                5 => KNOWN | IMM32,
                _ => 0,
            },
            0x50..0x60 | 0x90 | 0x98 | 0x99 => KNOWN,
            0x63 | 0x84..=0x8b | 0x8d | 0xd0..0xd4 | 0xfe | 0xff => KNOWN | MODRM,
            0x68 | 0xa9 | 0xb8..0xc0 => KNOWN | IMM32,
            0x6a | 0xa8 | 0xb0..0xb8 => KNOWN | IMM8,
            0x69 | 0x81 | 0xc7 => KNOWN | MODRM | IMM32,
            0x6b | 0x80 | 0x83 | 0xc0 | 0xc1 | 0xc6 => KNOWN | MODRM | IMM8,
            // With an immediate if TEST: see `length`.
            0xf6 | 0xf7 => KNOWN | MODRM,
            _ => 0,
        };
        op += 1;
    }
    table
};

/// What follows each opcode of two bytes, by the second (table A-3).
const TWO: [u8; 256] = {
    let mut table = [0; 256];
    let mut op = 0;
    while op < 256 {
        table[op] = match op {
            0x1f | 0x40..0x50 | 0x90..0xa0 | 0xa3 | 0xa5 | 0xab | 0xad | 0xaf => KNOWN | MODRM,
            0xb6 | 0xb7 | 0xbe | 0xbf => KNOWN | MODRM,
            0xa4 | 0xac | 0xba => KNOWN | MODRM | IMM8,
            0xc8..0xd0 => KNOWN,
            _ => 0,
        };
        op += 1;
    }
    table
};

/// The length of the common instruction that `word` starts with, in bytes: at most
/// REX as its prefix, and no address relative to RIP.
fn length(word: u64) -> Option<u32> {
    let (mut rest, mut len) = (word, 1);
    if rest & 0xf0 == 0x40 {
        (rest, len) = (rest >> 8, 2);
    }
    let mut follows = ONE[(rest & 0xff) as usize];
    let opcode = rest & 0xff;
    if opcode == 0x0f {
        (rest, len) = (rest >> 8, len + 1);
        follows = TWO[(rest & 0xff) as usize];
    }
    // MOV takes a whole word after REX.W.
    let long = opcode & 0xf8 == 0xb8 && word & 0xf8 == 0x48;
    if follows & KNOWN == 0 || long {
        return None;
    }
    len += u32::from(follows >> 1 & 0x3f);
    if follows & MODRM != 0 {
        let modrm = rest >> 8 & 0xff;
        let (md, rm) = (modrm >> 6, modrm & 7);
        len += 1;
        if md != 3 {
            let sib_base = rest >> 16 & 7;
            len += u32::from(rm == 4);
            len += match md {
                0 if rm == 5 => return None,
                0 if rm == 4 && sib_base == 5 => 4,
                0 => 0,
                1 => 1,
                _ => 4,
            };
        }
        if opcode & 0xfe == 0xf6 && modrm & 0x30 == 0 {
            len += if opcode == 0xf6 { 1 } else { 4 };
        }
    }
    Some(len)
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderError, DecoderOptions};

    use super::*;

    /// Lengths are the decoder's wherever the instruction exists.
    #[test]
    fn lengths_are_right() {
        let (mut common, mut random) = (0, 0x1234_5678_9abc_def1u64);
        for case in 0..400_000u64 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let word = match case & 3 {
                0 => random,
                1 => random & !0xff | 0x48,
                2 => random & !0xffff | 0x0f48,
                _ => random & !0xff | case >> 2 & 0xff,
            };
            let Some(len) = length(word) else { continue };
            let mut code = [0x90; 16];
            code[..8].copy_from_slice(&word.to_le_bytes());
            let mut decoder = Decoder::with_ip(64, &code, 0, DecoderOptions::NONE);
            let insn = decoder.decode();
            if decoder.last_error() != DecoderError::None {
                continue;
            }
            assert_eq!(len as usize, insn.len(), "{word:#x}: {insn:?}");
            common += 1;
        }
        assert!(common > 100_000, "{common}");
    }

    #[test]
    fn what_is_kept_is_found_under_its_mode_only() {
        let mut memo = Memo::new();
        let code = [0x48, 0x89, 0xe5, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90];
        let other = [0x48, 0x89, 0xe5, 1, 2, 3, 4, 5];
        let mut uop = memo.entries[0].uop;
        uop.len = 3;
        uop.dst = 40;
        memo.keep(&code, 1, &uop, Note::KILLS);
        let (found, note) = memo.recall(&other, 1).unwrap();
        assert!(found.dst == 40 && note.kills_flags());
        assert!(memo.recall(&other, 2).is_none());
        // Too near the end to be looked at as a word.
        assert!(memo.recall(&code[..7], 1).is_none());
        // The decoder found another length.
        uop.len = 4;
        memo.keep(&[0x31, 0xc0, 0, 0, 0, 0, 0, 0], 1, &uop, Note::KILLS);
        assert!(memo.recall(&[0x31, 0xc0, 0, 0, 0, 0, 0, 0], 1).is_none());
        memo.clear();
        assert!(memo.recall(&other, 1).is_none());
    }
}
