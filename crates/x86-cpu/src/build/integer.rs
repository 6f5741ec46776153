//! Lowering of integer instructions that have handlers of their own.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::{
    Builder, Note,
    flow::condition_number,
    operand::{Place, immediate, is_memory, register, register_size},
    select::{Compare, Operands, place, wide, width},
};
use crate::{
    mem::ea::segment_number,
    ops::{alu, atomic, bits, branch, io, misc, moves, muldiv, shift, string},
    state::mode,
    uop::{Handler, Uop},
};

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

    fn lower_binary(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let form = self.form(insn, u)?;
        let size = Self::operand_size(insn);
        let m = insn.mnemonic();
        if insn.has_lock_prefix() {
            return self.lower_locked(insn, u, size, &form);
        }
        macro_rules! go {
            ($O:ty) => {
                match form {
                    Form::RegReg => (
                        width!(size, W => alu::rr::<$O, W, true>),
                        Some(width!(size, W => alu::rr::<$O, W, false>)),
                    ),
                    Form::RegImm => (
                        width!(size, W => alu::ri::<$O, W, true>),
                        Some(width!(size, W => alu::ri::<$O, W, false>)),
                    ),
                    Form::RegMem(p) => (width!(size, W => place!(p, F, S => alu::rm::<$O, W, F, S>)), None),
                    Form::MemReg(p) => {
                        (width!(size, W => place!(p, F, S => alu::mr::<$O, W, F, false, S>)), None)
                    }
                    Form::MemImm(p) => {
                        (width!(size, W => place!(p, F, S => alu::mr::<$O, W, F, true, S>)), None)
                    }
                }
            };
        }
        let (handler, plain): (Handler, Option<Handler>) = match m {
            M::Add => go!(alu::Add),
            M::Or => go!(alu::Or),
            M::Adc => go!(alu::Adc),
            M::Sbb => go!(alu::Sbb),
            M::And => go!(alu::And),
            M::Sub => go!(alu::Sub),
            M::Xor => go!(alu::Xor),
            M::Cmp => go!(alu::Cmp),
            _ => go!(alu::Test),
        };
        u.handler = handler;
        let carries = matches!(m, M::Adc | M::Sbb);
        let memory = matches!(form, Form::RegMem(_) | Form::MemReg(_) | Form::MemImm(_));
        let compare = matches!(m, M::Cmp | M::Test).then(|| Compare {
            test: m == M::Test,
            size: size as u8,
            operands: match form {
                Form::RegReg => Operands::Registers,
                Form::RegImm => Operands::Immediate,
                Form::RegMem(p) | Form::MemReg(p) | Form::MemImm(p) => Operands::Memory(p.form),
            },
        });
        match form {
            Form::RegMem(_) => {
                u.aux = 2;
                u.src = u.dst;
            }
            Form::MemImm(_) => u.aux = 4,
            _ => {}
        }
        let slow = matches!(form, Form::RegMem(p) | Form::MemReg(p) | Form::MemImm(p) if p.slow);
        let note =
            Note::new(!carries, carries || memory).or_plain(if carries { None } else { plain });
        Some(match compare {
            Some(compare) if !slow => note.or_fused(compare),
            _ => note,
        })
    }

    fn lower_locked(
        &mut self,
        insn: &Instruction,
        u: &mut Uop,
        size: usize,
        form: &Form,
    ) -> Option<Note> {
        let (p, imm) = match *form {
            Form::MemReg(p) => (p, false),
            Form::MemImm(p) => (p, true),
            _ => return None,
        };
        macro_rules! go {
            ($O:ty) => {
                if imm {
                    width!(size, W => place!(p, F, S => atomic::op::<$O, W, true, F, S>))
                } else {
                    width!(size, W => place!(p, F, S => atomic::op::<$O, W, false, F, S>))
                }
            };
        }
        u.handler = match insn.mnemonic() {
            M::Add => go!(atomic::Add),
            M::Or => go!(atomic::Or),
            M::Adc => go!(atomic::Adc),
            M::Sbb => go!(atomic::Sbb),
            M::And => go!(atomic::And),
            M::Sub => go!(atomic::Sub),
            M::Xor => go!(atomic::Xor),
            _ => return None,
        };
        Some(Note::NEEDS)
    }

    fn lower_mov(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let form = self.form(insn, u)?;
        let size = Self::operand_size(insn);
        u.handler = match form {
            Form::RegReg => width!(size, W => moves::mov_rr::<W>),
            Form::RegImm => width!(size, W => moves::mov_ri::<W>),
            Form::RegMem(p) => {
                width!(size, W => place!(p, F, S => moves::load::<W, W, false, F, S>))
            }
            Form::MemReg(p) => width!(size, W => place!(p, F, S => moves::store::<W, F, false, S>)),
            Form::MemImm(p) => width!(size, W => place!(p, F, S => moves::store::<W, F, true, S>)),
        };
        let memory = !matches!(form, Form::RegReg | Form::RegImm);
        Some(Note::new(false, memory))
    }

    fn lower_extend(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let form = self.form(insn, u)?;
        let to = register_size(insn, 0);
        let from = if is_memory(insn, 1) {
            insn.memory_size().size()
        } else {
            register_size(insn, 1)
        };
        let signed = insn.mnemonic() != M::Movzx;
        macro_rules! go {
            ($X:ty, $signed:literal) => {
                match form {
                    Form::RegReg => wide!(to, W => moves::extend_rr::<W, $X, $signed>),
                    Form::RegMem(p) => wide!(to, W => place!(p, F, S => moves::load::<W, $X, $signed, F, S>)),
                    _ => return None,
                }
            };
        }
        u.handler = match (from, signed) {
            (1, false) => go!(u8, false),
            (1, true) => go!(u8, true),
            (2, false) => go!(u16, false),
            (2, true) => go!(u16, true),
            (4, _) => go!(u32, true),
            _ => return None,
        };
        Some(Note::new(false, matches!(form, Form::RegMem(_))))
    }

    fn lower_lea(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        u.dst = register(insn, 0)?;
        let p = self.memory(insn, u)?;
        let size = register_size(insn, 0);
        // Segments play no part in LEA.
        let form = if u.seg >> 4 == 3 {
            u8::from(insn.memory_index() != Register::None)
        } else {
            2
        };
        let _ = p;
        u.handler = match form {
            0 => wide!(size, W => moves::lea::<W, 0>),
            1 => wide!(size, W => moves::lea::<W, 1>),
            _ => wide!(size, W => moves::lea::<W, 2>),
        };
        Some(Note::NOTHING)
    }

    fn lower_unary(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let size = Self::operand_size(insn);
        let lock = insn.has_lock_prefix();
        macro_rules! go {
            ($O:ident) => {
                if is_memory(insn, 0) {
                    let p = self.memory(insn, u)?;
                    if lock {
                        width!(size, W => place!(p, F, S => atomic::op::<atomic::$O, W, true, F, S>))
                    } else {
                        width!(size, W => place!(p, F, S => alu::unary_m::<alu::$O, W, F, S>))
                    }
                } else {
                    u.dst = register(insn, 0)?;
                    width!(size, W => alu::unary_r::<alu::$O, W>)
                }
            };
        }
        u.handler = match insn.mnemonic() {
            M::Inc => go!(Inc),
            M::Dec => go!(Dec),
            M::Neg => go!(Neg),
            _ => go!(Not),
        };
        Some(Note::NEEDS)
    }

    fn lower_shift(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let size = Self::operand_size(insn);
        let cl = insn.op_kind(1) == OpKind::Register;
        if !cl {
            u.imm = immediate(insn, 1)? & 0xff;
        }
        let memory = is_memory(insn, 0);
        let p = if memory {
            Some(self.memory(insn, u)?)
        } else {
            None
        };
        if !memory {
            u.dst = register(insn, 0)?;
        }
        macro_rules! go {
            ($O:ident) => {
                match (p, cl) {
                    (None, false) => width!(size, W => shift::r::<shift::$O, W, false>),
                    (None, true) => width!(size, W => shift::r::<shift::$O, W, true>),
                    (Some(p), false) => width!(size, W => place!(p, F, S => shift::m::<shift::$O, W, false, F, S>)),
                    (Some(p), true) => width!(size, W => place!(p, F, S => shift::m::<shift::$O, W, true, F, S>)),
                }
            };
        }
        let m = insn.mnemonic();
        u.handler = match m {
            M::Rol => go!(Rol),
            M::Ror => go!(Ror),
            M::Rcl => go!(Rcl),
            M::Rcr => go!(Rcr),
            M::Shr => go!(Shr),
            M::Sar => go!(Sar),
            _ => go!(Shl),
        };
        let count = u.imm & if size == 8 { 63 } else { 31 };
        let simple = !cl
            && !memory
            && count != 0
            && size >= 4
            && matches!(m, M::Shl | M::Sal | M::Shr | M::Sar);
        if !simple {
            return Some(Note::NEEDS);
        }
        u.imm = count;
        let plain = match (m, size) {
            (M::Shr, 4) => shift::plain::<u32, 1> as Handler,
            (M::Shr, _) => shift::plain::<u64, 1>,
            (M::Sar, 4) => shift::plain::<u32, 2>,
            (M::Sar, _) => shift::plain::<u64, 2>,
            (_, 4) => shift::plain::<u32, 0>,
            _ => shift::plain::<u64, 0>,
        };
        // AF is undefined after a shift but the host leaves something there, so
        // earlier flags are all gone.
        Some(Note::KILLS.or_plain(Some(plain)))
    }

    fn lower_double_shift(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let size = Self::operand_size(insn);
        let left = insn.mnemonic() == M::Shld;
        let cl = insn.op_kind(2) == OpKind::Register;
        if !cl {
            u.imm = immediate(insn, 2)? & 0xff;
        }
        u.src = register(insn, 1)?;
        u.handler = if is_memory(insn, 0) {
            self.memory(insn, u)?;
            match (left, cl) {
                (true, true) => wide!(size, W => shift::double_m::<W, true, true>),
                (true, false) => wide!(size, W => shift::double_m::<W, true, false>),
                (false, true) => wide!(size, W => shift::double_m::<W, false, true>),
                (false, false) => wide!(size, W => shift::double_m::<W, false, false>),
            }
        } else {
            u.dst = register(insn, 0)?;
            match (left, cl) {
                (true, true) => wide!(size, W => shift::double_r::<W, true, true>),
                (true, false) => wide!(size, W => shift::double_r::<W, true, false>),
                (false, true) => wide!(size, W => shift::double_r::<W, false, true>),
                (false, false) => wide!(size, W => shift::double_r::<W, false, false>),
            }
        };
        Some(Note::NEEDS)
    }

    fn lower_muldiv(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let m = insn.mnemonic();
        if m == M::Imul && insn.op_count() > 1 {
            return self.lower_imul(insn, u);
        }
        let size = Self::operand_size(insn);
        if is_memory(insn, 0) {
            let p = self.memory(insn, u)?;
            u.handler = match m {
                M::Mul => width!(size, W => place!(p, F, S => muldiv::mul_m::<W, false, F, S>)),
                M::Imul => width!(size, W => place!(p, F, S => muldiv::mul_m::<W, true, F, S>)),
                M::Div => width!(size, W => muldiv::div_m::<W, false>),
                _ => width!(size, W => muldiv::div_m::<W, true>),
            };
            return Some(Note::NEEDS);
        }
        u.src = register(insn, 0)?;
        u.handler = match m {
            M::Mul => width!(size, W => muldiv::mul_r::<W, false>),
            M::Imul => width!(size, W => muldiv::mul_r::<W, true>),
            M::Div => width!(size, W => muldiv::div_r::<W, false>),
            _ => width!(size, W => muldiv::div_r::<W, true>),
        };
        if matches!(m, M::Mul | M::Imul) {
            Some(Note::KILLS)
        } else {
            Some(Note::NEEDS)
        }
    }

    fn lower_imul(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let size = register_size(insn, 0);
        u.dst = register(insn, 0)?;
        let three = insn.op_count() == 3;
        if three {
            u.imm = immediate(insn, 2)?;
        }
        if is_memory(insn, 1) {
            let p = self.memory(insn, u)?;
            u.handler = if three {
                wide!(size, W => place!(p, F, S => muldiv::imul_rm::<W, true, F, S>))
            } else {
                wide!(size, W => place!(p, F, S => muldiv::imul_rm::<W, false, F, S>))
            };
            return Some(Note::NEEDS);
        }
        u.src = register(insn, 1)?;
        u.handler = if three {
            wide!(size, W => muldiv::imul_rr::<W, true>)
        } else {
            wide!(size, W => muldiv::imul_rr::<W, false>)
        };
        Some(Note::KILLS)
    }

    fn lower_stack(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let push = insn.mnemonic() == M::Push;
        // The stack pointer moves by the operand size; iced has it, with sign.
        let size = insn.stack_pointer_increment().unsigned_abs() as u16;
        u.aux = size;
        let fast = self.is64() && size == 8;
        let careful = self.careful();
        if let Some(v) = immediate(insn, 0) {
            u.imm = v;
            u.handler = match (fast, careful) {
                (true, false) => moves::push64::<true, false>,
                (true, true) => moves::push64::<true, true>,
                _ => moves::push_any::<true>,
            };
        } else if is_memory(insn, 0) {
            self.memory(insn, u)?;
            u.handler = if push { moves::push_m } else { moves::pop_m };
        } else if touches_special(insn) {
            return None;
        } else if push {
            u.src = register(insn, 0)?;
            u.handler = match (fast, careful) {
                (true, false) => moves::push64::<false, false>,
                (true, true) => moves::push64::<false, true>,
                _ => moves::push_any::<false>,
            };
        } else {
            u.dst = register(insn, 0)?;
            u.handler = match (fast, careful) {
                (true, false) => moves::pop64::<false>,
                (true, true) => moves::pop64::<true>,
                _ => moves::pop_any,
            };
        }
        Some(Note::NEEDS)
    }

    fn lower_bit(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let size = Self::operand_size(insn);
        let imm = immediate(insn, 1);
        match imm {
            Some(v) => u.imm = v & 0xff,
            None => u.src = register(insn, 1)?,
        }
        let memory = is_memory(insn, 0);
        if memory {
            self.memory(insn, u)?;
            u.aux = u16::from(insn.has_lock_prefix());
        } else {
            u.dst = register(insn, 0)?;
        }
        macro_rules! go {
            ($kind:expr) => {
                match (memory, imm.is_some()) {
                    (false, false) => wide!(size, W => bits::bt_r::<W, { $kind }, false>),
                    (false, true) => wide!(size, W => bits::bt_r::<W, { $kind }, true>),
                    (true, false) => wide!(size, W => bits::bt_m::<W, { $kind }, false>),
                    (true, true) => wide!(size, W => bits::bt_m::<W, { $kind }, true>),
                }
            };
        }
        u.handler = match insn.mnemonic() {
            M::Bt => go!(bits::kind::TEST),
            M::Bts => go!(bits::kind::SET),
            M::Btr => go!(bits::kind::RESET),
            _ => go!(bits::kind::COMPLEMENT),
        };
        Some(Note::NEEDS)
    }

    fn lower_scan(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let size = register_size(insn, 0);
        u.dst = register(insn, 0)?;
        let p = if is_memory(insn, 1) {
            Some(self.memory(insn, u)?)
        } else {
            None
        };
        if p.is_none() {
            u.src = register(insn, 1)?;
        }
        macro_rules! go {
            ($O:ident, $keeps:literal) => {
                match p {
                    None => wide!(size, W => bits::scan_r::<bits::$O, W, $keeps>),
                    Some(p) => wide!(size, W => place!(p, F, S => bits::scan_m::<bits::$O, W, $keeps, F, S>)),
                }
            };
        }
        u.handler = match insn.mnemonic() {
            M::Bsf => go!(Bsf, true),
            M::Bsr => go!(Bsr, true),
            M::Popcnt => go!(Popcnt, false),
            M::Lzcnt => go!(Lzcnt, false),
            _ => go!(Tzcnt, false),
        };
        Some(Note::NEEDS)
    }

    fn lower_atomic(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let m = insn.mnemonic();
        if matches!(m, M::Cmpxchg8b | M::Cmpxchg16b) {
            self.memory(insn, u)?;
            u.handler = if m == M::Cmpxchg16b {
                atomic::cmpxchg_pair::<true>
            } else {
                atomic::cmpxchg_pair::<false>
            };
            return Some(Note::NEEDS);
        }
        let size = Self::operand_size(insn);
        // XCHG may name its memory operand second.
        let (mem, reg) = if is_memory(insn, 1) { (1, 0) } else { (0, 1) };
        u.src = register(insn, reg)?;
        if !is_memory(insn, mem) {
            u.dst = register(insn, 0)?;
            u.handler = match m {
                M::Xchg => width!(size, W => moves::xchg_rr::<W>),
                M::Xadd => width!(size, W => atomic::xadd_r::<W>),
                _ => width!(size, W => atomic::cmpxchg_r::<W>),
            };
            return Some(Note::NEEDS);
        }
        let p = self.memory(insn, u)?;
        u.handler = match m {
            M::Xchg => width!(size, W => place!(p, F, S => moves::xchg_mr::<W, F, S>)),
            M::Xadd if p.slow => width!(size, W => atomic::xadd_m::<W>),
            M::Xadd => match p.form {
                0 => width!(size, W => atomic::xadd_m_fast::<W, 0>),
                1 => width!(size, W => atomic::xadd_m_fast::<W, 1>),
                _ => width!(size, W => atomic::xadd_m_fast::<W, 2>),
            },
            _ => width!(size, W => place!(p, F, S => atomic::cmpxchg_m::<W, F, S>)),
        };
        Some(Note::NEEDS)
    }

    fn lower_setcc(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        u.aux = u16::from(condition_number(insn));
        if is_memory(insn, 0) {
            self.memory(insn, u)?;
            u.handler = moves::setcc_m;
        } else {
            u.dst = register(insn, 0)?;
            u.handler = moves::setcc_r;
        }
        Some(Note::NEEDS)
    }

    fn lower_cmov(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        u.aux = u16::from(condition_number(insn));
        u.dst = register(insn, 0)?;
        let size = register_size(insn, 0);
        u.handler = if is_memory(insn, 1) {
            let p = self.memory(insn, u)?;
            wide!(size, W => place!(p, F, S => moves::cmov_rm::<W, F, S>))
        } else {
            u.src = register(insn, 1)?;
            wide!(size, W => moves::cmov_rr::<W>)
        };
        Some(Note::NEEDS)
    }

    fn lower_string(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        let (kind, size) = string_kind(insn.mnemonic())?;
        let mut width = None;
        let mut segment = crate::state::seg::DS;
        for i in 0..insn.op_count() {
            match insn.op_kind(i) {
                OpKind::MemorySegSI => width = Some(1),
                OpKind::MemorySegESI => width = Some(2),
                OpKind::MemorySegRSI => width = Some(3),
                OpKind::MemoryESDI => width = width.or(Some(1)),
                OpKind::MemoryESEDI => width = width.or(Some(2)),
                OpKind::MemoryESRDI => width = width.or(Some(3)),
                _ => continue,
            }
            if matches!(
                insn.op_kind(i),
                OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI
            ) {
                segment = segment_number(insn.memory_segment());
            }
        }
        u.seg = segment as u8 | width? << 4;
        let compares = matches!(kind, string::kind::SCAS | string::kind::CMPS);
        let repeat = match (insn.has_rep_prefix(), insn.has_repne_prefix()) {
            (true, _) => string::repeat::WHILE_EQUAL,
            (_, true) if compares => string::repeat::WHILE_NOT_EQUAL,
            (_, true) => string::repeat::WHILE_EQUAL,
            _ => string::repeat::NONE,
        };
        u.aux = kind | size << 4 | repeat << 8;
        u.handler = string::string;
        Some(Note::NEEDS)
    }

    fn lower_simple(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
        use M::*;
        u.handler = match insn.mnemonic() {
            Nop | Reservednop | Endbr64 | Endbr32 | Prefetchnta | Prefetcht0 | Prefetcht1
            | Prefetcht2 | Prefetchw | Prefetch | Prefetchwt1 => branch::nop,
            Pause => misc::pause,
            Mfence | Lfence | Sfence => misc::fence,
            Clc => misc::carry::<0>,
            Stc => misc::carry::<1>,
            Cmc => misc::carry::<2>,
            Cld => misc::direction::<false>,
            Std => misc::direction::<true>,
            Lahf => misc::ah::<false>,
            Sahf => misc::ah::<true>,
            Cbw => moves::extend_a::<u16>,
            Cwde => moves::extend_a::<u32>,
            Cdqe => moves::extend_a::<u64>,
            Cwd => moves::extend_ad::<u16>,
            Cdq => moves::extend_ad::<u32>,
            Cqo => moves::extend_ad::<u64>,
            Bswap => {
                u.dst = register(insn, 0)?;
                wide!(register_size(insn, 0), W => moves::bswap::<W>)
            }
            Leave
                if self.mode & mode::CODE64 != 0
                    && insn.code() == iced_x86::Code::Leaveq
                    && !self.careful() =>
            {
                moves::leave64
            }
            _ => return None,
        };
        Some(Note::NEEDS)
    }
}

fn lower_io(insn: &Instruction, u: &mut Uop) -> Option<Note> {
    let input = insn.mnemonic() == M::In;
    let (data, port) = if input { (0, 1) } else { (1, 0) };
    u.aux = register_size(insn, data) as u16;
    if let Some(v) = immediate(insn, port) {
        u.imm = v & 0xff;
        u.src = 1;
    }
    u.handler = if input { io::input } else { io::output };
    Some(Note::NEEDS)
}
