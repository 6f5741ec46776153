//! The allow-list: encodings that translated code executes itself, with what
//! has to be known to encode them anew and what they do to the flags.
//!
//! What is not named here is interpreted by the other tier, one instruction at
//! a time. So are divisions that may raise an exception, the string instructions, which may take long, and everything that touches more
//! state than registers, flags and one operand in memory.

use super::raw::{Map, Raw};

/// Arithmetic flags at their places in RFLAGS.
pub(super) mod flag {
    pub(crate) const C: u16 = 1;
    pub(crate) const P: u16 = 1 << 2;
    pub(crate) const A: u16 = 1 << 4;
    pub(crate) const Z: u16 = 1 << 6;
    pub(crate) const S: u16 = 1 << 7;
    pub(crate) const O: u16 = 1 << 11;
    pub(crate) const ALL: u16 = C | P | A | Z | S | O;
}

/// What an instruction does with an operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// Reads it.
    Read,
    /// Overwrites it.
    Write,
    /// Reads and writes it, or may leave it alone.
    Update,
}

impl Role {
    pub(super) fn writes(self) -> bool {
        self != Self::Read
    }
}

/// How translated code executes an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Two operands by ModRM; `reg` is `None` where its field belongs to the opcode.
    ModRm { reg: Option<Role>, rm: Role },
    /// LEA.
    Lea,
    /// No operands but RAX, RCX and RDX, or the register in the opcode: see
    /// [`Kind::Low`] for the latter. Copied as it is.
    Verbatim,
    /// A register in the opcode's low bits.
    Low(Role),
    /// Exchanges RAX with the register in the opcode.
    ExchangeRax,
    /// PUSH of a register.
    Push,
    /// PUSH of an immediate.
    PushImmediate,
    /// POP of a register.
    Pop,
    /// LEAVE.
    Leave,
    /// DIV, or with `true` IDIV, of 32 or 64 bits where no exception is possible.
    Divide(bool),
    /// A fence, copied whole.
    Fence,
    /// Nothing happens.
    Nop,
    /// Jcc with this condition.
    Branch(u8),
    /// LOOP, LOOPE, LOOPNE, JRCXZ.
    Counter,
    /// JMP to a fixed target.
    Jump,
    /// CALL of a fixed target.
    Call,
    /// RET.
    Return,
    /// JMP through register or memory.
    JumpIndirect,
    /// CALL through register or memory.
    CallIndirect,
}

/// An instruction on the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    pub(super) kind: Kind,
    /// Flags that it reads.
    pub(super) reads: u16,
    /// Flags that it overwrites whatever they were.
    pub(super) kills: u16,
    /// The register operand is a byte.
    pub(super) byte_reg: bool,
    /// The other operand is a byte.
    pub(super) byte_rm: bool,
}

impl Shape {
    const fn new(kind: Kind) -> Self {
        Self {
            kind,
            reads: 0,
            kills: 0,
            byte_reg: false,
            byte_rm: false,
        }
    }

    const fn reads(self, reads: u16) -> Self {
        Self { reads, ..self }
    }

    const fn kills(self, kills: u16) -> Self {
        Self { kills, ..self }
    }

    /// Both operands are bytes if `yes`.
    const fn bytes(self, yes: bool) -> Self {
        Self {
            byte_reg: yes,
            byte_rm: yes,
            ..self
        }
    }
}

/// Flags that a condition depends on.
const fn condition_reads(condition: u8) -> u16 {
    use flag::{C, O, P, S, Z};
    match condition >> 1 & 7 {
        0 => O,
        1 => C,
        2 => Z,
        3 => C | Z,
        4 => S,
        5 => P,
        6 => S | O,
        _ => S | O | Z,
    }
}

const fn modrm(reg: Role, rm: Role) -> Shape {
    Shape::new(Kind::ModRm { reg: Some(reg), rm })
}

const fn group(rm: Role) -> Shape {
    Shape::new(Kind::ModRm { reg: None, rm })
}

/// The entry for `raw`, if it is on the list. The caller has made sure that the
/// decoder and the guest's CPUID accept it.
pub(super) fn of(raw: &Raw<'_>) -> Option<Shape> {
    let shape = match raw.map {
        Map::One => one(raw)?,
        Map::Two => two(raw)?,
        Map::Other => return None,
    };
    // Where a repeat prefix means something, the tables have looked at it.
    let repeat_known = raw.map == Map::Two && matches!(raw.opcode, 0xb8 | 0xbc | 0xbd | 0x1e);
    // BND and branch hints are no matter.
    let ignored = matches!(
        shape.kind,
        Kind::Branch(_) | Kind::Jump | Kind::Call | Kind::Return
    );
    if raw.repeat.is_some() && !repeat_known && !ignored {
        return None;
    }
    let flow = matches!(
        shape.kind,
        Kind::Branch(_)
            | Kind::Counter
            | Kind::Jump
            | Kind::Call
            | Kind::Return
            | Kind::JumpIndirect
            | Kind::CallIndirect
            | Kind::Push
            | Kind::PushImmediate
            | Kind::Pop
            | Kind::Leave
    );
    if flow && raw.operand16 {
        return None;
    }
    Some(shape)
}

/// ADD OR ADC SBB AND SUB XOR CMP, by number.
fn arithmetic(number: u8, reg_first: bool) -> (Role, Role, u16) {
    let target = if number == 7 {
        Role::Read
    } else {
        Role::Update
    };
    let reads = if matches!(number, 2 | 3) { flag::C } else { 0 };
    if reg_first {
        (target, Role::Read, reads)
    } else {
        (Role::Read, target, reads)
    }
}

fn one(raw: &Raw<'_>) -> Option<Shape> {
    use Role::{Read, Update, Write};
    use flag::{A, ALL, C, P, S, Z};
    let op = raw.opcode;
    let byte = op & 1 == 0;
    Some(match op {
        0x00..=0x3f if op & 7 < 4 => {
            let (reg, rm, reads) = arithmetic(op >> 3, op & 2 != 0);
            modrm(reg, rm).reads(reads).kills(ALL).bytes(byte)
        }
        0x00..=0x3f if op & 7 < 6 => {
            let (_, _, reads) = arithmetic(op >> 3, false);
            Shape::new(Kind::Verbatim).reads(reads).kills(ALL)
        }
        0x50..=0x57 => Shape::new(Kind::Push),
        0x58..=0x5f => Shape::new(Kind::Pop),
        // With 16 bits, processors differ in how much memory it reads.
        0x63 if raw.wide() || !raw.operand16 => modrm(Write, Read),
        0x68 | 0x6a => Shape::new(Kind::PushImmediate),
        // The other flags are undefined: who knows what becomes of them.
        0x69 | 0x6b => modrm(Write, Read),
        0x70..=0x7f => Shape::new(Kind::Branch(op & 15)).reads(condition_reads(op)),
        0x80 | 0x81 | 0x83 => {
            let (_, rm, reads) = arithmetic(raw.reg()? & 7, false);
            group(rm).reads(reads).kills(ALL).bytes(op == 0x80)
        }
        0x84 | 0x85 => modrm(Read, Read).kills(ALL).bytes(byte),
        0x86 | 0x87 => modrm(Update, Update).bytes(byte),
        0x88 | 0x89 => modrm(Read, Write).bytes(byte),
        0x8a | 0x8b => modrm(Write, Read).bytes(byte),
        0x8d => Shape::new(Kind::Lea),
        0x90 if raw.rex & 1 == 0 => Shape::new(Kind::Nop),
        0x90..=0x97 => Shape::new(Kind::ExchangeRax),
        0x98 | 0x99 => Shape::new(Kind::Verbatim),
        0x9e => Shape::new(Kind::Verbatim).kills(C | P | A | Z | S),
        0x9f => Shape::new(Kind::Verbatim).reads(C | P | A | Z | S),
        0xa8 | 0xa9 => Shape::new(Kind::Verbatim).kills(ALL),
        0xb0..=0xb7 => Shape::new(Kind::Low(Update)).bytes(true),
        0xb8..=0xbf => Shape::new(Kind::Low(Write)),
        0xc0 | 0xc1 | 0xd0..=0xd3 => return shift(raw),
        0xc2 | 0xc3 => Shape::new(Kind::Return),
        0xc6 | 0xc7 if raw.reg()? & 7 == 0 && raw.modrm()? != 0xf8 => group(Write).bytes(byte),
        0xc9 => Shape::new(Kind::Leave),
        0xe0 | 0xe1 => Shape::new(Kind::Counter).reads(Z),
        0xe2 | 0xe3 => Shape::new(Kind::Counter),
        0xe8 => Shape::new(Kind::Call),
        0xe9 | 0xeb => Shape::new(Kind::Jump),
        0xf5 => Shape::new(Kind::Verbatim).reads(C).kills(C),
        0xf8 | 0xf9 => Shape::new(Kind::Verbatim).kills(C),
        0xf6 | 0xf7 => match raw.reg()? & 7 {
            0 | 1 => group(Read).kills(ALL).bytes(byte),
            2 => group(Update).bytes(byte),
            3 => group(Update).kills(ALL).bytes(byte),
            4 | 5 => group(Read).bytes(byte),
            digit if !byte && (!raw.operand16 || raw.wide()) => {
                Shape::new(Kind::Divide(digit == 7))
            }
            _ => return None,
        },
        0xfe | 0xff => match raw.reg()? & 7 {
            0 | 1 => group(Update).kills(ALL & !C).bytes(byte),
            2 if op == 0xff => Shape::new(Kind::CallIndirect),
            4 if op == 0xff => Shape::new(Kind::JumpIndirect),
            _ => return None,
        },
        _ => return None,
    })
}

/// Shifts and rotates.
fn shift(raw: &Raw<'_>) -> Option<Shape> {
    let byte = raw.opcode & 1 == 0;
    let which = raw.reg()? & 7;
    let shape = group(Role::Update).bytes(byte);
    let count = match raw.opcode {
        0xc0 | 0xc1 => Some(*raw.immediate()?.first()?),
        0xd0 | 0xd1 => Some(1),
        _ => None,
    };
    let mask = if raw.wide() { 63 } else { 31 };
    let counted = count.is_some_and(|c| c & mask != 0);
    Some(match which {
        0 | 1 => shape,
        // A byte or word that comes round again: what becomes of OF depends on
        // where the count is, and the other tier has it in CL.
        2 | 3 if count.is_some_and(|c| byte && c & 31 > 8 || raw.operand16 && c & 31 > 16) => {
            return None;
        }
        2 | 3 => shape.reads(flag::C),
        6 => return None,
        // A count of zero leaves the flags alone, and what narrow operands leave
        // behind after large counts is the processor's affair.
        _ if counted && !byte && !raw.operand16 => shape.kills(flag::ALL),
        _ => shape,
    })
}

fn two(raw: &Raw<'_>) -> Option<Shape> {
    use Role::{Read, Update, Write};
    use flag::{ALL, C};
    let op = raw.opcode;
    let byte = op & 1 == 0;
    let register = raw.modrm().is_some_and(|m| m >= 0xc0);
    Some(match op {
        // ENDBR64, ENDBR32.
        0x1e if raw.repeat == Some(0xf3) && matches!(raw.modrm()?, 0xfa | 0xfb) => {
            Shape::new(Kind::Nop)
        }
        0x1f => Shape::new(Kind::Nop),
        0x40..=0x4f => modrm(Update, Read).reads(condition_reads(op)),
        0x80..=0x8f => Shape::new(Kind::Branch(op & 15)).reads(condition_reads(op)),
        0x90..=0x9f => Shape {
            byte_rm: true,
            ..group(Write).reads(condition_reads(op))
        },
        // With a register as bit number, memory far away may be meant.
        0xa3 if register => modrm(Read, Read).kills(C),
        0xab | 0xb3 | 0xbb if register => modrm(Read, Update).kills(C),
        0xba => match raw.reg()? & 7 {
            4 => group(Read).kills(C),
            5..=7 => group(Update).kills(C),
            _ => return None,
        },
        0xa4 | 0xa5 | 0xac | 0xad if !raw.operand16 => modrm(Read, Update),
        // LFENCE, MFENCE, SFENCE: the host's order is the guest's.
        0xae if !raw.operand16 && matches!(raw.modrm()?, 0xe8 | 0xf0 | 0xf8) => {
            Shape::new(Kind::Fence)
        }
        0xaf => modrm(Update, Read),
        0xb0 | 0xb1 => modrm(Read, Update).kills(ALL).bytes(byte),
        0xb6 | 0xb7 | 0xbe | 0xbf => Shape {
            byte_rm: byte,
            ..modrm(Write, Read)
        },
        // POPCNT, TZCNT, LZCNT; BSF and BSR keep the target if they find nothing.
        0xb8 if raw.repeat == Some(0xf3) => modrm(Write, Read).kills(ALL),
        0xbc | 0xbd if raw.repeat == Some(0xf3) => modrm(Write, Read),
        0xbc | 0xbd if raw.repeat.is_none() => modrm(Update, Read),
        0xc0 | 0xc1 => modrm(Update, Update).kills(ALL).bytes(byte),
        0xc8..=0xcf if !raw.operand16 => Shape::new(Kind::Low(Update)),
        _ => return None,
    })
}
