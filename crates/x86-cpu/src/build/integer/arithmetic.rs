//! Lowering of moves and arithmetic.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::Form;
use crate::{
    build::{
        Builder, Note,
        operand::{immediate, is_memory, register, register_size},
        select::{Compare, Operands, place, wide, width},
    },
    ops::{alu, atomic, moves, muldiv, shift},
    uop::{Handler, Uop},
};

impl Builder<'_> {
    pub(super) fn lower_binary(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_locked(
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

    pub(super) fn lower_mov(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_extend(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_lea(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_unary(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_shift(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_double_shift(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_muldiv(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_imul(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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
}
