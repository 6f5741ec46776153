//! Self-modifying code on one processor: the next instruction, a loop that
//! patches itself, through an alias, across a page, by strings and pushes.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, Exit};
use caisson_guest_rt::cpu;
use caisson_guest_rt::memory::{read, write, write_bytes};
use caisson_guest_rt::paging::{Arena, CODE, P, U, W, frame, frames};
use caisson_guest_rt::{Context, Suite, code64, guest};

guest!("smc", main);

const ALIAS: u64 = 0x5000_0000;

fn main(suite: &mut Suite) {
    let a = Arena::new();
    a.space.map_range(ALIAS, a.code, 4, P | W | U);
    suite.group("inside a block", |g| {
        for user in [false, true] {
            let enter = |code: &[u8]| if user { a.user(code) } else { a.kernel(code) };
            // The store rewrites the immediate of the very next instruction.
            let mut c = enter(code64!(
                "mov byte ptr [rip + 2f + 1], 0x22",
                "2: mov eax, 0x11",
                "int3"
            ));
            c.enter();
            g.eq("next instruction", c.rax, 0x22);
            let mut c = enter(code64!(
                "mov byte ptr [rip + 2f + 1], 0x22",
                "jmp 2f",
                "2: mov eax, 0x11",
                "int3"
            ));
            c.enter();
            g.eq("after a jump", c.rax, 0x22);
            let mut c = enter(code64!(
                "mov word ptr [rip + 2f], 0xC3CC",
                "2: nop",
                "nop",
                "ud2"
            ));
            let got = c.enter();
            g.check(
                got == BP,
                format_args!("instruction replaced by INT3: got {got}"),
            );
            let mut c = enter(code64!(
                "mov byte ptr [rip + 2f + 5], 0x33",
                "2: nop",
                "nop",
                "nop",
                "nop",
                "mov al, 0",
                "int3"
            ));
            c.enter();
            g.eq("a later instruction of the block", c.rax & 0xFF, 0x33);
        }
    });
    suite.group("loops", |g| {
        // Each round increments the immediate that the next round adds.
        let code = code64!(
            "xor eax, eax",
            "mov ecx, 1000",
            "2: add eax, 0",
            "inc byte ptr [rip + 2b + 2]",
            "dec ecx",
            "jnz 2b",
            "int3"
        );
        let mut c = a.user(code);
        c.enter();
        let want = (0..1000u64)
            .map(|i| u64::from(((i % 256) as u8 as i8) as u32))
            .fold(0u32, |s, v| s.wrapping_add(v as u32));
        g.eq("sum of self-incremented immediates", c.rax as u32, want);
        // A loop that turns its own branch into NOPs after ten rounds.
        let code = code64!(
            "xor eax, eax",
            "2: inc eax",
            "cmp eax, 10",
            "jne 3f",
            "mov word ptr [rip + 4f], 0x9090",
            "3: nop",
            "4: jmp 2b",
            "int3"
        );
        let mut c = a.user(code);
        g.run("removes its branch", &mut c, BP, CODE + code.len() as u64);
        g.eq("rounds", c.rax, 10);
        // A callee rewritten before each call.
        a.load_at(0x800, code64!("mov eax, 0", "ret"));
        let code = code64!(
            "xor ebx, ebx",
            "mov ecx, 200",
            "2: mov [rdi + 1], ecx",
            "call rdi",
            "add ebx, eax",
            "dec ecx",
            "jnz 2b",
            "int3"
        );
        let mut c = a.user(code);
        c.rdi = CODE + 0x800;
        c.enter();
        g.eq("callee on the same page", c.rbx, 200 * 201 / 2);
        write_bytes(a.code + 0x2000, code64!("mov eax, 0", "ret"));
        let mut c = a.user(code);
        c.rdi = CODE + 0x2000;
        c.enter();
        g.eq("callee on another page", c.rbx, 200 * 201 / 2);
    });
    suite.group("through an alias", |g| {
        let code = code64!(
            "xor ebx, ebx",
            "mov ecx, 200",
            "2: mov [rsi + 1], ecx",
            "call rdi",
            "add ebx, eax",
            "dec ecx",
            "jnz 2b",
            "int3"
        );
        a.load_at(0x800, code64!("mov eax, 0", "ret"));
        let mut c = a.user(code);
        (c.rdi, c.rsi) = (CODE + 0x800, ALIAS + 0x800);
        c.enter();
        g.eq("written through the other address", c.rbx, 200 * 201 / 2);
        // The runtime's own identity mapping is a third address.
        let mut sum = 0;
        for i in 1..=50u32 {
            write::<u32>(a.code + 0x801, i);
            let mut c = Context {
                rdi: CODE + 0x800,
                ..a.user(code64!("call rdi", "int3"))
            };
            c.enter();
            sum += c.rax;
        }
        g.eq("written through the identity mapping", sum, 50 * 51 / 2);
        // The same frame executed at two addresses, patched through one.
        let both = code64!("call rdi", "mov ebx, eax", "call rsi", "int3");
        for i in 1..=20u32 {
            write::<u32>(a.code + 0x801, i);
            let mut c = a.user(both);
            (c.rdi, c.rsi) = (CODE + 0x800, ALIAS + 0x800);
            c.enter();
            g.eq("first address", c.rbx, i.into());
            g.eq("second address", c.rax, i.into());
        }
    });
    suite.group("across pages", |g| {
        // MOV EAX, imm32 whose immediate starts on the next page.
        a.load_at(0xFFF, code64!("mov eax, 0", "int3"));
        let jump = code64!("mov dword ptr [rsi], ecx", "jmp rdi");
        for i in 1..=20u64 {
            let mut c = a.user(jump);
            (c.rdi, c.rsi, c.rcx) = (CODE + 0xFFF, CODE + 0x1000, i * 0x0101);
            g.run("executed", &mut c, BP, CODE + 0x1005);
            g.eq("immediate on the second page", c.rax, i * 0x0101);
        }
        a.load_at(0xFFD, code64!("mov eax, 0x11223344", "int3"));
        for i in 1..=20u64 {
            let mut c = a.user(code64!("mov byte ptr [rsi], cl", "jmp rdi"));
            (c.rdi, c.rsi, c.rcx) = (
                CODE + 0xFFD,
                CODE + if i % 2 == 0 { 0xFFE } else { 0x1000 },
                i,
            );
            c.enter();
            let now = read::<u32>(a.code + 0xFFE);
            g.eq("byte of either page", c.rax as u32, now);
        }
        // The second page is remapped under the instruction.
        let (one, two) = (frame(), frame());
        write::<u32>(one, 0x1111);
        write::<u8>(one + 4, 0xCC);
        write::<u32>(two, 0x2222);
        write::<u8>(two + 4, 0xCC);
        let base = 0x6000_0000;
        let first = frames(1, 4096);
        write::<u8>(first + 0xFFF, 0xB8);
        a.space.map(base, first, 1, P | W | U);
        for i in 0..10 {
            let page = if i % 2 == 0 { one } else { two };
            a.space.map(base + 0x1000, page, 1, P | W | U);
            let mut c = Context {
                rdi: base + 0xFFF,
                ..a.user(code64!("jmp rdi"))
            };
            c.enter();
            g.eq(
                "remapped second page",
                c.rax,
                if i % 2 == 0 { 0x1111 } else { 0x2222 },
            );
        }
        // And the first page is remapped while the second stays.
        let other = frames(1, 4096);
        write::<u8>(other + 0xFFF, 0xBB);
        a.space.map(base, other, 1, P | W | U);
        let mut c = Context {
            rdi: base + 0xFFF,
            rbx: 0,
            ..a.user(code64!("jmp rdi"))
        };
        c.enter();
        g.eq("remapped first page", c.rbx, 0x2222);
    });
    suite.group("other kinds of stores", |g| {
        a.load_at(0x800, code64!("mov eax, 1", "int3"));
        let patch = |code: &[u8], value: u64| {
            let mut c = a.user(code);
            (c.rdi, c.rsi, c.rcx, c.rax, c.rdx) =
                (CODE + 0x801, CODE + 0x900, 4, value, CODE + 0x800);
            write::<u32>(a.code + 0x900, value as u32);
            let got = c.enter();
            (got, c.rax as u32)
        };
        for (name, code) in [
            ("rep movsb", code64!("rep movsb", "jmp rdx")),
            ("stosd", code64!("stosd", "jmp rdx")),
            ("xchg", code64!("xchg [rdi], eax", "jmp rdx")),
            (
                "lock add",
                code64!("mov dword ptr [rdi], 0", "lock add [rdi], eax", "jmp rdx"),
            ),
            (
                "movd",
                code64!("movd xmm0, eax", "movd [rdi], xmm0", "jmp rdx"),
            ),
            (
                "push",
                code64!(
                    "mov rbp, rsp",
                    "lea rsp, [rdi + 7]",
                    "mov ebx, [rdi + 4]",
                    "shl rbx, 32",
                    "or rbx, rax",
                    "mov [rdi], rbx",
                    "mov rsp, rbp",
                    "jmp rdx"
                ),
            ),
            (
                "cmpxchg",
                code64!(
                    "mov ecx, eax",
                    "mov eax, [rdi]",
                    "cmpxchg [rdi], ecx",
                    "jmp rdx"
                ),
            ),
        ] {
            for value in [0x11u64, 0x2222, 0x33_3333] {
                let (got, eax) = patch(code, value);
                g.check(
                    got == BP && eax == value as u32,
                    format_args!("{name}: {got}, eax {eax:#x}, want {value:#x}"),
                );
            }
        }
        // Code on the stack page, below the pushes.
        let mut c = a.user(code64!(
            "mov rax, 0xCC90909090909090",
            "push rax",
            "jmp rsp"
        ));
        let rsp = c.rsp;
        g.run("pushed code", &mut c, BP, rsp);
        let mut c = a.user(code64!(
            "mov rax, 0x9090909090909090",
            "push rax",
            "mov rax, 0xCC909090C3C3C3C3",
            "mov [rsp], rax",
            "lea rbx, [rsp + 4]",
            "jmp rbx"
        ));
        g.run("and changed", &mut c, BP, rsp);
        // A store that straddles from data into code.
        a.load_at(0x1000, code64!("mov al, 0x10", "int3"));
        let mut c = Context {
            rdi: CODE + 0xFFE,
            rax: 0x77B0_0000,
            rdx: CODE + 0x1000,
            ..a.user(code64!("mov [rdi], eax", "jmp rdx"))
        };
        c.enter();
        g.eq("store across the page before", c.rax & 0xFF, 0x77);
        // Write-protecting and unprotecting the code page keeps its contents right.
        let slot = a.space.entry(CODE + 0x1000, 1);
        for i in 0..10u64 {
            write(slot, read::<u64>(slot) & !W);
            cpu::invlpg(CODE + 0x1000);
            let mut c = Context {
                rdi: CODE + 0x1001,
                rax: i,
                ..a.user(code64!("mov [rdi], al"))
            };
            g.run("protected", &mut c, Exit::code(14, 7), CODE);
            write(slot, read::<u64>(slot) | W);
            cpu::invlpg(CODE + 0x1000);
            let mut c = Context {
                rdi: CODE + 0x1001,
                rax: i,
                rdx: CODE + 0x1000,
                ..a.user(code64!("mov [rdi], al", "xor eax, eax", "jmp rdx"))
            };
            c.enter();
            g.eq("patched after unprotecting", c.rax & 0xFF, i);
        }
    });
}
