//! Translation caching, accessed and dirty bits, large pages, global pages,
//! accesses that straddle pages, aliases, PCID and INVPCID, and the faults of
//! control-register writes.
//!
//! QEMU TCG 7.2 fails this: reserved bits (P missing), read-modify-write
//! faults as reads, CR3's reserved bits; it offers no PCID.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, Exit, GP0, UD};
use caisson_guest_rt::cpu::{self, cr, has};
use caisson_guest_rt::memory::{fill, read, write};
use caisson_guest_rt::paging::{A, Arena, CODE, D, DATA, G, NX, P, PS, STACK, U, W, frame, frames};
use caisson_guest_rt::{Context, Group, Suite, code64, guest};

guest!("paging", main);

const VA: u64 = 0x5000_0000;
const RW: u64 = P | W | U;

fn bits(slot: u64) -> u64 {
    read::<u64>(slot) & (A | D)
}

fn main(suite: &mut Suite) {
    let a = Arena::new();
    accessed_dirty(suite, &a);
    caching(suite, &a);
    large(suite, &a);
    straddle(suite, &a);
    aliases(suite, &a);
    control(suite, &a);
    pcid(suite, &a);
}

fn accessed_dirty(suite: &mut Suite, a: &Arena) {
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

fn caching(suite: &mut Suite, a: &Arena) {
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

fn large(suite: &mut Suite, a: &Arena) {
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

fn straddle(suite: &mut Suite, a: &Arena) {
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

fn aliases(suite: &mut Suite, a: &Arena) {
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

fn control(suite: &mut Suite, a: &Arena) {
    suite.group("control register rules", |g| {
        if has::qemu_tcg() {
            g.skip("QEMU TCG checks too little here and would lose the guest");
            return;
        }
        let cr0 = |v: u64| Context {
            rax: v,
            ..a.kernel(code64!("mov cr0, rax", "int3"))
        };
        let now = cpu::cr0();
        g.run("PG without PE", &mut cr0(now & !cr::PE), GP0, CODE);
        g.run("NW without CD", &mut cr0(now | cr::NW), GP0, CODE);
        g.run("upper half of CR0", &mut cr0(now | 1 << 32), GP0, CODE);
        g.run("CD", &mut cr0(now | cr::CD), BP, CODE + 4);
        cpu::set_cr0(now);
        let cr4 = |v: u64| Context {
            rax: v,
            ..a.kernel(code64!("mov cr4, rax", "int3"))
        };
        let now4 = cpu::cr4();
        for bit in [15u32, 19, 26, 31, 32, 63] {
            let got = cr4(now4 | 1 << bit).enter();
            g.check(got == GP0, format_args!("CR4 bit {bit}: got {got}"));
        }
        for (bit, offered, name) in [
            (cr::VMXE, has::vmx(), "VMXE"),
            (cr::FSGSBASE, has::fsgsbase(), "FSGSBASE"),
            (cr::PCIDE, has::pcid(), "PCIDE"),
            (cr::OSXSAVE, has::xsave(), "OSXSAVE"),
            (cr::SMEP, has::smep(), "SMEP"),
            (cr::SMAP, has::smap(), "SMAP"),
            (cr::UMIP, has::umip(), "UMIP"),
            (cr::PKE, has::pku(), "PKE"),
            (cr::LA57, false, "LA57 in long mode"),
        ] {
            let got = cr4(now4 | bit).enter();
            // The code lies on a user page: with SMEP its next fetch faults.
            let taken = if bit == cr::SMEP {
                Exit::code(14, 0x11)
            } else {
                BP
            };
            g.check(
                got == if offered { taken } else { GP0 },
                format_args!("CR4.{name} (offered: {offered}): got {got}"),
            );
            cpu::set_cr4(now4);
        }
        let cr3 = |v: u64| Context {
            rax: v,
            ..a.kernel(code64!("mov cr3, rax", "int3"))
        };
        let now3 = cpu::cr3();
        g.run(
            "CR3 bit 63 without PCIDE",
            &mut cr3(now3 | 1 << 63),
            GP0,
            CODE,
        );
        if has::physical_bits() < 52 {
            g.run(
                "CR3 above the physical width",
                &mut cr3(now3 | 1 << 51),
                GP0,
                CODE,
            );
        }
        g.run("CR3 cache bits", &mut cr3(now3 | 0x18), BP, CODE + 4);
        cpu::set_cr3(now3);
        g.run(
            "CR8 above 15",
            &mut Context {
                rax: 16,
                ..a.kernel(code64!("mov cr8, rax"))
            },
            GP0,
            CODE,
        );
        g.run(
            "LMSW cannot clear PE",
            &mut Context {
                rax: 0,
                ..a.kernel(code64!("lmsw ax", "int3"))
            },
            BP,
            CODE + 4,
        );
        g.eq("PE", cpu::cr0() & cr::PE, cr::PE);
        cpu::set_cr0(now);
        // STAC and CLAC.
        let ring3 = a.user(code64!("stac")).enter();
        g.check(ring3 == UD, format_args!("STAC in ring 3: {ring3}"));
        if has::smap() {
            let mut c = a.kernel(code64!("stac", "int3"));
            g.run("STAC", &mut c, BP, CODE + 4);
            g.eq("AC", c.rflags & cpu::flags::AC, cpu::flags::AC);
        }
    });
}

fn pcid(suite: &mut Suite, a: &Arena) {
    suite.group("PCID and INVPCID", |g| {
        let inv = |kind: u64, pcid: u64, address: u64| {
            write(a.data, pcid);
            write(a.data + 8, address);
            Context {
                rax: kind,
                ..a.kernel(code64!("invpcid rax, [rdi]", "int3"))
            }
            .enter()
        };
        if has::invpcid() {
            g.check(inv(2, 0, 0) == BP, format_args!("INVPCID all"));
            g.check(inv(3, 0, 0) == BP, format_args!("INVPCID all but global"));
            g.check(inv(4, 0, 0) == GP0, format_args!("INVPCID type 4"));
            g.check(
                inv(0, 0x1000, 0) == GP0,
                format_args!("INVPCID with reserved descriptor bits"),
            );
            g.check(
                inv(0, 0, 0x8000_0000_0000) == GP0,
                format_args!("INVPCID type 0 at a non-canonical address"),
            );
            g.check(
                inv(0, 1, DATA) == GP0,
                format_args!("INVPCID type 0 of PCID 1 without PCIDE"),
            );
            g.check(
                inv(1, 1, 0) == GP0,
                format_args!("INVPCID type 1 of PCID 1 without PCIDE"),
            );
            let got = a.user(code64!("invpcid rax, [rdi]")).enter();
            g.check(got == GP0, format_args!("INVPCID in ring 3: {got}"));
        } else {
            g.check(inv(2, 0, 0) == UD, format_args!("INVPCID is masked"));
        }
        if !has::pcid() {
            g.skip("CPUID offers no PCID");
            return;
        }
        let root = cpu::cr3();
        let cr4 = cpu::cr4();
        let mut c = Context {
            rax: cr4 | cr::PCIDE,
            load: 2,
            cr3: root | 8,
            ..a.kernel(code64!("mov cr4, rax"))
        };
        g.run("PCIDE with CR3[11:0] set", &mut c, GP0, CODE);
        cpu::set_cr4(cr4 | cr::PCIDE);
        let (one, two) = (frame(), frame());
        write::<u32>(one, 1);
        write::<u32>(two, 2);
        let slot = a.space.entry(VA, 1);
        let set = |page: u64| write(slot, page | RW);
        set(one);
        cpu::set_cr3(root | 1);
        g.eq("PCID 1", read::<u32>(VA), 1);
        cpu::set_cr3(root | 2);
        set(two);
        g.eq(
            "PCID 2 does not see PCID 1's translation",
            read::<u32>(VA),
            2,
        );
        cpu::set_cr3(root | 1);
        g.eq("a flushing switch forgets PCID 1's", read::<u32>(VA), 2);
        set(one);
        cpu::set_cr3(root | 2 | 1 << 63);
        g.eq("bit 63 is not stored", cpu::cr3() >> 63, 0);
        cpu::set_cr3(root | 2);
        g.eq("a flushing switch to PCID 2", read::<u32>(VA), 1);
        set(two);
        cpu::set_cr3(root | 3);
        if has::invpcid() {
            cpu::invpcid(1, 2, 0);
        }
        cpu::set_cr3(root | 2 | 1 << 63);
        if has::invpcid() {
            g.eq("INVPCID of one context", read::<u32>(VA), 2);
            set(one);
            cpu::set_cr3(root | 3);
            cpu::invpcid(0, 2, VA);
            cpu::set_cr3(root | 2 | 1 << 63);
            g.eq(
                "INVPCID of one address in another context",
                read::<u32>(VA),
                1,
            );
            set(two);
            cpu::set_cr3(root | 3 | 1 << 63);
            cpu::invpcid(2, 0, 0);
            cpu::set_cr3(root | 2 | 1 << 63);
            g.eq("INVPCID of everything", read::<u32>(VA), 2);
            set(one);
            cpu::set_cr3(root | 3 | 1 << 63);
            cpu::invpcid(3, 0, 0);
            cpu::set_cr3(root | 2 | 1 << 63);
            g.eq("INVPCID of all but global", read::<u32>(VA), 1);
        }
        // Clearing PCIDE forgets every context.
        cpu::set_cr3(root);
        cpu::set_cr4(cr4);
        set(two);
        cpu::invlpg(VA);
        g.eq("after clearing PCIDE", read::<u32>(VA), 2);
    });
}
