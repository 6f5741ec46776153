use super::*;
use crate::{flow::Flow, state::reg, testenv::CODE};

fn machine() -> Machine {
    let mut m = Machine::protected_mode(0);
    m.cpu.rip = CODE;
    m
}

/// AX and flags (without the undefined ones) after an adjustment.
fn adjust(insn: &[u8], ax: u64, flags_in: u64, mask: u64) -> (u64, u64) {
    let mut m = machine();
    m.cpu.regs[reg::RAX] = ax;
    m.cpu.set_rflags(flags_in | 2);
    m.run(insn).unwrap();
    (m.cpu.regs[reg::RAX], m.cpu.rflags() & mask)
}

const CF: u64 = 1;
const AF: u64 = 0x10;

#[test]
fn decimal_adjustment() {
    // The manual's examples: 79h + 35h = AEh, adjusted 114h.
    assert_eq!(adjust(&[0x27], 0xae, 0x84, CF | AF), (0x14, CF | AF));
    // 35h - 47h = EEh, adjusted 88h.
    assert_eq!(adjust(&[0x2f], 0xee, 0x95, CF | AF), (0x88, CF | AF));
    assert_eq!(adjust(&[0x27], 0x15, 0, CF | AF), (0x15, 0));
    assert_eq!(
        adjust(&[0x2f], 0x03, AF, CF | AF),
        (0xfd, CF | AF),
        "borrow"
    );
    assert_eq!(adjust(&[0x37], 0x0f, 0, CF | AF), (0x105, CF | AF));
    assert_eq!(adjust(&[0x3f], 0x20f, 0, CF | AF), (0x109, CF | AF));
    assert_eq!(adjust(&[0xd4, 10], 73, 0, 0xc4), (0x703, 4));
    assert_eq!(adjust(&[0xd5, 10], 0x703, 0, 0xc4), (73, 0));
    assert_eq!(machine().run(&[0xd4, 0]), Err(Fault::simple(vector::DE)));
}

#[test]
fn all_registers_at_once() {
    let mut m = machine();
    for i in 0..8 {
        m.cpu.regs[i] = 0x1111_1111 * i as u64;
    }
    m.cpu.regs[reg::RSP] = STACK;
    let before = m.cpu.regs;
    assert_eq!(m.run(&[0x60]), Ok(Flow::Next));
    assert_eq!(m.cpu.regs[reg::RSP], STACK - 32);
    assert_eq!(m.read(STACK - 20, 4), STACK);
    m.cpu.regs[..4].fill(0);
    assert_eq!(m.run(&[0x61]), Ok(Flow::Next));
    assert_eq!(m.cpu.regs, before);
    // No room: nothing changes.
    m.set_descriptor(sel::FREE, descriptor(0, 0xfff, 0x4092));
    m.cpu.segments[seg::SS].limit = 0xfff;
    m.cpu.regs[reg::RSP] = 16;
    assert_eq!(m.run(&[0x60]), Err(Fault::ss(0)));
    assert_eq!(m.cpu.regs[reg::RSP], 16);
}

#[test]
fn nested_frames() {
    let mut m = machine();
    m.cpu.regs[reg::RBP] = 0x5_0000;
    m.write_u32(0x4_fffc, 0xaaaa);
    // enter 0x20, 2
    assert_eq!(m.run(&[0xc8, 0x20, 0, 2]), Ok(Flow::Next));
    assert_eq!(m.cpu.regs[reg::RBP], STACK - 4);
    assert_eq!(m.cpu.regs[reg::RSP], STACK - 12 - 0x20);
    assert_eq!(m.read(STACK - 4, 4), 0x5_0000);
    assert_eq!(m.read(STACK - 8, 4), 0xaaaa);
    assert_eq!(m.read(STACK - 12, 4), STACK - 4);
    assert_eq!(m.run(&[0xc9]), Ok(Flow::Next));
    assert_eq!(
        (m.cpu.regs[reg::RSP], m.cpu.regs[reg::RBP]),
        (STACK, 0x5_0000)
    );
}

#[test]
fn bounds_and_translation() {
    let mut m = machine();
    m.cpu.regs[reg::RBX] = 0x9000;
    m.write_u32(0x9000, -5i32 as u32);
    m.write_u32(0x9004, 7);
    for (index, ok) in [(-5i64, true), (7, true), (-6, false), (8, false)] {
        m.cpu.regs[reg::RCX] = index as u64 & 0xffff_ffff;
        let want = if ok {
            Ok(Flow::Next)
        } else {
            Err(Fault::simple(vector::BR))
        };
        assert_eq!(m.run(&[0x62, 0x0b]), want);
    }
    m.cpu.regs[reg::RAX] = 0xabcd_ef04;
    assert_eq!(m.run(&[0xd7]), Ok(Flow::Next));
    assert_eq!(m.cpu.regs[reg::RAX], 0xabcd_ef07);
    m.cpu.set_rflags(3);
    m.run(&[0xd6]).unwrap();
    assert_eq!(m.cpu.regs[reg::RAX], 0xabcd_efff);
}

#[test]
fn overflow_trap() {
    let mut m = machine();
    m.set_gate(4, sel::CODE0, 0x1000, 0xe, 0, 0);
    assert_eq!(m.run(&[0xce]), Ok(Flow::Next));
    m.cpu.set_rflags(0x802);
    assert_eq!(m.run(&[0xce]), Ok(Flow::Jump));
    assert_eq!(frame::<1>(&mut m, 4), [CODE + 2]);
}
