//! Accessed and dirty bits.

use crate::{RW, VA, bits};
use caisson_guest_rt::context::{BP, Exit};
use caisson_guest_rt::memory::{fill, read, write};
use caisson_guest_rt::paging::{A, Arena, CODE, D, P, U, frame};
use caisson_guest_rt::{Context, Group, Suite, code64, cpu};

pub(crate) fn accessed_dirty(suite: &mut Suite, a: &Arena) {
    suite.group("accessed and dirty bits", |g| {
        let page = frame();
        a.space.map(VA, page, 1, RW);
        let slots: [u64; 4] = [1, 2, 3, 4].map(|level| a.space.entry(VA, level));
        let clear = || {
            for slot in slots {
                write(slot, read::<u64>(slot) & !(A | D));
            }
            cpu::set_cr3(cpu::cr3());
        };
        let upper = |g: &mut Group, want: u64| {
            for slot in &slots[1..3] {
                g.eq("upper levels", bits(*slot), want);
            }
        };
        let on = |c: Context| Context { rdi: VA, ..c };
        clear();
        g.run(
            "read",
            &mut on(a.user(code64!("mov al, [rdi]", "int3"))),
            BP,
            CODE + 3,
        );
        g.eq("read sets A only", bits(slots[0]), A);
        upper(g, A);
        clear();
        g.run(
            "write",
            &mut on(a.user(code64!("mov [rdi], al", "int3"))),
            BP,
            CODE + 3,
        );
        g.eq("write sets A and D", bits(slots[0]), A | D);
        upper(g, A);
        clear();
        g.run(
            "read then write",
            &mut on(a.user(code64!("mov al, [rdi]", "mov [rdi], al", "int3"))),
            BP,
            CODE + 5,
        );
        g.eq(
            "a cached clean translation still sets D",
            bits(slots[0]),
            A | D,
        );
        for (what, code) in [
            (
                "cmpxchg that fails",
                code64!("mov eax, 1", "mov ecx, 2", "cmpxchg [rdi], ecx", "int3"),
            ),
            (
                "lock cmpxchg that fails",
                code64!(
                    "mov eax, 1",
                    "mov ecx, 2",
                    "lock cmpxchg [rdi], ecx",
                    "int3"
                ),
            ),
            ("add of zero", code64!("add dword ptr [rdi], 0", "int3")),
            ("xchg", code64!("xchg [rdi], eax", "int3")),
            ("bts", code64!("bts dword ptr [rdi], 3", "int3")),
            ("stosb", code64!("stosb", "int3")),
            ("movaps store", code64!("movaps [rdi], xmm0", "int3")),
            ("fnstcw", code64!("fnstcw [rdi]", "int3")),
            ("fxsave", code64!("fxsave [rdi]", "int3")),
        ] {
            fill(page, 4096, 0);
            clear();
            let got = on(a.user(code)).enter();
            g.check(
                got == BP && bits(slots[0]) == A | D,
                format_args!("{what}: {got}, bits {:#x}", bits(slots[0])),
            );
        }
        for (what, code) in [
            ("test", code64!("test [rdi], eax", "int3")),
            ("bt", code64!("bt dword ptr [rdi], 3", "int3")),
            ("scasb", code64!("scasb", "int3")),
            ("movaps load", code64!("movaps xmm0, [rdi]", "int3")),
            ("cmp", code64!("cmp [rdi], eax", "int3")),
            ("fldcw", code64!("fldcw [rdi]", "fninit", "int3")),
        ] {
            write::<u16>(page, 0x37F);
            clear();
            let got = on(a.user(code)).enter();
            g.check(
                got == BP && bits(slots[0]) == A,
                format_args!("{what}: {got}, bits {:#x}", bits(slots[0])),
            );
        }
        clear();
        write::<u8>(page, 0xCC);
        let mut c = a.user(code64!("jmp rdi"));
        c.rdi = VA;
        g.run("fetch", &mut c, BP, VA + 1);
        g.eq("fetch sets A only", bits(slots[0]), A);
        // A faulting write leaves D alone.
        write(slots[0], page | P | U);
        cpu::invlpg(VA);
        g.run(
            "denied write",
            &mut on(a.user(code64!("mov [rdi], al"))),
            Exit::code(14, 7),
            CODE,
        );
        g.eq("no D", bits(slots[0]) & D, 0);
        // The walker's bits are set on tables that are themselves mapped read-only or not at all.
        write(slots[0], page | RW);
        cpu::invlpg(VA);
        g.run(
            "write",
            &mut on(a.user(code64!("mov [rdi], al", "int3"))),
            BP,
            CODE + 3,
        );
        g.eq(
            "bits through the table's physical address",
            bits(slots[0]),
            A | D,
        );
        // Ring 0 data structures of the processor count as supervisor accesses.
        let gdt_read = code64!("mov ds, eax", "int3");
        g.run(
            "segment load from ring 3 reads a ring-0 GDT",
            &mut Context {
                rax: 0x23,
                ..a.user(gdt_read)
            },
            BP,
            CODE + 3,
        );
    });
}
