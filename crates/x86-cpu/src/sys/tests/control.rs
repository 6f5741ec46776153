use super::*;
use crate::{
    flags,
    flow::Flow,
    state::{cr0, cr4, efer, reg},
    testenv::{CODE, TABLES},
};

/// `mov crN, rax`.
fn mov_to_cr(n: u8) -> [u8; 3] {
    [0x0f, 0x22, 0xc0 | n << 3]
}

fn write_cr(m: &mut Machine, n: u8, value: u64) -> Result<Flow, Fault> {
    m.cpu.regs[reg::RAX] = value;
    m.run(&mov_to_cr(n))
}

#[test]
fn cr0_rules() {
    let mut m = Machine::long_mode(0);
    let old = m.cpu.cr0;
    let gp = Err(Fault::gp(0));
    assert_eq!(write_cr(&mut m, 0, old & !cr0::PE), gp);
    assert_eq!(write_cr(&mut m, 0, old & !cr0::PG), gp, "64-bit code");
    assert_eq!(write_cr(&mut m, 0, old | cr0::NW), gp);
    assert_eq!(write_cr(&mut m, 0, old | 1 << 32), gp);
    assert_eq!(m.cpu.cr0, old);
    // ET is wired; undefined bits do nothing.
    let odd = old & !cr0::ET | 1 << 28 | cr0::NW | cr0::CD;
    assert_eq!(write_cr(&mut m, 0, odd), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.cr0, old | cr0::NW | cr0::CD);
    let mut user = Machine::long_mode(3);
    assert_eq!(write_cr(&mut user, 0, old), gp);
}

#[test]
fn into_and_out_of_long_mode() {
    let mut m = Machine::protected_mode(0);
    let on = m.cpu.cr0 | cr0::PG;
    m.cpu.efer = efer::LME;
    m.cpu.cr3 = TABLES;
    assert_eq!(write_cr(&mut m, 0, on), Err(Fault::gp(0)), "without PAE");
    m.cpu.cr4 |= cr4::PAE;
    m.cpu.segments[seg::CS].attributes = 0xa09b;
    assert_eq!(write_cr(&mut m, 0, on), Err(Fault::gp(0)), "CS.L");
    m.cpu.segments[seg::CS].attributes = 0xc09b;
    m.cpu.segments[seg::TR].attributes = 0x83;
    assert_eq!(write_cr(&mut m, 0, on), Err(Fault::gp(0)), "16-bit TSS");
    m.cpu.segments[seg::TR].attributes = 0x8b;
    assert_eq!(write_cr(&mut m, 0, on), Ok(Flow::EndBlock));
    assert!(m.cpu.is_long() && !m.cpu.is_64bit());
    assert_eq!(write_cr(&mut m, 4, 0), Err(Fault::gp(0)), "PAE is needed");
    assert_eq!(write_cr(&mut m, 0, on & !cr0::PG), Ok(Flow::EndBlock));
    assert!(!m.cpu.is_long());
}

#[test]
fn pae_paging_loads_its_pointers() {
    let mut m = Machine::protected_mode(0);
    m.cpu.cr4 |= cr4::PAE;
    m.cpu.cr3 = TABLES;
    let on = m.cpu.cr0 | cr0::PG;
    m.write_u64(TABLES, 0x1003);
    assert_eq!(write_cr(&mut m, 0, on), Err(Fault::gp(0)), "reserved bit 1");
    assert_eq!(m.cpu.cr0 & cr0::PG, 0);
    m.write_u64(TABLES, 0x1001);
    assert_eq!(write_cr(&mut m, 0, on), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.pdptes[0], 0x1001);
    assert_eq!(write_cr(&mut m, 3, TABLES + 0x20), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.pdptes[0], 0);
}

#[test]
fn cr3_rules_and_flushes() {
    let mut m = Machine::long_mode(0);
    assert_eq!(write_cr(&mut m, 3, 1 << 40), Err(Fault::gp(0)));
    assert_eq!(write_cr(&mut m, 3, 1 << 63 | TABLES), Err(Fault::gp(0)));
    m.cpu.cr4 |= cr4::PCIDE;
    m.cpu
        .read_uint(0x5000, 8, crate::mem::Privilege::Supervisor)
        .unwrap();
    assert_eq!(m.cpu.tlbs.entry(0, 0x5000).tag_r, 0x5000);
    assert_eq!(write_cr(&mut m, 3, 1 << 63 | TABLES), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.cr3, TABLES);
    assert_ne!(m.cpu.tlbs.entry(0, 0x5000).tag_r, 0x5000);
}

#[test]
fn cr4_follows_cpuid() {
    let mut m = Machine::long_mode(0);
    let base = m.cpu.cr4;
    for (bit, ok) in [
        (cr4::SMEP, true),
        (cr4::SMAP, true),
        (cr4::UMIP, true),
        (cr4::FSGSBASE, true),
        (cr4::VME, false),
        (cr4::PVI, false),
        (1 << 13, false),
        (1 << 22, false),
        (1 << 40, false),
        (cr4::LA57, false),
    ] {
        let want = if ok {
            Ok(Flow::EndBlock)
        } else {
            Err(Fault::gp(0))
        };
        assert_eq!(write_cr(&mut m, 4, base | bit), want, "{bit:#x}");
    }
    m.env().cpuid.insert((7, 0), [0; 4]);
    assert_eq!(write_cr(&mut m, 4, base | cr4::SMEP), Err(Fault::gp(0)));
    // PCIDE needs a CR3 without PCID, and paging cannot be left with it.
    m.cpu.cr3 |= 1;
    assert_eq!(write_cr(&mut m, 4, base | cr4::PCIDE), Err(Fault::gp(0)));
    m.cpu.cr3 &= !1;
    assert_eq!(write_cr(&mut m, 4, base | cr4::PCIDE), Ok(Flow::EndBlock));
}

#[test]
fn cr8_and_absent_registers() {
    let mut m = Machine::long_mode(0);
    m.cpu.regs[reg::RAX] = 16;
    let mov_cr8: &[u8] = &[0x44, 0x0f, 0x22, 0xc0];
    assert_eq!(m.run(mov_cr8), Err(Fault::gp(0)));
    m.cpu.regs[reg::RAX] = 9;
    assert_eq!(m.run(mov_cr8), Ok(Flow::EndBlock));
    assert_eq!(m.env().cr8, 9);
    assert_eq!(m.run(&[0x44, 0x0f, 0x20, 0xc1]), Ok(Flow::Next));
    assert_eq!(m.cpu.regs[reg::RCX], 9);
}

#[test]
fn umip_hides_tables_from_user_code() {
    // sgdt [rbx]; sidt [rbx]; sldt eax; str eax; smsw eax
    let insns: [&[u8]; 5] = [
        &[0x0f, 0x01, 0x03],
        &[0x0f, 0x01, 0x0b],
        &[0x0f, 0x00, 0xc0],
        &[0x0f, 0x00, 0xc8],
        &[0x0f, 0x01, 0xe0],
    ];
    let mut m = Machine::long_mode(3);
    m.cpu.regs[reg::RBX] = 0x9000;
    for i in insns {
        assert_eq!(m.run(i), Ok(Flow::Next));
    }
    assert_eq!(m.cpu.regs[reg::RAX], m.cpu.cr0);
    m.run(insns[0]).unwrap();
    assert_eq!((m.read(0x9000, 2), m.read(0x9002, 8)), (0xfff, GDT));
    m.cpu.cr4 |= cr4::UMIP;
    for i in insns {
        assert_eq!(m.run(i), Err(Fault::gp(0)));
    }
}

#[test]
fn table_registers() {
    let mut m = Machine::long_mode(0);
    m.cpu.regs[reg::RBX] = 0x9000;
    m.write(0x9000, &[0x34, 0x12, 8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(
        m.run(&[0x0f, 0x01, 0x13]),
        Err(Fault::gp(0)),
        "not canonical"
    );
    m.write(0x9008, &[0, 0]);
    assert_eq!(m.run(&[0x0f, 0x01, 0x13]), Ok(Flow::Next));
    assert_eq!(
        (m.cpu.gdtr.limit, m.cpu.gdtr.base),
        (0x1234, 0x0304_0506_0708)
    );
    let mut m = Machine::new();
    m.cpu.rip = CODE;
    m.cpu.regs[reg::RBX] = 0x900;
    m.write(0x900, &[0xff, 0, 0x78, 0x56, 0x34, 0x12]);
    assert_eq!(m.run(&[0x0f, 0x01, 0x1f]), Ok(Flow::Next));
    assert_eq!(m.cpu.idtr.base, 0x34_5678, "24 bits with a 16-bit operand");
    assert_eq!(m.run(&[0x66, 0x0f, 0x01, 0x1f]), Ok(Flow::Next));
    assert_eq!(m.cpu.idtr.base, 0x1234_5678);
}

#[test]
fn task_register() {
    let mut m = Machine::long_mode(0);
    let ltr: &[u8] = &[0x0f, 0x00, 0xd8];
    m.cpu.regs[reg::RAX] = 0;
    assert_eq!(m.run(ltr), Err(Fault::gp(0)));
    m.cpu.regs[reg::RAX] = sel::TSS.into();
    assert_eq!(m.run(ltr), Err(Fault::gp(sel::TSS.into())), "busy");
    m.set_descriptor(sel::TSS, descriptor(TSS as u32, 0x67, 0x09));
    assert_eq!(m.run(ltr), Err(Fault::np(sel::TSS.into())));
    m.set_descriptor(sel::TSS, descriptor(TSS as u32, 0x67, 0x89));
    m.write_u64(GDT + u64::from(sel::TSS) + 8, 0xffff_8000);
    assert_eq!(m.run(ltr), Ok(Flow::Next));
    let tr = m.cpu.segments[seg::TR];
    assert_eq!((tr.base, tr.kind()), (0xffff_8000_0000_4000, 0xb));
    assert_eq!(m.read(GDT + u64::from(sel::TSS) + 5, 1), 0x8b);
    m.cpu.regs[reg::RAX] = 4;
    assert_eq!(m.run(ltr), Err(Fault::gp(4)), "not from the LDT");
}

#[test]
fn selector_questions() {
    let mut m = Machine::protected_mode(3);
    // lar ecx, eax; lsl ecx, eax; verr ax; verw ax
    let (lar, lsl): (&[u8], &[u8]) = (&[0x0f, 0x02, 0xc8], &[0x0f, 0x03, 0xc8]);
    let (verr, verw): (&[u8], &[u8]) = (&[0x0f, 0x00, 0xe0], &[0x0f, 0x00, 0xe8]);
    let mut ask = |selector: u16, attributes: u16, insn: &[u8]| {
        m.set_descriptor(sel::FREE, descriptor(0x1234, 0x8_1234, attributes));
        m.cpu.regs[reg::RAX] = selector.into();
        m.cpu.regs[reg::RCX] = 0;
        m.run(insn).unwrap();
        let zf = m.cpu.rflags() & 0x40 != 0;
        zf.then(|| m.cpu.regs[reg::RCX])
    };
    let free = sel::FREE;
    assert_eq!(ask(free, 0xf3, lar), Some(0x8_f300));
    assert_eq!(ask(free, 0xf3, lsl), Some(0x8_1234));
    assert_eq!(ask(free, 0x80f3, lsl), Some(0x8123_4fff));
    assert_eq!(ask(free, 0x93, lar), None, "privilege");
    assert_eq!(ask(free, 0x9f, lar), Some(0x8_9f00), "conforming");
    assert_eq!(ask(free, 0xec, lar), Some(0x8_ec00));
    assert_eq!(ask(free, 0xec, lsl), None, "gates have no limit");
    assert_eq!(ask(free, 0xee, lar), None, "not in a GDT");
    assert_eq!(ask(0, 0xf3, lar), None);
    assert_eq!(ask(0xff8, 0xf3, lar), None);
    assert!(ask(free, 0xf3, verw).is_some() && ask(free, 0xf3, verr).is_some());
    assert!(ask(free, 0xf1, verw).is_none() && ask(free, 0xf1, verr).is_some());
    assert!(ask(free, 0xf9, verr).is_none() && ask(free, 0xfb, verr).is_some());
    assert!(ask(free, 0xfb, verw).is_none());
    let mut real = Machine::new();
    assert_eq!(real.run(lar), Err(Fault::ud()));
}

#[test]
fn lmsw_cannot_leave_protected_mode() {
    let mut m = Machine::protected_mode(0);
    m.cpu.regs[reg::RAX] = 0xfff0 | 0xc;
    assert_eq!(m.run(&[0x0f, 0x01, 0xf0]), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.cr0 & 0xf, cr0::PE | cr0::EM | cr0::TS);
    assert_eq!(m.run(&[0x0f, 0x06]), Ok(Flow::EndBlock));
    assert_eq!(m.cpu.cr0 & cr0::TS, 0);
}

#[test]
fn invalidation() {
    use crate::mem::Privilege::Supervisor;
    let mut m = Machine::long_mode(0);
    let cached = |m: &mut Machine, a: u64| m.cpu.tlbs.entry(0, a).tag_r == a;
    let warm = |m: &mut Machine, a: u64| {
        m.cpu.read_uint(a, 1, Supervisor).unwrap();
    };
    warm(&mut m, 0x5000);
    warm(&mut m, 0x9000);
    m.cpu.regs[reg::RBX] = 0x5abc;
    assert_eq!(m.run(&[0x0f, 0x01, 0x3b]), Ok(Flow::EndBlock));
    assert!(!cached(&mut m, 0x5000));
    assert!(!cached(&mut m, 0x9000), "the same 2 MiB page");
    // Not canonical: nothing happens.
    m.cpu.regs[reg::RBX] = 1 << 47;
    assert_eq!(m.run(&[0x0f, 0x01, 0x3b]), Ok(Flow::EndBlock));
    // invpcid rax, [rbx]
    let mut invpcid = |kind: u64, pcid: u64, address: u64, pcide: bool| {
        m.cpu.cr4 = cr4::PAE | if pcide { cr4::PCIDE } else { 0 };
        m.cpu.regs[reg::RAX] = kind;
        m.cpu.regs[reg::RBX] = 0x9000;
        m.write_u64(0x9000, pcid);
        m.write_u64(0x9008, address);
        m.run(&[0x66, 0x0f, 0x38, 0x82, 0x03])
    };
    let (ok, gp) = (Ok(Flow::EndBlock), Err(Fault::gp(0)));
    assert_eq!(invpcid(0, 0, 0x5000, false), ok);
    assert_eq!(invpcid(0, 1, 0x5000, false), gp);
    assert_eq!(invpcid(0, 1, 0x5000, true), ok);
    assert_eq!(invpcid(0, 1, 1 << 57, true), gp);
    assert_eq!(invpcid(1, 1, 1 << 57, true), ok);
    assert_eq!(invpcid(1, 0x1000, 0, true), gp);
    assert_eq!(invpcid(2, 0, 0, false), ok);
    assert_eq!(invpcid(3, 0, 0, false), ok);
    assert_eq!(invpcid(4, 0, 0, false), gp);
}

#[test]
fn debug_registers() {
    let mut m = Machine::long_mode(0);
    let to = |n: u8| [0x0f, 0x23, 0xc0 | n << 3];
    let from = |n: u8| [0x0f, 0x21, 0xc1 | n << 3];
    m.cpu.regs[reg::RAX] = 0xffff_ffff;
    m.run(&to(6)).unwrap();
    m.run(&from(6)).unwrap();
    assert_eq!(m.cpu.regs[reg::RCX], 0xffff_efff);
    m.run(&to(7)).unwrap();
    m.cpu.dr7 &= !(1 << 13);
    m.run(&from(7)).unwrap();
    assert_eq!(m.cpu.regs[reg::RCX], 0xffff_07ff);
    m.cpu.regs[reg::RAX] = 1 << 32;
    assert_eq!(m.run(&to(6)), Err(Fault::gp(0)));
    assert_eq!(m.run(&to(7)), Err(Fault::gp(0)));
    m.run(&to(0)).unwrap();
    // DR4 is DR6 until debugging extensions are on.
    m.run(&from(4)).unwrap();
    assert_eq!(m.cpu.regs[reg::RCX], 0xffff_efff);
    m.cpu.cr4 |= cr4::DE;
    assert_eq!(m.run(&from(4)), Err(Fault::ud()));
    // General detect.
    m.cpu.dr7 |= 1 << 13;
    let Err(Fault::Exception(e)) = m.run(&from(0)) else {
        panic!("no #DB")
    };
    assert_eq!((e.vector, e.payload), (vector::DB, 1 << 13));
    m.set_gate(1, sel::CODE0, 0x1000, 0xe, 0, 0);
    crate::sys::deliver_exception(&mut m.cpu, e).unwrap();
    assert_eq!((m.cpu.dr7 >> 13 & 1, m.cpu.dr6 >> 13 & 1), (0, 1));
    let mut user = Machine::long_mode(3);
    assert_eq!(user.run(&from(0)), Err(Fault::gp(0)));
}

#[test]
fn time_stamps_and_cpuid() {
    let mut m = Machine::long_mode(3);
    assert_eq!(m.run(&[0x0f, 0x31]), Ok(Flow::Next));
    m.cpu.cr4 |= cr4::TSD;
    assert_eq!(m.run(&[0x0f, 0x31]), Err(Fault::gp(0)));
    assert_eq!(m.run(&[0x0f, 0x01, 0xf9]), Err(Fault::gp(0)));
    assert_eq!(m.run(&[0x0f, 0x33]), Err(Fault::gp(0)));
    m.cpu.regs[reg::RAX] = 0xffff_0000_0000_0001;
    m.cpu.regs[reg::RCX] = 0;
    m.run(&[0x0f, 0xa2]).unwrap();
    assert_eq!(m.cpu.regs[reg::RAX], 0x306c3);
    assert_eq!(m.cpu.regs[reg::RCX] >> 27 & 1, 0);
    m.cpu.cr4 |= cr4::OSXSAVE;
    m.cpu.regs[reg::RAX] = 1;
    m.run(&[0x0f, 0xa2]).unwrap();
    assert_eq!(m.cpu.regs[reg::RCX] >> 27 & 1, 1);
    // XSAVE area sizes follow XCR0.
    m.env().cpuid.insert((0xd, 0), [7, 0, 832, 0]);
    m.env().cpuid.insert((0xd, 2), [256, 576, 0, 0]);
    for (xcr0, size) in [(1, 576), (3, 576), (7, 832)] {
        m.cpu.xcr0 = xcr0;
        m.cpu.regs[reg::RAX] = 0xd;
        m.cpu.regs[reg::RCX] = 0;
        m.run(&[0x0f, 0xa2]).unwrap();
        assert_eq!(m.cpu.regs[reg::RBX], size);
    }
}

#[test]
fn halting_and_caches_are_for_the_kernel() {
    for insn in [&[0xf4u8][..], &[0x0f, 0x09], &[0x0f, 0x08], &[0x0f, 0x06]] {
        let mut m = Machine::long_mode(3);
        assert_eq!(m.run(insn), Err(Fault::gp(0)));
    }
    let mut m = Machine::long_mode(0);
    assert_eq!(m.run(&[0xf4]), Ok(Flow::Halt));
    // clflush [rbx] faults as a load does.
    m.cpu.regs[reg::RBX] = 0x50_0000;
    assert_eq!(m.run(&[0x0f, 0xae, 0x3b]), Err(Fault::page(0, 0x50_0000)));
}

#[test]
fn port_permissions() {
    use crate::sys::check_io;
    let mut m = Machine::protected_mode(3);
    m.write(TSS + 0x66, &[0x68, 0]);
    m.cpu.segments[seg::TR].limit = 0x68 + 8;
    m.write(TSS + 0x68, &[0x00, 0x02]);
    assert_eq!(check_io(&mut m.cpu, 8, 1), Ok(()));
    assert_eq!(check_io(&mut m.cpu, 9, 1), Err(Fault::gp(0)));
    assert_eq!(check_io(&mut m.cpu, 8, 2), Err(Fault::gp(0)));
    assert_eq!(check_io(&mut m.cpu, 6, 4), Err(Fault::gp(0)));
    assert_eq!(
        check_io(&mut m.cpu, 63, 1),
        Ok(()),
        "its second byte is the last"
    );
    assert_eq!(
        check_io(&mut m.cpu, 64, 1),
        Err(Fault::gp(0)),
        "beyond the limit"
    );
    m.cpu.set_rflags(flags::IOPL | 2);
    assert_eq!(check_io(&mut m.cpu, 9, 1), Ok(()));
    m.cpu.set_rflags(flags::IOPL | flags::VM | 2);
    assert_eq!(
        check_io(&mut m.cpu, 9, 1),
        Err(Fault::gp(0)),
        "V86 asks the map"
    );
}
