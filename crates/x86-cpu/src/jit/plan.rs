//! What is to be translated: a block's instructions, how each is executed, and
//! which flags somebody may still look at before it.

use alloc::vec::Vec;
use core::mem::MaybeUninit;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register, RflagsBits};

use super::{
    raw::Raw,
    registers::place,
    shape::{self, Kind, Shape, flag},
    vector::{self, Vector},
};
use crate::{
    build,
    cache::{Block, CodeCache},
    fault::Fault,
    mem::ea::gpr_number,
    state::Cpu,
    uop::Uop,
};

/// The decoder's names of the arithmetic flags.
const ARITHMETIC: u32 = RflagsBits::CF
    | RflagsBits::PF
    | RflagsBits::AF
    | RflagsBits::ZF
    | RflagsBits::SF
    | RflagsBits::OF;

/// One instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) insn: Instruction,
    /// Where it starts in its page.
    pub(super) start: u16,
    /// How translated code executes it; `None` leaves it to the interpreter.
    pub(super) shape: Option<Shape>,
    /// Or as a vector instruction.
    pub(super) vector: Option<Vector>,
    /// Its bytes are copied: it names a byte register that no REX prefix allows.
    pub(super) copied: bool,
    /// What interprets it; null where that never happens.
    pub(super) uop: *const Uop,
    /// Flags that must be right before it.
    pub(super) live: u16,
    /// Looks at arithmetic flags.
    pub(super) reads_flags: bool,
    /// May change arithmetic flags.
    pub(super) writes_flags: bool,
}

/// A block's instructions.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) items: Vec<Item>,
    /// The block's bytes.
    pub(super) bytes: Vec<u8>,
    /// Page offset of the first.
    pub(super) start: usize,
}

impl Item {
    /// Translated code executes it, and it looks at MXCSR.
    pub(super) fn is_float(&self) -> bool {
        self.vector.is_some_and(|v| v.is_float())
    }
}

impl Plan {
    /// The bytes of an item.
    pub(super) fn raw(&self, item: &Item) -> Option<Raw<'_>> {
        let at = usize::from(item.start) - self.start;
        Raw::new(self.bytes.get(at..at + item.insn.len())?)
    }

    /// Decodes `block` again and decides about each instruction. `false` if it is
    /// not to be translated: it holds bytes that are no instruction, or memory has
    /// changed since the block was built.
    ///
    /// # Errors
    /// Those of reading code.
    pub(super) fn make(
        &mut self,
        cpu: &mut Cpu,
        cache: &mut CodeCache,
        block: &Block,
        strict: bool,
    ) -> Result<bool, Fault> {
        self.items.clear();
        self.bytes.clear();
        self.start = (block.gpa & 0xfff) as usize;
        let len = usize::from(block.len);
        let mut window = [const { MaybeUninit::uninit() }; build::WINDOW];
        let Some(window) = window.get_mut(..len) else {
            return Ok(false);
        };
        if self.start + len > 4096 || cpu.env().host_page(block.gpa >> 12).is_none() {
            return Ok(false);
        }
        build::announce(cpu, block.gpa, len);
        let window = build::read_code(cpu, block.gpa, window)?;
        self.bytes.extend_from_slice(window);
        let mut decoder = Decoder::with_ip(64, window, self.start as u64, DecoderOptions::NONE);
        let mut at = self.start;
        while at < self.start + len {
            let insn = decoder.decode();
            if decoder.last_error() != DecoderError::None {
                return Ok(false);
            }
            self.items.push(Item {
                insn,
                start: at as u16,
                shape: None,
                vector: None,
                copied: false,
                uop: core::ptr::null(),
                live: flag::ALL,
                reads_flags: insn.rflags_read() & ARITHMETIC != 0,
                writes_flags: insn.rflags_modified() & ARITHMETIC != 0,
            });
            at += insn.len();
        }
        if self.items.len() != usize::from(block.count) || !self.ends_like(block) {
            return Ok(false);
        }
        for i in 0..self.items.len() {
            self.decide(cpu, cache, block, i);
        }
        self.distrust_mxcsr();
        self.find_live(strict);
        Ok(true)
    }

    /// Whether the last instruction leads where the block's does, and none
    /// before it leads anywhere.
    fn ends_like(&self, block: &Block) -> bool {
        let Some((last, before)) = self.items.split_last() else {
            return false;
        };
        let relative = |i: &Item| i.insn.op0_kind() == OpKind::NearBranch64;
        let next = i64::from(last.start) + last.insn.len() as i64;
        if before.iter().any(relative) {
            return false;
        }
        !relative(last) || block.targets == [next, last.insn.near_branch_target() as i64]
    }

    fn decide(&mut self, cpu: &mut Cpu, cache: &mut CodeCache, block: &Block, i: usize) {
        let mut item = self.items[i];
        let last = i + 1 == self.items.len();
        if let Some(raw) = self.raw(&item)
            && let Some(shape) = shape::of(&raw)
            && permitted(cpu, &item.insn, &raw)
            && fits(&item.insn, &raw, &shape)
            && (last || !ends(shape.kind))
        {
            match high_bytes(&raw, &shape) {
                HighBytes::None => item.shape = Some(shape),
                HighBytes::Copy => (item.shape, item.copied) = (Some(shape), true),
                HighBytes::Impossible => {}
            }
        }
        if item.shape.is_none() && !build::handles_integer(&item.insn) {
            let plan = crate::vector::plan(cpu, &item.insn);
            let at = usize::from(item.start) - self.start;
            let bytes = &self.bytes[at..at + item.insn.len()];
            item.vector = vector::of(&item.insn, bytes, &plan);
        }
        let memory = item.insn.op_kinds().any(|k| k == OpKind::Memory);
        let stack = matches!(
            item.shape.map(|s| s.kind),
            Some(
                Kind::Push
                    | Kind::PushImmediate
                    | Kind::Pop
                    | Kind::Leave
                    | Kind::Call
                    | Kind::Return
                    | Kind::JumpIndirect
                    | Kind::CallIndirect
                    | Kind::Divide(_)
            )
        );
        if matches!(item.shape.map(|s| s.kind), Some(Kind::Divide(_))) {
            // What it leaves undefined, both tiers leave alone.
            item.writes_flags = false;
        }
        let plain = matches!(item.shape.map(|s| s.kind), Some(Kind::Lea | Kind::Nop));
        let native = item.shape.is_some() || item.vector.is_some();
        let float = item.is_float();
        if !native || stack || float || memory && !plain {
            let left = self.items.len() - 1 - i;
            let start = usize::from(item.start);
            item.uop = build::single(cpu, cache, &item.insn, start, block.mode, left);
        }
        self.items[i] = item;
    }

    /// Behind an instruction that loads MXCSR, floating point is the interpreter's
    /// for the rest of the block: exceptions may be unmasked there.
    fn distrust_mxcsr(&mut self) {
        use iced_x86::Mnemonic as M;
        let mut loaded = false;
        for item in &mut self.items {
            if loaded && item.is_float() {
                item.vector = None;
            }
            loaded |= matches!(
                item.insn.mnemonic(),
                M::Ldmxcsr
                    | M::Vldmxcsr
                    | M::Fxrstor
                    | M::Fxrstor64
                    | M::Xrstor
                    | M::Xrstor64
                    | M::Xrstors
                    | M::Xrstors64
            );
        }
    }

    /// Goes backwards from the end, where all flags are wanted.
    fn find_live(&mut self, strict: bool) {
        let mut live = flag::ALL;
        for item in self.items.iter_mut().rev() {
            let exact = strict && !item.uop.is_null();
            live = match item.shape {
                _ if exact => flag::ALL,
                None if item.vector.is_some_and(|v| v.kills_flags()) => 0,
                None if item.vector.is_some() => live,
                None => flag::ALL,
                Some(s) => live & !s.kills | s.reads,
            };
            item.live = live;
        }
    }
}

/// Whether control does not go on behind such an instruction.
fn ends(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Branch(_)
            | Kind::Counter
            | Kind::Jump
            | Kind::Call
            | Kind::Return
            | Kind::JumpIndirect
            | Kind::CallIndirect
    )
}

/// Whether the guest has the instruction, and the decoder means the same by the
/// bytes as the list.
fn permitted(cpu: &Cpu, insn: &Instruction, raw: &Raw<'_>) -> bool {
    use iced_x86::Mnemonic as M;
    if !cpu.vector.permits(insn.code()) || raw.lock != insn.has_lock_prefix() {
        return false;
    }
    match insn.mnemonic() {
        M::Popcnt | M::Lzcnt | M::Tzcnt => cpu.vector.executes(insn.code()),
        // By the prefix they would be others, if the guest had those.
        M::Bsf | M::Bsr => raw.repeat.is_none(),
        _ => build::handles_integer(insn) || build::handles_flow(insn),
    }
}

/// Whether the operands are such as translated code can make.
fn fits(insn: &Instruction, raw: &Raw<'_>, shape: &Shape) -> bool {
    match shape.kind {
        Kind::Lea if raw.operand16 && !raw.wide() || raw.address32 => return false,
        Kind::Branch(_) if !insn.is_jcc_short_or_near() => return false,
        Kind::Jump if !insn.is_jmp_short_or_near() => return false,
        Kind::Call if !insn.is_call_near() => return false,
        Kind::JumpIndirect if !insn.is_jmp_near_indirect() => return false,
        Kind::CallIndirect if !insn.is_call_near_indirect() => return false,
        Kind::Branch(_) | Kind::Jump | Kind::Call | Kind::Counter => {
            return insn.op0_kind() == OpKind::NearBranch64;
        }
        Kind::Nop => return true,
        _ => {}
    }
    let Some(_) = insn.op_kinds().find(|&k| k == OpKind::Memory) else {
        return true;
    };
    let size = insn.memory_size().size();
    let known = |r: Register| r == Register::None || gpr_number(r).is_some();
    let base = insn.memory_base();
    let rip = matches!(base, Register::RIP | Register::EIP);
    (matches!(size, 1 | 2 | 4 | 8) || shape.kind == Kind::Lea)
        && (known(base) || rip)
        && known(insn.memory_index())
        && displacement(insn).is_some()
}

/// The width in bytes of `insn`'s address computation.
pub(super) fn address_width(insn: &Instruction) -> usize {
    match insn.memory_base().size().max(insn.memory_index().size()) {
        0 => insn.memory_displ_size().max(2) as usize,
        n => n,
    }
}

/// The displacement of `insn`'s memory operand, to be added to its registers or
/// to the page's address.
pub(super) fn displacement(insn: &Instruction) -> Option<i32> {
    let d = insn.memory_displacement64();
    match address_width(insn) {
        8 => i32::try_from(d as i64).ok(),
        4 => Some(d as u32 as i32),
        _ => None,
    }
}

/// What becomes of an instruction that may name AH, CH, DH or BH.
enum HighBytes {
    /// It does not.
    None,
    /// It can be copied as it is.
    Copy,
    /// It cannot be encoded with other registers.
    Impossible,
}

fn high_bytes(raw: &Raw<'_>, shape: &Shape) -> HighBytes {
    if raw.rex != 0 {
        return HighBytes::None;
    }
    let high = |n: u8| (4..8).contains(&n);
    match shape.kind {
        Kind::Low(_) if shape.byte_reg && high(raw.low()) => HighBytes::Copy,
        Kind::ModRm { reg, .. } => {
            let (Some(reg_number), rm) = (raw.reg(), raw.rm()) else {
                return HighBytes::Impossible;
            };
            let reg_high = reg.is_some() && shape.byte_reg && high(reg_number);
            let rm_high = shape.byte_rm && rm.is_some_and(high);
            if !reg_high && !rm_high {
                return HighBytes::None;
            }
            let stays = |n: u8| place(n) == Some(n);
            let reg_stays = reg.is_none() || reg_high || stays(reg_number);
            match rm {
                Some(n) if reg_stays && (rm_high || stays(n)) => HighBytes::Copy,
                _ => HighBytes::Impossible,
            }
        }
        _ => HighBytes::None,
    }
}
