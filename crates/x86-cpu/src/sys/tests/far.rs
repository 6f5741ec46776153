use super::*;
use crate::{
    flow::Flow,
    state::{Table, reg},
    testenv::CODE,
};

/// `jmp ptr16:32` and `call ptr16:32`.
fn direct(opcode: u8, selector: u16, offset: u32) -> [u8; 7] {
    let mut b = [opcode; 7];
    b[1..5].copy_from_slice(&offset.to_le_bytes());
    b[5..].copy_from_slice(&selector.to_le_bytes());
    b
}

fn jmp(selector: u16, offset: u32) -> [u8; 7] {
    direct(0xea, selector, offset)
}

fn call(selector: u16, offset: u32) -> [u8; 7] {
    direct(0x9a, selector, offset)
}

fn call_gate(selector: u16, offset: u64, attributes: u16, count: u8) -> u64 {
    offset & 0xffff
        | u64::from(selector) << 16
        | u64::from(count) << 32
        | u64::from(attributes) << 40
        | (offset >> 16 & 0xffff) << 48
}

fn protected(cpl: u8) -> Machine {
    let mut m = Machine::protected_mode(cpl);
    m.cpu.rip = CODE;
    m
}

#[test]
fn direct_transfers_and_return() {
    let mut m = protected(0);
    m.set_descriptor(sel::FREE, descriptor(0x1000, 0xffff, 0x009a));
    assert_eq!(m.run(&call(sel::FREE, 0x234)), Ok(Flow::Jump));
    assert_eq!(m.cpu.rip, 0x234);
    assert_eq!(m.cpu.segments[seg::CS].base, 0x1000);
    assert_eq!(frame(&mut m, 4), [CODE + 7, u64::from(sel::CODE0)]);
    assert_eq!(m.read(GDT + u64::from(sel::FREE) + 5, 1), 0x9b, "accessed");
    // 16-bit code: RETFD 4.
    assert_eq!(m.run(&[0x66, 0xca, 4, 0]), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RSP]), (CODE + 7, STACK + 4));
}

#[test]
fn privilege_rules_of_direct_transfers() {
    let cases: [(u8, u16, u16, Result<Flow, Fault>); 10] = [
        (0, sel::CODE0, 0, Ok(Flow::Jump)),
        (0, sel::CODE3, 0, Err(Fault::gp(0x18))),
        (3, sel::CODE0, 0, Err(Fault::gp(8))),
        (3, sel::CODE0 | 3, 0, Err(Fault::gp(8))),
        (0, sel::CODE0 | 1, 0, Err(Fault::gp(8))),
        (0, sel::DATA0, 0, Err(Fault::gp(0x10))),
        (0, 3, 0, Err(Fault::gp(0))),
        // Conforming: any level at least as outer.
        (3, sel::FREE, 0xc09f, Ok(Flow::Jump)),
        (0, sel::FREE, 0xc0ff, Err(Fault::gp(0x40))),
        (0, sel::FREE, 0xc01b, Err(Fault::np(0x40))),
    ];
    for (cpl, selector, attributes, want) in cases {
        let mut m = protected(cpl);
        m.set_descriptor(sel::FREE, descriptor(0, !0, attributes));
        assert_eq!(m.run(&jmp(selector, 0x1234)), want, "{cpl} {selector:#x}");
        if want.is_ok() {
            assert_eq!(m.cpu.cpl, cpl);
            assert_eq!(m.cpu.segments[seg::CS].selector & 3, u16::from(cpl));
        } else {
            assert_eq!(m.cpu.rip, CODE);
        }
    }
    let mut m = protected(0);
    m.cpu.gdtr.limit = sel::CODE32 + 6;
    assert_eq!(m.run(&jmp(sel::CODE32, 0)), Err(Fault::gp(0x38)));
    m.set_descriptor(sel::CODE0, descriptor(0, 0xfff, 0x409b));
    assert_eq!(m.run(&jmp(sel::CODE0, 0x1000)), Err(Fault::gp(0)));
}

#[test]
fn call_gate_to_inner_level_and_back() {
    let mut m = protected(3);
    let gate = call_gate(sel::CODE0, 0x1_2345, 0xec, 2);
    m.set_descriptor(sel::FREE, gate);
    m.cpu.push(0xaaaa, 4).unwrap();
    m.cpu.push(0xbbbb, 4).unwrap();
    assert_eq!(m.run(&call(sel::FREE | 3, 0xdead)), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.cpl), (0x1_2345, 0));
    let want = [
        CODE + 7,
        u64::from(sel::CODE3),
        0xbbbb,
        0xaaaa,
        STACK - 8,
        u64::from(sel::DATA3),
    ];
    assert_eq!(frame(&mut m, 4), want);
    // RETF 8 removes the parameters from both stacks.
    assert_eq!(m.run(&[0xca, 8, 0]), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.cpl), (CODE + 7, 3));
    assert_eq!(m.cpu.regs[reg::RSP], STACK);
}

#[test]
fn call_gate_errors() {
    let check = |cpl: u8, selector: u16, gate: u64, is_call: bool, want: Fault| {
        let mut m = protected(cpl);
        m.set_descriptor(sel::FREE, gate);
        let insn = if is_call {
            call(selector, 0)
        } else {
            jmp(selector, 0)
        };
        assert_eq!(m.run(&insn), Err(want), "{gate:x}");
    };
    let free = u32::from(sel::FREE);
    check(
        3,
        sel::FREE,
        call_gate(sel::CODE0, 0, 0x8c, 0),
        true,
        Fault::gp(free),
    );
    check(
        0,
        sel::FREE | 3,
        call_gate(sel::CODE0, 0, 0x8c, 0),
        true,
        Fault::gp(free),
    );
    check(
        3,
        sel::FREE,
        call_gate(sel::CODE0, 0, 0x6c, 0),
        true,
        Fault::np(free),
    );
    check(3, sel::FREE, call_gate(0, 0, 0xec, 0), true, Fault::gp(0));
    check(
        3,
        sel::FREE,
        call_gate(sel::DATA0, 0, 0xec, 0),
        true,
        Fault::gp(0x10),
    );
    check(
        3,
        sel::FREE,
        call_gate(0xff8, 0, 0xec, 0),
        true,
        Fault::gp(0xff8),
    );
    check(
        0,
        sel::FREE,
        call_gate(sel::CODE3, 0, 0xec, 0),
        true,
        Fault::gp(0x18),
    );
    check(
        3,
        sel::FREE,
        call_gate(sel::CODE0, 0, 0xec, 0),
        false,
        Fault::gp(8),
    );
}

#[test]
fn long_mode_entry_by_far_jump() {
    let mut m = Machine::long_mode(0);
    m.set_descriptor(sel::CODE0, descriptor(0, !0, 0xa09b));
    m.cpu.rip = CODE;
    m.write(0x9000, &[0x78, 0x56, 0x34, 0x12, 0x38, 0]);
    m.cpu.regs[reg::RBX] = 0x9000;
    // jmp far [rbx], 16:32, to compatibility mode.
    assert_eq!(m.run(&[0xff, 0x2b]), Ok(Flow::Jump));
    assert!(!m.cpu.is_64bit());
    assert_eq!(m.cpu.rip, 0x1234_5678);
    assert_eq!(m.run(&jmp(sel::CODE0, 0x4444)), Ok(Flow::Jump));
    assert!(m.cpu.is_64bit());
    // L and D together are reserved.
    m.set_descriptor(sel::FREE, descriptor(0, !0, 0xe09b));
    m.write(0x9004, &[sel::FREE as u8, 0]);
    assert_eq!(m.run(&[0xff, 0x2b]), Err(Fault::gp(sel::FREE.into())));
}

#[test]
fn long_mode_call_gates() {
    let mut m = Machine::long_mode(3);
    m.cpu.rip = CODE;
    m.set_descriptor(sel::FREE, call_gate(sel::CODE0, 0x1_2345, 0xec, 0));
    m.write_u64(GDT + u64::from(sel::FREE) + 8, 0);
    m.write(0x9000, &[0, 0, 0, 0, sel::FREE as u8 | 3, 0]);
    m.cpu.regs[reg::RBX] = 0x9000;
    assert_eq!(m.run(&[0xff, 0x1b]), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.cpl), (0x1_2345, 0));
    let want = [
        CODE + 2,
        u64::from(sel::CODE3),
        STACK,
        u64::from(sel::DATA3),
    ];
    assert_eq!(frame(&mut m, 8), want);
    assert_eq!(m.run(&[0x48, 0xcb]), Ok(Flow::Jump));
    assert_eq!(
        (m.cpu.rip, m.cpu.cpl, m.cpu.regs[reg::RSP]),
        (CODE + 2, 3, STACK)
    );
    // The upper half must have type 0, and the target must be 64-bit code.
    m.write_u64(GDT + u64::from(sel::FREE) + 8, 1 << 40);
    assert_eq!(m.run(&[0xff, 0x1b]), Err(Fault::gp(sel::FREE.into())));
    m.write_u64(GDT + u64::from(sel::FREE) + 8, 0);
    m.set_descriptor(sel::FREE, call_gate(sel::CODE32, 0, 0xec, 0));
    assert_eq!(m.run(&[0xff, 0x1b]), Err(Fault::gp(0x38)));
    // 32-bit TSS, task gates and 16-bit gates do not exist.
    for attributes in [0xe4, 0xe5, 0xe9] {
        m.set_descriptor(sel::FREE, call_gate(sel::CODE0, 0, attributes, 0));
        assert_eq!(m.run(&[0xff, 0x1b]), Err(Fault::gp(sel::FREE.into())));
    }
}

#[test]
fn real_mode_transfers() {
    let mut m = Machine::new();
    m.cpu.rip = 0x100;
    assert_eq!(m.run(&[0x9a, 0x34, 0x12, 0x00, 0x20]), Ok(Flow::Jump));
    assert_eq!(
        (m.cpu.rip, m.cpu.segments[seg::CS].base),
        (0x1234, 0x2_0000)
    );
    assert_eq!(frame(&mut m, 2), [0x105, 0]);
    assert_eq!(m.run(&[0xcb]), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.segments[seg::CS].selector), (0x105, 0));
    // The limit holds for 32-bit offsets.
    let far = [0x66, 0xea, 0, 0, 1, 0, 0, 0x20];
    assert_eq!(m.run(&far), Err(Fault::gp(0)));
    // A stack at 1 has no room for a word that would wrap.
    m.cpu.regs[reg::RSP] = 1;
    assert_eq!(m.run(&[0x9a, 0, 0, 0, 0]), Err(Fault::ss(0)));
}

#[test]
fn return_outward_checks_the_stack_segment() {
    let mut m = protected(0);
    for (ss, want) in [
        (0, Fault::gp(0)),
        (0x10, Fault::gp(0x10)),
        (sel::CODE3, Fault::gp(0x18)),
        (0xffb, Fault::gp(0xff8)),
    ] {
        m.cpu.regs[reg::RSP] = STACK - 16;
        m.write_u32(STACK - 16, 0x1234);
        m.write_u32(STACK - 12, sel::CODE3.into());
        m.write_u32(STACK - 8, 0x5678);
        m.write_u32(STACK - 4, ss.into());
        assert_eq!(m.run(&[0xcb]), Err(want));
        assert_eq!(m.cpu.regs[reg::RSP], STACK - 16);
    }
    m.write_u32(STACK - 4, sel::DATA3.into());
    assert_eq!(m.run(&[0xcb]), Ok(Flow::Jump));
    assert_eq!((m.cpu.cpl, m.cpu.regs[reg::RSP]), (3, 0x5678));
    assert!(m.cpu.segments[seg::DS].unusable, "level-0 DS dropped");
}

#[test]
fn local_descriptor_table() {
    let mut m = protected(0);
    m.set_descriptor(sel::FREE, descriptor(0xa000, 0xf, 0x82));
    m.cpu.regs[reg::RAX] = sel::FREE.into();
    assert_eq!(m.run(&[0x0f, 0x00, 0xd0]), Ok(Flow::Next));
    m.write_u64(0xa008, descriptor(0x5000, 0xffff, 0x409b));
    assert_eq!(m.run(&jmp(0xc, 0)), Ok(Flow::Jump));
    assert_eq!(m.cpu.segments[seg::CS].base, 0x5000);
    assert_eq!(m.run(&jmp(0x14, 0)), Err(Fault::gp(0x14)));
    m.cpu.gdtr = Table::default();
    assert_eq!(m.run(&jmp(0xc, 0)), Ok(Flow::Jump), "the GDT is not asked");
}
