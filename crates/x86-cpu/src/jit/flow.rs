//! Host code for branches, and for what follows a block.

use super::{
    code::{Cold, Exit, Flags, Translator},
    emit::{Jump, Mem, Opcode, Rm, cpu, mem},
    plan::Item,
    raw::Raw,
    registers::{SP, T0, T1, at, host, place},
    shape::Kind,
    stubs,
};

/// `jmp r11`.
const JUMP_T1: [u8; 3] = [0x41, 0xff, 0xe3];

impl Translator<'_> {
    /// Translates a branch, the last instruction of its block.
    pub(super) fn flow(&mut self, i: usize, item: &Item, raw: &Raw<'_>, kind: Kind) {
        match kind {
            Kind::Branch(condition) => self.branch(condition),
            Kind::Counter => {
                if raw.address32 {
                    self.e.bytes(&[0x67]);
                }
                // Over the jump that is made otherwise.
                self.e.bytes(&[raw.opcode, 5]);
                let otherwise = self.e.jump();
                self.edge(1, self.flags);
                self.e.bind(otherwise);
                self.edge(0, self.flags);
            }
            Kind::Jump => self.edge(1, self.flags),
            Kind::Call => self.call(i, item),
            Kind::Return => self.ret(i, item),
            Kind::JumpIndirect => self.jump_indirect(i, item, raw),
            _ => self.call_indirect(i, item, raw),
        }
    }

    fn branch(&mut self, condition: u8) {
        let taken = self.e.branch(condition);
        if self.in_page(1) && !self.backward(1) {
            // The branch itself goes to the successor, once there is one.
            self.link(1, taken, self.flags);
            self.edge(0, self.flags);
        } else {
            self.edge(0, self.flags);
            self.e.bind(taken);
            self.edge(1, self.flags);
        }
    }

    fn in_page(&self, which: usize) -> bool {
        (0..4096).contains(&self.targets[which])
    }

    /// Whether going there may close a loop: one that stays in a page has a step
    /// to an address not above its own.
    fn backward(&self, which: usize) -> bool {
        self.targets[which] <= self.plan.start as i64
    }

    fn link(&mut self, which: usize, jump: Jump, flags: Flags) {
        self.links[which] = self.e.site(jump) as u32;
        self.links_saved[which] = flags == Flags::Saved;
        self.exits.push(Exit { jump, which, flags });
    }

    fn exit(&mut self, jump: Jump, which: usize, flags: Flags) {
        self.exits.push(Exit { jump, which, flags });
    }

    /// Goes on to successor `which`, with the flags where `flags` says.
    pub(super) fn edge(&mut self, which: usize, flags: Flags) {
        if self.in_page(which) {
            let mut flags = flags;
            if self.backward(which) {
                if flags == Flags::Both {
                    flags = Flags::Saved;
                }
                self.poll(which, flags);
            }
            let jump = self.e.jump();
            self.link(which, jump, flags);
            return;
        }
        if flags == Flags::Host {
            self.e.save_flags(T1);
        }
        self.e.constant(T0, self.targets[which] as u64);
        // add r10, [page]
        self.e.modrm(Opcode::wide(&[0x03]), T0, cpu(at::PAGE_RIP));
        for jump in stubs::probe(self.e) {
            self.exit(jump, which, Flags::Saved);
        }
        stubs::set_page(self.e);
        self.e.bytes(&JUMP_T1);
    }

    /// Leaves towards successor `which` if somebody wants the vCPU's attention.
    fn poll(&mut self, which: usize, flags: Flags) {
        self.e.load(T0, cpu(at::REQUEST));
        let itself = self.targets[which] == self.plan.start as i64;
        if flags == Flags::Saved || itself && self.live() == 0 {
            self.e.arithmetic(false, 7, mem(T0, 0), 0);
            let wanted = self.e.branch(5);
            self.exit(wanted, which, flags);
            return;
        }
        // As above, but without touching the flags.
        self.e.load(T1, Rm::Reg(host::RCX));
        self.e.load32(host::RCX, mem(T0, 0));
        // jrcxz, over the next two
        self.e.bytes(&[0xe3, 8]);
        let before = self.e.position();
        self.e.load(host::RCX, Rm::Reg(T1));
        let wanted = self.e.jump();
        debug_assert_eq!(self.e.position() - before, 8);
        self.exit(wanted, which, flags);
        self.e.load(host::RCX, Rm::Reg(T1));
    }

    /// What goes wrong with item `i` is the interpreter's, which then leaves.
    fn give_up(&mut self, i: usize, jump: Jump) {
        self.cold.push(Cold {
            jump,
            item: i,
            resume: None,
        });
    }

    /// Stores the return address of `item` on the stack, with flags free.
    fn push_return(&mut self, i: usize, item: &Item) {
        self.e.offset(T0, SP, -8);
        let jump = self.check(8, true);
        self.give_up(i, jump);
        self.arrive();
        self.e.load(T1, cpu(at::PAGE_RIP));
        let next = i32::from(item.start) + item.insn.len() as i32;
        self.e.offset(T1, T1, next);
        self.e.store(mem(T0, 0), T1);
        self.e.offset(SP, SP, -8);
    }

    fn call(&mut self, i: usize, item: &Item) {
        self.keep_flags(item);
        self.push_return(i, item);
        self.edge(1, Flags::Saved);
    }

    fn ret(&mut self, i: usize, item: &Item) {
        self.keep_flags(item);
        self.e.load(T0, Rm::Reg(SP));
        let jump = self.check(8, false);
        self.give_up(i, jump);
        self.arrive();
        self.e.load(T0, mem(T0, 0));
        for jump in stubs::probe(self.e) {
            self.give_up(i, jump);
        }
        let popped = match item.insn.op_count() {
            0 => 8,
            _ => 8 + i32::from(item.insn.immediate16()),
        };
        self.e.offset(SP, SP, popped);
        stubs::set_page(self.e);
        self.e.bytes(&JUMP_T1);
    }

    /// Puts the target of an indirect branch into [`T0`], with flags free. Code
    /// that is in the jump cache lies at a canonical address.
    fn target(&mut self, i: usize, item: &Item, raw: &Raw<'_>) {
        match raw.rm() {
            Some(n) => match place(n) {
                Some(r) => self.e.load(T0, Rm::Reg(r)),
                None => self.e.load(T0, cpu(at::register(n))),
            },
            None => {
                self.address(&item.insn);
                let jump = self.check(8, false);
                self.give_up(i, jump);
                self.arrive();
                self.e.load(T0, mem(T0, 0));
            }
        }
    }

    fn jump_indirect(&mut self, i: usize, item: &Item, raw: &Raw<'_>) {
        self.keep_flags(item);
        self.target(i, item, raw);
        for jump in stubs::probe(self.e) {
            self.give_up(i, jump);
        }
        stubs::set_page(self.e);
        self.e.bytes(&JUMP_T1);
    }

    fn call_indirect(&mut self, i: usize, item: &Item, raw: &Raw<'_>) {
        self.keep_flags(item);
        self.target(i, item, raw);
        for jump in stubs::probe(self.e) {
            self.give_up(i, jump);
        }
        self.e.store(cpu(at::TARGET), T1);
        self.push_return(i, item);
        stubs::set_page(self.e);
        let target = Mem {
            base: Some(super::registers::CPU),
            index: None,
            disp: at::TARGET,
        };
        self.e.modrm(Opcode::narrow(&[0xff]), 4, Rm::Mem(target));
    }
}
