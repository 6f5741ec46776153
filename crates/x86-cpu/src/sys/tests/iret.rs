use super::*;
use crate::{
    flags,
    flow::Flow,
    state::{Segment, reg},
    testenv::CODE,
};

const IRETQ: &[u8] = &[0x48, 0xcf];
const IRETD: &[u8] = &[0xcf];

fn push_frame(m: &mut Machine, words: &[u64], size: u64) {
    let sp = m.cpu.regs[reg::RSP] - words.len() as u64 * size;
    for (i, w) in words.iter().enumerate() {
        m.write(sp + i as u64 * size, &w.to_le_bytes()[..size as usize]);
    }
    m.cpu.regs[reg::RSP] = sp;
}

fn long() -> Machine {
    let mut m = Machine::long_mode(0);
    m.cpu.rip = CODE;
    m
}

#[test]
fn to_user_mode() {
    let mut m = long();
    m.cpu.nmi_masked = true;
    m.cpu.segments[seg::FS].base = 0x40_0000;
    m.cpu.segments[seg::GS] = Segment {
        base: 0x1234_5678_9000,
        unusable: true,
        ..Segment::default()
    };
    let image = flags::IF | flags::RF | flags::AC | 3;
    let (cs, ss) = (u64::from(sel::CODE3), u64::from(sel::DATA3));
    push_frame(&mut m, &[0x40_0000, cs, image, 0x50_0001, ss], 8);
    assert_eq!(m.run(IRETQ), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.cpl), (0x40_0000, 3));
    assert_eq!((m.cpu.rflags(), m.cpu.regs[reg::RSP]), (image, 0x50_0001));
    assert!(!m.cpu.nmi_masked);
    // Level-0 data segments are gone; the bases that 64-bit mode uses are not.
    let fs = m.cpu.segments[seg::FS];
    assert!(fs.unusable && fs.selector == 0 && fs.base == 0x40_0000);
    assert!(m.cpu.segments[seg::DS].unusable);
    assert_eq!(m.cpu.segments[seg::GS].base, 0x1234_5678_9000);
    assert!(!m.cpu.segments[seg::SS].unusable);
}

#[test]
fn same_level_pops_the_stack_in_64_bit_mode() {
    let mut m = long();
    push_frame(
        &mut m,
        &[0x40_0000, u64::from(sel::CODE0), 2, 0x7_7777, 0],
        8,
    );
    assert_eq!(m.run(IRETQ), Ok(Flow::Jump));
    assert_eq!(m.cpu.regs[reg::RSP], 0x7_7777);
    assert!(m.cpu.segments[seg::SS].unusable);
}

#[test]
fn user_cannot_raise_flags() {
    let mut m = Machine::long_mode(3);
    m.cpu.rip = CODE;
    let (cs, ss) = (u64::from(sel::CODE3), u64::from(sel::DATA3));
    let image = flags::IF | flags::IOPL | flags::NT | flags::VIF | flags::VIP | 2;
    push_frame(&mut m, &[CODE, cs, image, STACK, ss], 8);
    assert_eq!(m.run(IRETQ), Ok(Flow::Jump));
    assert_eq!(m.cpu.rflags(), flags::NT | 2);
    assert_eq!(m.run(IRETQ), Err(Fault::gp(0)), "NT in IA-32e mode");
}

#[test]
fn faults_leave_everything_in_place() {
    let check = |words: [u64; 5], want: Fault| {
        let mut m = long();
        m.set_descriptor(sel::FREE, descriptor(0, !0, 0xa07b));
        m.set_descriptor(sel::FREE + 8, descriptor(0, !0, 0xc073));
        m.set_descriptor(sel::FREE + 16, descriptor(0, !0, 0xe0fb));
        push_frame(&mut m, &words, 8);
        let before = (
            m.cpu.rip,
            m.cpu.regs,
            m.cpu.segments,
            m.cpu.rflags(),
            m.cpu.cpl,
        );
        assert_eq!(m.run(IRETQ), Err(want), "{words:x?}");
        assert_eq!(
            (
                m.cpu.rip,
                m.cpu.regs,
                m.cpu.segments,
                m.cpu.rflags(),
                m.cpu.cpl
            ),
            before
        );
    };
    let (cs, ss) = (u64::from(sel::CODE3), u64::from(sel::DATA3));
    let free = u64::from(sel::FREE) | 3;
    check([CODE, 0, 2, STACK, ss], Fault::gp(0));
    check([CODE, 0xfffb, 2, STACK, ss], Fault::gp(0xfff8));
    check([CODE, ss, 2, STACK, ss], Fault::gp(0x20));
    check([CODE, 0xb, 2, STACK, ss], Fault::gp(8));
    check([CODE, free, 2, STACK, ss], Fault::np(sel::FREE.into()));
    check(
        [CODE, free + 16, 2, STACK, ss],
        Fault::gp(u32::from(sel::FREE) + 16),
    );
    check([CODE, cs, 2, STACK, 0], Fault::gp(0));
    check([CODE, cs, 2, STACK, 3], Fault::gp(0));
    check([CODE, cs, 2, STACK, 0x10], Fault::gp(0x10));
    check([CODE, cs, 2, STACK, 0xfffb], Fault::gp(0xfff8));
    check(
        [CODE, cs, 2, STACK, free + 8],
        Fault::ss(u32::from(sel::FREE) + 8),
    );
    check([1 << 47, cs, 2, STACK, ss], Fault::gp(0));
}

#[test]
fn stack_that_is_not_there() {
    let mut m = long();
    m.cpu.regs[reg::RSP] = 0x50_0000;
    assert_eq!(m.run(IRETQ), Err(Fault::page(0, 0x50_0000)));
    m.cpu.regs[reg::RSP] = 1 << 47;
    assert_eq!(m.run(IRETQ), Err(Fault::ss(0)));
}

#[test]
fn to_compatibility_mode_and_16_bit_stacks() {
    let mut m = long();
    m.set_descriptor(sel::FREE, descriptor(0, !0, 0xc0fb));
    m.set_descriptor(sel::FREE + 8, descriptor(0, 0xffff, 0x00f3));
    let (cs, ss) = (u64::from(sel::FREE) | 3, (u64::from(sel::FREE) + 8) | 3);
    m.cpu.regs[reg::RSP] = 0x12_0000;
    push_frame(&mut m, &[0x1234, cs, 2, 0xffff_8000, ss], 8);
    let kernel = m.cpu.regs[reg::RSP];
    assert_eq!(m.run(IRETQ), Ok(Flow::Jump));
    assert!(!m.cpu.is_64bit() && m.cpu.is_long());
    // Only SP is loaded: the upper half is the kernel's.
    assert_eq!(m.cpu.regs[reg::RSP], kernel & !0xffff | 0x8000);
}

#[test]
fn protected_mode_same_and_outer_level() {
    let mut m = Machine::protected_mode(0);
    m.cpu.rip = CODE;
    push_frame(&mut m, &[0x1234, 8, flags::IF | 2], 4);
    assert_eq!(m.run(IRETD), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RSP]), (0x1234, STACK));
    let (cs, ss) = (u64::from(sel::CODE3), u64::from(sel::DATA3));
    push_frame(&mut m, &[0x1234, cs, 2, 0x9000, ss], 4);
    assert_eq!(m.run(IRETD), Ok(Flow::Jump));
    assert_eq!((m.cpu.cpl, m.cpu.regs[reg::RSP]), (3, 0x9000));
    // Word-sized frames leave the upper flags alone.
    let mut m = Machine::protected_mode(0);
    m.cpu.set_rflags(flags::AC | 2);
    push_frame(&mut m, &[0x1234, 8, 0x3], 2);
    assert_eq!(m.run(&[0x66, 0xcf]), Ok(Flow::Jump));
    assert_eq!(m.cpu.rflags(), flags::AC | 3);
    // EIP beyond the limit.
    let mut m = Machine::protected_mode(0);
    m.set_descriptor(sel::CODE0, descriptor(0, 0xfff, 0x409b));
    push_frame(&mut m, &[0x1000, 8, 2], 4);
    assert_eq!(m.run(IRETD), Err(Fault::gp(0)));
}
