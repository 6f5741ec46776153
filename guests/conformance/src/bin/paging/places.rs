//! Accesses that straddle pages, and pages that are mapped twice.

use crate::{RW, VA};
use caisson_guest_rt::context::{BP, Exit};
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{A, Arena, CODE, D, P, STACK, U, frame};
use caisson_guest_rt::{Context, Suite, code64, cpu};

pub(crate) fn straddle(suite: &mut Suite, a: &Arena) {
    suite.group("accesses across pages", |g| {
        let (one, two) = (frame(), frame());
        a.space.map(VA, one, 1, RW);
        let second = a.space.entry(VA + 4096, 1);
        write(second, two | RW);
        cpu::invlpg(VA + 4096);
        let at = |c: Context, back: u64| Context {
            rdi: VA + 4096 - back,
            ..c
        };
        for back in 1..8u64 {
            write::<u64>(one + 4088, 0);
            write::<u64>(two, 0);
            let mut c = Context {
                rax: 0x1122_3344_5566_7788,
                ..at(
                    a.user(code64!("mov [rdi], rax", "mov rbx, [rdi]", "int3")),
                    back,
                )
            };
            let got = c.enter();
            let low = read::<u64>(one + 4088) >> (8 * (8 - back));
            g.check(
                got == BP && c.rbx == c.rax,
                format_args!("store and load {back} bytes before the end: {got}"),
            );
            g.eq(
                "bytes in the first page",
                low,
                c.rax & (u64::MAX >> (8 * (8 - back))),
            );
            g.eq(
                "bytes in the second page",
                read::<u64>(two),
                c.rax >> (8 * back),
            );
        }
        // Rearranged physical order.
        a.space.map(VA, two, 1, RW);
        write(second, one | RW);
        cpu::invlpg(VA + 4096);
        write::<u32>(two + 4092, 0x4433_2211);
        write::<u32>(one, 0x8877_6655);
        let mut c = at(
            a.user(code64!(
                "mov rax, [rdi]",
                "movups xmm0, [rdi - 8]",
                "movq rbx, xmm0",
                "int3"
            )),
            4,
        );
        c.enter();
        g.eq("pages in reverse order", c.rax, 0x8877_6655_4433_2211);
        // A store that faults on the second page changes nothing.
        write(second, one | P | U);
        cpu::invlpg(VA + 4096);
        write::<u32>(two + 4092, 0x1111_1111);
        for (what, code) in [
            ("mov", code64!("mov [rdi], rax")),
            ("add", code64!("add [rdi], rax")),
            ("lock add", code64!("lock add [rdi], rax")),
            ("xchg", code64!("xchg [rdi], rax")),
            ("movups", code64!("movups [rdi], xmm0")),
            ("movq", code64!("movq [rdi], mm0")),
        ] {
            let mut c = Context {
                rax: u64::MAX,
                ..at(a.user(code), 4)
            };
            let got = c.enter();
            g.check(
                got == Exit::code(14, 7) && c.cr2 == VA + 4096,
                format_args!("{what}: {got} cr2 {:#x}", c.cr2),
            );
            g.eqf(
                format_args!("{what}: first page unchanged"),
                read::<u32>(two + 4092),
                0x1111_1111,
            );
            g.eq("register unchanged", c.rax, u64::MAX);
        }
        // Locked operations across the boundary are whole.
        write(second, one | RW);
        cpu::invlpg(VA + 4096);
        write::<u32>(two + 4092, u32::MAX);
        write::<u32>(one, 0);
        let mut c = Context {
            rax: 1,
            ..at(a.user(code64!("lock xadd [rdi], rax", "int3")), 4)
        };
        g.run("split lock", &mut c, BP, CODE + 6);
        g.eq("carry into the second page", read::<u32>(one), 1);
        g.eq("old value", c.rax, 0xFFFF_FFFF);
        // Instructions across the boundary.
        write::<u8>(two + 4095, 0xB8);
        write::<u32>(one, 0x1234_5678);
        write::<u8>(one + 4, 0xCC);
        let mut c = Context {
            rdi: VA + 4095,
            ..a.user(code64!("jmp rdi"))
        };
        g.run("instruction across pages", &mut c, BP, VA + 4096 + 5);
        g.eq("its operand", c.rax, 0x1234_5678);
        write(second, 0u64);
        cpu::invlpg(VA + 4096);
        let mut c = Context {
            rdi: VA + 4095,
            ..a.user(code64!("jmp rdi"))
        };
        g.run(
            "second half not present",
            &mut c,
            Exit::code(14, 0x14),
            VA + 4095,
        );
        g.eq("cr2 is the second page", c.cr2, VA + 4096);
        // Stack across the boundary, in delivery and CALL.
        let mut c = Context {
            rsp: VA + 4096 + 4,
            ..a.user(code64!("call 2f", "2: int3"))
        };
        g.run("CALL pushes across", &mut c, Exit::code(14, 6), CODE);
        g.eq("cr2", c.cr2, VA + 4096);
        g.eq("RSP unchanged", c.rsp, VA + 4100);
        let mut c = Context {
            rsp: STACK + 8,
            ..a.user(code64!("mov rbp, rsp", "enter 16, 3", "int3"))
        };
        let got = c.enter();
        g.check(
            got.vector == 14 && c.rsp == STACK + 8,
            format_args!("ENTER that runs off the stack: {got}, rsp {:#x}", c.rsp),
        );
    });
}

pub(crate) fn aliases(suite: &mut Suite, a: &Arena) {
    suite.group("aliases and self-mapped tables", |g| {
        let page = frame();
        a.space.map(VA + 0x1_0000, page, 1, RW);
        a.space.map(VA + 0x2_0000, page, 1, RW);
        write::<u32>(VA + 0x1_0000, 5);
        g.eq("second alias", read::<u32>(VA + 0x2_0000), 5);
        let mut c = Context {
            rdi: VA + 0x1_0FFE,
            rsi: VA + 0x2_0FFE,
            ..a.user(code64!("mov byte ptr [rdi], 7", "mov al, [rsi]", "int3"))
        };
        c.enter();
        g.eq("inside one block", c.rax as u8, 7);
        // A page table mapped into the space it describes: it moves a mapping through itself.
        let (one, two) = (frame(), frame());
        write::<u32>(one, 1);
        write::<u32>(two, 2);
        let target = VA + 0x3_0000;
        a.space.map(target, one, 1, RW);
        let slot = a.space.entry(target, 1);
        let window = VA + 0x4_0000;
        a.space.map(window, slot & !0xFFF, 1, RW);
        let mut c = a.kernel(code64!(
            "mov eax, [rsi]",
            "mov [rdi], rdx",
            "invlpg [rsi]",
            "mov ebx, [rsi]",
            "int3"
        ));
        c.rsi = target;
        c.rdi = window + (slot & 0xFFF);
        c.rdx = two | RW;
        c.enter();
        g.eq("before", c.rax as u32, 1);
        g.eq("after", c.rbx as u32, 2);
        // A page table that maps itself as the page being written: A and D land in it.
        let own = a.space.entry(VA + 0x5_0000, 1);
        write(own, (own & !0xFFF) | RW);
        cpu::invlpg(VA + 0x5_0000);
        let mut c = Context {
            rdi: VA + 0x5_0000 + (own & 0xFFF),
            ..a.kernel(code64!("mov rax, [rdi]", "int3"))
        };
        c.enter();
        g.eq("the entry reads itself with A set", c.rax & (A | D), A);
        write(own, 0u64);
        cpu::invlpg(VA + 0x5_0000);
    });
}
