//! Lowering of stack, bit, atomic, conditional, string, flag and port
//! instructions.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::{string_kind, touches_special};
use crate::{
    build::{
        Builder, Note,
        flow::condition_number,
        operand::{immediate, is_memory, register, register_size},
        select::{place, wide, width},
    },
    mem::ea::segment_number,
    ops::{atomic, bits, branch, io, misc, moves, string},
    state::mode,
    uop::Uop,
};

impl Builder<'_> {
    pub(super) fn lower_stack(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_bit(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_scan(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_atomic(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_setcc(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_cmov(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_string(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

    pub(super) fn lower_simple(&mut self, insn: &Instruction, u: &mut Uop) -> Option<Note> {
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

pub(super) fn lower_io(insn: &Instruction, u: &mut Uop) -> Option<Note> {
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
