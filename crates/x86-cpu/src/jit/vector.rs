//! Vector instructions that translated code executes itself: moves, logic,
//! integer and floating-point arithmetic of SSE2 to SSE4.2, AVX, AVX2 and FMA.
//!
//! Vector registers stay in [`Cpu::vec`]. An instruction loads its operands
//! into XMM0 to XMM2, runs on those, and stores its result: no register is
//! live between instructions, so nothing has to be saved around calls.
//!
//! Floating point looks at MXCSR and leaves its exception flags there. A block
//! with such an instruction loads the guest's MXCSR when it is entered, unless
//! the host's unit has it already (`Frame::mxcsr_live`); it goes back to the
//! [`Cpu`] when translated code calls or is left. With an exception unmasked, such
//! blocks are interpreted.
//!
//! Everything else (gathers, masked moves, x87) is interpreted.

use core::mem::offset_of;

use iced_x86::{Instruction, OpKind};

use super::{
    code::Translator,
    emit::{Opcode, Rm, cpu, mem},
    plan::Item,
    registers::{BIAS, T0, T1},
};
use crate::{
    state::{Cpu, VecReg},
    vector::{Access, Memory, Plan},
};

/// An instruction on the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Vector {
    kind: Kind,
    /// 0, 66, F3 or F2, numbered as VEX does.
    prefix: u8,
    /// 1: 0F; 2: 0F 38; 3: 0F 3A.
    map: u8,
    opcode: u8,
    wide: bool,
    /// Encoded by VEX: with 256 bits, and this further operand.
    vex: Option<(bool, u8)>,
    reg: u8,
    /// The other register, unless that operand is in memory.
    rm: Option<u8>,
    immediate: Option<u8>,
    memory: Option<Memory>,
    /// Looks at MXCSR.
    float: bool,
}

/// Which operands are what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// `reg` from `rm`, and from what is there or the further operand.
    Operation,
    /// `rm` from `reg`.
    Store,
    /// Vector `reg` from general `rm`.
    FromGeneral,
    /// General `rm` from vector `reg`.
    ToGeneral,
    /// General `reg` from vector `rm`.
    Mask,
    /// Vector `reg`, or the further operand, with general `rm` converted into it.
    Convert,
    /// Flags from `reg` and `rm`.
    Compare,
    /// A shift of vector `rm` by an immediate, to itself or the further operand.
    Shift,
    /// VZEROUPPER.
    ZeroUpper,
}

/// Scratch registers.
const X0: u8 = 0;
const X1: u8 = 1;
const X2: u8 = 2;

/// Vector register `n` where the guest has it.
fn home(n: u8) -> Rm {
    let offset = offset_of!(Cpu, vec) + usize::from(n) * size_of::<VecReg>();
    cpu(offset as i32 - BIAS)
}

/// The entry for the instruction with `bytes`, if it is on the list and `plan`
/// lets it run in the mode in force.
pub(super) fn of(insn: &Instruction, bytes: &[u8], plan: &Plan) -> Option<Vector> {
    let Plan::Run(op) = plan else {
        return None;
    };
    let mut v = parse(bytes)?;
    v.memory = op.memory;
    v.float = op.is_float();
    v.kind = kind(&v)?;
    if v.kind != Kind::ZeroUpper {
        let in_memory = insn.op_kinds().any(|k| k == OpKind::Memory);
        let simple = op.memory.is_none_or(|m| {
            !m.locked && m.access != Access::ReadWrite && matches!(m.size, 4 | 8 | 16 | 32)
        });
        if !op.direct
            || in_memory != v.rm.is_none()
            || in_memory != op.memory.is_some()
            || !simple
            || v.immediate.is_some() != takes_immediate(&v)
        {
            return None;
        }
    }
    Some(v)
}

fn parse(bytes: &[u8]) -> Option<Vector> {
    let mut at = 0;
    let mut prefix = 0;
    let mut next = || {
        at += 1;
        bytes.get(at - 1).copied()
    };
    let mut byte = next()?;
    let mut rex = 0;
    let (mut map, mut vex) = (1, None);
    loop {
        match byte {
            // A segment is the address's affair.
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => rex = 0,
            0x66 if prefix == 0 => (prefix, rex) = (1, 0),
            0xf3 => (prefix, rex) = (2, 0),
            0xf2 => (prefix, rex) = (3, 0),
            0x40..=0x4f => rex = byte,
            _ => break,
        }
        byte = next()?;
    }
    let opcode = match byte {
        0x0f => match next()? {
            0x38 => {
                map = 2;
                next()?
            }
            0x3a => {
                map = 3;
                next()?
            }
            opcode => opcode,
        },
        0xc5 if prefix == 0 && rex == 0 => {
            let b = next()?;
            rex = (!b & 0x80) >> 5;
            prefix = b & 3;
            vex = Some((b & 4 != 0, !b >> 3 & 15));
            next()?
        }
        0xc4 if prefix == 0 && rex == 0 => {
            let (a, b) = (next()?, next()?);
            map = a & 31;
            rex = (!a & 0xe0) >> 5 | (b & 0x80) >> 4;
            prefix = b & 3;
            vex = Some((b & 4 != 0, !b >> 3 & 15));
            next()?
        }
        _ => return None,
    };
    if !(1..=3).contains(&map) {
        return None;
    }
    let mut v = Vector {
        kind: Kind::ZeroUpper,
        prefix,
        map,
        opcode,
        wide: rex & 8 != 0,
        vex,
        reg: 0,
        rm: None,
        immediate: None,
        memory: None,
        float: false,
    };
    if v.map == 1 && v.opcode == 0x77 {
        return Some(v);
    }
    let modrm = next()?;
    v.reg = modrm >> 3 & 7 | (rex & 4) << 1;
    v.rm = (modrm >= 0xc0).then_some(modrm & 7 | (rex & 1) << 3);
    if takes_immediate(&v) {
        v.immediate = bytes.last().copied();
    }
    Some(v)
}

fn takes_immediate(v: &Vector) -> bool {
    v.map == 3 || v.map == 1 && matches!(v.opcode, 0x70..=0x73 | 0xc2 | 0xc6)
}

fn kind(v: &Vector) -> Option<Kind> {
    match v.map {
        1 => kind_one(v),
        2 => kind_two(v),
        _ => kind_three(v),
    }
}

/// Behind 0F.
fn kind_one(v: &Vector) -> Option<Kind> {
    let vex = v.vex.is_some();
    let plain = v.prefix <= 1;
    let integer = v.prefix == 1;
    // In its register form, a scalar move takes the rest from elsewhere.
    let scalar = !plain && (!vex || v.rm.is_none());
    Some(match v.opcode {
        0x10 if plain || scalar => Kind::Operation,
        0x11 if plain || scalar => Kind::Store,
        // MOVLPS to MOVHPD, MOVSLDUP, MOVDDUP, MOVSHDUP.
        0x12 | 0x16 if plain || !vex => Kind::Operation,
        0x13 | 0x17 if plain && v.rm.is_none() => Kind::Store,
        0x28 if plain => Kind::Operation,
        0x29 if plain => Kind::Store,
        0x2a if !plain => Kind::Convert,
        0x2c | 0x2d if !plain => Kind::Mask,
        0x2e | 0x2f if plain => Kind::Compare,
        0x51 | 0x58 | 0x59 | 0x5a | 0x5c..=0x5f | 0xc2 => Kind::Operation,
        0x52 | 0x53 if matches!(v.prefix, 0 | 2) => Kind::Operation,
        0x5b if v.prefix != 3 => Kind::Operation,
        0xe6 if v.prefix != 0 => Kind::Operation,
        0x7c | 0x7d | 0xd0 if matches!(v.prefix, 1 | 3) => Kind::Operation,
        0x14 | 0x15 | 0x54..=0x57 | 0xc6 if plain => Kind::Operation,
        0x50 if plain && v.rm.is_some() => Kind::Mask,
        0x60..=0x6d if integer => Kind::Operation,
        0x6e if integer => Kind::FromGeneral,
        0x7e if integer => Kind::ToGeneral,
        0x7e if v.prefix == 2 => Kind::Operation,
        0x6f if matches!(v.prefix, 1 | 2) => Kind::Operation,
        0x7f if matches!(v.prefix, 1 | 2) => Kind::Store,
        0x70 if v.prefix != 0 => Kind::Operation,
        0x71..=0x73 if integer && v.rm.is_some() => Kind::Shift,
        0x74..=0x76 if integer => Kind::Operation,
        0x77 if vex && v.prefix == 0 && v.vex == Some((false, 0)) => Kind::ZeroUpper,
        0xd1..=0xd5 | 0xd8..=0xe5 | 0xe8..=0xef | 0xf1..=0xf6 | 0xf8..=0xfe if integer => {
            Kind::Operation
        }
        0xd6 | 0xe7 if integer => Kind::Store,
        0xd7 if integer && v.rm.is_some() => Kind::Mask,
        _ => return None,
    })
}

/// Behind 0F 38.
fn kind_two(v: &Vector) -> Option<Kind> {
    if v.prefix != 1 {
        return None;
    }
    let vex = v.vex.is_some();
    Some(match v.opcode {
        // PSHUFB to PMULHRSW, PMULDQ, PCMPEQQ, PACKUSDW, PCMPGTQ to PMULLD, AES rounds.
        0x00..=0x0b | 0x28 | 0x29 | 0x2b | 0x37..=0x40 | 0xdc..=0xdf => Kind::Operation,
        // PABS, PMOVSX, PMOVZX.
        0x1c..=0x1e | 0x20..=0x25 | 0x30..=0x35 => Kind::Operation,
        0x17 => Kind::Compare,
        // Broadcasts, and shifts by vectors.
        0x58 | 0x59 | 0x78 | 0x79 | 0x45..=0x47 if vex => Kind::Operation,
        0x96..=0x9f | 0xa6..=0xaf | 0xb6..=0xbf if vex => Kind::Operation,
        _ => return None,
    })
}

/// Behind 0F 3A: rounding, PBLENDW, PALIGNR, PCLMULQDQ.
fn kind_three(v: &Vector) -> Option<Kind> {
    let known = v.prefix == 1 && matches!(v.opcode, 0x08..=0x0b | 0x0e | 0x0f | 0x44);
    known.then_some(Kind::Operation)
}

/// Whether VEX names no operand besides: its field must say so.
fn is_unary(v: &Vector) -> bool {
    let packed = v.prefix <= 1;
    match (v.map, v.opcode) {
        (1, 0x10 | 0x28 | 0x6f | 0x70 | 0x7e | 0x5b | 0xe6) => true,
        (1, 0x51 | 0x5a) => packed,
        (1, 0x52 | 0x53) => v.prefix == 0,
        (2, 0x1c..=0x1e | 0x20..=0x25 | 0x30..=0x35 | 0x58 | 0x59 | 0x78 | 0x79) => true,
        (3, 0x08 | 0x09) => true,
        _ => false,
    }
}

impl Vector {
    /// Whether it leaves something in the upper halves of scratch registers.
    pub(super) fn is_vex(&self) -> bool {
        self.vex.is_some() && self.kind != Kind::ZeroUpper
    }

    /// Whether it looks at MXCSR.
    pub(super) fn is_float(&self) -> bool {
        self.float
    }

    /// Whether it overwrites all arithmetic flags.
    pub(super) fn kills_flags(&self) -> bool {
        self.kind == Kind::Compare
    }
}

impl Translator<'_> {
    /// Translates a vector instruction.
    pub(super) fn vector(&mut self, i: usize, item: &Item, v: &Vector) {
        if v.kind == Kind::ZeroUpper {
            self.zero_upper();
            return;
        }
        let memory = v.memory.map(|m| {
            self.keep_flags(item);
            self.address(&item.insn);
            let write = m.access != Access::Read;
            self.reach_aligned(i, item, m.size.into(), write, m.align_mask);
            mem(T0, 0)
        });
        let rm = v.rm.unwrap_or(0);
        match v.kind {
            Kind::Operation => {
                // Some moves merge with what is there; in memory form, most do not look.
                self.load_vector(v, X0, v.reg);
                let from = memory.unwrap_or_else(|| {
                    self.load_vector(v, X1, rm);
                    Rm::Reg(X1)
                });
                let further = self.further(v);
                self.run(v, X0, from, further);
                self.store_vector(v, v.reg, X0);
            }
            Kind::Store => {
                self.load_vector(v, X0, v.reg);
                match memory {
                    Some(to) => self.run(v, X0, to, 0),
                    None => {
                        self.load_vector(v, X1, rm);
                        self.run(v, X0, Rm::Reg(X1), 0);
                        self.store_vector(v, rm, X1);
                    }
                }
            }
            Kind::FromGeneral => {
                let from = memory.unwrap_or_else(|| Rm::Reg(self.fetch(rm, T0, true)));
                self.run(v, X0, from, 0);
                self.store_vector(v, v.reg, X0);
            }
            Kind::ToGeneral => {
                self.load_vector(v, X0, v.reg);
                match memory {
                    Some(to) => self.run(v, X0, to, 0),
                    None => {
                        let to = self.fetch(rm, T0, false);
                        self.run(v, X0, Rm::Reg(to), 0);
                        self.put_back(rm, to);
                    }
                }
            }
            Kind::Mask => {
                let from = memory.unwrap_or_else(|| {
                    self.load_vector(v, X1, rm);
                    Rm::Reg(X1)
                });
                let to = self.fetch(v.reg, T1, false);
                self.run(v, to, from, 0);
                self.put_back(v.reg, to);
            }
            Kind::Convert => {
                let from = memory.unwrap_or_else(|| Rm::Reg(self.fetch(rm, T0, true)));
                if v.vex.is_none() {
                    self.load_vector(v, X0, v.reg);
                }
                let further = self.further(v);
                self.run(v, X0, from, further);
                self.store_vector(v, v.reg, X0);
            }
            Kind::Compare => {
                self.load_vector(v, X0, v.reg);
                let from = memory.unwrap_or_else(|| {
                    self.load_vector(v, X1, rm);
                    Rm::Reg(X1)
                });
                self.run(v, X0, from, 0);
            }
            Kind::Shift => {
                self.load_vector(v, X1, rm);
                // With VEX, the target is the further operand.
                let to = if v.vex.is_some() { X0 } else { X1 };
                self.run(v, v.reg & 7, Rm::Reg(X1), X0);
                self.store_vector(v, v.vex.map_or(rm, |(_, n)| n), to);
            }
            Kind::ZeroUpper => {}
        }
        if memory.is_some() {
            self.rejoin(i);
        }
    }

    /// Clears the upper halves of the scratch registers behind the last of a run
    /// of such instructions: the engine's own code may be slow otherwise.
    pub(super) fn after_vex(&mut self) {
        // vzeroupper
        self.e.bytes(&[0xc5, 0xf8, 0x77]);
    }

    /// Loads the operand that VEX names besides.
    fn further(&mut self, v: &Vector) -> u8 {
        let Some((_, n)) = v.vex else { return 0 };
        if is_unary(v) {
            return 0;
        }
        self.load_vector(v, X2, n);
        X2
    }

    fn run(&mut self, v: &Vector, reg: u8, rm: Rm, further: u8) {
        match v.vex {
            Some((long, _)) => {
                let head = (v.map, v.prefix, v.wide, long);
                self.e.vex(head, further, v.opcode, reg, rm);
            }
            None => {
                let prefix = [None, Some(0x66), Some(0xf3), Some(0xf2)];
                let escaped = [0x0f, if v.map == 2 { 0x38 } else { 0x3a }, v.opcode];
                let op = Opcode {
                    prefix: prefix[usize::from(v.prefix & 3)],
                    lock: false,
                    wide: v.wide,
                    rex: false,
                    bytes: if v.map == 1 {
                        &[0x0f, v.opcode]
                    } else {
                        &escaped
                    },
                };
                self.e.modrm(op, reg, rm);
            }
        }
        self.e.bytes(v.immediate.as_slice());
    }

    /// Loads 128 bits, or with VEX 256.
    fn load_vector(&mut self, v: &Vector, to: u8, n: u8) {
        if v.vex.is_some() {
            self.e.vex((1, 0, false, true), 0, 0x10, to, home(n));
        } else {
            self.e.modrm(Opcode::narrow(&[0x0f, 0x10]), to, home(n));
        }
    }

    fn store_vector(&mut self, v: &Vector, n: u8, from: u8) {
        if v.vex.is_some() {
            self.e.vex((1, 0, false, true), 0, 0x11, from, home(n));
        } else {
            self.e.modrm(Opcode::narrow(&[0x0f, 0x11]), from, home(n));
        }
    }

    fn zero_upper(&mut self) {
        // pxor xmm0, xmm0
        self.e.bytes(&[0x66, 0x0f, 0xef, 0xc0]);
        for n in 0..16 {
            let Rm::Mem(mut upper) = home(n) else { return };
            upper.disp += 16;
            self.e
                .modrm(Opcode::narrow(&[0x0f, 0x11]), X0, Rm::Mem(upper));
        }
    }
}
