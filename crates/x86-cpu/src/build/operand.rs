//! Operands of decoded instructions in the form that micro-operations take.

use iced_x86::{Instruction, OpKind, Register};

use super::Builder;
use crate::{
    mem::ea::{gpr_number, gpr_offset, segment_number},
    state::{mode, reg, seg},
    uop::Uop,
};

const ZERO: u8 = (reg::ZERO * 8) as u8;
const PAGE_RIP: u8 = (reg::PAGE_RIP * 8) as u8;

/// How a memory operand is reached: see [`crate::ops::access`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Address form.
    pub(super) form: u8,
    /// Only the slow path checks what must be checked.
    pub(super) slow: bool,
}

/// The offset of the general register in operand `i`.
pub(super) fn register(insn: &Instruction, i: u32) -> Option<u8> {
    if insn.op_kind(i) != OpKind::Register {
        return None;
    }
    gpr_offset(insn.op_register(i)).map(|o| o as u8)
}

/// Whether operand `i` is in memory.
pub(super) fn is_memory(insn: &Instruction, i: u32) -> bool {
    insn.op_kind(i) == OpKind::Memory
}

/// Operand `i` as an immediate, sign-extended as the instruction has it.
pub(super) fn immediate(insn: &Instruction, i: u32) -> Option<u64> {
    match insn.op_kind(i) {
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Some(insn.immediate(i)),
        _ => None,
    }
}

/// Size in bytes of operand `i`, a register.
pub(super) fn register_size(insn: &Instruction, i: u32) -> usize {
    insn.op_register(i).size()
}

impl Builder<'_> {
    /// Fills in the address fields of `u`. `None` for the few forms that no
    /// micro-operation can express.
    pub(super) fn memory(&self, insn: &Instruction, u: &mut Uop) -> Option<Place> {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let width = match base.size().max(index.size()) {
            0 => insn.memory_displ_size().max(2) as usize,
            n => n,
        };
        let segment = segment_number(insn.memory_segment());
        u.seg = segment as u8 | (width.trailing_zeros() as u8) << 4;
        let displacement = insn.memory_displacement64();
        u.disp = if width == 8 {
            i32::try_from(displacement as i64).ok()?
        } else {
            displacement as u32 as i32
        };
        u.base = match base {
            Register::None => ZERO,
            Register::RIP | Register::EIP => PAGE_RIP,
            r => (gpr_number(r)? * 8) as u8,
        };
        u.index = if index == Register::None {
            ZERO
        } else {
            (gpr_number(index)? * 8) as u8
        };
        u.scale = insn.memory_index_scale().trailing_zeros() as u8;
        let is64 = self.is64();
        let form = if is64 && width == 8 && segment < seg::FS {
            u8::from(index != Register::None)
        } else {
            2
        };
        let checked = !is64
            && (self.mode & mode::FLAT == 0
                || !matches!(segment, seg::ES | seg::SS | seg::DS)
                || width != 4);
        Some(Place {
            form,
            slow: checked || self.careful(),
        })
    }
}
