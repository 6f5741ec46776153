use super::*;
use crate::{
    flags,
    flow::Flow,
    state::{Shadow, cr4, reg},
    sys::debug::{after_instruction, check_instruction, dr6, match_port},
    testenv::CODE,
};

/// Runs one instruction as the engine's STEP loop does. The conditions of a
/// #DB, if there is one.
fn step(m: &mut Machine, bytes: &[u8]) -> Option<u64> {
    let conditions = |f: Fault| match f {
        Fault::Exception(e) if e.vector == vector::DB => e.payload,
        other => panic!("{other:?}"),
    };
    if let Err(f) = check_instruction(&mut m.cpu) {
        return Some(conditions(f));
    }
    if let Err(f) = m.run(bytes) {
        return Some(conditions(f));
    }
    after_instruction(&mut m.cpu).err().map(conditions)
}

const NOP: &[u8] = &[0x90];
const POPF: &[u8] = &[0x9d];

fn machine() -> Machine {
    let mut m = Machine::long_mode(0);
    m.cpu.rip = CODE;
    for v in 0..32 {
        m.set_gate(v, sel::CODE0, 0x1000, 0xe, 3, 0);
    }
    m
}

#[test]
fn single_step_begins_one_instruction_late() {
    let mut m = machine();
    m.cpu.push(flags::TF | 2, 8).unwrap();
    assert_eq!(step(&mut m, POPF), None);
    assert_eq!(step(&mut m, NOP), Some(dr6::BS));
    // The instruction that clears TF is stepped, the next is not.
    m.cpu.push(2, 8).unwrap();
    assert_eq!(step(&mut m, POPF), Some(dr6::BS));
    assert_eq!(step(&mut m, NOP), None);
}

#[test]
fn loads_of_ss_delay_the_trap_but_sti_does_not() {
    let mut m = machine();
    m.cpu.regs[reg::RAX] = sel::DATA0.into();
    m.cpu.set_rflags(flags::TF | 2);
    assert_eq!(step(&mut m, &[0x8e, 0xd0]), None);
    assert_eq!(m.cpu.shadow, Shadow::MovSs);
    assert_eq!(step(&mut m, NOP), Some(dr6::BS));
    assert_eq!(step(&mut m, &[0xfb]), Some(dr6::BS));
}

#[test]
fn data_breakpoint_on_a_load_of_ss() {
    let mut m = machine();
    m.cpu.dr = [0x9000, 0, 0, 0];
    m.cpu.dr7 = 0x4_0000 | 0x3_0000 | 3;
    m.cpu.regs[reg::RBX] = 0x9000;
    m.write(0x9000, &[sel::DATA0 as u8, 0]);
    // mov ss, [rbx]; int1: one #DB, which says why.
    assert_eq!(step(&mut m, &[0x8e, 0x13]), None);
    assert_eq!(m.cpu.pending_db, 1);
    assert_eq!(step(&mut m, &[0xf1]), None);
    assert_eq!((m.cpu.rip, m.cpu.dr6 & 0xf), (0x1000, 1));
    // mov ss, [rbx]; int 3: the trap comes inside of the handler.
    m.cpu.rip = CODE;
    assert_eq!(step(&mut m, &[0x8e, 0x13]), None);
    assert_eq!(step(&mut m, &[0xcc]), Some(1));
    assert_eq!(m.cpu.rip, 0x1000);
}

#[test]
fn instruction_breakpoints_and_rf() {
    let mut m = machine();
    m.cpu.dr[2] = CODE;
    m.cpu.dr7 = 1 << 5;
    assert_eq!(step(&mut m, NOP), Some(4));
    m.cpu.rflags_system |= flags::RF;
    assert_eq!(step(&mut m, NOP), None);
    assert_eq!(
        m.cpu.rflags() & flags::RF,
        0,
        "RF lasts for one instruction"
    );
    // IRET brings RF for the instruction that it returns to.
    let sp = m.cpu.regs[reg::RSP] - 40;
    m.cpu.regs[reg::RSP] = sp;
    for (i, w) in [CODE, 8, flags::RF | 2, STACK, 0].into_iter().enumerate() {
        m.write_u64(sp + 8 * i as u64, w);
    }
    assert_eq!(step(&mut m, &[0x48, 0xcf]), None);
    assert_eq!(step(&mut m, NOP), None);
    m.cpu.rip = CODE;
    assert_eq!(step(&mut m, NOP), Some(4));
    // Disabled, or of another kind: no match.
    m.cpu.dr7 = 0;
    assert_eq!(step(&mut m, NOP), None);
}

#[test]
fn saved_rf_of_breakpoints_and_faults() {
    let mut m = machine();
    m.cpu.dr7 = 1;
    m.cpu.update_mode();
    m.cpu.rflags_system |= flags::RF;
    let db = exception(vector::DB, None);
    crate::sys::deliver_exception(&mut m.cpu, db).unwrap();
    assert_ne!(frame::<3>(&mut m, 8)[2] & flags::RF, 0, "kept while armed");
    let mut m = machine();
    crate::sys::deliver_exception(&mut m.cpu, db).unwrap();
    assert_eq!(frame::<3>(&mut m, 8)[2] & flags::RF, 0);
    let mut m = machine();
    crate::sys::deliver_exception(&mut m.cpu, exception(vector::UD, None)).unwrap();
    assert_ne!(frame::<3>(&mut m, 8)[2] & flags::RF, 0);
}

#[test]
fn dr6_keeps_what_is_not_a_breakpoint() {
    let mut m = machine();
    m.cpu.dr6 = 0xffff_0ff0 | dr6::BS | 2;
    let e = Exception {
        payload: 4,
        ..exception(vector::DB, None)
    };
    crate::sys::deliver_exception(&mut m.cpu, e).unwrap();
    assert_eq!(m.cpu.dr6, 0xffff_0ff0 | dr6::BS | 4);
}

#[test]
fn int_is_not_stepped_into() {
    let mut m = machine();
    m.cpu.set_rflags(flags::TF | 2);
    assert_eq!(step(&mut m, &[0xcc]), None);
    assert_eq!(m.cpu.rip, 0x1000);
    let mut m = machine();
    m.cpu.set_rflags(flags::TF | 2);
    m.cpu.dr6 = 0xffff_0ff0;
    assert_eq!(step(&mut m, &[0xf1]), None);
    assert_eq!(m.cpu.dr6, 0xffff_0ff0);
}

#[test]
fn halt_is_stepped() {
    let mut m = machine();
    m.cpu.set_rflags(flags::TF | 2);
    check_instruction(&mut m.cpu).unwrap();
    assert_eq!(m.run(&[0xf4]), Ok(Flow::Halt));
    assert!(after_instruction(&mut m.cpu).is_err());
}

#[test]
fn port_breakpoints() {
    let mut m = machine();
    m.cpu.dr[1] = 0x3f8;
    m.cpu.dr7 = 1 << 2 | 2 << 20 | 1 << 22;
    match_port(&mut m.cpu, 0x3f9, 1);
    assert_eq!(m.cpu.pending_db, 0, "without CR4.DE");
    m.cpu.cr4 |= cr4::DE;
    match_port(&mut m.cpu, 0x3fa, 4);
    assert_eq!(m.cpu.pending_db, 0);
    match_port(&mut m.cpu, 0x3f6, 4);
    assert_eq!(m.cpu.pending_db, 2);
}
