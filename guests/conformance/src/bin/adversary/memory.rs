//! Addresses that lead nowhere: linear and physical.

use crate::Random;
use caisson_guest_rt::context::{BP, GP0, SS0, load};
use caisson_guest_rt::cpu::has;
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{Arena, CODE, DATA, P, PS, U, W};
use caisson_guest_rt::{Context, Group, Suite, code64, cpu, guest, paging};

pub(crate) fn wild_addresses(suite: &mut Suite, a: &Arena) {
    suite.group("addresses that could alias in a software TLB", |g| {
        // Fill the translations of a few pages, then use addresses that share
        // their low bits but differ above: none may hit.
        write::<u64>(a.data, 0x5AFE);
        let load8 = code64!("mov rax, [rdi]", "int3");
        let store8 = code64!("mov [rdi], rax", "int3");
        let fill = |g: &mut Group| {
            let mut c = a.user(load8);
            g.run("fill", &mut c, BP, CODE + 4);
            let mut c = Context {
                rax: 0x5AFE,
                ..a.user(store8)
            };
            g.run("fill for writing", &mut c, BP, CODE + 4);
        };
        for bit in 24..64u32 {
            fill(g);
            let address = DATA ^ 1 << bit;
            let canonical = (address << 16) as i64 >> 16 == address as i64;
            for code in [load8, store8] {
                let mut c = Context {
                    rdi: address,
                    rax: 0xBAD,
                    ..a.user(code)
                };
                let got = c.enter();
                let fine = if canonical {
                    got.vector == 14 && c.cr2 == address
                } else {
                    got == GP0
                };
                g.check(fine, format_args!("DATA with bit {bit} flipped: {got}"));
            }
            g.eq("memory unharmed", read::<u64>(a.data), 0x5AFE);
        }
        // Sign extension the wrong way, all ones, poison-like values.
        for high in [
            0xFFFFu64 << 48,
            0x8000 << 48,
            0x7FFF << 48,
            1 << 62,
            0xFFF << 47,
            0x1_0000 << 47,
        ] {
            for code in [load8, store8] {
                let mut c = Context {
                    rdi: DATA | high,
                    ..a.user(code)
                };
                let got = c.enter();
                g.check(got != BP, format_args!("DATA | {high:#x}: {got}"));
            }
            let mut c = Context {
                rbp: DATA | high,
                ..a.user(code64!("mov rax, [rbp]"))
            };
            let got = c.enter();
            g.check(
                got == SS0 || got.vector == 14,
                format_args!("[rbp] with {high:#x}: {got}"),
            );
        }
        // The complement of the slot number in the page bits.
        for slot in 0..4096u64 {
            let address = (!slot & 0xFFF) << 12;
            for offset in [0, 0xFF8, 0xFFC] {
                let mut c = Context {
                    rdi: address | 0x7F00_0000_0000 | offset,
                    ..a.user(load8)
                };
                let got = c.enter();
                if got.vector != 14 {
                    g.check(
                        false,
                        format_args!("slot {slot:#x} offset {offset:#x}: {got}"),
                    );
                }
            }
        }
        let mut random = Random(0x1234_5678_9ABC_DEF1);
        let mut escaped = 0u64;
        for _ in 0..20_000 {
            let address = random.next();
            // Everything this space maps for ring 3 lies in 0x4000_0000..0x4030_0000.
            if (CODE..CODE + 0x30_0000).contains(&address) {
                continue;
            }
            let mut c = Context {
                rdi: address,
                ..a.user(load8)
            };
            let got = c.enter();
            escaped += u64::from(got == BP || !(got.vector == 14 || got == GP0));
        }
        g.eq("random addresses that were readable in ring 3", escaped, 0);
    });
}

pub(crate) fn wild_physical(suite: &mut Suite, a: &Arena) {
    suite.group("page tables that point outside of memory", |g| {
        let width = has::physical_bits();
        let va = 0x5000_0000;
        let slot = a.space.entry(va, 1);
        let mut random = Random(0xFEED_FACE_CAFE_BEEF);
        let load8 = code64!("mov rax, [rdi]", "int3");
        let store8 = code64!("mov [rdi], rax", "int3");
        let jump = code64!("jmp rdi");
        let mut surprises = 0u64;
        for i in 0..4000u64 {
            let mut physical = random.next() & ((1 << width) - 1) & paging::ADDRESS;
            if i % 4 == 0 {
                physical = ((1 << width) - 4096) - (i << 12);
            }
            // Leave the devices and the guest's own RAM alone here.
            if physical < 0x1_0000_0000 {
                physical |= 1 << 33;
            }
            write(slot, physical | P | W | U);
            cpu::invlpg(va);
            for code in [load8, store8, jump] {
                let got = Context {
                    rdi: va,
                    ..a.user(code)
                }
                .enter();
                // Nothing is there: reads give ones, writes vanish, a fetch cannot succeed as INT3.
                surprises += u64::from(got.vector > 31);
            }
        }
        g.eq(
            "accesses ended by something other than their own exception",
            surprises,
            0,
        );
        // Tables in nonexistent memory, and tables that contain themselves.
        for (what, level) in [
            ("page table", 2),
            ("page directory", 3),
            ("directory pointers", 4),
        ] {
            let upper = a.space.entry(0x700_0000_0000, level);
            let table = (1 << (width - 1)) | P | W | U;
            write(upper, table);
            let got = Context {
                rdi: 0x700_0000_0000,
                ..a.user(load8)
            }
            .enter();
            g.check(
                got.vector == 14 || got == BP,
                format_args!("{what} outside of memory: {got}"),
            );
            write(upper, (upper & !0xFFF) | P | W | U);
            let got = Context {
                rdi: 0x700_0000_0000,
                ..a.user(load8)
            }
            .enter();
            g.check(
                got.vector == 14 || got == BP,
                format_args!("{what} in itself: {got}"),
            );
            write(upper, 0u64);
            cpu::set_cr3(cpu::cr3());
        }
        // A 1 GiB page that ends beyond the physical width.
        if has::gb_pages() {
            let upper = a.space.entry(0x600_0000_0000, 3);
            write(upper, ((1u64 << width) - (1 << 30)) | P | W | U | PS);
            for offset in [0u64, 0x3FFF_FFF8] {
                let got = Context {
                    rdi: 0x600_0000_0000 + offset,
                    ..a.user(load8)
                }
                .enter();
                g.check(
                    got == BP || got.vector == 14,
                    format_args!("last GiB + {offset:#x}: {got}"),
                );
            }
        }
        // CR3 itself outside of memory: only a fetch from nothing can follow, so
        // the triple fault guest does that. Here: a root that maps us and itself.
        let copy = paging::frame();
        for i in 0..512u64 {
            write::<u64>(copy + i * 8, read(a.space.root + i * 8));
        }
        write::<u64>(copy + 511 * 8, copy | P | W);
        let mut c = Context {
            load: load::CR3,
            cr3: copy,
            rdi: 0xFFFF_FFFF_FFFF_FFF8,
            ..a.kernel(load8)
        };
        let got = c.enter();
        g.check(
            got == BP && c.rax & paging::ADDRESS == copy,
            format_args!("recursive root: {got} {:#x}", c.rax),
        );
    });
}
