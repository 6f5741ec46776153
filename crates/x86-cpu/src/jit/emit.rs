//! Host instructions as bytes.
//!
//! One encoder for whatever has a ModRM byte, and the few others that
//! translated code is made of. Code is put together here and copied to where it
//! runs when it is complete; positions are offsets in the code memory, so that
//! jumps to other code there can be relative.

use alloc::vec::Vec;

use super::registers::{CPU, host};

/// The operand that a ModRM byte names beside the register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rm {
    /// A register.
    Reg(u8),
    /// Memory.
    Mem(Mem),
}

/// A memory operand: `base + index << scale + disp`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mem {
    pub(super) base: Option<u8>,
    /// Not the stack pointer, whose number means that there is no index.
    pub(super) index: Option<(u8, u8)>,
    pub(super) disp: i32,
}

/// `[base + disp]`.
pub(super) const fn mem(base: u8, disp: i32) -> Rm {
    Rm::Mem(Mem {
        base: Some(base),
        index: None,
        disp,
    })
}

/// A field of the vCPU.
pub(super) const fn cpu(disp: i32) -> Rm {
    mem(CPU, disp)
}

/// An instruction's bytes before ModRM, but for REX.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opcode<'a> {
    /// 66, F2 or F3.
    pub(super) prefix: Option<u8>,
    pub(super) lock: bool,
    /// REX.W.
    pub(super) wide: bool,
    /// A REX prefix is wanted even if it is empty: byte registers 4 to 7 are SPL
    /// to DIL.
    pub(super) rex: bool,
    /// With the escape bytes.
    pub(super) bytes: &'a [u8],
}

impl<'a> Opcode<'a> {
    /// A 64-bit operation.
    pub(super) const fn wide(bytes: &'a [u8]) -> Self {
        Self {
            prefix: None,
            lock: false,
            wide: true,
            rex: false,
            bytes,
        }
    }

    /// A 32-bit operation.
    pub(super) const fn narrow(bytes: &'a [u8]) -> Self {
        Self {
            wide: false,
            ..Self::wide(bytes)
        }
    }
}

/// Where a jump's 32-bit displacement lies, to be filled in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub(super) struct Jump(usize);

/// Code in the making.
#[derive(Debug, Default)]
pub(super) struct Emitter {
    /// The bytes so far.
    pub(super) code: Vec<u8>,
    /// Position of the first of them.
    base: usize,
}

/// `mov`, to a register.
const LOAD: &[u8] = &[0x8b];
/// `mov`, from a register.
const STORE: &[u8] = &[0x89];
const LEA: &[u8] = &[0x8d];

impl Emitter {
    /// Begins code at position `base`.
    pub(super) fn start(&mut self, base: usize) {
        self.code.clear();
        self.base = base;
    }

    /// Where the next byte will be.
    pub(super) fn position(&self) -> usize {
        self.base + self.code.len()
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// An instruction with a ModRM byte. What follows it, an immediate, is the
    /// caller's.
    pub(super) fn modrm(&mut self, op: Opcode<'_>, reg: u8, rm: Rm) {
        if op.lock {
            self.code.push(0xf0);
        }
        self.code.extend(op.prefix);
        let (x, b) = match rm {
            Rm::Reg(r) => (0, r >> 3),
            Rm::Mem(m) => (
                m.index.map_or(0, |(r, _)| r >> 3),
                m.base.map_or(0, |r| r >> 3),
            ),
        };
        let rex = u8::from(op.wide) << 3 | (reg >> 3) << 2 | x << 1 | b;
        if rex != 0 || op.rex {
            self.code.push(0x40 | rex);
        }
        self.code.extend_from_slice(op.bytes);
        let reg = (reg & 7) << 3;
        match rm {
            Rm::Reg(r) => self.code.push(0xc0 | reg | r & 7),
            Rm::Mem(m) => self.memory(reg, m),
        }
    }

    fn memory(&mut self, reg: u8, m: Mem) {
        let Some(base) = m.base else {
            // No base: a SIB byte with a 32-bit displacement, never RIP-relative.
            let (index, scale) = m.index.unwrap_or((host::RSP, 0));
            self.code.push(reg | 4);
            self.code.push(scale << 6 | (index & 7) << 3 | 5);
            self.code.extend_from_slice(&m.disp.to_le_bytes());
            return;
        };
        let short = i8::try_from(m.disp);
        // Without displacement, RBP and R13 as base mean something else.
        let mode = match (m.disp, short) {
            (0, _) if base & 7 != 5 => 0,
            (_, Ok(_)) => 0x40,
            _ => 0x80,
        };
        match m.index {
            None if base & 7 != 4 => self.code.push(mode | reg | base & 7),
            index => {
                let (index, scale) = index.unwrap_or((host::RSP, 0));
                self.code.push(mode | reg | 4);
                self.code.push(scale << 6 | (index & 7) << 3 | base & 7);
            }
        }
        match (mode, short) {
            (0x40, Ok(d)) => self.code.push(d as u8),
            (0x80, _) => self.code.extend_from_slice(&m.disp.to_le_bytes()),
            _ => {}
        }
    }

    /// An instruction with a VEX prefix: `head` is map, prefix, W and L; `further`
    /// the operand that the prefix names.
    pub(super) fn vex(
        &mut self,
        head: (u8, u8, bool, bool),
        further: u8,
        opcode: u8,
        reg: u8,
        rm: Rm,
    ) {
        let (map, prefix, wide, long) = head;
        let (x, b) = match rm {
            Rm::Reg(r) => (0, r >> 3),
            Rm::Mem(m) => (
                m.index.map_or(0, |(r, _)| r >> 3),
                m.base.map_or(0, |r| r >> 3),
            ),
        };
        let extensions = (reg >> 3) << 7 | x << 6 | b << 5;
        let rest = u8::from(wide) << 7 | (!further & 15) << 3 | u8::from(long) << 2 | prefix;
        self.bytes(&[0xc4, !extensions & 0xe0 | map, rest, opcode]);
        let field = (reg & 7) << 3;
        match rm {
            Rm::Reg(r) => self.code.push(0xc0 | field | r & 7),
            Rm::Mem(m) => self.memory(field, m),
        }
    }

    /// `mov to, from`, 64 bits.
    pub(super) fn load(&mut self, to: u8, from: Rm) {
        self.modrm(Opcode::wide(LOAD), to, from);
    }

    /// `mov to, from`, 32 bits.
    pub(super) fn load32(&mut self, to: u8, from: Rm) {
        self.modrm(Opcode::narrow(LOAD), to, from);
    }

    /// `mov to, from`, 64 bits.
    pub(super) fn store(&mut self, to: Rm, from: u8) {
        self.modrm(Opcode::wide(STORE), from, to);
    }

    /// `lea to, from`, with a 64-bit result, or one of 32 bits.
    pub(super) fn lea(&mut self, to: u8, from: Mem, wide: bool) {
        let op = if wide {
            Opcode::wide(LEA)
        } else {
            Opcode::narrow(LEA)
        };
        self.modrm(op, to, Rm::Mem(from));
    }

    /// `lea to, [base + disp]`: an addition that leaves the flags alone.
    pub(super) fn offset(&mut self, to: u8, base: u8, disp: i32) {
        let from = Mem {
            base: Some(base),
            index: None,
            disp,
        };
        self.lea(to, from, true);
    }

    /// `mov to, value`, 64 bits.
    pub(super) fn constant(&mut self, to: u8, value: u64) {
        self.bytes(&[0x48 | to >> 3, 0xb8 | to & 7]);
        self.bytes(&value.to_le_bytes());
    }

    /// `mov to, value`, 32 bits, extended by zeros.
    pub(super) fn constant32(&mut self, to: u8, value: u32) {
        if to > 7 {
            self.code.push(0x41);
        }
        self.code.push(0xb8 | to & 7);
        self.bytes(&value.to_le_bytes());
    }

    /// An arithmetic instruction with a sign-extended 32-bit immediate: `digit`
    /// is 0 for ADD, 1 OR, 4 AND, 5 SUB, 6 XOR, 7 CMP.
    pub(super) fn arithmetic(&mut self, wide: bool, digit: u8, rm: Rm, imm: i32) {
        let short = i8::try_from(imm);
        let bytes: &[u8] = if short.is_ok() { &[0x83] } else { &[0x81] };
        let op = Opcode {
            wide,
            ..Opcode::wide(bytes)
        };
        self.modrm(op, digit, rm);
        match short {
            Ok(v) => self.code.push(v as u8),
            Err(_) => self.bytes(&imm.to_le_bytes()),
        }
    }

    /// `jmp`, to be filled in.
    pub(super) fn jump(&mut self) -> Jump {
        self.code.push(0xe9);
        self.displacement()
    }

    /// `jcc`, to be filled in; `condition` is the opcode's low four bits.
    pub(super) fn branch(&mut self, condition: u8) -> Jump {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.displacement()
    }

    /// `jmp` to a position.
    pub(super) fn jump_to(&mut self, target: usize) {
        let jump = self.jump();
        self.aim(jump, target);
    }

    /// `call` to a position.
    pub(super) fn call_to(&mut self, target: usize) {
        self.code.push(0xe8);
        let jump = self.displacement();
        self.aim(jump, target);
    }

    fn displacement(&mut self) -> Jump {
        let at = self.code.len();
        self.bytes(&[0; 4]);
        Jump(at)
    }

    /// Lets `jump` go to a position.
    pub(super) fn aim(&mut self, jump: Jump, target: usize) {
        let end = self.base + jump.0 + 4;
        let distance = target.wrapping_sub(end) as u32;
        self.code[jump.0..jump.0 + 4].copy_from_slice(&distance.to_le_bytes());
    }

    /// Lets `jump` go to the next instruction.
    pub(super) fn bind(&mut self, jump: Jump) {
        self.aim(jump, self.position());
    }

    /// The position of `jump`'s displacement, to aim it anew when the code is in
    /// place.
    pub(super) fn site(&self, jump: Jump) -> usize {
        self.base + jump.0
    }

    /// Puts the host's arithmetic flags into [`crate::state::Cpu::cc`], by way of RAX,
    /// which is kept in `keep`. The flags are not needed afterwards.
    pub(super) fn save_flags(&mut self, keep: u8) {
        self.load(keep, Rm::Reg(host::RAX));
        self.flags_to_memory();
        self.load(host::RAX, Rm::Reg(keep));
    }

    /// As [`Self::save_flags`], and leaves RAX as it falls out.
    pub(super) fn flags_to_memory(&mut self) {
        // lahf; seto al; movzx eax, ax
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x0f, 0xb7, 0xc0]);
        self.store(cpu(super::registers::at::FLAGS), host::RAX);
    }

    /// The reverse of [`Self::save_flags`].
    pub(super) fn restore_flags(&mut self, keep: u8) {
        self.load(keep, Rm::Reg(host::RAX));
        self.flags_from_memory();
        self.load(host::RAX, Rm::Reg(keep));
    }

    /// The reverse of [`Self::flags_to_memory`].
    pub(super) fn flags_from_memory(&mut self) {
        self.load(host::RAX, cpu(super::registers::at::FLAGS));
        // add al, 127; sahf
        self.bytes(&[0x04, 0x7f, 0x9e]);
    }
}
