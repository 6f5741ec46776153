//! Lowering of near branches, calls and returns.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{
    After, Builder, Note,
    operand::{immediate, is_memory, register},
    select,
};
use crate::{
    ops::branch::{self, legacy},
    uop::{Handler, Uop},
};

/// Whether this module lowers `insn`.
pub(super) fn handles(insn: &Instruction) -> bool {
    let m = insn.mnemonic();
    let near_indirect = matches!(m, Mnemonic::Jmp | Mnemonic::Call)
        && (insn.is_jmp_near_indirect()
            || insn.is_call_near_indirect()
            || insn.is_jmp_short_or_near()
            || insn.is_call_near());
    near_indirect || condition(insn).is_some() || counter_kind(m).is_some() || m == Mnemonic::Ret
}

/// The condition code of a Jcc.
fn condition(insn: &Instruction) -> Option<u8> {
    insn.is_jcc_short_or_near().then(|| condition_number(insn))
}

/// The low four opcode bits of Jcc, SETcc and CMOVcc.
pub(super) fn condition_number(insn: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match insn.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

fn counter_kind(m: Mnemonic) -> Option<u16> {
    Some(match m {
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => 16,
        Mnemonic::Loop => 17,
        Mnemonic::Loope => 18,
        Mnemonic::Loopne => 19,
        _ => return None,
    })
}

/// The width in bytes of the counter of LOOP and JrCXZ.
fn counter_width(insn: &Instruction) -> u16 {
    use iced_x86::Code as C;
    match insn.code() {
        C::Jcxz_rel8_16
        | C::Jcxz_rel8_32
        | C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX => 2,
        C::Jrcxz_rel8_16
        | C::Jrcxz_rel8_64
        | C::Loop_rel8_16_RCX
        | C::Loop_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loopne_rel8_16_RCX
        | C::Loopne_rel8_64_RCX => 8,
        _ => 4,
    }
}

/// Operand size in bytes of a near branch outside of 64-bit code.
fn branch_size(insn: &Instruction) -> u16 {
    match insn.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        OpKind::Register => insn.op0_register().size() as u16,
        OpKind::Memory => insn.memory_size().size() as u16,
        _ => 4,
    }
}

impl Builder<'_> {
    /// Lowers `insn` if it is a near branch.
    /// `previous` is the micro-operation before `u`.
    pub(super) fn lower_flow(
        &mut self,
        insn: &Instruction,
        u: &mut Uop,
        previous: Option<&mut Uop>,
    ) -> Option<After> {
        let next = i64::from(u.off) + i64::from(u.len);
        let is_rel = matches!(
            insn.op0_kind(),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
        );
        if is_rel {
            return self.lower_relative(insn, u, previous, next);
        }
        if insn.is_jmp_near_indirect() || insn.is_call_near_indirect() {
            let call = insn.is_call_near_indirect();
            let memory = is_memory(insn, 0);
            if let Some(r) = register(insn, 0) {
                u.src = r;
            }
            let place = if memory {
                Some(self.memory(insn, u)?)
            } else {
                None
            };
            let size = branch_size(insn);
            if self.is64() && size == 8 {
                u.handler = match (call, place) {
                    (false, None) => branch::jmp_r64,
                    (false, Some(p)) if p.slow => branch::near_any,
                    (false, Some(p)) => match p.form {
                        0 => branch::jmp_m64::<0>,
                        1 => branch::jmp_m64::<1>,
                        _ => branch::jmp_m64::<2>,
                    },
                    (true, None) => branch::call_indirect64::<false>,
                    (true, Some(_)) => branch::call_indirect64::<true>,
                };
            } else {
                u.handler = branch::near_any;
            }
            let kind = match (call, memory) {
                (false, false) => legacy::JMP_REG,
                (false, true) => legacy::JMP_MEM,
                (true, false) => legacy::CALL_REG,
                (true, true) => legacy::CALL_MEM,
            };
            u.aux = size | kind << 4;
            self.keep(Note::NEEDS);
            return Some(After::Ended);
        }
        if insn.mnemonic() == Mnemonic::Ret {
            u.imm = immediate(insn, 0).unwrap_or(0) & 0xffff;
            let size = match insn.code() {
                iced_x86::Code::Retnw | iced_x86::Code::Retnw_imm16 => 2,
                iced_x86::Code::Retnd | iced_x86::Code::Retnd_imm16 => 4,
                _ => 8,
            };
            u.aux = size | legacy::RET << 4;
            u.handler = if size == 8 {
                branch::ret64
            } else {
                branch::near_any
            };
            self.keep(Note::NEEDS);
            return Some(After::Ended);
        }
        None
    }

    fn lower_relative(
        &mut self,
        insn: &Instruction,
        u: &mut Uop,
        previous: Option<&mut Uop>,
        next: i64,
    ) -> Option<After> {
        let call = insn.is_call_near();
        let size = branch_size(insn);
        if self.is64() && size == 8 {
            self.targets = [next, insn.near_branch_target() as i64];
            if let Some(cond) = condition(insn) {
                self.conditional(cond, u, previous);
                return Some(After::Ended);
            }
            u.handler = match counter_kind(insn.mnemonic()) {
                None if call => branch::call64,
                None if insn.is_jmp_short_or_near() => branch::jmp,
                None => return None,
                Some(kind) => {
                    u.aux = counter_width(insn);
                    match kind {
                        16 => branch::jrcxz,
                        17 => branch::loop_::<0>,
                        18 => branch::loop_::<1>,
                        _ => branch::loop_::<2>,
                    }
                }
            };
            self.keep(Note::NEEDS);
            return Some(After::Ended);
        }
        u.imm = (insn.near_branch_target() as i64).wrapping_sub(next) as u64;
        let kind = condition(insn)
            .map(u16::from)
            .or_else(|| counter_kind(insn.mnemonic()));
        u.handler = match kind {
            Some(kind) => {
                u.aux = size | kind << 4;
                u.disp = i32::from(counter_width(insn));
                branch::jcc_any
            }
            None => {
                let kind = if call {
                    legacy::CALL_REL
                } else {
                    legacy::JMP_REL
                };
                u.aux = size | kind << 4;
                branch::near_any
            }
        };
        self.keep(Note::NEEDS);
        Some(After::Ended)
    }

    /// A Jcc in 64-bit code, fused with the comparison before it if there is one.
    fn conditional(&mut self, cond: u8, u: &mut Uop, previous: Option<&mut Uop>) {
        let careful = self.careful();
        let note = self.notes.last_mut();
        if !careful
            && let Some((note, previous)) = note.zip(previous)
            && let Some(compare) = note.compare()
        {
            previous.handler = select::fused(compare, cond >> 1);
            previous.aux = previous.aux & !1 | u16::from(cond & 1);
            *note = Note::NEEDS;
            return;
        }
        macro_rules! table {
            ($($n:literal)*) => {
                match cond { $($n => branch::jcc::<$n> as Handler,)* _ => branch::jcc::<15> }
            };
        }
        u.handler = table!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
        self.keep(Note::NEEDS);
    }
}
