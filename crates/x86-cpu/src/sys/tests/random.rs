//! Random instructions in random states: nothing panics, and an instruction
//! that faults leaves the registers as they were.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

use super::*;
use crate::{
    env::Env,
    flags,
    flow::Flow,
    state::{Activity, cr4, reg},
    sys,
    testenv::{CODE, IDT, RAM, TABLES},
};

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// An address or value that is often near something interesting.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.next(),
            1 => self.next() & 0xffff_ffff,
            2 => self.below(RAM as u64 + 0x2000),
            3 => (1 << 47) - self.below(16),
            4 => 0u64.wrapping_sub(self.below(32)),
            5 => GDT + self.below(0x100),
            6 => self.below(0x80),
            _ => STACK - self.below(64),
        }
    }
    fn selector(&mut self) -> u64 {
        self.below(0x60)
    }
}

fn machine(r: &mut Random) -> Machine {
    let cpl = if r.below(2) == 0 { 0 } else { 3 };
    match r.below(4) {
        0 | 1 => Machine::long_mode(cpl),
        2 => Machine::protected_mode(cpl),
        _ => Machine::new(),
    }
}

/// Fills tables, registers and the stack; the machine stays one that fetches.
fn shuffle(m: &mut Machine, r: &mut Random) {
    for i in 0..6u16 {
        let attributes = r.next() as u16 | if r.below(2) == 0 { 0x93 } else { 0 };
        let limit = if r.below(2) == 0 { !0 } else { 0x67 };
        let d = descriptor(r.below(RAM as u64) as u32, limit, attributes);
        // Sometimes any bit pattern: gates to anywhere.
        let d = if r.below(3) == 0 { r.next() } else { d };
        m.set_descriptor(sel::FREE + 8 * i, d);
    }
    for v in 0..4u64 {
        let gate = r.next() & !(0xffff << 16) | r.selector() << 16;
        m.write_u64(IDT + 8 * v, gate);
    }
    for i in 0..16 {
        m.cpu.regs[i] = r.value();
    }
    if r.below(2) == 0 {
        m.cpu.regs[reg::RAX] = r.selector();
    }
    if r.below(4) != 0 {
        m.cpu.regs[reg::RSP] = STACK - 8 * r.below(8);
    }
    for i in 0..32 {
        let v = if r.below(2) == 0 {
            r.selector()
        } else {
            r.value()
        };
        m.write_u64(STACK - 64 + 8 * i, v);
    }
    m.cpu.rip = CODE;
    let allowed = if m.cpu.is_long() || !m.cpu.is_protected() {
        flags::SYSTEM_MASK & !flags::VM
    } else {
        flags::SYSTEM_MASK
    };
    let image = r.next() & (allowed | flags::ARITHMETIC_MASK);
    m.cpu.set_rflags(image);
    if m.cpu.is_protected() && m.cpu.is_v86() {
        m.cpu.cpl = 3;
        for s in seg::ES..=seg::GS {
            m.cpu.segments[s] = Segment::v86(r.below(0x8000) as u16);
        }
    }
    if m.cpu.is_long() {
        m.cpu.cr4 |= r.next() & (cr4::SMAP | cr4::UMIP | cr4::TSD | cr4::FSGSBASE | cr4::PCIDE);
    }
    m.cpu.update_mode();
}

/// Every code that the module executes, once.
fn codes() -> impl Iterator<Item = Code> {
    Code::values().filter(|&c| sys::handles(c))
}

/// Bytes that decode to something handled, found by trying.
fn instruction(r: &mut Random, bits: u32) -> Instruction {
    loop {
        let mut bytes = [0; 15];
        for b in &mut bytes {
            *b = r.next() as u8;
        }
        let start = r.below(3) as usize;
        bytes[start] = match r.below(3) {
            0 => bytes[start],
            _ => 0x0f,
        };
        for b in &mut bytes[..start] {
            *b = [0x66, 0x67, 0x48, 0x2e, 0xf3][r.below(5) as usize];
        }
        // The interesting rows: segment loads, far transfers, system groups.
        if bytes[start] == 0x0f && r.below(2) == 0 {
            let rows = [
                0, 1, 2, 3, 5, 6, 7, 0x20, 0x21, 0x22, 0x23, 0x30, 0x32, 0x34, 0x35,
            ];
            bytes[start + 1] = rows[r.below(rows.len() as u64) as usize];
        }
        let insn = Decoder::with_ip(bits, &bytes, CODE, DecoderOptions::NONE).decode();
        if !insn.is_invalid() && sys::handles(insn.code()) {
            return insn;
        }
    }
}

#[test]
fn faults_change_nothing_and_nothing_panics() {
    let mut r = Random(0x9e37_79b9_7f4a_7c15);
    let (mut faults, mut successes) = (0, 0);
    for _ in 0..30 {
        let mut m = machine(&mut r);
        let (pristine_segments, tables) = (m.cpu.segments, (m.cpu.gdtr, m.cpu.idtr));
        let (cr0, cr3, cr4, efer) = (m.cpu.cr0, m.cpu.cr3, m.cpu.cr4, m.cpu.efer);
        let (cpl, tss) = (m.cpu.cpl, m.read(GDT + u64::from(sel::TSS), 8));
        for _ in 0..4000 {
            m.cpu.segments = pristine_segments;
            (m.cpu.gdtr, m.cpu.idtr) = tables;
            (m.cpu.cr0, m.cpu.cr3, m.cpu.cr4, m.cpu.efer) = (cr0, cr3, cr4, efer);
            (m.cpu.cpl, m.cpu.dr7) = (cpl, 0x400);
            m.cpu.activity = Activity::Running;
            m.write_u64(GDT + u64::from(sel::TSS), tss);
            if m.read(TABLES, 8) & 1 == 0 && m.cpu.is_long() {
                // The guest has overwritten its own page tables.
                break;
            }
            shuffle(&mut m, &mut r);
            let bits = m.bitness();
            let insn = instruction(&mut r, bits);
            m.cpu.replay.begin_instruction();
            let tr = m.cpu.segments[seg::TR].selector;
            let before = (
                m.cpu.regs,
                m.cpu.rip,
                m.cpu.rflags(),
                m.cpu.segments,
                m.cpu.cpl,
            );
            let system = (m.cpu.cr0, m.cpu.cr3, m.cpu.cr4, m.cpu.efer, m.cpu.msr);
            match sys::exec(&mut m.cpu, &insn) {
                Ok(flow) => {
                    successes += 1;
                    assert!(flow == Flow::Jump || m.cpu.rip == CODE, "{:?}", insn.code());
                }
                Err(f) => {
                    faults += 1;
                    // A fault inside a new task belongs to that task.
                    if m.cpu.segments[seg::TR].selector == tr {
                        let after = (
                            m.cpu.regs,
                            m.cpu.rip,
                            m.cpu.rflags(),
                            m.cpu.segments,
                            m.cpu.cpl,
                        );
                        assert_eq!(before, after, "{:?} {f:?}", insn.code());
                        let after = (m.cpu.cr0, m.cpu.cr3, m.cpu.cr4, m.cpu.efer, m.cpu.msr);
                        assert_eq!(system, after, "{:?} {f:?}", insn.code());
                    }
                    if let Fault::Exception(e) = f {
                        let r = sys::deliver_exception(&mut m.cpu, e);
                        assert!(matches!(r, Ok(()) | Err(Fault::Shutdown)), "{r:?}");
                    }
                }
            }
        }
    }
    assert!(
        faults > 10_000 && successes > 10_000,
        "{faults} {successes}"
    );
}

#[test]
fn what_is_not_offered_is_not_handled() {
    for c in codes() {
        let name = alloc::format!("{c:?}");
        for absent in [
            "Vm", "Sm_", "Rsm", "Monitor", "Mwait", "Encl", "Skinit", "Xbegin",
        ] {
            assert!(!name.starts_with(absent), "{name}");
        }
    }
    assert!(codes().count() > 150);
    // The answers of the environment are never trusted to be bounded.
    let mut m = Machine::long_mode(0);
    m.env().cpuid.insert((0xd, 0), [!0; 4]);
    m.env().cpuid.insert((0xd, 5), [!0; 4]);
    m.cpu.xcr0 = !0;
    m.cpu.regs[reg::RAX] = 0xd;
    m.cpu.regs[reg::RCX] = 0;
    assert_eq!(m.run(&[0x0f, 0xa2]), Ok(Flow::Next));
    assert_eq!(m.env().cpuid(0xd, 5), [!0; 4]);
}
