//! Host code for single instructions.

use iced_x86::{Instruction, OpKind, Register};

use super::{
    emit::{Emitter, Jump, Mem, Opcode, Rm, cpu, mem},
    plan::{Item, Plan, address_width, displacement},
    raw::Raw,
    registers::{SP, T0, T1, at, host, place},
    shape::{Kind, Role, Shape, flag},
    stubs::Stubs,
};
use crate::{
    cache::Block,
    mem::{ea::gpr_number, segment_number},
    state::seg,
    tlb,
};

/// Offsets in a TLB entry.
const TAG_READ: i32 = core::mem::offset_of!(tlb::TlbEntry, tag_r) as i32;
const TAG_WRITE: i32 = core::mem::offset_of!(tlb::TlbEntry, tag_w) as i32;
const TLB_HOST: i32 = core::mem::offset_of!(tlb::TlbEntry, host) as i32;
/// log2 of a TLB entry's size.
const ENTRY_BITS: u8 = size_of::<tlb::TlbEntry>().trailing_zeros() as u8;
const _: () = assert!(size_of::<tlb::TlbEntry>() == 1 << ENTRY_BITS);

/// A way out of line: the instruction is interpreted.
pub(super) struct Cold {
    pub(super) jump: Jump,
    /// Which instruction.
    pub(super) item: usize,
    /// Where to go on behind it; `None` if the interpreter always leaves.
    pub(super) resume: Option<usize>,
}

/// A way out of translated code by one of the block's two successors.
pub(super) struct Exit {
    pub(super) jump: Jump,
    pub(super) which: usize,
    pub(super) flags: Flags,
}

/// Where the guest's arithmetic flags are, as far as anybody needs them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flags {
    /// In the host's.
    Host,
    /// In [`Cpu::cc`](crate::state::Cpu::cc).
    Saved,
    /// In both.
    Both,
}

/// A block in translation.
pub(super) struct Translator<'a> {
    pub(super) e: &'a mut Emitter,
    pub(super) stubs: &'a Stubs,
    pub(super) plan: &'a Plan,
    pub(super) block: *const Block,
    /// Its successors.
    pub(super) targets: [i64; 2],
    pub(super) cold: alloc::vec::Vec<Cold>,
    pub(super) exits: alloc::vec::Vec<Exit>,
    /// Where the jumps to the successors have their displacements; 0 if there is
    /// none to aim anew.
    pub(super) links: [u32; 2],
    /// Those jumps are made with the flags in memory.
    pub(super) links_saved: [bool; 2],
    /// Where the flags are before the next host instruction.
    pub(super) flags: Flags,
}

impl Translator<'_> {
    /// Translates item `i`. `false` when the block has ended with it.
    pub(super) fn instruction(&mut self, i: usize) -> bool {
        let item = self.plan.items[i];
        let goes_on = self.execute(i, &item);
        let native = item.shape.is_some() || item.vector.is_some();
        if native && item.writes_flags {
            self.flags = Flags::Host;
        }
        goes_on
    }

    fn execute(&mut self, i: usize, item: &Item) -> bool {
        if let Some(v) = item.vector {
            self.vector(i, item, &v);
            let next = self.plan.items.get(i + 1).and_then(|n| n.vector);
            if v.is_vex() && !next.is_some_and(|n| n.is_vex()) {
                self.after_vex();
            }
            return true;
        }
        let (Some(shape), Some(raw)) = (item.shape, self.plan.raw(item)) else {
            self.interpret(i);
            return true;
        };
        let reaches = item.insn.op_kinds().any(|k| k == OpKind::Memory);
        if !reaches || shape.kind == Kind::Lea {
            self.take_flags(item);
        }
        if item.copied || shape.kind == Kind::Fence {
            let at = usize::from(item.start) - self.plan.start;
            let bytes = &self.plan.bytes[at..at + item.insn.len()];
            self.e.bytes(bytes);
            return true;
        }
        match shape.kind {
            Kind::Nop => {}
            Kind::Verbatim => {
                if raw.operand16 {
                    self.e.bytes(&[0x66]);
                }
                if raw.wide() {
                    self.e.bytes(&[0x48]);
                }
                self.e.bytes(&[raw.opcode]);
                self.e.bytes(raw.tail());
            }
            Kind::ModRm { reg, rm } => self.modrm(i, item, &raw, &shape, reg, rm),
            Kind::Lea => self.lea(&item.insn, &raw),
            Kind::Low(role) => self.low(&raw, role, shape.byte_reg),
            Kind::ExchangeRax => self.exchange_rax(&raw),
            Kind::Push | Kind::PushImmediate => self.push(i, item, &raw, shape.kind),
            Kind::Pop => self.pop(i, item, &raw),
            Kind::Leave => self.leave(i, item),
            Kind::Divide(signed) => self.divide(i, item, &raw, signed),
            _ => {
                self.flow(i, item, &raw, shape.kind);
                return false;
            }
        }
        true
    }

    /// The interpreter executes item `i`, in line.
    fn interpret(&mut self, i: usize) {
        let item = &self.plan.items[i];
        let last = i + 1 == self.plan.items.len();
        if last {
            self.name_block();
        }
        self.e.constant(T0, item.uop as u64);
        let gate = if item.live == 0 || self.flags != Flags::Host {
            self.stubs.gate
        } else {
            self.stubs.gate_flags
        };
        self.e.call_to(gate);
        self.flags = Flags::Both;
    }

    /// Sees, where the block begins, that the host's unit has the guest's MXCSR.
    pub(super) fn load_mxcsr(&mut self) {
        if self.live() != 0 {
            self.e.save_flags(T1);
        }
        self.flags = Flags::Saved;
        self.e.arithmetic(false, 7, cpu(at::MXCSR_LIVE), 0);
        let loaded = self.e.branch(5);
        self.name_block();
        self.e.call_to(self.stubs.load_mxcsr);
        self.e.bind(loaded);
    }

    /// Says which block may be left, by way of [`T0`].
    pub(super) fn name_block(&mut self) {
        self.e.constant(T0, self.block as u64);
        self.e.store(cpu(at::BLOCK), T0);
    }

    /// The host register with guest register `n`: its own, or `temporary`, with
    /// its value if `load`.
    pub(super) fn fetch(&mut self, n: u8, temporary: u8, load: bool) -> u8 {
        place(n).unwrap_or_else(|| {
            if load {
                self.e.load(temporary, cpu(at::register(n)));
            }
            temporary
        })
    }

    /// Stores what [`Self::fetch`] gave, if it was a temporary.
    pub(super) fn put_back(&mut self, n: u8, from: u8) {
        if place(n).is_none() {
            self.e.store(cpu(at::register(n)), from);
        }
    }

    /// The address of `insn`'s memory operand as a host operand, without
    /// segment; may use both temporaries.
    fn operand(&mut self, insn: &Instruction) -> Mem {
        let base = match insn.memory_base() {
            Register::None => None,
            Register::RIP | Register::EIP => {
                self.e.load(T0, cpu(at::PAGE_RIP));
                Some(T0)
            }
            r => gpr_number(r).map(|n| self.fetch(n as u8, T0, true)),
        };
        let index = gpr_number(insn.memory_index()).map(|n| {
            let scale = insn.memory_index_scale().trailing_zeros() as u8;
            (self.fetch(n as u8, T1, true), scale)
        });
        Mem {
            base,
            index: index.filter(|_| insn.memory_index() != Register::None),
            // The plan has seen that there is one.
            disp: displacement(insn).unwrap_or(0),
        }
    }

    /// Puts the linear address of `insn`'s memory operand into [`T0`]. Flags are
    /// free.
    pub(super) fn address(&mut self, insn: &Instruction) {
        let m = self.operand(insn);
        let wide = address_width(insn) == 8;
        match m {
            Mem {
                base: Some(base),
                index: None,
                disp: 0,
            } if wide => {
                if base != T0 {
                    self.e.load(T0, Rm::Reg(base));
                }
            }
            m => self.e.lea(T0, m, wide),
        }
        let segment = segment_number(insn.memory_segment());
        if segment >= seg::FS {
            // add r10, [base]
            self.e
                .modrm(Opcode::wide(&[0x03]), T0, cpu(at::segment(segment)));
        }
    }

    /// Checks the linear address in [`T0`] for an access of `size` bytes. Behind
    /// it, T0 is the offset in the page and [`T1`] the TLB entry; the jump is for
    /// everything but a hit.
    pub(super) fn check(&mut self, size: usize, write: bool) -> Jump {
        let e = &mut *self.e;
        e.load32(T1, Rm::Reg(T0));
        // shr r11d, …; and r11d, …
        e.bytes(&[0x41, 0xc1, 0xeb, 12 - ENTRY_BITS]);
        let mask = ((tlb::TLB_SIZE - 1) << ENTRY_BITS) as i32;
        e.arithmetic(false, 4, Rm::Reg(T1), mask);
        // add r11, [tlb]; xor r10, [r11 + tag]
        e.modrm(Opcode::wide(&[0x03]), T1, cpu(at::TLB));
        let tag = if write { TAG_WRITE } else { TAG_READ };
        e.modrm(Opcode::wide(&[0x33]), T0, mem(T1, tag));
        // One comparison for tag, page crossing and canonical form: see `tlb`.
        e.arithmetic(true, 7, Rm::Reg(T0), 4096 - size as i32);
        e.branch(7)
    }

    /// After a hit, with flags free: the host address in [`T0`].
    pub(super) fn arrive(&mut self) {
        self.e.modrm(Opcode::wide(&[0x03]), T0, mem(T1, TLB_HOST));
    }

    /// The host address of an access at the linear address in [`T0`]; takes back
    /// the flags that `item` needs, which [`Self::keep_flags`] has put away.
    fn reach(&mut self, i: usize, item: &Item, size: usize, write: bool) {
        self.reach_aligned(i, item, size, write, 0);
    }

    /// As [`Self::reach`], for an address with no bit of `mask`.
    pub(super) fn reach_aligned(
        &mut self,
        i: usize,
        item: &Item,
        size: usize,
        write: bool,
        mask: u8,
    ) {
        let jump = self.check(size, write);
        let cold = |jump| Cold {
            jump,
            item: i,
            resume: None,
        };
        self.cold.push(cold(jump));
        if mask != 0 {
            // test r10b, …
            self.e.bytes(&[0x41, 0xf6, 0xc2, mask]);
            let jump = self.e.branch(5);
            self.cold.push(cold(jump));
        }
        self.arrive();
        self.take_flags(item);
    }

    /// Puts the flags away if anything needs them as they are before `item`: the
    /// host's are about to be clobbered.
    pub(super) fn keep_flags(&mut self, item: &Item) {
        if item.live != 0 && self.flags == Flags::Host {
            self.e.save_flags(T1);
        }
        self.flags = Flags::Saved;
    }

    /// Takes the flags back, by way of [`T1`], if `item` looks at them or changes
    /// only some.
    fn take_flags(&mut self, item: &Item) {
        let concerned = item.reads_flags || item.writes_flags;
        if concerned && item.live != 0 && self.flags == Flags::Saved {
            self.e.restore_flags(T1);
            self.flags = Flags::Both;
        }
    }

    /// The interpreted way joins here.
    pub(super) fn rejoin(&mut self, i: usize) {
        let here = self.e.position();
        let mine = self.cold.iter_mut().rev().take_while(|c| c.item == i);
        for cold in mine {
            cold.resume = Some(here);
        }
    }

    fn modrm(
        &mut self,
        i: usize,
        item: &Item,
        raw: &Raw<'_>,
        shape: &Shape,
        reg: Option<Role>,
        rm: Role,
    ) {
        let narrow = raw.operand16 && !raw.wide();
        let loads = |role: Role, byte: bool| role != Role::Write || byte || narrow;
        let reg_number = raw.reg().unwrap_or(0);
        let rm_number = raw.rm();
        let to = match rm_number {
            None => {
                let size = item.insn.memory_size().size();
                self.keep_flags(item);
                self.address(&item.insn);
                // XCHG and the locked instructions write whatever they find.
                self.reach(i, item, size, rm.writes());
                mem(T0, 0)
            }
            Some(n) => Rm::Reg(self.fetch(n, T0, loads(rm, shape.byte_rm))),
        };
        let same = rm_number == Some(reg_number) && place(reg_number).is_none();
        let field = match reg {
            None => reg_number & 7,
            Some(role) if same => {
                // Both are the same temporary.
                if !loads(rm, shape.byte_rm) && loads(role, shape.byte_reg) {
                    self.e.load(T0, cpu(at::register(reg_number)));
                }
                T0
            }
            Some(role) => self.fetch(reg_number, T1, loads(role, shape.byte_reg)),
        };
        if raw.operand16 {
            self.e.bytes(&[0x66]);
        }
        let escaped = [0x0f, raw.opcode];
        let op = Opcode {
            prefix: raw.repeat,
            lock: raw.lock,
            wide: raw.wide(),
            rex: raw.rex != 0,
            bytes: match raw.map {
                super::raw::Map::One => &escaped[1..],
                _ => &escaped,
            },
        };
        self.e.modrm(op, field, to);
        self.e.bytes(raw.immediate().unwrap_or(&[]));
        if let (Rm::Reg(r), Some(n)) = (to, rm_number)
            && (rm.writes() || same && reg.is_some_and(Role::writes))
        {
            self.put_back(n, r);
        }
        if let Some(role) = reg
            && role.writes()
            && !same
        {
            self.put_back(reg_number, field);
        }
        if rm_number.is_none() {
            self.rejoin(i);
        }
    }

    fn lea(&mut self, insn: &Instruction, raw: &Raw<'_>) {
        let n = raw.reg().unwrap_or(0);
        let from = self.operand(insn);
        let to = place(n).unwrap_or(T0);
        self.e.lea(to, from, raw.wide());
        self.put_back(n, to);
    }

    fn low(&mut self, raw: &Raw<'_>, role: Role, byte: bool) {
        let n = raw.low();
        let narrow = raw.operand16 && !raw.wide();
        let r = self.fetch(n, T0, role != Role::Write || byte || narrow);
        if raw.operand16 {
            self.e.bytes(&[0x66]);
        }
        let rex = u8::from(raw.wide()) << 3 | r >> 3;
        if rex != 0 || raw.rex != 0 {
            self.e.bytes(&[0x40 | rex]);
        }
        if raw.map == super::raw::Map::Two {
            self.e.bytes(&[0x0f]);
        }
        self.e.bytes(&[raw.opcode & !7 | r & 7]);
        self.e.bytes(raw.tail());
        self.put_back(n, r);
    }

    fn exchange_rax(&mut self, raw: &Raw<'_>) {
        let n = raw.low();
        let r = self.fetch(n, T0, true);
        if raw.operand16 {
            self.e.bytes(&[0x66]);
        }
        let op = if raw.wide() {
            Opcode::wide(&[0x87])
        } else {
            Opcode::narrow(&[0x87])
        };
        self.e.modrm(op, host::RAX, Rm::Reg(r));
        self.put_back(n, r);
    }

    fn push(&mut self, i: usize, item: &Item, raw: &Raw<'_>, kind: Kind) {
        self.keep_flags(item);
        self.e.offset(T0, SP, -8);
        self.reach(i, item, 8, true);
        if kind == Kind::Push {
            let r = self.fetch(raw.low(), T1, true);
            self.e.store(mem(T0, 0), r);
        } else {
            let value = match item.insn.op0_kind() {
                OpKind::Immediate8to64 => item.insn.immediate8to64() as i32,
                _ => item.insn.immediate32to64() as i32,
            };
            // mov qword [r10], …
            self.e.modrm(Opcode::wide(&[0xc7]), 0, mem(T0, 0));
            self.e.bytes(&value.to_le_bytes());
        }
        self.e.offset(SP, SP, -8);
        self.rejoin(i);
    }

    fn pop(&mut self, i: usize, item: &Item, raw: &Raw<'_>) {
        let n = raw.low();
        self.keep_flags(item);
        self.e.load(T0, Rm::Reg(SP));
        self.reach(i, item, 8, false);
        let to = place(n).unwrap_or(T1);
        self.e.load(to, mem(T0, 0));
        if to != SP {
            self.e.offset(SP, SP, 8);
        }
        self.put_back(n, to);
        self.rejoin(i);
    }

    fn leave(&mut self, i: usize, item: &Item) {
        self.keep_flags(item);
        self.e.load(T0, Rm::Reg(host::RBP));
        self.reach(i, item, 8, false);
        self.e.load(T1, mem(T0, 0));
        self.e.offset(SP, host::RBP, 8);
        self.e.load(host::RBP, Rm::Reg(T1));
        self.rejoin(i);
    }

    /// A division that cannot overflow, as far as that is seen quickly; the others
    /// are the interpreter's.
    fn divide(&mut self, i: usize, item: &Item, raw: &Raw<'_>, signed: bool) {
        let wide = raw.wide();
        let op = |bytes| Opcode {
            wide,
            ..Opcode::narrow(bytes)
        };
        self.keep_flags(item);
        match raw.rm() {
            Some(n) => match place(n) {
                Some(r) => self.e.load(T0, Rm::Reg(r)),
                None => self.e.load(T0, cpu(at::register(n))),
            },
            None => {
                self.address(&item.insn);
                self.reach(i, item, if wide { 8 } else { 4 }, false);
                self.e.modrm(op(&[0x8b]), T0, mem(T0, 0));
            }
        }
        let cold = |jump| Cold {
            jump,
            item: i,
            resume: None,
        };
        if signed {
            // The upper half is the sign, and the divisor neither 0 nor -1.
            let next = Mem {
                base: Some(T0),
                index: None,
                disp: 1,
            };
            self.e.lea(T1, next, wide);
            self.e.arithmetic(wide, 7, Rm::Reg(T1), 1);
            let jump = self.e.branch(6);
            self.cold.push(cold(jump));
            self.e.modrm(op(&[0x8b]), T1, Rm::Reg(host::RAX));
            // sar r11, 63
            self.e.modrm(op(&[0xc1]), 7, Rm::Reg(T1));
            self.e.bytes(&[if wide { 63 } else { 31 }]);
            self.e.modrm(op(&[0x3b]), T1, Rm::Reg(host::RDX));
            let jump = self.e.branch(5);
            self.cold.push(cold(jump));
        } else {
            // The upper half is less than the divisor.
            self.e.modrm(op(&[0x3b]), host::RDX, Rm::Reg(T0));
            let jump = self.e.branch(3);
            self.cold.push(cold(jump));
        }
        self.e.modrm(op(&[0xf7]), 6 + u8::from(signed), Rm::Reg(T0));
        self.rejoin(i);
    }

    /// Everything that lies out of line.
    pub(super) fn finish(&mut self) {
        for cold in core::mem::take(&mut self.cold) {
            self.e.bind(cold.jump);
            if cold.item + 1 == self.plan.items.len() {
                self.name_block();
            }
            let uop = self.plan.items[cold.item].uop;
            self.e.constant(T0, uop as u64);
            self.e.call_to(self.stubs.gate);
            match cold.resume {
                Some(position) => self.e.jump_to(position),
                // ud2: the interpreter does not come back from a branch.
                None => self.e.bytes(&[0x0f, 0x0b]),
            }
        }
        for exit in core::mem::take(&mut self.exits) {
            self.e.bind(exit.jump);
            self.name_block();
            self.e.constant32(T0, exit.which as u32);
            let stub = match exit.flags {
                Flags::Host => self.stubs.exit_flags,
                Flags::Saved | Flags::Both => self.stubs.exit,
            };
            self.e.jump_to(stub);
        }
    }

    /// Flags that must be right where the block begins.
    pub(super) fn live(&self) -> u16 {
        self.plan.items.first().map_or(flag::ALL, |i| i.live)
    }
}
