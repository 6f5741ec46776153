//! What a processor remembers of page tables, and what makes it forget.

use crate::{RW, VA};
use caisson_guest_rt::context::{BP, Exit};
use caisson_guest_rt::cpu::cr;
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{Arena, CODE, G, NX, P, U, W, frame};
use caisson_guest_rt::{Context, Suite, code64, cpu};

pub(crate) fn caching(suite: &mut Suite, a: &Arena) {
    suite.group("translation caching", |g| {
        let (one, two) = (frame(), frame());
        write::<u32>(one, 1);
        write::<u32>(two, 2);
        let slot = a.space.entry(VA, 1);
        write(slot, one | RW);
        cpu::invlpg(VA);
        g.eq("first mapping", read::<u32>(VA), 1);
        write(slot, two | RW);
        cpu::invlpg(VA);
        g.eq("INVLPG", read::<u32>(VA), 2);
        write(slot, one | RW);
        cpu::invlpg(VA + 0xFFF);
        g.eq("INVLPG by any address of the page", read::<u32>(VA), 1);
        write(slot, two | RW);
        cpu::set_cr3(cpu::cr3());
        g.eq("MOV CR3", read::<u32>(VA), 2);
        write(slot, 0u64);
        cpu::invlpg(VA);
        g.run(
            "unmapped",
            &mut Context {
                rdi: VA,
                ..a.user(code64!("mov eax, [rdi]"))
            },
            Exit::code(14, 4),
            CODE,
        );
        // Not-present entries are never cached: no INVLPG needed.
        write(slot, one | RW);
        let mut c = Context {
            rdi: VA,
            ..a.user(code64!("mov eax, [rdi]", "int3"))
        };
        g.run("newly present", &mut c, BP, CODE + 3);
        g.eq("value", c.rax as u32, 1);
        // More rights: at most one spurious fault.
        write(slot, one | P | U);
        cpu::invlpg(VA);
        let _ = read::<u32>(VA);
        g.run(
            "read-only",
            &mut Context {
                rdi: VA,
                ..a.user(code64!("mov [rdi], eax"))
            },
            Exit::code(14, 7),
            CODE,
        );
        write(slot, one | RW);
        let store = code64!("mov [rdi], eax", "int3");
        let first = Context {
            rdi: VA,
            ..a.user(store)
        }
        .enter();
        let second = Context {
            rdi: VA,
            ..a.user(store)
        }
        .enter();
        g.check(
            (first == BP || first == Exit::code(14, 7)) && second == BP,
            format_args!("upgrade without INVLPG: {first}, then {second}"),
        );
        // Fewer rights after INVLPG take effect at once.
        write(slot, one | P | U);
        cpu::invlpg(VA);
        g.run(
            "downgraded",
            &mut Context {
                rdi: VA,
                ..a.user(code64!("mov [rdi], eax"))
            },
            Exit::code(14, 7),
            CODE,
        );
        write(slot, one | P | W);
        cpu::invlpg(VA);
        g.run(
            "made supervisor",
            &mut Context {
                rdi: VA,
                ..a.user(code64!("mov eax, [rdi]"))
            },
            Exit::code(14, 5),
            CODE,
        );
        write(slot, one | RW | NX);
        cpu::invlpg(VA);
        g.run(
            "made NX",
            &mut Context {
                rdi: VA,
                ..a.user(code64!("jmp rdi"))
            },
            Exit::code(14, 0x15),
            VA,
        );
        // The same code address after its page is replaced.
        write::<u32>(one, 0xCCCC_CC90);
        write::<u32>(two, 0xCCCC_CCCC);
        write(slot, one | RW);
        cpu::invlpg(VA);
        g.run(
            "code in the first frame",
            &mut Context {
                rdi: VA,
                ..a.user(code64!("jmp rdi"))
            },
            BP,
            VA + 2,
        );
        write(slot, two | RW);
        cpu::invlpg(VA);
        g.run(
            "code in the second frame",
            &mut Context {
                rdi: VA,
                ..a.user(code64!("jmp rdi"))
            },
            BP,
            VA + 1,
        );
        // Changing an upper-level entry.
        let table = frame();
        write(table, one | RW);
        let upper = a.space.entry(VA, 2);
        let old: u64 = read(upper);
        write(upper, table | RW);
        cpu::invlpg(VA);
        g.run(
            "code after a new table",
            &mut Context {
                rdi: VA,
                ..a.user(code64!("jmp rdi"))
            },
            BP,
            VA + 2,
        );
        write(upper, old);
        cpu::invlpg(VA);
        // Global pages go with CR4.PGE.
        let cr4 = cpu::cr4();
        cpu::set_cr4(cr4 | cr::PGE);
        write(slot, one | RW | G);
        cpu::invlpg(VA);
        let _ = read::<u32>(VA);
        write(slot, two | RW | G);
        cpu::invlpg(VA);
        g.eq("INVLPG drops a global entry", read::<u32>(VA), 0xCCCC_CCCC);
        write(slot, one | RW);
        cpu::set_cr4(cr4);
        g.eq(
            "clearing PGE drops global entries",
            read::<u32>(VA),
            0xCCCC_CC90,
        );
    });
}
