//! Interrupt delivery: stacks, gates, flags, error codes with IDT and EXT
//! bits, faults during delivery and double faults, NMI blocking, the shadows
//! of STI and MOV SS, priorities.
//!
//! QEMU TCG 7.2 fails this: it codes IDT errors as vector × 16 in long mode
//! and holds back the single-step trap after STI.
#![no_std]
#![no_main]

use caisson_guest_rt::apic::{self, reg};
use caisson_guest_rt::context::{BP, DB, Exit, UD};
use caisson_guest_rt::cpu::{self, TablePointer, flags};
use caisson_guest_rt::interrupt::{
    self, Frame, Gate, INTERRUPT_GATE, TRAP_GATE, USER_GATE, reset_gate, set_gate, stub,
};
use caisson_guest_rt::paging::{Arena, CODE, DATA, STACK_TOP};
use caisson_guest_rt::percpu::{self, descriptor, sel};
use caisson_guest_rt::{Context, Suite, code64, guest, ioapic};
use core::sync::atomic::{AtomicUsize, Ordering};

guest!("idt", main);

const VECTOR: u8 = 0x50;
/// Flags that the runtime's stub changes before it stores them.
const ARITHMETIC: u64 = 0x8D5;
const NON_CANONICAL: u64 = 0x8000_0000_0000;

fn main(suite: &mut Suite) {
    let a = Arena::new();
    ioapic::mask_pics();
    apic::enable(0xFF);
    stacks(suite, &a);
    gates(suite, &a);
    nested(suite, &a);
    nmi(suite, &a);
    shadows(suite, &a);
    priorities(suite, &a);
}

fn stacks(suite: &mut Suite, a: &Arena) {
    let gate = |ist, access| Gate::new(sel::CODE64, stub(VECTOR), ist, access);
    let int = code64!("int 0x50");
    let want = Exit::plain(VECTOR.into());
    suite.group("stack of the handler", |g| {
        set_gate(VECTOR, gate(0, USER_GATE));
        for misalign in [0, 1, 7, 8, 15] {
            let mut c = Context {
                rsp: STACK_TOP + misalign,
                ..a.kernel(int)
            };
            g.run("int from ring 0", &mut c, want, CODE + 2);
            g.eq(
                "frame on the same stack, aligned",
                c.entry_rsp,
                STACK_TOP + (misalign & !15) - 40,
            );
            g.eq("saved rsp", c.rsp, STACK_TOP + misalign);
        }
        let mut c = a.user(int);
        g.run("int from ring 3", &mut c, want, CODE + 2);
        g.eq("frame on RSP0", c.entry_rsp, percpu::stack_top(0, 0) - 40);
        g.eq("saved cs", c.cs, sel::USER_CODE64.into());
        g.eq("saved ss", c.ss, sel::USER_DATA.into());
        for ist in 1..=3u8 {
            set_gate(VECTOR, gate(ist, USER_GATE));
            for user in [false, true] {
                let mut c = if user { a.user(int) } else { a.kernel(int) };
                g.run("int with IST", &mut c, want, CODE + 2);
                g.eq(
                    "frame on the IST",
                    c.entry_rsp,
                    percpu::stack_top(0, ist.into()) - 40,
                );
            }
        }
        percpu::this().tss.ist[6] = STACK_TOP - 64 + 5;
        set_gate(VECTOR, gate(7, USER_GATE));
        let mut c = a.user(int);
        g.run("IST 7", &mut c, want, CODE + 2);
        g.eq(
            "unaligned IST is aligned down",
            c.entry_rsp,
            STACK_TOP - 64 - 40,
        );
        set_gate(13, Gate::new(sel::CODE64, stub(13), 0, INTERRUPT_GATE));
        let mut c = a.user(code64!("hlt"));
        g.run("exception with error code", &mut c, Exit::code(13, 0), CODE);
        g.eq(
            "frame with error code",
            c.entry_rsp,
            percpu::stack_top(0, 0) - 40,
        );
        reset_gate(13);
    });
    suite.group("flags at the handler", |g| {
        let all =
            flags::FIXED | flags::IF | flags::NT | flags::AC | flags::ID | flags::DF | flags::IOPL3;
        set_gate(VECTOR, gate(0, INTERRUPT_GATE));
        let mut c = Context {
            rflags: all,
            ..a.kernel(int)
        };
        g.run("interrupt gate", &mut c, want, CODE + 2);
        g.eq(
            "IF, NT cleared, others kept",
            c.entry_rflags & !ARITHMETIC,
            all & !(flags::IF | flags::NT),
        );
        g.eq("saved flags", c.rflags, all);
        set_gate(VECTOR, gate(0, TRAP_GATE));
        let mut c = Context {
            rflags: all,
            ..a.kernel(int)
        };
        g.run("trap gate", &mut c, want, CODE + 2);
        g.eq("IF kept", c.entry_rflags & !ARITHMETIC, all & !flags::NT);
        reset_gate(VECTOR);
        let mut c = Context {
            rflags: flags::FIXED | flags::RF,
            ..a.user(code64!("ud2"))
        };
        g.run("fault", &mut c, UD, CODE);
        g.eq("a fault saves RF set", c.rflags & flags::RF, flags::RF);
        let mut c = a.user(code64!("int3"));
        g.run("trap", &mut c, BP, CODE + 1);
        g.eq("a trap saves RF clear", c.rflags & flags::RF, 0);
    });
}

fn gates(suite: &mut Suite, a: &Arena) {
    let idt_error = |vector: u64, ext: u64| vector * 8 + 2 + ext;
    let int = code64!("int 0x50");
    suite.group("bad gates", |g| {
        let v = u64::from(VECTOR);
        let absent = Gate::new(sel::CODE64, stub(VECTOR), 0, USER_GATE & 0x7F);
        set_gate(VECTOR, absent);
        g.run(
            "not present",
            &mut a.user(int),
            Exit::code(11, idt_error(v, 0)),
            CODE,
        );
        set_gate(
            VECTOR,
            Gate::new(sel::CODE64, stub(VECTOR), 0, INTERRUPT_GATE & 0x7F),
        );
        g.run(
            "privilege before presence",
            &mut a.user(int),
            Exit::code(13, idt_error(v, 0)),
            CODE,
        );
        for kind in [0u8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xA, 0xB, 0xC, 0xD] {
            set_gate(VECTOR, Gate::new(sel::CODE64, stub(VECTOR), 0, 0xE0 | kind));
            let got = a.user(int).enter();
            g.check(
                got == Exit::code(13, idt_error(v, 0)),
                format_args!("gate type {kind:#x}: got {got}"),
            );
        }
        let with_selector = |s: u16| set_gate(VECTOR, Gate::new(s, stub(VECTOR), 0, USER_GATE));
        with_selector(0);
        g.run("null selector", &mut a.user(int), Exit::code(13, 0), CODE);
        with_selector(sel::DATA);
        g.run(
            "data selector",
            &mut a.user(int),
            Exit::code(13, sel::DATA.into()),
            CODE,
        );
        with_selector(sel::CODE32);
        g.run(
            "32-bit code selector",
            &mut a.user(int),
            Exit::code(13, sel::CODE32.into()),
            CODE,
        );
        with_selector(0xFFF8);
        g.run(
            "selector beyond the GDT",
            &mut a.user(int),
            Exit::code(13, 0xFFF8),
            CODE,
        );
        with_selector(0xC);
        g.run(
            "selector in an absent LDT",
            &mut a.user(int),
            Exit::code(13, 0xC),
            CODE,
        );
        with_selector(sel::USER_CODE64 & !3);
        g.run(
            "less privileged code from ring 0",
            &mut a.kernel(int),
            Exit::code(13, (sel::USER_CODE64 & !3).into()),
            CODE,
        );
        let absent_code = sel::FREE;
        percpu::this().set_gdt(absent_code, descriptor(0, 0xF_FFFF, 0x1B, 0xA));
        with_selector(absent_code);
        g.run(
            "absent code segment",
            &mut a.user(int),
            Exit::code(11, absent_code.into()),
            CODE,
        );
        set_gate(VECTOR, Gate::new(sel::CODE64, NON_CANONICAL, 0, USER_GATE));
        g.run(
            "non-canonical offset",
            &mut a.user(int),
            Exit::code(13, 0),
            CODE,
        );
        reset_gate(VECTOR);

        cpu::lidt(TablePointer {
            limit: 0x50 * 16 + 14,
            base: interrupt::idt_base(),
        });
        g.run(
            "beyond the limit by one byte",
            &mut a.user(int),
            Exit::code(13, idt_error(v, 0)),
            CODE,
        );
        cpu::lidt(TablePointer {
            limit: 0x50 * 16 + 15,
            base: interrupt::idt_base(),
        });
        g.run(
            "just inside the limit: DPL 0 gate",
            &mut a.user(int),
            Exit::code(13, idt_error(v, 0)),
            CODE,
        );
        g.run(
            "just inside the limit",
            &mut a.kernel(int),
            Exit::plain(v),
            CODE + 2,
        );
        interrupt::load();

        set_gate(6, Gate::new(sel::CODE64, stub(6), 0, INTERRUPT_GATE & 0x7F));
        g.run(
            "absent gate of an exception sets EXT",
            &mut a.user(code64!("ud2")),
            Exit::code(11, idt_error(6, 1)),
            CODE,
        );
        g.run(
            "INT 6 does not",
            &mut a.kernel(code64!("int 6")),
            Exit::code(11, idt_error(6, 0)),
            CODE,
        );
        set_gate(6, Gate::new(0, stub(6), 0, INTERRUPT_GATE));
        g.run(
            "null selector, exception",
            &mut a.user(code64!("ud2")),
            Exit::code(13, 1),
            CODE,
        );
        reset_gate(6);
    });
}

fn nested(suite: &mut Suite, a: &Arena) {
    suite.group("faults during delivery", |g| {
        let df = Exit::code(8, 0);
        let break_gate = |vector: u8| {
            set_gate(
                vector,
                Gate::new(sel::CODE64, stub(vector), 0, INTERRUPT_GATE & 0x7F),
            )
        };
        let div = code64!("xor ecx, ecx", "div ecx");
        break_gate(0);
        g.run("#NP while delivering #DE", &mut a.user(div), df, CODE + 2);
        reset_gate(0);
        break_gate(13);
        g.run(
            "#NP while delivering #GP",
            &mut a.user(code64!("hlt")),
            df,
            CODE,
        );
        reset_gate(13);
        break_gate(14);
        let load = code64!("mov rax, [rdi + 0x80000]");
        g.run("#NP while delivering #PF", &mut a.user(load), df, CODE);
        reset_gate(14);

        // Ring 3 to ring 0 on a bad RSP0.
        let rsp0 = percpu::this().tss.rsp[0];
        let bad = |rsp: u64, vector: u8| {
            percpu::this().tss.rsp[0] = rsp;
            set_gate(vector, Gate::new(sel::CODE64, stub(vector), 0, USER_GATE));
        };
        let hole = DATA + 0x8_0000;
        bad(hole, VECTOR);
        let mut c = a.user(code64!("int 0x50"));
        g.run("INT with unmapped RSP0", &mut c, Exit::code(14, 2), CODE);
        g.eq("cr2", c.cr2, hole - 8);
        bad(NON_CANONICAL, VECTOR);
        g.run(
            "INT with non-canonical RSP0",
            &mut a.user(code64!("int 0x50")),
            Exit::code(12, 0),
            CODE,
        );
        bad(hole, 6);
        let mut c = a.user(code64!("ud2"));
        g.run("#UD with unmapped RSP0", &mut c, Exit::code(14, 2), CODE);
        bad(NON_CANONICAL, 6);
        g.run(
            "#UD with non-canonical RSP0 sets EXT",
            &mut a.user(code64!("ud2")),
            Exit::code(12, 1),
            CODE,
        );
        bad(hole, 13);
        let mut c = a.user(code64!("hlt"));
        g.run(
            "#PF while delivering #GP is a page fault",
            &mut c,
            Exit::code(14, 2),
            CODE,
        );
        g.eq("cr2", c.cr2, hole - 8);
        bad(hole, 14);
        let mut c = a.user(load);
        g.run("#PF while delivering #PF", &mut c, df, CODE);
        g.eq("cr2 of the second", c.cr2, hole - 8);
        bad(NON_CANONICAL, 14);
        g.run("#SS while delivering #PF", &mut a.user(load), df, CODE);
        percpu::this().tss.rsp[0] = rsp0;
        for vector in [6, 13, 14, VECTOR] {
            reset_gate(vector);
        }
    });
}

static NMI_DEPTH: AtomicUsize = AtomicUsize::new(0);
static NMI_MAX_DEPTH: AtomicUsize = AtomicUsize::new(0);
static NMI_SEEN: AtomicUsize = AtomicUsize::new(0);

/// The first NMI sends another one to this processor and waits a little.
fn nmi_handler(_: &mut Frame) {
    let depth = NMI_DEPTH.fetch_add(1, Ordering::SeqCst) + 1;
    NMI_MAX_DEPTH.fetch_max(depth, Ordering::SeqCst);
    if NMI_SEEN.fetch_add(1, Ordering::SeqCst) == 0 {
        apic::send(apic::id(), apic::mode::NMI | apic::ASSERT);
        apic::send(apic::id(), apic::mode::NMI | apic::ASSERT);
        for _ in 0..1000 {
            cpu::pause();
        }
    }
    NMI_DEPTH.fetch_sub(1, Ordering::SeqCst);
}

fn nmi(suite: &mut Suite, a: &Arena) {
    suite.group("NMI", |g| {
        interrupt::set_handler(2, nmi_handler);
        apic::send(apic::id(), apic::mode::NMI | apic::ASSERT);
        for _ in 0..1000 {
            cpu::pause();
        }
        g.eq(
            "a second NMI waits for IRET, a third merges with it",
            NMI_SEEN.load(Ordering::SeqCst),
            2,
        );
        g.eq("never nested", NMI_MAX_DEPTH.load(Ordering::SeqCst), 1);
        interrupt::clear_handler(2);

        // The APIC's own NMI arrives with IF clear.
        let id = u64::from(apic::id()) << 24;
        let code = code64!(
            "mov [rsi + 0x10], ebx",
            "mov [rsi], eax",
            "2: pause",
            "dec ecx",
            "jnz 2b",
            "int3"
        );
        let mut c = a.kernel(code);
        c.rsi = apic::base() + u64::from(reg::ICR);
        c.rbx = id;
        c.rax = (apic::mode::NMI | apic::ASSERT).into();
        c.rcx = 100_000;
        let got = c.enter();
        g.check(
            got == Exit::plain(2),
            format_args!("NMI with IF clear: got {got}"),
        );
        g.that("taken soon after the write", c.rcx > 0);
        // IRET without an NMI changes nothing; the next NMI must come again.
        let got = Context {
            rsi: c.rsi,
            rbx: id,
            rax: c.rax,
            rcx: 100_000,
            ..a.kernel(code)
        }
        .enter();
        g.check(
            got == Exit::plain(2),
            format_args!("a further NMI: got {got}"),
        );
    });
}

/// Makes a fixed interrupt pending on this processor; interrupts are off.
fn pend(vector: u8) {
    apic::send(
        apic::id(),
        apic::mode::FIXED | apic::ASSERT | u32::from(vector),
    );
    while !apic::bit(reg::IRR, vector) {
        cpu::pause();
    }
}

/// Ends the interrupt in service, if one is.
fn settle(vector: u8) {
    if apic::bit(reg::ISR, vector) {
        apic::eoi();
    }
}

fn shadows(suite: &mut Suite, a: &Arena) {
    let irq = Exit::plain(VECTOR.into());
    suite.group("interrupt shadow", |g| {
        pend(VECTOR);
        g.run(
            "one instruction after STI",
            &mut a.kernel(code64!("sti", "nop", "nop", "int3")),
            irq,
            CODE + 2,
        );
        settle(VECTOR);
        pend(VECTOR);
        g.run(
            "STI, CLI: no window",
            &mut a.kernel(code64!("sti", "cli", "nop", "int3")),
            BP,
            CODE + 4,
        );
        g.that("still pending", apic::bit(reg::IRR, VECTOR));
        g.run(
            "STI, NOP, CLI: taken after the NOP",
            &mut a.kernel(code64!("sti", "nop", "cli", "int3")),
            irq,
            CODE + 2,
        );
        settle(VECTOR);
        pend(VECTOR);
        g.run(
            "a second STI does not prolong the shadow",
            &mut a.kernel(code64!("sti", "sti", "nop", "int3")),
            irq,
            CODE + 2,
        );
        settle(VECTOR);
        pend(VECTOR);
        let mut c = Context {
            rax: sel::DATA.into(),
            ..a.kernel(code64!("sti", "mov ss, eax", "nop", "int3"))
        };
        let got = c.enter();
        g.check(
            got == irq && (c.rip == CODE + 3 || c.rip == CODE + 4),
            format_args!("STI, MOV SS: got {got} at {:#x}", c.rip),
        );
        settle(VECTOR);
        pend(VECTOR);
        let mut c = a.kernel(code64!("push rax", "popfq", "nop", "int3"));
        c.rax = flags::FIXED | flags::IF;
        g.run("POPF has no shadow", &mut c, irq, CODE + 2);
        settle(VECTOR);
        pend(VECTOR);
        let mut c = a.kernel(code64!("nop", "int3"));
        c.rflags |= flags::IF;
        g.run("IRET has no shadow", &mut c, irq, CODE);
        settle(VECTOR);
        pend(VECTOR);
        g.run(
            "STI, HLT wakes",
            &mut a.kernel(code64!("sti", "hlt", "int3")),
            irq,
            CODE + 2,
        );
        settle(VECTOR);
    });
    suite.group("MOV SS and POP SS hold back debug traps", |g| {
        let tf = flags::FIXED | flags::TF;
        let mut c = Context {
            rflags: tf,
            rax: sel::DATA.into(),
            ..a.kernel(code64!("mov ss, eax", "nop", "nop", "int3"))
        };
        g.run("trap after the next instruction", &mut c, DB, CODE + 3);
        let mut c = Context {
            rflags: tf,
            ..a.kernel(code64!("nop", "nop", "int3"))
        };
        g.run("trap after each instruction", &mut c, DB, CODE + 1);
        let mut c = Context {
            rflags: tf,
            ..a.kernel(code64!("sti", "nop", "int3"))
        };
        g.run("STI does not hold it back", &mut c, DB, CODE + 1);
    });
}

fn priorities(suite: &mut Suite, a: &Arena) {
    suite.group("interrupt priority", |g| {
        for vector in [0x41, 0x91, 0x61, 0x92] {
            pend(vector);
        }
        let code = code64!("sti", "nop", "int3");
        for vector in [0x92u8, 0x91, 0x61, 0x41] {
            let got = a.kernel(code).enter();
            g.check(
                got == Exit::plain(vector.into()),
                format_args!("got {got}, want {vector:#x}"),
            );
            g.that("in service", apic::bit(reg::ISR, vector));
            g.eq(
                "processor priority",
                apic::get(reg::PPR),
                u32::from(vector) & 0xF0,
            );
            // The lower ones stay blocked until EOI.
            let blocked = a.kernel(code).enter();
            g.check(
                blocked == BP,
                format_args!("while {vector:#x} is in service: got {blocked}"),
            );
            apic::eoi();
        }
        apic::set(reg::TPR, 0x60);
        pend(0x61);
        g.run(
            "TPR blocks its own class",
            &mut a.kernel(code),
            BP,
            CODE + 3,
        );
        g.eq("CR8 is TPR's class", cpu::cr8(), 6);
        cpu::set_cr8(5);
        g.eq("CR8 writes TPR", apic::get(reg::TPR), 0x50);
        g.run(
            "a lower TPR lets it through",
            &mut a.kernel(code),
            Exit::plain(0x61),
            CODE + 2,
        );
        apic::eoi();
        cpu::set_cr8(0);
    });
}
