//! Lowering of integer instructions that have handlers of their own.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

mod arithmetic;
mod assorted;

use assorted::lower_io;

use super::{
    Builder, Note,
    operand::{Place, immediate, is_memory, register, register_size},
};
use crate::{ops::string, uop::Uop};

/// Whether this module may lower `insn` (some operand forms it leaves to others).
pub(super) fn handles(insn: &Instruction) -> bool {
    use M::*;
    let m = insn.mnemonic();
    let string = string_kind(m).is_some()
        && insn
            .op_kinds()
            .any(|k| (OpKind::MemorySegSI..=OpKind::MemoryESRDI).contains(&k));
    string
        || setcc(m)
        || cmovcc(m)
        || matches!(
            m,
            Add | Or
                | Adc
                | Sbb
                | And
                | Sub
                | Xor
                | Cmp
                | Test
                | Mov
                | Movzx
                | Movsx
                | Movsxd
                | Lea
                | Inc
                | Dec
                | Neg
                | Not
                | Rol
                | Ror
                | Rcl
                | Rcr
                | Shl
                | Sal
                | Shr
                | Sar
                | Shld
                | Shrd
                | Mul
                | Imul
                | Div
                | Idiv
                | Push
                | Pop
                | Leave
                | Bt
                | Bts
                | Btr
                | Btc
                | Bsf
                | Bsr
                | Popcnt
                | Lzcnt
                | Tzcnt
                | Bswap
                | Cbw
                | Cwde
                | Cdqe
                | Cwd
                | Cdq
                | Cqo
                | Xchg
                | Xadd
                | Cmpxchg
                | Cmpxchg8b
                | Cmpxchg16b
                | Nop
                | Endbr64
                | Endbr32
                | Clc
                | Stc
                | Cmc
                | Cld
                | Std
                | Lahf
                | Sahf
                | Pause
                | Mfence
                | Lfence
                | Sfence
                | In
                | Out
                | Reservednop
                | Prefetchnta
                | Prefetcht0
                | Prefetcht1
                | Prefetcht2
                | Prefetchw
                | Prefetch
                | Prefetchwt1
        ) && !touches_special(insn)
}

/// Moves to and from segment, control, debug and test registers belong to the
/// system instructions, and so do the stack forms of segment registers.
fn touches_special(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| {
        insn.op_kind(i) == OpKind::Register && {
            let r = insn.op_register(i);
            r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr()
        }
    })
}

fn setcc(m: M) -> bool {
    use M::*;
    matches!(
        m,
        Seta | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
    )
}

fn cmovcc(m: M) -> bool {
    use M::*;
    matches!(
        m,
        Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
    )
}

/// Kind and log2 of the element size.
fn string_kind(m: M) -> Option<(u16, u16)> {
    use string::kind::*;
    Some(match m {
        M::Movsb => (MOVS, 0),
        M::Movsw => (MOVS, 1),
        M::Movsd => (MOVS, 2),
        M::Movsq => (MOVS, 3),
        M::Stosb => (STOS, 0),
        M::Stosw => (STOS, 1),
        M::Stosd => (STOS, 2),
        M::Stosq => (STOS, 3),
        M::Lodsb => (LODS, 0),
        M::Lodsw => (LODS, 1),
        M::Lodsd => (LODS, 2),
        M::Lodsq => (LODS, 3),
        M::Scasb => (SCAS, 0),
        M::Scasw => (SCAS, 1),
        M::Scasd => (SCAS, 2),
        M::Scasq => (SCAS, 3),
        M::Cmpsb => (CMPS, 0),
        M::Cmpsw => (CMPS, 1),
        M::Cmpsd => (CMPS, 2),
        M::Cmpsq => (CMPS, 3),
        M::Insb => (INS, 0),
        M::Insw => (INS, 1),
        M::Insd => (INS, 2),
        M::Outsb => (OUTS, 0),
        M::Outsw => (OUTS, 1),
        M::Outsd => (OUTS, 2),
        _ => return None,
    })
}

/// Operand forms of a two-operand instruction.
enum Form {
    RegReg,
    RegImm,
    RegMem(Place),
    MemReg(Place),
    MemImm(Place),
}

impl Builder<'_> {
    /// Lowers `insn` into `u` if there is a handler for it.
    pub(super) fn lower_integer(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let m = insn.mnemonic();
        match m {
            M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test => {
                self.lower_binary(insn, u)
            }
            M::Mov => self.lower_mov(insn, u),
            M::Movzx | M::Movsx | M::Movsxd => self.lower_extend(insn, u),
            M::Lea => self.lower_lea(insn, u),
            M::Inc | M::Dec | M::Neg | M::Not => self.lower_unary(insn, u),
            M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shl | M::Sal | M::Shr | M::Sar => {
                self.lower_shift(insn, u)
            }
            M::Shld | M::Shrd => self.lower_double_shift(insn, u),
            M::Mul | M::Imul | M::Div | M::Idiv => self.lower_muldiv(insn, u),
            M::Push | M::Pop => self.lower_stack(insn, u),
            M::Bt | M::Bts | M::Btr | M::Btc => self.lower_bit(insn, u),
            M::Bsf | M::Bsr => self.lower_scan(insn, u),
            // Where they are not offered, their prefix means nothing.
            M::Popcnt | M::Lzcnt | M::Tzcnt if self.cpu.vector.executes(insn.code()) => {
                self.lower_scan(insn, u)
            }
            M::Popcnt | M::Lzcnt | M::Tzcnt => None,
            M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b => {
                self.lower_atomic(insn, u)
            }
            M::In | M::Out => lower_io(insn, u),
            _ if setcc(m) => self.lower_setcc(insn, u),
            _ if cmovcc(m) => self.lower_cmov(insn, u),
            _ if string_kind(m).is_some() => self.lower_string(insn, u),
            _ => self.lower_simple(insn, u),
        }
    }

    fn form(&self, insn: &Instruction, u: &mut Uop) -> Option<Form> {
        if is_memory(insn, 0) {
            let p = self.memory(insn, u)?;
            if let Some(v) = immediate(insn, 1) {
                u.imm = v;
                return Some(Form::MemImm(p));
            }
            u.src = register(insn, 1)?;
            return Some(Form::MemReg(p));
        }
        u.dst = register(insn, 0)?;
        if is_memory(insn, 1) {
            return Some(Form::RegMem(self.memory(insn, u)?));
        }
        if let Some(v) = immediate(insn, 1) {
            u.imm = v;
            return Some(Form::RegImm);
        }
        u.src = register(insn, 1)?;
        Some(Form::RegReg)
    }

    fn operand_size(insn: &Instruction) -> usize {
        if is_memory(insn, 0) {
            insn.memory_size().size()
        } else {
            register_size(insn, 0)
        }
    }
}
