//! Every exception that an instruction can raise: exact vector, error code,
//! saved instruction pointer and CR2.
//!
//! QEMU TCG 7.2 fails this: it codes a bad IDT entry in long mode as vector
//! × 16, reports #NM for SSE with EM and TS, #GP for non-canonical stack
//! references, a non-canonical branch at its target, no #GP for MXCSR's
//! reserved bits, read-modify-write faults as reads, and knows neither #AC nor #XM.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, Exit, GP0, SS0, UD};
use caisson_guest_rt::cpu::{self, cr, flags};
use caisson_guest_rt::paging::{self, Arena, CODE, DATA, STACK_TOP};
use caisson_guest_rt::{Context, Group, Suite, code64, guest};

guest!("exceptions", main);

const NON_CANONICAL: u64 = 0x8000_0000_0000;

/// Runs a context and checks exit and the offset of the reported RIP.
fn expect(g: &mut Group, what: &str, c: &mut Context, want: Exit, offset: u64) {
    let got = c.enter();
    g.check(got == want, format_args!("{what}: got {got}, want {want}"));
    g.eqf(format_args!("{what}: rip"), c.rip, CODE + offset);
}

fn main(suite: &mut Suite) {
    let a = Arena::new();
    suite.group("divide error", |g| {
        let code = code64!("div ecx");
        let mut c = Context {
            rax: 1,
            ..a.kernel(code)
        };
        expect(g, "div by 0", &mut c, Exit::plain(0), 0);
        g.eq("rax kept", c.rax, 1);
        let mut c = Context {
            rdx: 1,
            rcx: 1,
            rax: 7,
            ..a.user(code)
        };
        expect(g, "quotient overflow", &mut c, Exit::plain(0), 0);
        g.eq("rdx kept", c.rdx, 1);
        let mut c = Context {
            rax: 0x8000_0000,
            rdx: 0xFFFF_FFFF,
            rcx: 0xFFFF_FFFF,
            ..a.kernel(code64!("idiv ecx"))
        };
        expect(g, "INT_MIN / -1", &mut c, Exit::plain(0), 0);
        let mut c = Context {
            rax: 1 << 63,
            rdx: u64::MAX,
            rcx: u64::MAX,
            ..a.kernel(code64!("idiv rcx"))
        };
        expect(g, "INT64_MIN / -1", &mut c, Exit::plain(0), 0);
        let mut c = Context {
            rax: 0x8000,
            rcx: 0xFF,
            ..a.kernel(code64!("idiv cl"))
        };
        expect(
            g,
            "byte quotient -128.. overflow",
            &mut c,
            Exit::plain(0),
            0,
        );
    });
    suite.group("breakpoint and INT n", |g| {
        expect(g, "int3", &mut a.user(code64!("nop", "int3")), BP, 2);
        expect(
            g,
            "int 3 (two bytes)",
            &mut a.user(code64!(".byte 0xCD, 3")),
            BP,
            2,
        );
        expect(
            g,
            "int 0x80",
            &mut a.user(code64!("int 0x80")),
            Exit::plain(0x80),
            2,
        );
        expect(
            g,
            "int 0x20 from ring 3",
            &mut a.user(code64!("int 0x20")),
            Exit::code(13, 0x20 * 8 + 2),
            0,
        );
        expect(
            g,
            "int 13 from ring 0 has no code",
            &mut a.kernel(code64!("int 13")),
            Exit::plain(13),
            2,
        );
        expect(
            g,
            "int 14 from ring 0 has no code",
            &mut a.kernel(code64!("int 14")),
            Exit::plain(14),
            2,
        );
        expect(
            g,
            "into is invalid",
            &mut a.user(code64!(".byte 0xCE")),
            UD,
            0,
        );
    });
    suite.group("invalid opcode", |g| {
        expect(g, "ud2", &mut a.user(code64!("ud2")), UD, 0);
        expect(
            g,
            "mov cs",
            &mut a.kernel(code64!(".byte 0x8E, 0xC8")),
            UD,
            0,
        );
        expect(
            g,
            "lea reg",
            &mut a.user(code64!(".byte 0x8D, 0xC0")),
            UD,
            0,
        );
        for op in [
            0x06u8, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x27, 0x2F, 0x37, 0x3F, 0x60, 0x61, 0x82,
            0x9A, 0xCE, 0xD4, 0xD5, 0xD6, 0xEA,
        ] {
            let got = a.user(&[op, 0, 0, 0, 0, 0, 0, 0]).enter();
            g.check(
                got == UD,
                format_args!("opcode {op:#x} in 64-bit mode: got {got}"),
            );
        }
        expect(
            g,
            "mov cr1",
            &mut a.kernel(code64!(".byte 0x0F, 0x20, 0xC8")),
            UD,
            0,
        );
        expect(
            g,
            "mov cr5",
            &mut a.kernel(code64!(".byte 0x0F, 0x22, 0xE8")),
            UD,
            0,
        );
        expect(
            g,
            "mov cr9",
            &mut a.kernel(code64!(".byte 0x44, 0x0F, 0x20, 0xC8")),
            UD,
            0,
        );
    });
    suite.group("device not available", |g| {
        let nm = Exit::plain(7);
        for (what, code) in [
            ("fld1", code64!("fld1")),
            ("paddb mm", code64!("paddb mm0, mm0")),
            ("addps", code64!("addps xmm0, xmm0")),
            ("fwait", code64!("fwait")),
        ] {
            let mut c = Context {
                load: caisson_guest_rt::context::load::CR0,
                cr0: cpu::cr0() | cr::TS | cr::MP,
                ..a.user(code)
            };
            expect(g, what, &mut c, nm, 0);
        }
        let mut c = Context {
            load: 1,
            cr0: cpu::cr0() & !cr::MP | cr::TS,
            ..a.user(code64!("fwait", "int3"))
        };
        expect(g, "fwait with TS but not MP", &mut c, BP, 2);
        let mut c = Context {
            load: 1,
            cr0: cpu::cr0() | cr::EM,
            ..a.user(code64!("fld1"))
        };
        expect(g, "fld1 with EM", &mut c, nm, 0);
        let mut c = Context {
            load: 1,
            cr0: cpu::cr0() | cr::EM,
            ..a.user(code64!("addps xmm0, xmm0"))
        };
        expect(g, "addps with EM", &mut c, UD, 0);
        let mut c = Context {
            load: 1,
            cr0: cpu::cr0() | cr::EM | cr::TS,
            ..a.user(code64!("addps xmm0, xmm0"))
        };
        expect(g, "addps with EM and TS", &mut c, UD, 0);
    });
    suite.group("general protection and stack fault", |g| {
        let read = |c: Context, reg: u64| Context { rax: reg, ..c };
        expect(
            g,
            "non-canonical data",
            &mut read(a.user(code64!("mov rcx, [rax]")), NON_CANONICAL),
            GP0,
            0,
        );
        expect(
            g,
            "highest non-canonical",
            &mut read(a.user(code64!("mov rcx, [rax]")), 0xFFFF_7FFF_FFFF_FFFF),
            GP0,
            0,
        );
        a.space
            .map(NON_CANONICAL - 4096, a.data, 1, paging::P | paging::W);
        expect(
            g,
            "access leaves the canonical range",
            &mut read(a.kernel(code64!("mov rcx, [rax]")), NON_CANONICAL - 4),
            GP0,
            0,
        );
        expect(
            g,
            "push at non-canonical",
            &mut Context {
                rsp: NON_CANONICAL + 8,
                ..a.user(code64!("push rax"))
            },
            SS0,
            0,
        );
        expect(
            g,
            "rbp-based",
            &mut Context {
                rbp: NON_CANONICAL,
                ..a.user(code64!("mov rax, [rbp]"))
            },
            SS0,
            0,
        );
        expect(
            g,
            "rsp-based",
            &mut Context {
                rsp: NON_CANONICAL,
                ..a.user(code64!("mov rax, [rsp]"))
            },
            SS0,
            0,
        );
        expect(
            g,
            "rbp index is not a stack reference",
            &mut Context {
                rbp: NON_CANONICAL,
                ..a.user(code64!(".byte 0x48, 0x8B, 0x04, 0x6D, 0, 0, 0, 0"))
            },
            GP0,
            0,
        );
        expect(
            g,
            "ret to non-canonical",
            &mut ret_to(&a, NON_CANONICAL),
            GP0,
            0,
        );
        expect(
            g,
            "jmp to non-canonical",
            &mut read(a.user(code64!("jmp rax")), NON_CANONICAL),
            GP0,
            0,
        );
        expect(
            g,
            "call to non-canonical",
            &mut read(a.user(code64!("call rax")), NON_CANONICAL),
            GP0,
            0,
        );
        expect(g, "hlt in ring 3", &mut a.user(code64!("hlt")), GP0, 0);
        expect(g, "cli in ring 3", &mut a.user(code64!("cli")), GP0, 0);
        expect(g, "sti in ring 3", &mut a.user(code64!("sti")), GP0, 0);
        expect(
            g,
            "in al, 0x60 in ring 3",
            &mut a.user(code64!("in al, 0x60")),
            GP0,
            0,
        );
        expect(
            g,
            "mov cr0 in ring 3",
            &mut a.user(code64!("mov rax, cr0")),
            GP0,
            0,
        );
        expect(
            g,
            "mov dr7 in ring 3",
            &mut a.user(code64!("mov rax, dr7")),
            GP0,
            0,
        );
        expect(g, "rdmsr in ring 3", &mut a.user(code64!("rdmsr")), GP0, 0);
        expect(g, "clts in ring 3", &mut a.user(code64!("clts")), GP0, 0);
        expect(
            g,
            "invlpg in ring 3",
            &mut a.user(code64!("invlpg [rdi]")),
            GP0,
            0,
        );
        expect(
            g,
            "lgdt in ring 3",
            &mut a.user(code64!("lgdt [rdi]")),
            GP0,
            0,
        );
        expect(
            g,
            "wbinvd in ring 3",
            &mut a.user(code64!("wbinvd")),
            GP0,
            0,
        );
        expect(
            g,
            "movaps misaligned",
            &mut Context {
                rdi: DATA + 8,
                ..a.user(code64!("movaps xmm0, [rdi]"))
            },
            GP0,
            0,
        );
        expect(
            g,
            "movaps misaligned on the stack",
            &mut Context {
                rsp: STACK_TOP + 8,
                ..a.user(code64!("movaps xmm0, [rsp]"))
            },
            GP0,
            0,
        );
        expect(
            g,
            "movups misaligned",
            &mut Context {
                rdi: DATA + 8,
                ..a.user(code64!("movups xmm0, [rdi]", "int3"))
            },
            BP,
            4,
        );
        expect(
            g,
            "fxsave misaligned",
            &mut Context {
                rdi: DATA + 8,
                ..a.user(code64!("fxsave [rdi]"))
            },
            GP0,
            0,
        );
        expect(g, "ldmxcsr reserved bit", &mut mxcsr(&a, 0x1_0000), GP0, 0);
    });
    suite.group("selector errors", |g| {
        let with = |c: Context, rax: u64| Context { rax, ..c };
        let load_ds = code64!("mov ds, eax");
        expect(
            g,
            "selector beyond the GDT",
            &mut with(a.kernel(load_ds), 0xFFF8),
            Exit::code(13, 0xFFF8),
            0,
        );
        expect(
            g,
            "RPL is not part of the code",
            &mut with(a.kernel(load_ds), 0xFFFB),
            Exit::code(13, 0xFFF8),
            0,
        );
        expect(
            g,
            "LDT selector with no LDT",
            &mut with(a.kernel(load_ds), 0xC),
            Exit::code(13, 0xC),
            0,
        );
        expect(
            g,
            "null SS in ring 3",
            &mut with(a.user(code64!("mov ss, eax")), 0),
            GP0,
            0,
        );
        expect(
            g,
            "ring-0 data from ring 3",
            &mut with(a.user(load_ds), 0x10),
            Exit::code(13, 0x10),
            0,
        );
        expect(
            g,
            "system segment as data",
            &mut with(a.kernel(load_ds), 0x40),
            Exit::code(13, 0x40),
            0,
        );
        expect(
            g,
            "ss with wrong rpl",
            &mut with(a.kernel(code64!("mov ss, eax")), 0x13),
            Exit::code(13, 0x10),
            0,
        );
        expect(
            g,
            "null ds is fine",
            &mut with(a.user(code64!("mov ds, eax", "int3")), 3),
            BP,
            3,
        );
    });
    suite.group("page fault", |g| {
        let pf = |code: u64| Exit::code(14, code);
        let hole = DATA + 0x8_0000;
        let mut check = |what: &str, mut c: Context, want: Exit, cr2: u64, offset: u64| {
            cpu::set_cr2(0x1234);
            expect(g, what, &mut c, want, offset);
            g.eqf(format_args!("{what}: cr2"), c.cr2, cr2);
        };
        let at = |c: Context, rax: u64| Context { rax, ..c };
        check(
            "kernel read",
            at(a.kernel(code64!("mov cl, [rax]")), hole + 5),
            pf(0),
            hole + 5,
            0,
        );
        check(
            "kernel write",
            at(a.kernel(code64!("mov [rax], cl")), hole + 5),
            pf(2),
            hole + 5,
            0,
        );
        check(
            "user read",
            at(a.user(code64!("mov ecx, [rax]")), hole),
            pf(4),
            hole,
            0,
        );
        check(
            "user write",
            at(a.user(code64!("nop", "mov [rax], ecx")), hole),
            pf(6),
            hole,
            1,
        );
        check(
            "user rmw is a write",
            at(a.user(code64!("inc dword ptr [rax]")), hole),
            pf(6),
            hole,
            0,
        );
        check(
            "user lock rmw is a write",
            at(a.user(code64!("lock inc dword ptr [rax]")), hole),
            pf(6),
            hole,
            0,
        );
        check(
            "cmp is a read",
            at(a.user(code64!("cmp dword ptr [rax], 5")), hole),
            pf(4),
            hole,
            0,
        );
        check(
            "user reads kernel",
            at(a.user(code64!("mov ecx, [rax]")), 0x10_0000),
            pf(5),
            0x10_0000,
            0,
        );
        check(
            "user writes kernel",
            at(a.user(code64!("mov [rax], ecx")), 0x10_0000),
            pf(7),
            0x10_0000,
            0,
        );
        check(
            "straddling read reports the second page",
            at(a.user(code64!("mov rcx, [rax]")), DATA + 0x3FFD),
            pf(4),
            DATA + 0x4000,
            0,
        );
        check(
            "straddling write reports the second page",
            at(a.user(code64!("mov [rax], rcx")), DATA + 0x3FFD),
            pf(6),
            DATA + 0x4000,
            0,
        );
        check(
            "read before the first page",
            at(a.user(code64!("mov rcx, [rax]")), DATA - 3),
            pf(4),
            DATA - 3,
            0,
        );
        check(
            "push",
            Context {
                rsp: hole + 4,
                ..a.user(code64!("push rax"))
            },
            pf(6),
            hole - 4,
            0,
        );
        check(
            "pop",
            Context {
                rsp: hole,
                ..a.user(code64!("pop rax"))
            },
            pf(4),
            hole,
            0,
        );
        let mut c = Context {
            rax: hole,
            ..a.user(code64!("jmp rax"))
        };
        let got = c.enter();
        g.check(got == pf(0x14), format_args!("fetch: got {got}"));
        g.eq("fetch rip", c.rip, hole);
        g.eq("fetch cr2", c.cr2, hole);
    });
    suite.group("alignment check", |g| {
        let am = cpu::cr0() | cr::AM;
        let ac = Exit::code(17, 0);
        let c = |c: Context| Context {
            load: 1,
            cr0: am,
            rflags: flags::FIXED | flags::AC,
            rdi: DATA + 1,
            ..c
        };
        expect(
            g,
            "ring 3, AC and AM",
            &mut c(a.user(code64!("mov eax, [rdi]"))),
            ac,
            0,
        );
        expect(g, "word", &mut c(a.user(code64!("mov ax, [rdi]"))), ac, 0);
        expect(
            g,
            "qword at 4",
            &mut Context {
                rdi: DATA + 4,
                ..c(a.user(code64!("mov rax, [rdi]")))
            },
            ac,
            0,
        );
        expect(g, "write", &mut c(a.user(code64!("mov [rdi], eax"))), ac, 0);
        expect(
            g,
            "byte is always aligned",
            &mut c(a.user(code64!("mov al, [rdi]", "int3"))),
            BP,
            3,
        );
        expect(
            g,
            "ring 0 is exempt",
            &mut c(a.kernel(code64!("mov eax, [rdi]", "int3"))),
            BP,
            3,
        );
        expect(
            g,
            "AM clear",
            &mut Context {
                cr0: am & !cr::AM,
                ..c(a.user(code64!("mov eax, [rdi]", "int3")))
            },
            BP,
            3,
        );
        expect(
            g,
            "AC clear",
            &mut Context {
                rflags: 2,
                ..c(a.user(code64!("mov eax, [rdi]", "int3")))
            },
            BP,
            3,
        );
        expect(
            g,
            "movups is exempt",
            &mut c(a.user(code64!("movups xmm0, [rdi]", "int3"))),
            BP,
            4,
        );
        expect(
            g,
            "push at odd stack",
            &mut Context {
                rsp: STACK_TOP + 2,
                ..c(a.user(code64!("push rax")))
            },
            ac,
            0,
        );
    });
    suite.group("floating point", |g| {
        // Unmasked divide by zero; the error shows at the next waiting instruction.
        a.load_at(0x1000, &0x037Bu16.to_le_bytes());
        let mut c = Context {
            rsi: CODE + 0x1000,
            ..a.user(code64!(
                "fninit",
                "fldcw [rsi]",
                "fld1",
                "fldz",
                "fdivp st(1), st",
                "nop",
                "fwait"
            ))
        };
        expect(
            g,
            "#MF at the next waiting instruction",
            &mut c,
            Exit::plain(16),
            11,
        );
        let mut c = Context {
            rsi: CODE + 0x1000,
            ..a.user(code64!("fninit", "int3"))
        };
        expect(g, "fninit clears it", &mut c, BP, 3);
        a.load_at(0x1000, &0x1D80u32.to_le_bytes());
        // 0x1D80 leaves only divide-by-zero unmasked: 1.0 / 0 raises it.
        let code = code64!(
            "mov eax, 0x3F800000",
            "movd xmm1, eax",
            "xorps xmm0, xmm0",
            "ldmxcsr [rsi]",
            "divss xmm1, xmm0"
        );
        let mut c = Context {
            rsi: CODE + 0x1000,
            ..a.user(code)
        };
        expect(g, "#XM", &mut c, Exit::plain(19), 15);
        let mut c = Context {
            rsi: CODE + 0x1000,
            load: 4,
            cr4: cpu::cr4() & !cr::OSXMMEXCPT,
            ..a.user(code)
        };
        expect(g, "#UD without OSXMMEXCPT", &mut c, UD, 15);
        // Put the default control word back for compiled code.
        a.load_at(0x1000, &0x1F80u32.to_le_bytes());
        let mut c = Context {
            rsi: CODE + 0x1000,
            ..a.user(code64!("ldmxcsr [rsi]", "int3"))
        };
        expect(g, "mxcsr restored", &mut c, BP, 4);
    });
}

/// RET with the given return address on the stack.
fn ret_to(a: &Arena, target: u64) -> Context {
    let c = a.user(code64!("ret"));
    caisson_guest_rt::memory::write(
        a.stack + (STACK_TOP - caisson_guest_rt::paging::STACK),
        target,
    );
    c
}

/// LDMXCSR of the given value.
fn mxcsr(a: &Arena, value: u32) -> Context {
    caisson_guest_rt::memory::write(a.data, value);
    a.user(code64!("ldmxcsr [rdi]"))
}
