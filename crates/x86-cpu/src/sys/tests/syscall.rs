use super::*;
use crate::{
    flags,
    flow::Flow,
    state::{efer, reg},
    sys::{
        debug::{after_instruction, check_instruction, dr6},
        msr::{self, index},
    },
    testenv::CODE,
};

const SYSCALL: &[u8] = &[0x0f, 0x05];
const SYSRETQ: &[u8] = &[0x48, 0x0f, 0x07];
const SYSRETD: &[u8] = &[0x0f, 0x07];
const SYSENTER: &[u8] = &[0x0f, 0x34];
const SYSEXIT: &[u8] = &[0x0f, 0x35];
const SYSEXITQ: &[u8] = &[0x48, 0x0f, 0x35];

fn machine(cpl: u8) -> Machine {
    let mut m = Machine::long_mode(cpl);
    m.cpu.rip = CODE;
    m.cpu.msr.star = 0x0023_0010 << 32;
    m.cpu.msr.lstar = 0xffff_ffff_8100_0000;
    m.cpu.msr.cstar = 0xffff_ffff_8200_0000;
    m.cpu.msr.sfmask = flags::IF | flags::TF | 0x4_0000;
    m
}

fn make_amd(m: &mut Machine) {
    m.env()
        .cpuid
        .insert((0, 0), [1, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);
}

#[test]
fn syscall_and_sysret() {
    let mut m = machine(3);
    m.cpu
        .set_rflags(flags::IF | flags::RF | flags::AC | flags::DF | 3);
    assert_eq!(m.run(SYSCALL), Ok(Flow::Jump));
    assert_eq!(m.cpu.rip, 0xffff_ffff_8100_0000);
    assert_eq!(m.cpu.regs[reg::RCX], CODE + 2);
    assert_eq!(m.cpu.regs[11], flags::IF | flags::AC | flags::DF | 3);
    assert_eq!(m.cpu.rflags(), flags::DF | 3);
    assert_eq!(m.cpu.cpl, 0);
    let (cs, ss) = (m.cpu.segments[seg::CS], m.cpu.segments[seg::SS]);
    assert_eq!((cs.selector, cs.attributes, cs.limit), (0x10, 0xa09b, !0));
    assert_eq!((ss.selector, ss.attributes, ss.limit), (0x18, 0xc093, !0));
    m.cpu.regs[11] |= flags::VM | flags::RF | 1 << 15 | 1 << 40;
    assert_eq!(m.run(SYSRETQ), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.cpl), (CODE + 2, 3));
    assert_eq!(m.cpu.rflags(), flags::IF | flags::AC | flags::DF | 3);
    let (cs, ss) = (m.cpu.segments[seg::CS], m.cpu.segments[seg::SS]);
    assert_eq!((cs.selector, cs.attributes), (0x33, 0xa0fb));
    assert_eq!((ss.selector, ss.attributes), (0x2b, 0xc0f3));
}

#[test]
fn sysret_corners() {
    let mut m = machine(0);
    m.cpu.regs[reg::RCX] = 1 << 47;
    assert_eq!(m.run(SYSRETQ), Err(Fault::gp(0)));
    assert_eq!(m.cpu.cpl, 0);
    m.cpu.regs[reg::RCX] = 0xffff_ffff_0000_1000;
    assert_eq!(m.run(SYSRETD), Ok(Flow::Jump));
    assert_eq!(
        (m.cpu.rip, m.cpu.segments[seg::CS].selector),
        (0x1000, 0x23)
    );
    assert!(!m.cpu.is_64bit() && m.cpu.is_long());
    let mut m = machine(3);
    assert_eq!(m.run(SYSRETQ), Err(Fault::gp(0)));
    m.cpu.efer &= !efer::SCE;
    assert_eq!(m.run(SYSRETQ), Err(Fault::ud()));
    assert_eq!(m.run(SYSCALL), Err(Fault::ud()));
}

#[test]
fn compatibility_mode_depends_on_the_vendor() {
    let mut m = machine(3);
    m.cpu.segments[seg::CS].attributes = 0xc0fb;
    m.cpu.update_mode();
    assert_eq!(m.run(SYSCALL), Err(Fault::ud()));
    make_amd(&mut m);
    assert_eq!(m.run(SYSCALL), Ok(Flow::Jump));
    assert_eq!(m.cpu.rip, 0xffff_ffff_8200_0000);
    assert!(m.cpu.is_64bit());
    m.cpu.msr.sysenter_cs = 0x10;
    assert_eq!(m.run(SYSENTER), Err(Fault::ud()));
}

#[test]
fn trap_flag_is_judged_at_the_end() {
    let mut m = machine(3);
    m.cpu.set_rflags(flags::TF | 2);
    m.cpu.step.armed = true;
    m.run(SYSCALL).unwrap();
    assert_eq!(after_instruction(&mut m.cpu), Ok(()));
    // SYSRET brings TF back: the trap is the first thing that happens.
    m.run(SYSRETQ).unwrap();
    let Err(Fault::Exception(e)) = check_instruction(&mut m.cpu) else {
        panic!("no trap");
    };
    assert_eq!((e.vector, e.payload), (vector::DB, dr6::BS));
}

#[test]
fn sysenter_and_sysexit() {
    let mut m = machine(3);
    assert_eq!(m.run(SYSENTER), Err(Fault::gp(0)), "null selector");
    m.cpu.msr.sysenter_cs = 0x1b;
    m.cpu.msr.sysenter_esp = 0xffff_8000_0000_1000;
    m.cpu.msr.sysenter_eip = 0xffff_8000_0000_2000;
    m.cpu.set_rflags(flags::IF | flags::AC | 2);
    assert_eq!(m.run(SYSENTER), Ok(Flow::Jump));
    assert_eq!(m.cpu.rip, 0xffff_8000_0000_2000);
    assert_eq!(m.cpu.regs[reg::RSP], 0xffff_8000_0000_1000);
    assert_eq!(m.cpu.rflags(), flags::AC | 2);
    assert_eq!(m.cpu.segments[seg::CS].selector, 0x18);
    assert_eq!(m.cpu.segments[seg::SS].selector, 0x20);
    m.cpu.regs[reg::RDX] = 1 << 47;
    assert_eq!(m.run(SYSEXITQ), Err(Fault::gp(0)));
    m.cpu.regs[reg::RDX] = 0x1000;
    m.cpu.regs[reg::RCX] = 0x1_0000_2000;
    assert_eq!(m.run(SYSEXITQ), Ok(Flow::Jump));
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RSP]), (0x1000, 0x1_0000_2000));
    assert_eq!(m.cpu.segments[seg::CS].selector, 0x3b);
    assert_eq!(m.run(SYSEXIT), Err(Fault::gp(0)), "at level 3");
    let mut m = Machine::protected_mode(0);
    m.cpu.msr.sysenter_cs = 0x18;
    m.cpu.regs[reg::RDX] = 0x1000;
    assert_eq!(m.run(SYSEXIT), Ok(Flow::Jump));
    assert_eq!(m.cpu.segments[seg::CS].selector, 0x2b);
    assert_eq!(m.cpu.segments[seg::SS].selector, 0x33);
}

#[test]
fn msr_rules() {
    let mut m = Machine::long_mode(0);
    let cpu = &mut m.cpu;
    for i in [
        index::SYSENTER_ESP,
        index::SYSENTER_EIP,
        index::LSTAR,
        index::CSTAR,
        index::FS_BASE,
        index::GS_BASE,
        index::KERNEL_GS_BASE,
    ] {
        assert_eq!(msr::write(cpu, i, 0xffff_9000_1234_5678), Some(()));
        assert_eq!(msr::read(cpu, i), Some(0xffff_9000_1234_5678));
        assert_eq!(msr::write(cpu, i, 1 << 57), None, "{i:#x}");
        // The full width of a processor with 5-level paging counts.
        assert_eq!(msr::write(cpu, i, 1 << 47), Some(()));
        msr::write(cpu, i, 0xffff_9000_1234_5678).unwrap();
    }
    assert_eq!(cpu.regs[reg::SEG_BASE + seg::GS], 0xffff_9000_1234_5678);
    assert_eq!(msr::write(cpu, index::PAT, 0x0706_0504_0100_0607), Some(()));
    for bad in [2, 3, 8, 0x80] {
        for byte in 0..8 {
            assert_eq!(msr::write(cpu, index::PAT, bad << (8 * byte)), None);
        }
    }
    assert_eq!(msr::write(cpu, index::TSC_AUX, 1 << 32), None);
    assert_eq!(msr::read(cpu, 0x1234_5678), None);
    let e = cpu.efer;
    assert_eq!(msr::write(cpu, index::EFER, e & !efer::LME), None, "paging");
    assert_eq!(msr::write(cpu, index::EFER, e | 1 << 12), None, "SVME");
    assert_eq!(
        msr::write(cpu, index::EFER, e & !efer::LMA & !efer::NXE),
        Some(())
    );
    assert_eq!(cpu.efer, e & !efer::NXE, "LMA is read-only");
    let mut user = Machine::long_mode(3);
    assert_eq!(user.run(&[0x0f, 0x32]), Err(Fault::gp(0)));
    assert_eq!(user.run(&[0x0f, 0x30]), Err(Fault::gp(0)));
}

#[test]
fn msrs_of_the_engine() {
    let mut m = Machine::long_mode(0);
    m.env().msrs.insert(0x1b, 0xfee0_0900);
    m.cpu.regs[reg::RCX] = 0xdead_0000_0000_001b;
    assert_eq!(m.run(&[0x0f, 0x32]), Ok(Flow::Next));
    assert_eq!(
        (m.cpu.regs[reg::RAX], m.cpu.regs[reg::RDX]),
        (0xfee0_0900, 0)
    );
    m.cpu.regs[reg::RAX] = !0;
    m.cpu.regs[reg::RDX] = 0xffff_ffff_0000_0001;
    assert_eq!(m.run(&[0x0f, 0x30]), Ok(Flow::EndBlock));
    assert_eq!(m.env().msrs[&0x1b], 0x1_ffff_ffff);
    m.cpu.regs[reg::RCX] = 0x99;
    assert_eq!(m.run(&[0x0f, 0x30]), Err(Fault::gp(0)));
}

#[test]
fn swapgs_and_base_instructions() {
    let mut m = Machine::long_mode(0);
    m.cpu.msr.kernel_gs_base = 0xffff_8888_0000_0000;
    msr::write(&mut m.cpu, index::GS_BASE, 0x1000).unwrap();
    assert_eq!(m.run(&[0x0f, 0x01, 0xf8]), Ok(Flow::Next));
    assert_eq!(m.cpu.segments[seg::GS].base, 0xffff_8888_0000_0000);
    assert_eq!(m.cpu.regs[reg::SEG_BASE + seg::GS], 0xffff_8888_0000_0000);
    assert_eq!(m.cpu.msr.kernel_gs_base, 0x1000);
    // WRFSBASE RAX.
    let wrfsbase: &[u8] = &[0xf3, 0x48, 0x0f, 0xae, 0xd0];
    assert_eq!(m.run(wrfsbase), Err(Fault::ud()));
    m.cpu.cr4 |= crate::state::cr4::FSGSBASE;
    m.cpu.regs[reg::RAX] = 1 << 47;
    assert_eq!(m.run(wrfsbase), Err(Fault::gp(0)));
    m.cpu.regs[reg::RAX] = 0x7fff_0000_1234;
    assert_eq!(m.run(wrfsbase), Ok(Flow::Next));
    assert_eq!(m.run(&[0xf3, 0x0f, 0xae, 0xc1]), Ok(Flow::Next));
    assert_eq!(m.cpu.regs[reg::RCX], 0x1234, "RDFSBASE ECX");
    let mut user = Machine::long_mode(3);
    assert_eq!(user.run(&[0x0f, 0x01, 0xf8]), Err(Fault::gp(0)));
}
