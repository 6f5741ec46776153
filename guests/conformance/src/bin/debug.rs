//! Debug registers, single step, RF, ICEBP, general detect, I/O breakpoints.
//!
//! QEMU TCG 7.2 fails this: DR6 bits it should keep, RF on faults, I/O
//! breakpoints' trap position, watchpoints in string instructions.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, DB, GP0, UD, load};
use caisson_guest_rt::cpu::{self, cr, flags};
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{Arena, CODE, DATA, STACK_TOP};
use caisson_guest_rt::percpu::sel;
use caisson_guest_rt::{Context, Group, Suite, code64, guest};

guest!("debug", main);

/// DR6 after nothing happened: reserved ones, BLD and RTM bits set.
const DR6_INIT: u64 = 0xFFFF_0FF0;
const BD: u64 = 1 << 13;
const BS: u64 = 1 << 14;
const TF: u64 = flags::FIXED | flags::TF;

/// DR7 for breakpoint `n`: local enable, type (0 execute, 1 write, 2 I/O, 3
/// access) and length (0 one byte, 1 two, 3 four, 2 eight).
fn dr7(n: u64, kind: u64, len: u64) -> u64 {
    0x400 | 1 << (n * 2) | kind << (16 + n * 4) | len << (18 + n * 4)
}

/// Runs and checks the exit, and DR6 against the wanted cause bits; resets DR6.
fn step(g: &mut Group, what: &str, c: &mut Context, rip: u64, cause: u64) {
    cpu::set_dr6(DR6_INIT);
    g.run(what, c, DB, rip);
    g.eqf(format_args!("{what}: dr6"), cpu::dr6(), DR6_INIT | cause);
    cpu::set_dr7(0x400);
}

fn main(suite: &mut Suite) {
    let a = Arena::new();
    single_step(suite, &a);
    breakpoints(suite, &a);
    watchpoints(suite, &a);
    registers(suite, &a);
}

fn single_step(suite: &mut Suite, a: &Arena) {
    suite.group("single step", |g| {
        let tf = |c: Context| Context { rflags: TF, ..c };
        let mut c = tf(a.user(code64!("nop", "nop")));
        step(g, "nop in ring 3", &mut c, CODE + 1, BS);
        g.eq("TF in the saved flags", c.rflags & flags::TF, flags::TF);
        g.eq("TF clear in the handler", c.entry_rflags & flags::TF, 0);
        step(
            g,
            "nop in ring 0",
            &mut tf(a.kernel(code64!("nop"))),
            CODE + 1,
            BS,
        );
        step(
            g,
            "jmp",
            &mut tf(a.user(code64!("jmp 2f", "nop", "2: nop"))),
            CODE + 3,
            BS,
        );
        // POPF that sets TF traps after the next instruction.
        let mut c = Context {
            rax: TF,
            ..a.user(code64!("push rax", "popfq", "nop", "nop"))
        };
        step(g, "POPF sets TF", &mut c, CODE + 3, BS);
        // POPF that clears TF still traps once.
        let mut c = Context {
            rax: flags::FIXED,
            ..tf(a.user(code64!("popfq", "nop", "int3")))
        };
        write::<u64>(
            a.stack + (STACK_TOP - caisson_guest_rt::paging::STACK),
            flags::FIXED,
        );
        step(g, "POPF clears TF", &mut c, CODE + 1, BS);
        c.rflags &= !flags::TF;
        g.eq("and it is clear", c.rflags & flags::TF, 0);
        step(
            g,
            "syscall-like INT does not trap in the handler",
            &mut tf(a.user(code64!("nop", "int3"))),
            CODE + 1,
            BS,
        );
        cpu::set_dr6(DR6_INIT);
        g.run(
            "INT3 under TF enters its handler first",
            &mut tf(a.user(code64!("int3", "nop"))),
            BP,
            CODE + 1,
        );
        g.eq("no #DB was noted", cpu::dr6(), DR6_INIT);
        g.run(
            "a fault under TF",
            &mut tf(a.user(code64!("ud2"))),
            UD,
            CODE,
        );
        // Each iteration of a string instruction traps, at the instruction itself.
        let mut c = Context {
            rcx: 3,
            ..tf(a.user(code64!("rep stosb", "nop")))
        };
        step(g, "REP STOSB, first iteration", &mut c, CODE, BS);
        g.eq("rcx", c.rcx, 2);
        step(g, "second iteration", &mut c, CODE, BS);
        step(g, "last iteration", &mut c, CODE + 2, BS);
        g.eq("rcx", c.rcx, 0);
        step(
            g,
            "mov ss holds it back",
            &mut Context {
                rax: sel::USER_DATA.into(),
                ..tf(a.user(code64!("mov ss, eax", "nop", "nop")))
            },
            CODE + 3,
            BS,
        );
        step(g, "cpuid", &mut tf(a.user(code64!("cpuid"))), CODE + 2, BS);
        step(
            g,
            "pushf pushes TF",
            &mut tf(a.user(code64!("pushfq", "nop"))),
            CODE + 1,
            BS,
        );
        g.eq(
            "image",
            read::<u64>(a.stack + (STACK_TOP - 8 - caisson_guest_rt::paging::STACK)) & flags::TF,
            flags::TF,
        );
        step(
            g,
            "iretq with TF in the image",
            &mut iret_with_tf(a),
            CODE + 0x101,
            BS,
        );
        step(
            g,
            "ICEBP sets no cause bit",
            &mut a.user(code64!(".byte 0xF1")),
            CODE + 1,
            0,
        );
    });
}

/// IRETQ in ring 0 to code at CODE + 0x100 with TF set in the popped flags.
fn iret_with_tf(a: &Arena) -> Context {
    let c = a.kernel(code64!("iretq"));
    a.load_at(0x100, code64!("nop", "nop", "int3"));
    let top = a.stack + (STACK_TOP - caisson_guest_rt::paging::STACK);
    for (i, v) in [
        CODE + 0x100,
        sel::CODE64.into(),
        TF,
        STACK_TOP,
        sel::DATA.into(),
    ]
    .iter()
    .enumerate()
    {
        write(top + i as u64 * 8, *v);
    }
    c
}

fn breakpoints(suite: &mut Suite, a: &Arena) {
    suite.group("instruction breakpoints", |g| {
        let code = code64!("nop", "nop", "inc eax", "int3");
        for user in [false, true] {
            let mut c = if user { a.user(code) } else { a.kernel(code) };
            cpu::set_dr0(CODE + 2);
            cpu::set_dr7(dr7(0, 0, 0));
            c.rax = 0;
            step(g, "fault before the instruction", &mut c, CODE + 2, 1);
            g.eq("not executed", c.rax, 0);
            // A handler sets RF itself to get past the breakpoint (Intel SDM Vol. 3 §18.3.1.1).
            g.eq("RF in the saved flags", c.rflags & flags::RF, 0);
            c.rflags |= flags::RF;
            cpu::set_dr7(dr7(0, 0, 0));
            g.run("RF lets it run", &mut c, BP, CODE + 5);
            g.eq("executed", c.rax, 1);
            g.eq(
                "RF is cleared after one instruction",
                c.rflags & flags::RF,
                0,
            );
        }
        cpu::set_dr0(CODE + 1);
        cpu::set_dr1(CODE + 1);
        cpu::set_dr7(dr7(0, 0, 0) | dr7(1, 0, 0));
        step(g, "two match", &mut a.user(code), CODE + 1, 3);
        cpu::set_dr1(CODE + 1);
        cpu::set_dr7(0x400 | 1 << 3);
        step(
            g,
            "global enable of DR1, DR0 matches but is disabled",
            &mut a.user(code),
            CODE + 1,
            3,
        );
        cpu::set_dr0(CODE + 3);
        cpu::set_dr7(dr7(0, 0, 0));
        g.run("middle of an instruction", &mut a.user(code), BP, CODE + 5);
        // MOV SS holds back the breakpoint of the next instruction.
        cpu::set_dr0(CODE + 2);
        cpu::set_dr7(dr7(0, 0, 0));
        let mut c = Context {
            rax: sel::USER_DATA.into(),
            ..a.user(code64!("mov ss, eax", "nop", "int3"))
        };
        g.run("breakpoint after MOV SS is lost", &mut c, BP, CODE + 4);
        cpu::set_dr0(CODE);
        cpu::set_dr7(dr7(0, 0, 0));
        let mut c = Context {
            rflags: flags::FIXED | flags::RF,
            ..a.user(code)
        };
        g.run("RF loaded by IRET", &mut c, BP, CODE + 5);
        // A breakpoint on an instruction that faults: #DB first.
        cpu::set_dr0(CODE);
        cpu::set_dr7(dr7(0, 0, 0));
        step(
            g,
            "before a faulting instruction",
            &mut a.user(code64!("ud2")),
            CODE,
            1,
        );
        cpu::set_dr7(0x400);
    });
}

fn watchpoints(suite: &mut Suite, a: &Arena) {
    suite.group("data breakpoints", |g| {
        let on = |addr: u64, kind: u64, len: u64| {
            cpu::set_dr1(addr);
            cpu::set_dr7(dr7(1, kind, len));
        };
        let store4 = code64!("mov [rdi], eax", "nop", "int3");
        let load4 = code64!("mov eax, [rdi]", "nop", "int3");
        on(DATA, 1, 3);
        step(
            g,
            "write traps after the store",
            &mut Context {
                rax: 0x77,
                ..a.user(store4)
            },
            CODE + 2,
            2,
        );
        g.eq("stored", read::<u32>(a.data), 0x77);
        on(DATA, 1, 3);
        g.run(
            "read of a write watchpoint",
            &mut a.user(load4),
            BP,
            CODE + 4,
        );
        on(DATA, 3, 3);
        step(
            g,
            "read of an access watchpoint",
            &mut a.user(load4),
            CODE + 2,
            2,
        );
        on(DATA + 3, 1, 0);
        step(
            g,
            "one byte inside the store",
            &mut a.user(store4),
            CODE + 2,
            2,
        );
        on(DATA + 4, 1, 3);
        g.run("just above the store", &mut a.user(store4), BP, CODE + 4);
        on(DATA, 1, 0);
        g.run(
            "just below the store",
            &mut Context {
                rdi: DATA + 1,
                ..a.user(store4)
            },
            BP,
            CODE + 4,
        );
        on(DATA, 1, 3);
        step(
            g,
            "store straddles its end",
            &mut Context {
                rdi: DATA + 3,
                ..a.user(store4)
            },
            CODE + 2,
            2,
        );
        on(DATA + 8, 1, 2);
        step(
            g,
            "eight bytes long",
            &mut Context {
                rdi: DATA + 15,
                ..a.user(store4)
            },
            CODE + 2,
            2,
        );
        on(DATA, 3, 3);
        step(
            g,
            "read-modify-write",
            &mut a.user(code64!("inc dword ptr [rdi]", "nop", "int3")),
            CODE + 2,
            2,
        );
        on(DATA, 3, 3);
        step(
            g,
            "SSE load",
            &mut a.user(code64!("movups xmm0, [rdi]", "nop", "int3")),
            CODE + 3,
            2,
        );
        on(STACK_TOP - 8, 1, 2);
        step(
            g,
            "push",
            &mut a.user(code64!("push rax", "nop", "int3")),
            CODE + 1,
            2,
        );
        on(STACK_TOP - 8, 1, 2);
        step(
            g,
            "call",
            &mut a.user(code64!("call 2f", "nop", "2: nop", "int3")),
            CODE + 6,
            2,
        );
        on(DATA + 2, 1, 0);
        let mut c = Context {
            rcx: 5,
            ..a.user(code64!("rep stosb", "nop", "int3"))
        };
        cpu::set_dr6(DR6_INIT);
        let got = c.enter();
        g.check(
            got == DB && c.rdi > DATA + 2,
            format_args!("REP STOSB: {got}, rdi {:#x}", c.rdi),
        );
        g.check(
            (c.rip == CODE && c.rcx == DATA + 5 - c.rdi) || (c.rip == CODE + 2 && c.rcx == 0),
            format_args!("REP STOSB stops whole: rip {:#x} rcx {:#x}", c.rip, c.rcx),
        );
        // A fetch is not a data access, and a faulting store does not trap.
        on(CODE, 3, 3);
        g.run("fetch", &mut a.user(code64!("nop", "int3")), BP, CODE + 2);
        on(DATA + 0x8_0000, 1, 3);
        cpu::set_dr6(DR6_INIT);
        let mut c = Context {
            rdi: DATA + 0x8_0000,
            ..a.user(store4)
        };
        let got = c.enter();
        g.check(got.vector == 14, format_args!("faulting store: {got}"));
        g.eq("no cause recorded", cpu::dr6() & 0xF, 0);
        // With TF both causes show.
        on(DATA, 1, 3);
        step(
            g,
            "with single step",
            &mut Context {
                rflags: TF,
                ..a.user(store4)
            },
            CODE + 2,
            2 | BS,
        );
        cpu::set_dr7(0x400);
        // I/O breakpoints need CR4.DE.
        let io = code64!("out 0x80, al", "nop", "int3");
        let de = |c: Context, on: bool| Context {
            load: load::CR4,
            cr4: cpu::cr4() & !cr::DE | if on { cr::DE } else { 0 },
            ..c
        };
        cpu::set_cr4(cpu::cr4() | cr::DE);
        cpu::set_dr1(0x80);
        cpu::set_dr7(dr7(1, 2, 0));
        step(g, "OUT with DE", &mut de(a.kernel(io), true), CODE + 2, 2);
        cpu::set_dr1(0x81);
        cpu::set_dr7(dr7(1, 2, 0));
        g.run("another port", &mut de(a.kernel(io), true), BP, CODE + 4);
        cpu::set_dr1(0x80);
        cpu::set_dr7(dr7(1, 2, 0));
        step(
            g,
            "IN",
            &mut de(a.kernel(code64!("in al, 0x80", "nop", "int3")), true),
            CODE + 2,
            2,
        );
        cpu::set_dr7(0x400);
        cpu::set_cr4(cpu::cr4() & !cr::DE);
    });
}

fn registers(suite: &mut Suite, a: &Arena) {
    suite.group("debug register access", |g| {
        cpu::set_dr6(0);
        g.eq("DR6 reserved bits read as one", cpu::dr6(), 0xFFFF_0FF0);
        cpu::set_dr6(DR6_INIT | 0xF | BS | BD);
        g.eq(
            "DR6 keeps what software writes",
            cpu::dr6(),
            DR6_INIT | 0xF | BS | BD,
        );
        cpu::set_dr6(DR6_INIT);
        cpu::set_dr7(0);
        g.eq("DR7 bit 10 reads as one", cpu::dr7(), 0x400);
        let write_dr = |n: u8, value: u64| Context {
            rax: value,
            ..a.kernel(&[0x0F, 0x23, 0xC0 | n << 3, 0xCC])
        };
        g.run("DR7 upper half", &mut write_dr(7, 1 << 32), GP0, CODE);
        g.run("DR6 upper half", &mut write_dr(6, 1 << 32), GP0, CODE);
        g.run(
            "DR0 takes any address",
            &mut write_dr(0, 0x7FFF_FFFF_FFFF),
            BP,
            CODE + 4,
        );
        // DR4 and DR5 alias DR6 and DR7 unless CR4.DE.
        let read4 = code64!(".byte 0x0F, 0x21, 0xE0", "int3");
        let mut c = a.kernel(read4);
        g.run("DR4 without DE", &mut c, BP, CODE + 4);
        g.eq("is DR6", c.rax, DR6_INIT);
        let mut c = Context {
            load: load::CR4,
            cr4: cpu::cr4() | cr::DE,
            ..a.kernel(read4)
        };
        g.run("DR4 with DE", &mut c, UD, CODE);
        // General detect: any MOV DR faults and clears GD.
        cpu::set_dr7(0x400 | 1 << 13);
        let mut c = a.kernel(code64!("mov rax, dr3", "int3"));
        g.run("general detect", &mut c, DB, CODE);
        g.eq("BD", cpu::dr6() & BD, BD);
        g.eq("GD is cleared for the handler", cpu::dr7() & 1 << 13, 0);
        cpu::set_dr7(0x400);
        cpu::set_dr6(DR6_INIT);
        g.run(
            "MOV DR in ring 3",
            &mut a.user(code64!("mov rax, dr0")),
            GP0,
            CODE,
        );
    });
}
