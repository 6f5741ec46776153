use super::*;
use crate::{
    flags,
    flow::Flow,
    state::{Shadow, reg},
    sys,
    testenv::CODE,
};

const HANDLER: u64 = 0x1_2340;

fn long(cpl: u8) -> Machine {
    let mut m = Machine::long_mode(cpl);
    for v in 0..32 {
        m.set_gate(v, sel::CODE0, HANDLER + u64::from(v), 0xe, 0, 0);
    }
    m.cpu.rip = CODE;
    m.cpu.set_rflags(flags::IF | flags::TF | flags::NT | 2 | 1);
    m.cpu.update_mode();
    m
}

fn protected(cpl: u8) -> Machine {
    let mut m = Machine::protected_mode(cpl);
    for v in 0..32 {
        m.set_gate(v, sel::CODE0, HANDLER + u64::from(v), 0xe, 0, 0);
    }
    m.cpu.rip = CODE;
    m.cpu.set_rflags(flags::IF | 2 | 1);
    m
}

#[test]
fn page_fault_from_user_mode_in_long_mode() {
    let mut m = long(3);
    let e = Exception {
        vector: vector::PF,
        error: Some(6),
        payload: 0xdead_beef,
    };
    sys::deliver_exception(&mut m.cpu, e).unwrap();
    assert_eq!(m.cpu.cr2, 0xdead_beef);
    assert_eq!((m.cpu.rip, m.cpu.cpl), (HANDLER + 14, 0));
    assert_eq!(m.cpu.regs[reg::RSP], 0x7_0000 - 48);
    let saved = flags::IF | flags::TF | flags::NT | flags::RF | 3;
    let want = [
        6,
        CODE,
        u64::from(sel::CODE3),
        saved,
        STACK,
        u64::from(sel::DATA3),
    ];
    assert_eq!(frame(&mut m, 8), want);
    assert_eq!(m.cpu.rflags(), 3);
    assert_eq!(m.cpu.segments[seg::CS].selector, sel::CODE0);
    let ss = m.cpu.segments[seg::SS];
    assert!(ss.unusable && ss.selector == 0);
}

#[test]
fn stack_alignment_ist_and_trap_gates() {
    let mut m = long(0);
    m.cpu.regs[reg::RSP] = STACK - 3;
    m.set_gate(3, sel::CODE0, HANDLER, 0xf, 3, 0);
    assert_eq!(m.run(&[0xcc]), Ok(Flow::Jump));
    assert_eq!(m.cpu.regs[reg::RSP], STACK - 16 - 40);
    let [ip, _, fl, sp, _] = frame(&mut m, 8);
    assert_eq!((ip, sp), (CODE + 1, STACK - 3));
    assert_eq!(fl & flags::RF, 0);
    assert_ne!(m.cpu.rflags() & flags::IF, 0, "a trap gate leaves IF");
    let mut m = long(0);
    m.set_gate(2, sel::CODE0, HANDLER, 0xe, 0, 4);
    sys::deliver_nmi(&mut m.cpu).unwrap();
    assert!(m.cpu.nmi_masked);
    assert_eq!(m.cpu.regs[reg::RSP], 0x6_3000 - 40);
}

#[test]
fn gate_errors_name_the_entry() {
    // (prepare, software?, expected error of the first fault)
    let check = |prepare: &dyn Fn(&mut Machine), want: Fault| {
        let mut m = long(3);
        prepare(&mut m);
        let before = (m.cpu.rip, m.cpu.regs, m.cpu.rflags());
        assert_eq!(m.run(&[0xcd, 0x40]), Err(want));
        assert_eq!((m.cpu.rip, m.cpu.regs, m.cpu.rflags()), before);
    };
    let idt = 0x40 << 3 | 2;
    check(&|m| m.cpu.idtr.limit = 0x40f - 1, Fault::gp(idt));
    check(
        &|m| m.set_gate(0x40, sel::CODE0, HANDLER, 0xe, 0, 0),
        Fault::gp(idt),
    );
    check(
        &|m| m.set_gate(0x40, sel::CODE0, HANDLER, 5, 3, 0),
        Fault::gp(idt),
    );
    check(
        &|m| m.set_gate(0x40, sel::CODE0, HANDLER, 6, 3, 0),
        Fault::gp(idt),
    );
    check(&|m| m.set_gate(0x40, 0, HANDLER, 0xe, 3, 0), Fault::gp(0));
    check(
        &|m| m.set_gate(0x40, sel::DATA0, HANDLER, 0xe, 3, 0),
        Fault::gp(0x10),
    );
    check(
        &|m| m.set_gate(0x40, sel::CODE32, HANDLER, 0xe, 3, 0),
        Fault::gp(0x38),
    );
    check(
        &|m| m.set_gate(0x40, 0xfff8, HANDLER, 0xe, 3, 0),
        Fault::gp(0xfff8),
    );
    check(
        &|m| m.set_gate(0x40, sel::CODE0, 1 << 47, 0xe, 3, 0),
        Fault::gp(0),
    );
    check(
        &|m| {
            m.set_gate(0x40, sel::CODE0, HANDLER, 0xe, 3, 0);
            let at = crate::testenv::IDT + 0x400 + 5;
            m.write(at, &[0x6e]);
        },
        Fault::np(idt),
    );
    check(
        &|m| {
            m.set_gate(0x40, sel::FREE, HANDLER, 0xe, 3, 0);
            m.set_descriptor(sel::FREE, descriptor(0, !0, 0xa01b));
        },
        Fault::np(sel::FREE.into()),
    );
    check(
        &|m| {
            m.set_gate(0x40, sel::CODE0, HANDLER, 0xe, 3, 2);
            m.cpu.segments[seg::TR].limit = 0x24 + 14;
        },
        Fault::ts(sel::TSS.into()),
    );
    check(
        &|m| {
            m.set_gate(0x40, sel::CODE0, HANDLER, 0xe, 3, 0);
            m.write_u64(TSS + 4, 1 << 47);
        },
        Fault::ss(0),
    );
}

#[test]
fn external_events_set_the_ext_bit() {
    let mut m = long(0);
    // Vector 0x60 is empty: #GP with EXT and IDT.
    sys::deliver_interrupt(&mut m.cpu, 0x60).unwrap();
    assert_eq!(m.cpu.rip, HANDLER + 13);
    let [error, ip] = frame(&mut m, 8);
    assert_eq!((error, ip), (0x60 << 3 | 3, CODE));
    // INT1 is not subject to the gate's DPL, and counts as external.
    let mut m = long(3);
    assert_eq!(m.run(&[0xf1]), Ok(Flow::Jump));
    assert_eq!(frame::<1>(&mut m, 8), [CODE + 1]);
}

#[test]
fn double_and_triple_faults() {
    // #GP while #NP is delivered.
    let mut m = long(0);
    m.set_gate(11, 0xff8, HANDLER, 0xe, 0, 0);
    sys::deliver_exception(&mut m.cpu, exception(vector::NP, Some(8))).unwrap();
    assert_eq!(m.cpu.rip, HANDLER + 8);
    let [error, ip] = frame(&mut m, 8);
    assert_eq!((error, ip), (0, CODE));
    // #PF while #GP is delivered: handled one after the other.
    let mut m = long(0);
    m.cpu.idtr.base = 0x7f_fff0_0000;
    let r = sys::deliver_exception(&mut m.cpu, exception(vector::GP, Some(0)));
    assert_eq!(r, Err(Fault::Shutdown));
    assert_eq!(m.cpu.cr2, 0x7f_fff0_0080, "the double fault's own #PF");
    // A benign exception gives way.
    let mut m = long(0);
    m.set_gate(6, 0, HANDLER, 0xe, 0, 0);
    sys::deliver_exception(&mut m.cpu, exception(vector::UD, None)).unwrap();
    assert_eq!(m.cpu.rip, HANDLER + 13);
    assert_eq!(frame::<1>(&mut m, 8), [1]);
    // Nothing works.
    let mut m = long(0);
    m.cpu.idtr.limit = 0;
    let r = sys::deliver_exception(&mut m.cpu, exception(vector::UD, None));
    assert_eq!(r, Err(Fault::Shutdown));
}

#[test]
fn table_of_exception_classes() {
    let outcome = |first: u8, second: u8| {
        let mut m = long(0);
        // The gate of `first` makes `second`: #GP, #NP or #SS.
        match second {
            vector::GP => m.set_gate(first, 0, HANDLER, 0xe, 0, 0),
            vector::NP => {
                m.set_gate(first, sel::CODE0, HANDLER, 0xe, 0, 0);
                m.write(crate::testenv::IDT + 16 * u64::from(first) + 5, &[0x0e]);
            }
            _ => {
                m.set_gate(first, sel::CODE0, HANDLER, 0xe, 0, 7);
                m.write_u64(TSS + 0x24 + 48, 0x40_0000 + 0x1000);
            }
        }
        sys::deliver_exception(&mut m.cpu, exception(first, Some(0))).unwrap();
        (m.cpu.rip - HANDLER) as u8
    };
    for first in [vector::DE, vector::TS, vector::NP, vector::SS, vector::GP] {
        for second in [vector::GP, vector::NP] {
            if first != second {
                assert_eq!(outcome(first, second), 8, "{first} {second}");
            }
        }
        assert_eq!(outcome(first, vector::PF), vector::PF, "{first} then #PF");
    }
    for second in [vector::GP, vector::NP] {
        assert_eq!(outcome(vector::PF, second), 8);
        for first in [
            vector::DB,
            vector::BP,
            vector::UD,
            vector::NM,
            vector::MF,
            vector::AC,
        ] {
            assert_eq!(outcome(first, second), second, "{first} {second}");
        }
    }
    assert_eq!(outcome(vector::PF, vector::PF), 8);
}

#[test]
fn protected_mode_inner_and_same_level() {
    let mut m = protected(3);
    sys::deliver_exception(&mut m.cpu, exception(vector::GP, Some(0x18))).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.cpl), (HANDLER + 13, 0));
    let want = [
        0x18,
        CODE,
        u64::from(sel::CODE3),
        flags::IF | flags::RF | 3,
        STACK,
        u64::from(sel::DATA3),
    ];
    assert_eq!(frame(&mut m, 4), want);
    assert_eq!(m.cpu.segments[seg::SS].selector, sel::DATA0);
    assert_eq!(m.cpu.regs[reg::RSP], 0x7_0000 - 24);
    let mut m = protected(0);
    sys::deliver_interrupt(&mut m.cpu, 9).unwrap();
    assert_eq!(frame(&mut m, 4), [CODE, 8, flags::IF | 3]);
    // 16-bit gates push words.
    let mut m = protected(3);
    m.set_gate(9, sel::CODE0, 0xffff_1234, 7, 0, 0);
    sys::deliver_interrupt(&mut m.cpu, 9).unwrap();
    assert_eq!(m.cpu.rip, 0x1234);
    let want = [
        0,
        u64::from(sel::CODE3),
        flags::IF | 3,
        0,
        u64::from(sel::DATA3),
    ];
    assert_eq!(frame(&mut m, 2), want);
}

#[test]
fn inner_stack_errors() {
    let check = |prepare: &dyn Fn(&mut Machine), want: Fault| {
        let mut m = protected(3);
        m.set_gate(0x40, sel::CODE0, HANDLER, 0xe, 3, 0);
        prepare(&mut m);
        assert_eq!(m.run(&[0xcd, 0x40]), Err(want));
        assert_eq!((m.cpu.cpl, m.cpu.rip), (3, CODE));
    };
    check(
        &|m| m.cpu.segments[seg::TR].limit = 8,
        Fault::ts(sel::TSS.into()),
    );
    check(&|m| m.write_u32(TSS + 8, 0), Fault::ts(0));
    check(&|m| m.write_u32(TSS + 8, 0xfff8), Fault::ts(0xfff8));
    check(
        &|m| m.write_u32(TSS + 8, sel::DATA3.into()),
        Fault::ts(0x20),
    );
    check(&|m| m.write_u32(TSS + 8, sel::CODE0.into()), Fault::ts(8));
    check(
        &|m| {
            m.write_u32(TSS + 8, sel::FREE.into());
            m.set_descriptor(sel::FREE, descriptor(0, !0, 0xc013));
        },
        Fault::ss(sel::FREE.into()),
    );
    check(
        &|m| {
            m.write_u32(TSS + 8, sel::FREE.into());
            m.set_descriptor(sel::FREE, descriptor(0, 0xfff, 0x4093));
        },
        Fault::ss(sel::FREE.into()),
    );
}

#[test]
fn virtual_8086_mode_and_back() {
    let mut m = protected(3);
    m.set_gate(0x40, sel::CODE0, HANDLER, 0xe, 3, 0);
    for (i, s) in [seg::ES, seg::CS, seg::SS, seg::DS, seg::FS, seg::GS]
        .into_iter()
        .enumerate()
    {
        m.cpu.segments[s] = Segment::v86(0x1000 + i as u16);
    }
    m.cpu.regs[reg::RSP] = 0x100;
    m.cpu.rip = 0x10;
    m.cpu.set_rflags(flags::VM | flags::IF | 2);
    m.cpu.update_mode();
    assert_eq!(m.run(&[0xcd, 0x40]), Err(Fault::gp(0)), "IOPL 0");
    m.cpu.set_rflags(flags::VM | flags::IF | flags::IOPL | 2);
    assert_eq!(m.run(&[0xcd, 0x40]), Ok(Flow::Jump));
    let f = flags::VM | flags::IF | flags::IOPL | 2;
    let want = [
        0x12, 0x1001, f, 0x100, 0x1002, 0x1000, 0x1003, 0x1004, 0x1005,
    ];
    assert_eq!(frame(&mut m, 4), want);
    assert!(m.cpu.segments[seg::DS].unusable && m.cpu.cpl == 0 && !m.cpu.is_v86());
    assert_eq!(m.run(&[0xcf]), Ok(Flow::Jump));
    assert!(m.cpu.is_v86() && m.cpu.cpl == 3);
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RSP]), (0x12, 0x100));
    assert_eq!(m.cpu.segments[seg::GS], Segment::v86(0x1005));
    // A handler that is not at level 0 cannot be entered.
    m.set_gate(0x40, sel::CODE3 & !3, HANDLER, 0xe, 3, 0);
    assert_eq!(m.run(&[0xcd, 0x40]), Err(Fault::gp(0x18)));
}

#[test]
fn real_mode_vectors() {
    let mut m = Machine::new();
    m.cpu.rip = 0x500;
    m.cpu.set_rflags(flags::IF | flags::TF | 2);
    m.write_u32(0x21 * 4, 0x1234_5678);
    assert_eq!(m.run(&[0xcd, 0x21]), Ok(Flow::Jump));
    assert_eq!(
        (m.cpu.rip, m.cpu.segments[seg::CS].base),
        (0x5678, 0x1_2340)
    );
    assert_eq!(frame(&mut m, 2), [0x502, 0, flags::IF | flags::TF | 2]);
    assert_eq!(m.cpu.rflags() & (flags::IF | flags::TF), 0);
    assert_eq!(m.run(&[0xcf]), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.segments[seg::CS].base), (0x502, 0));
    // Exceptions push no error code.
    m.write_u32(13 * 4, 0x0070_0000);
    sys::deliver_exception(&mut m.cpu, exception(vector::GP, Some(0))).unwrap();
    assert_eq!(m.cpu.regs[reg::RSP], 0x8000 - 6);
    m.cpu.idtr.limit = 0x40;
    let r = sys::deliver_exception(&mut m.cpu, exception(vector::AC, None));
    assert_eq!(r, Ok(()), "#GP in its place");
    m.cpu.idtr.limit = 3;
    let r = sys::deliver_exception(&mut m.cpu, exception(vector::UD, None));
    assert_eq!(r, Err(Fault::Shutdown));
}

#[test]
fn delivery_ends_shadows_and_marks_descriptors() {
    let mut m = long(0);
    m.set_descriptor(sel::CODE0, descriptor(0, !0, 0xa09a));
    m.cpu.shadow = Shadow::MovSs;
    sys::deliver_interrupt(&mut m.cpu, 6).unwrap();
    assert_eq!(m.cpu.shadow, Shadow::None);
    assert_eq!(m.read(GDT + 8 + 5, 1), 0x9b);
}
