//! Large pages.

use crate::{RW, bits};
use caisson_guest_rt::context::Exit;
use caisson_guest_rt::cpu::has;
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{A, Arena, CODE, PS, frame, frames};
use caisson_guest_rt::{Context, Suite, code64, cpu};

pub(crate) fn large(suite: &mut Suite, a: &Arena) {
    suite.group("large pages", |g| {
        let big = frames(512, 2 << 20);
        write::<u64>(big + 0x12_3458, 0xABCD);
        a.space.map(0x6000_0000, big, 2, RW);
        g.eq("2 MiB page", read::<u64>(0x6012_3458), 0xABCD);
        write(a.space.entry(0x6000_0000, 2), big | RW | PS | 1 << 12);
        cpu::invlpg(0x6000_0000);
        g.eq(
            "PAT bit of a large page is not an address bit",
            read::<u64>(0x6012_3458),
            0xABCD,
        );
        g.run(
            "straddling two large pages",
            &mut Context {
                rdi: 0x601F_FFFC,
                ..a.user(code64!("mov rax, [rdi]"))
            },
            Exit::code(14, 4),
            CODE,
        );
        // Splitting without a change of contents.
        let table = frame();
        for i in 0..512 {
            write(table + i * 8, (big + i * 4096) | RW);
        }
        write(a.space.entry(0x6000_0000, 2), table | RW);
        cpu::invlpg(0x6012_3000);
        g.eq("split page", read::<u64>(0x6012_3458), 0xABCD);
        if has::gb_pages() {
            let slot = a.space.entry(0x80_0000_0000, 3);
            write(slot, RW | PS);
            g.eq(
                "1 GiB page",
                read::<u64>(0x80_0000_0000 + big + 0x12_3458),
                0xABCD,
            );
            g.eq("A in the 1 GiB entry", bits(slot), A);
            write(slot, RW | PS | 1 << 13);
            cpu::set_cr3(cpu::cr3());
            g.run(
                "reserved bit of a 1 GiB page",
                &mut Context {
                    rdi: 0x80_0000_0000,
                    ..a.user(code64!("mov rax, [rdi]"))
                },
                Exit::code(14, 0xD),
                CODE,
            );
        }
        let slot = a.space.entry(0x100_0000_0000, 4);
        write(slot, frame() | RW | PS);
        g.run(
            "PS in the top table is reserved",
            &mut Context {
                rdi: 0x100_0000_0000,
                ..a.user(code64!("mov rax, [rdi]"))
            },
            Exit::code(14, 0xD),
            CODE,
        );
        write(slot, 0u64);
        // The upper half of the address space.
        a.space.map(0xFFFF_8000_0000_0000, big, 1, RW);
        a.space.map(0xFFFF_FFFF_FFFF_F000, big, 1, RW);
        write::<u64>(big, 0x77);
        g.eq(
            "lowest upper page",
            read::<u64>(0xFFFF_8000_0000_0000),
            0x77,
        );
        write::<u64>(big + 0xFF8, 0x88);
        g.eq(
            "last quadword of the address space",
            read::<u64>(u64::MAX - 7),
            0x88,
        );
    });
}
