use super::*;
use crate::{
    flags,
    flow::Flow,
    state::{cr0, reg},
    sys,
    testenv::CODE,
};

/// The other task's TSS and its selector.
const OTHER: u64 = 0x6000;
const SELECTOR: u16 = sel::FREE;

fn machine(cpl: u8) -> Machine {
    let mut m = Machine::protected_mode(cpl);
    m.cpu.rip = CODE;
    m.cpu.dr7 = 0x400 | 0x155 | 0xaa;
    m.cpu.segments[seg::TR].limit = 0x67;
    m.set_descriptor(SELECTOR, descriptor(OTHER as u32, 0x67, 0x89));
    m.write_u32(OTHER + 0x20, 0x2222);
    m.write_u32(OTHER + 0x24, (flags::IF | 3) as u32);
    for i in 0..8 {
        m.write_u32(OTHER + 0x28 + 4 * i, 0x1000 + i as u32);
    }
    m.write_u32(OTHER + 0x38, 0x5_0000);
    let code = if cpl == 3 { sel::CODE3 } else { sel::CODE0 };
    let data = if cpl == 3 { sel::DATA3 } else { sel::DATA0 };
    for i in 0..6 {
        let s = if i == seg::CS { code } else { data };
        m.write_u32(OTHER + 0x48 + 4 * i as u64, s.into());
    }
    m
}

fn jmp_or_call(opcode: u8, selector: u16) -> [u8; 7] {
    let [low, high] = selector.to_le_bytes();
    [opcode, 0, 0, 0, 0, low, high]
}

#[test]
fn call_and_return() {
    let mut m = machine(0);
    m.cpu.regs[reg::RAX] = 0xaaaa;
    assert_eq!(m.run(&jmp_or_call(0x9a, SELECTOR)), Ok(Flow::Jump));
    assert_eq!(m.cpu.rip, 0x2222);
    assert_eq!(
        (m.cpu.regs[reg::RAX], m.cpu.regs[reg::RSP]),
        (0x1000, 0x5_0000)
    );
    assert_eq!(m.cpu.rflags(), flags::IF | flags::NT | 3);
    assert_ne!(m.cpu.cr0 & cr0::TS, 0);
    assert_eq!(m.cpu.dr7, 0x400 | 0xaa, "local breakpoints are off");
    let tr = m.cpu.segments[seg::TR];
    assert_eq!((tr.selector, tr.base, tr.kind()), (SELECTOR, OTHER, 0xb));
    // The old task is saved, still busy, and linked to.
    assert_eq!(m.read(TSS + 0x20, 4), CODE + 7);
    assert_eq!(m.read(TSS + 0x28, 4), 0xaaaa);
    assert_eq!(m.read(TSS + 0x4c, 2), sel::CODE0.into());
    assert_eq!(m.read(OTHER, 2), sel::TSS.into());
    assert_eq!(m.read(GDT + u64::from(sel::TSS) + 5, 1), 0x8b);
    assert_eq!(m.read(GDT + u64::from(SELECTOR) + 5, 1), 0x8b);
    // IRET goes back and frees the descriptor.
    m.cpu.regs[reg::RCX] = 0xcccc;
    assert_eq!(m.run(&[0xcf]), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RAX]), (CODE + 7, 0xaaaa));
    assert_eq!(m.read(GDT + u64::from(SELECTOR) + 5, 1), 0x89);
    assert_eq!(m.read(OTHER + 0x2c, 4), 0xcccc);
    assert_eq!(m.read(OTHER + 0x24, 4) & flags::NT, 0);
    // RIP after an IRET that starts the task again is behind the IRET.
    assert_eq!(m.read(OTHER + 0x20, 4), 0x2223);
}

#[test]
fn jump_leaves_nothing_behind() {
    let mut m = machine(0);
    m.write_u32(OTHER, 0x7777);
    assert_eq!(m.run(&jmp_or_call(0xea, SELECTOR)), Ok(Flow::Jump));
    assert_eq!(m.cpu.rflags(), flags::IF | 3);
    assert_eq!(m.read(GDT + u64::from(sel::TSS) + 5, 1), 0x89);
    assert_eq!(m.read(OTHER, 2), 0x7777, "no link");
}

#[test]
fn task_gate_with_error_code() {
    let mut m = machine(3);
    m.set_gate(14, SELECTOR, 0, 5, 0, 0);
    m.write_u32(OTHER + 0x4c, sel::CODE0.into());
    for i in [0, 2, 3, 4, 5] {
        m.write_u32(OTHER + 0x48 + 4 * i, sel::DATA0.into());
    }
    let e = Exception {
        payload: 0x1234,
        ..exception(vector::PF, Some(7))
    };
    sys::deliver_exception(&mut m.cpu, e).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.cpl, m.cpu.cr2), (0x2222, 0, 0x1234));
    assert_eq!(m.cpu.regs[reg::RSP], 0x5_0000 - 4);
    assert_eq!(frame::<1>(&mut m, 4), [7]);
    assert_eq!(m.read(TSS + 0x20, 4), CODE);
    assert_ne!(m.read(TSS + 0x24, 4) & flags::RF, 0);
}

#[test]
fn refusals_before_the_switch() {
    let check = |cpl: u8, prepare: &dyn Fn(&mut Machine), selector: u16, want: Fault| {
        let mut m = machine(cpl);
        prepare(&mut m);
        let before = (m.cpu.rip, m.cpu.regs, m.cpu.segments);
        assert_eq!(m.run(&jmp_or_call(0x9a, selector)), Err(want));
        assert_eq!((m.cpu.rip, m.cpu.regs, m.cpu.segments), before);
    };
    let s = u32::from(SELECTOR);
    let set = |attributes: u16, limit: u32| {
        move |m: &mut Machine| {
            m.set_descriptor(SELECTOR, descriptor(OTHER as u32, limit, attributes));
        }
    };
    check(0, &set(0x8b, 0x67), SELECTOR, Fault::gp(s));
    check(0, &set(0x09, 0x67), SELECTOR, Fault::np(s));
    check(0, &set(0x89, 0x66), SELECTOR, Fault::ts(s));
    check(3, &|_| {}, SELECTOR, Fault::gp(s));
    check(0, &set(0xe9, 0x67), 0x4000, Fault::gp(0x4000));
}

#[test]
fn faults_of_the_new_task() {
    let check = |at: u64, value: u32, want: Fault| {
        let mut m = machine(0);
        m.set_descriptor(SELECTOR + 8, descriptor(0, !0, 0x4012));
        m.set_descriptor(SELECTOR + 16, descriptor(0, !0, 0x401a));
        m.write_u32(OTHER + at, value);
        assert_eq!(m.run(&jmp_or_call(0x9a, SELECTOR)), Err(want), "{at:#x}");
        // The new task is the current one.
        assert_eq!((m.cpu.rip, m.cpu.segments[seg::TR].base), (0x2222, OTHER));
    };
    let absent = u32::from(SELECTOR) + 8;
    check(0x60, 0x1000, Fault::ts(0x1000));
    check(0x4c, 0, Fault::ts(0));
    check(0x4c, sel::DATA0.into(), Fault::ts(0x10));
    check(0x4c, absent + 8, Fault::np(absent + 8));
    check(0x50, 0, Fault::ts(0));
    check(0x50, sel::DATA3.into(), Fault::ts(0x20));
    check(0x50, absent, Fault::ss(absent));
    check(0x54, 0x1000, Fault::ts(0x1000));
    check(0x54, absent, Fault::np(absent));
}

#[test]
fn sixteen_bit_tasks() {
    let mut m = machine(0);
    m.set_descriptor(SELECTOR, descriptor(OTHER as u32, 0x2b, 0x81));
    m.write(OTHER, &[0; 0x2c]);
    m.write(OTHER + 0xe, &[0x22, 0x22, 2, 0]);
    m.write(OTHER + 0x12, &[0x11, 0x11]);
    for (i, s) in [sel::DATA0, sel::CODE0, sel::DATA0, sel::DATA0]
        .iter()
        .enumerate()
    {
        m.write(OTHER + 0x22 + 2 * i as u64, &s.to_le_bytes());
    }
    assert_eq!(m.run(&jmp_or_call(0xea, SELECTOR)), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RAX]), (0x2222, 0x1111));
    assert!(m.cpu.segments[seg::FS].unusable);
    assert_eq!(m.cpu.segments[seg::TR].kind(), 3);
    // And back, saving in the 16-bit format.
    assert_eq!(m.run(&jmp_or_call(0xea, sel::TSS)), Ok(Flow::Jump));
    assert_eq!(m.read(OTHER + 0xe, 2), 0x2229);
    assert_eq!(m.cpu.rip, CODE + 7);
}

#[test]
fn debug_trap_on_switch() {
    let mut m = machine(0);
    m.write(OTHER + 0x64, &[1]);
    m.run(&jmp_or_call(0xea, SELECTOR)).unwrap();
    assert_eq!(m.cpu.pending_db, sys::debug::dr6::BT);
    assert_ne!(m.cpu.mode & crate::state::mode::STEP, 0);
}

#[test]
fn return_link_must_be_a_busy_task() {
    let mut m = machine(0);
    m.cpu.set_rflags(flags::NT | 2);
    m.write(TSS, &SELECTOR.to_le_bytes());
    assert_eq!(m.run(&[0xcf]), Err(Fault::ts(SELECTOR.into())));
    m.write(TSS, &[4, 0]);
    assert_eq!(m.run(&[0xcf]), Err(Fault::ts(4)));
}
