use super::*;
use crate::{
    flags,
    flow::Flow,
    state::{Shadow, cr0, reg},
    testenv::CODE,
};

/// `mov sreg, ax`.
fn mov_sreg(index: usize) -> [u8; 2] {
    [0x8e, 0xc0 | (index as u8) << 3]
}

/// Loads `selector`, whose slot in the GDT holds a segment with `attributes`.
fn load(cpl: u8, index: usize, selector: u16, attributes: u16) -> Result<Flow, Fault> {
    let mut m = Machine::protected_mode(cpl);
    m.set_descriptor(sel::FREE, descriptor(0x1000, 0xffff, attributes));
    m.cpu.regs[reg::RAX] = selector.into();
    let before = m.cpu.segments[index];
    let r = m.run(&mov_sreg(index));
    if r.is_err() {
        assert_eq!(m.cpu.segments[index], before);
    } else {
        assert_eq!(m.cpu.segments[index].selector, selector);
        let in_use = selector & !3 != 0;
        assert_eq!(m.cpu.segments[index].unusable, !in_use);
        if in_use {
            assert_eq!(m.cpu.segments[index].base, 0x1000);
            assert_eq!(m.read(GDT + u64::from(sel::FREE) + 5, 1) & 1, 1);
        }
    }
    r
}

#[test]
fn data_segments() {
    let free = sel::FREE;
    let error = u32::from(free);
    let ok = Ok(Flow::EndBlock);
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        assert_eq!(load(0, index, free, 0x92), ok);
        assert_eq!(load(0, index, free, 0x90), ok);
        assert_eq!(load(0, index, free, 0x9a), ok, "readable code");
        assert_eq!(load(0, index, free, 0x98), Err(Fault::gp(error)));
        assert_eq!(load(0, index, free, 0x12), Err(Fault::np(error)));
        assert_eq!(load(0, index, free, 0x82), Err(Fault::gp(error)), "system");
        assert_eq!(load(3, index, free, 0x92), Err(Fault::gp(error)));
        assert_eq!(load(0, index, free | 3, 0x92), Err(Fault::gp(error)));
        assert_eq!(load(3, index, free | 3, 0xf2), ok);
        assert_eq!(load(3, index, free | 3, 0x9e), ok, "conforming code");
        assert_eq!(load(3, index, 2, 0), ok, "null");
        assert_eq!(load(0, index, 0x1000, 0), Err(Fault::gp(0x1000)));
        assert_eq!(load(0, index, 4, 0), Err(Fault::gp(4)), "no LDT");
    }
}

#[test]
fn stack_segment() {
    let free = sel::FREE;
    let error = u32::from(free);
    let ok = Ok(Flow::EndBlock);
    assert_eq!(load(0, seg::SS, free, 0x92), ok);
    assert_eq!(load(3, seg::SS, free | 3, 0xf2), ok);
    for (cpl, selector, attributes, want) in [
        (0, 0, 0, Fault::gp(0)),
        (0, free | 3, 0x92, Fault::gp(error)),
        (0, free, 0xf2, Fault::gp(error)),
        (0, free, 0x90, Fault::gp(error)),
        (0, free, 0x9a, Fault::gp(error)),
        (0, free, 0x12, Fault::ss(error)),
        (3, free, 0x92, Fault::gp(error)),
    ] {
        assert_eq!(load(cpl, seg::SS, selector, attributes), Err(want));
    }
}

#[test]
fn null_stack_segment_in_64_bit_mode() {
    let mut m = Machine::long_mode(0);
    m.cpu.regs[reg::RAX] = 0;
    assert_eq!(m.run(&mov_sreg(seg::SS)), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.shadow, Shadow::MovSs);
    m.cpu.regs[reg::RAX] = 3;
    assert_eq!(m.run(&mov_sreg(seg::SS)), Err(Fault::gp(0)));
    let mut m = Machine::long_mode(3);
    assert_eq!(m.run(&mov_sreg(seg::SS)), Err(Fault::gp(0)));
}

#[test]
fn mov_to_cs_does_not_exist() {
    let mut m = Machine::long_mode(0);
    let insn = iced_x86::Instruction::with2(
        iced_x86::Code::Mov_Sreg_rm16,
        iced_x86::Register::CS,
        iced_x86::Register::AX,
    )
    .unwrap();
    assert_eq!(crate::sys::exec(&mut m.cpu, &insn), Err(Fault::ud()));
}

#[test]
fn limits_survive_a_return_to_real_mode() {
    let mut m = Machine::protected_mode(0);
    m.set_descriptor(sel::CODE0, descriptor(0, 0xffff, 0x9b));
    m.cpu.segments[seg::CS].attributes = 0x9b;
    m.cpu.regs[reg::RAX] = m.cpu.cr0 & !cr0::PE;
    m.run(&[0x0f, 0x22, 0xc0]).unwrap();
    m.cpu.regs[reg::RAX] = 0x1234;
    m.run(&mov_sreg(seg::DS)).unwrap();
    let ds = m.cpu.segments[seg::DS];
    assert_eq!((ds.base, ds.limit), (0x1_2340, !0));
}

#[test]
fn push_and_pop() {
    let mut m = Machine::long_mode(0);
    // push fs; pop gs
    assert_eq!(m.run(&[0x0f, 0xa0]), Ok(Flow::Next));
    assert_eq!(frame::<1>(&mut m, 8), [u64::from(sel::DATA0)]);
    assert_eq!(m.run(&[0x0f, 0xa9]), Ok(Flow::Next));
    assert_eq!(m.cpu.regs[reg::RSP], STACK);
    m.cpu.push(0xfff8, 8).unwrap();
    assert_eq!(m.run(&[0x0f, 0xa9]), Err(Fault::gp(0xfff8)));
    assert_eq!(m.cpu.regs[reg::RSP], STACK - 8);
    let mut m = Machine::protected_mode(0);
    m.cpu.push(sel::DATA0.into(), 4).unwrap();
    assert_eq!(m.run(&[0x17]), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.shadow, Shadow::MovSs);
}

#[test]
fn far_pointers() {
    let mut m = Machine::protected_mode(0);
    m.set_descriptor(sel::FREE, descriptor(0x7000, 0xffff, 0x92));
    m.write(0x9000, &[0x78, 0x56, 0x34, 0x12, sel::FREE as u8, 0]);
    m.cpu.regs[reg::RBX] = 0x9000;
    // les ecx, [ebx]
    assert_eq!(m.run(&[0xc4, 0x0b]), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.regs[reg::RCX], 0x1234_5678);
    assert_eq!(m.cpu.segments[seg::ES].base, 0x7000);
    // A bad selector leaves the register alone.
    m.write(0x9004, &[0xf8, 0xff]);
    m.cpu.regs[reg::RCX] = 7;
    assert_eq!(m.run(&[0x0f, 0xb2, 0x0b]), Err(Fault::gp(0xfff8)));
    assert_eq!(m.cpu.regs[reg::RCX], 7);
}

#[test]
fn storing_selectors() {
    let mut m = Machine::long_mode(0);
    m.cpu.regs[reg::RAX] = !0;
    m.run(&[0x8c, 0xd8]).unwrap();
    assert_eq!(m.cpu.regs[reg::RAX], sel::DATA0.into(), "zero-extended");
    m.cpu.regs[reg::RAX] = !0;
    m.run(&[0x66, 0x8c, 0xd8]).unwrap();
    assert_eq!(m.cpu.regs[reg::RAX], !0xffff | u64::from(sel::DATA0));
    m.cpu.regs[reg::RBX] = 0x9000;
    m.write_u64(0x9000, !0);
    m.run(&[0x48, 0x8c, 0x1b]).unwrap();
    assert_eq!(m.read(0x9000, 8), !0xffff | u64::from(sel::DATA0));
}

#[test]
fn flags_and_privilege() {
    let gp = Err(Fault::gp(0));
    let mut m = Machine::long_mode(3);
    m.cpu.rip = CODE;
    assert_eq!(m.run(&[0xfa]), gp);
    assert_eq!(m.run(&[0xfb]), gp);
    m.cpu.set_rflags(flags::IOPL | 2);
    assert_eq!(m.run(&[0xfb]), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.shadow, Shadow::Sti);
    m.cpu.shadow = Shadow::None;
    assert_eq!(m.run(&[0xfb]), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.shadow, Shadow::None, "IF was set already");
    // POPF at level 3 cannot change IOPL, nor IF below IOPL 3.
    m.cpu.set_rflags(flags::IF | 2);
    m.cpu
        .push(flags::IOPL | flags::AC | flags::VM | flags::RF | 0x8d7, 8)
        .unwrap();
    assert_eq!(m.run(&[0x9d]), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.rflags(), flags::IF | flags::AC | 0x8d7);
    m.cpu.rflags_system |= flags::RF;
    m.run(&[0x9c]).unwrap();
    assert_eq!(frame::<1>(&mut m, 8), [flags::IF | flags::AC | 0x8d7]);
    // CLAC at level 3 is #UD.
    assert_eq!(m.run(&[0x0f, 0x01, 0xca]), Err(Fault::ud()));
    let mut m = Machine::long_mode(0);
    assert_eq!(m.run(&[0x0f, 0x01, 0xcb]), Ok(Flow::Next));
    assert_ne!(m.cpu.rflags() & flags::AC, 0);
    m.cpu.cr4 |= crate::state::cr4::SMAP;
    assert_eq!(m.run(&[0x0f, 0x01, 0xca]), Ok(Flow::EndBlock));
}
