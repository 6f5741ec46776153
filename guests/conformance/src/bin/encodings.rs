//! Which encodings are valid: LOCK, instruction length, UD0 to UD2, prefixes,
//! CMPXCHG8B and CMPXCHG16B, UMIP, and that masked features raise #UD.
//!
//! QEMU TCG 7.2 fails this: some LOCK prefixes, UD0's ModRM byte, CMPXCHG16B's
//! alignment, instruction length over 15 bytes across pages.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, Exit, GP0, UD, load};
use caisson_guest_rt::cpu::{self, cr, flags, has};
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{Arena, CODE, DATA, PAGES};
use caisson_guest_rt::{Context, Suite, code64, guest};

guest!("encodings", main);

fn main(suite: &mut Suite) {
    let a = Arena::new();
    lock(suite, &a);
    length(suite, &a);
    wide_exchange(suite, &a);
    umip(suite, &a);
    flags_and_prefixes(suite, &a);
}

fn lock(suite: &mut Suite, a: &Arena) {
    suite.group("LOCK prefix", |g| {
        // With a memory destination these accept LOCK; each is followed by INT3.
        let valid: &[(&str, &[u8])] = &[
            ("add", &[0xF0, 0x01, 0x07]),
            ("or", &[0xF0, 0x09, 0x07]),
            ("adc", &[0xF0, 0x11, 0x07]),
            ("sbb", &[0xF0, 0x19, 0x07]),
            ("and", &[0xF0, 0x21, 0x07]),
            ("sub", &[0xF0, 0x29, 0x07]),
            ("xor", &[0xF0, 0x31, 0x07]),
            ("add imm", &[0xF0, 0x83, 0x07, 1]),
            ("inc", &[0xF0, 0xFF, 0x07]),
            ("dec", &[0xF0, 0xFF, 0x0F]),
            ("not", &[0xF0, 0xF7, 0x17]),
            ("neg", &[0xF0, 0xF7, 0x1F]),
            ("xchg", &[0xF0, 0x87, 0x07]),
            ("xadd", &[0xF0, 0x0F, 0xC1, 0x07]),
            ("cmpxchg", &[0xF0, 0x0F, 0xB1, 0x0F]),
            ("cmpxchg8b", &[0xF0, 0x0F, 0xC7, 0x0F]),
            ("bts", &[0xF0, 0x0F, 0xAB, 0x07]),
            ("btr", &[0xF0, 0x0F, 0xB3, 0x07]),
            ("btc", &[0xF0, 0x0F, 0xBB, 0x07]),
            ("bts imm", &[0xF0, 0x0F, 0xBA, 0x2F, 1]),
        ];
        for (name, bytes) in valid {
            let mut code = [0xCC; 16];
            code[..bytes.len()].copy_from_slice(bytes);
            let mut c = a.user(&code);
            let got = c.enter();
            g.check(
                got == BP && c.rip == CODE + bytes.len() as u64 + 1,
                format_args!("lock {name}: got {got} at {:#x}", c.rip),
            );
        }
        if has::qemu_tcg() {
            g.skip("QEMU TCG aborts on a locked XCHG of registers");
            return;
        }
        let invalid: &[(&str, &[u8])] = &[
            ("add reg, mem", &[0xF0, 0x03, 0x07]),
            ("add reg, reg", &[0xF0, 0x01, 0xC0]),
            ("cmp", &[0xF0, 0x39, 0x07]),
            ("cmp imm", &[0xF0, 0x83, 0x3F, 1]),
            ("test", &[0xF0, 0x85, 0x07]),
            ("mov", &[0xF0, 0x89, 0x07]),
            ("lea", &[0xF0, 0x8D, 0x07]),
            ("nop", &[0xF0, 0x90]),
            ("push", &[0xF0, 0x50]),
            ("push mem", &[0xF0, 0xFF, 0x37]),
            ("mul", &[0xF0, 0xF7, 0x27]),
            ("shl", &[0xF0, 0xC1, 0x27, 1]),
            ("bt", &[0xF0, 0x0F, 0xA3, 0x07]),
            ("bt imm", &[0xF0, 0x0F, 0xBA, 0x27, 1]),
            ("bts reg", &[0xF0, 0x0F, 0xAB, 0xC0]),
            ("xchg reg", &[0xF0, 0x87, 0xC0]),
            ("inc reg", &[0xF0, 0xFF, 0xC0]),
            ("jmp", &[0xF0, 0xEB, 0x00]),
            ("call", &[0xF0, 0xE8, 0, 0, 0, 0]),
            ("ret", &[0xF0, 0xC3]),
            ("stosb", &[0xF0, 0xAA]),
            ("movups", &[0xF0, 0x0F, 0x11, 0x07]),
            ("fld", &[0xF0, 0xD9, 0x07]),
            ("cpuid", &[0xF0, 0x0F, 0xA2]),
            ("mfence", &[0xF0, 0x0F, 0xAE, 0xF0]),
            ("movzx", &[0xF0, 0x0F, 0xB6, 0x07]),
            ("sete", &[0xF0, 0x0F, 0x94, 0x07]),
            ("bsf", &[0xF0, 0x0F, 0xBC, 0x07]),
            ("popcnt", &[0xF0, 0xF3, 0x0F, 0xB8, 0x07]),
            ("hlt", &[0xF0, 0xF4]),
        ];
        for (name, bytes) in invalid {
            let mut code = [0xCC; 16];
            code[..bytes.len()].copy_from_slice(bytes);
            let got = a.user(&code).enter();
            g.check(got == UD, format_args!("lock {name}: got {got}"));
        }
    });
}

fn length(suite: &mut Suite, a: &Arena) {
    suite.group("instruction length", |g| {
        for prefixes in 0..20usize {
            let mut code = [0xCC; 32];
            code[..prefixes].fill(0x66);
            code[prefixes] = 0x90;
            let mut c = a.user(&code);
            let want = if prefixes < 15 { BP } else { GP0 };
            let rip = if prefixes < 15 {
                CODE + prefixes as u64 + 2
            } else {
                CODE
            };
            let got = c.enter();
            g.check(
                got == want && c.rip == rip,
                format_args!("{prefixes} prefixes and NOP: got {got} at {:#x}", c.rip),
            );
        }
        // 15 bytes with an immediate, and 16.
        let mut code = [0x66u8; 24];
        code[10..15].copy_from_slice(&[0x81, 0xC0, 0x34, 0x12, 0xCC]);
        code[14] = 0xCC;
        let mut c = a.user(&code);
        g.run("14 bytes", &mut c, BP, CODE + 15);
        // The limit counts before the next page is touched.
        let end = PAGES * 4096;
        let mut tail = [0x66u8; 15];
        a.load_at(end - 15, &tail);
        let mut c = a.user(&[0x90]);
        c.rip = CODE + end - 15;
        g.run(
            "15 prefixes at the end of memory are too long",
            &mut c,
            GP0,
            CODE + end - 15,
        );
        tail = [0x66; 15];
        a.load_at(end - 14, &tail[..14]);
        c.rip = CODE + end - 14;
        g.run(
            "14 prefixes need one byte more",
            &mut c,
            Exit::code(14, 0x14),
            CODE + end - 14,
        );
        g.eq("cr2", c.cr2, CODE + end);
    });
    suite.group("UD0, UD1, UD2", |g| {
        g.run("ud2", &mut a.user(code64!(".byte 0x0F, 0x0B")), UD, CODE);
        g.run(
            "ud1",
            &mut a.user(code64!(".byte 0x0F, 0xB9, 0xC0")),
            UD,
            CODE,
        );
        g.run(
            "ud0",
            &mut a.user(code64!(".byte 0x0F, 0xFF, 0xC0")),
            UD,
            CODE,
        );
        g.run(
            "ud1 with an unmapped operand",
            &mut Context {
                rdi: 0,
                ..a.user(code64!(".byte 0x0F, 0xB9, 0x07"))
            },
            UD,
            CODE,
        );
        for op in [
            0x04u8, 0x0A, 0x0C, 0x24, 0x25, 0x26, 0x27, 0x36, 0x39, 0x3B, 0x3C, 0x3D, 0x3E, 0x3F,
            0xA6, 0xA7,
        ] {
            let got = a.user(&[0x0F, op, 0, 0, 0, 0]).enter();
            g.check(got == UD, format_args!("0f {op:#x}: got {got}"));
        }
        for (name, bytes) in [
            ("group 4 /2", &[0xFEu8, 0xD0][..]),
            ("group 5 /7", &[0xFF, 0xF8]),
            ("group 9 /0", &[0x0F, 0xC7, 0xC0]),
            ("group 8 /0", &[0x0F, 0xBA, 0xC0, 1]),
            ("group 11 /1", &[0xC7, 0xC8, 0, 0, 0, 0]),
            ("pop mem /1", &[0x8F, 0x0F]),
            ("far call through a register", &[0xFF, 0xD8]),
            ("far jump through a register", &[0xFF, 0xE8]),
            ("lea from a register", &[0x8D, 0xC0]),
            ("mov segment 6", &[0x8C, 0xF0]),
            ("bound, now EVEX", &[0x62, 0x07]),
            ("movntps from a register", &[0x0F, 0x2B, 0xC0]),
            ("lds, now VEX, with a REX prefix", &[0x40, 0xC5, 0xF8, 0x77]),
            ("VEX with LOCK", &[0xF0, 0xC5, 0xF8, 0x77]),
            ("VEX with an operand-size prefix", &[0x66, 0xC5, 0xF8, 0x77]),
            ("cmpxchg8b of a register", &[0x0F, 0xC7, 0xC8]),
        ] {
            let got = a.user(bytes).enter();
            g.check(got == UD, format_args!("{name}: got {got}"));
        }
    });
}

fn wide_exchange(suite: &mut Suite, a: &Arena) {
    suite.group("CMPXCHG8B and CMPXCHG16B", |g| {
        write::<u64>(a.data, 0x1111_1111_2222_2222);
        let mut c = Context {
            rdx: 0x1111_1111,
            rax: 0x2222_2222,
            rcx: 3,
            rbx: 4,
            ..a.user(code64!("cmpxchg8b [rdi]", "int3"))
        };
        g.run("equal", &mut c, BP, CODE + 4);
        g.eq("stored", read::<u64>(a.data), 3 << 32 | 4);
        g.eq("ZF", c.rflags & flags::ZF, flags::ZF);
        let mut c = Context {
            rdx: u64::MAX,
            rax: u64::MAX,
            rflags: 2 | flags::CF,
            ..a.user(code64!("cmpxchg8b [rdi]", "int3"))
        };
        g.run("different", &mut c, BP, CODE + 4);
        g.eq("loaded, zero extended", (c.rdx, c.rax).0, 3);
        g.eq("low half", c.rax, 4);
        g.eq(
            "only ZF changes",
            c.rflags & (flags::ZF | flags::CF),
            flags::CF,
        );
        if !has::cx16() {
            g.run(
                "CMPXCHG16B is masked",
                &mut a.user(code64!("cmpxchg16b [rdi]")),
                UD,
                CODE,
            );
            return;
        }
        write::<u64>(a.data + 16, 1);
        write::<u64>(a.data + 24, 2);
        let code = code64!("cmpxchg16b [rdi]", "int3");
        let at = |offset: u64| Context {
            rdi: DATA + offset,
            rax: 1,
            rdx: 2,
            rbx: 5,
            rcx: 6,
            ..a.user(code)
        };
        g.run("equal", &mut at(16), BP, CODE + 5);
        g.eq("stored low", read::<u64>(a.data + 16), 5);
        g.eq("stored high", read::<u64>(a.data + 24), 6);
        let mut c = at(16);
        g.run("different", &mut c, BP, CODE + 5);
        g.eq("loaded low", c.rax, 5);
        g.eq("loaded high", c.rdx, 6);
        for offset in [1, 4, 8] {
            g.run("misaligned", &mut at(offset), GP0, CODE);
        }
        g.run(
            "locked",
            &mut {
                let mut c = at(16);
                a.load(code64!("lock cmpxchg16b [rdi]", "int3"));
                c.rax = 5;
                c.rdx = 6;
                c
            },
            BP,
            CODE + 6,
        );
        g.run(
            "misaligned and unmapped: #GP first",
            &mut at(0x8_0008),
            GP0,
            CODE,
        );
        g.run(
            "aligned and unmapped",
            &mut at(0x8_0000),
            Exit::code(14, 6),
            CODE,
        );
    });
}

fn umip(suite: &mut Suite, a: &Arena) {
    suite.group("UMIP", |g| {
        let codes: [(&str, &[u8]); 5] = [
            ("sgdt", code64!("sgdt [rdi]", "int3")),
            ("sidt", code64!("sidt [rdi]", "int3")),
            ("sldt", code64!("sldt word ptr [rdi]", "int3")),
            ("str", code64!("str word ptr [rdi]", "int3")),
            ("smsw", code64!("smsw word ptr [rdi]", "int3")),
        ];
        for (name, code) in codes {
            let end = CODE + code.len() as u64;
            let mut c = a.user(code);
            let got = c.enter();
            g.check(
                got == BP && c.rip == end,
                format_args!("{name} in ring 3 without UMIP: got {got}"),
            );
            if has::umip() {
                let with = |c: Context| Context {
                    load: load::CR4,
                    cr4: cpu::cr4() | cr::UMIP,
                    ..c
                };
                let got = with(a.user(code)).enter();
                g.check(
                    got == GP0,
                    format_args!("{name} in ring 3 with UMIP: got {got}"),
                );
                let got = with(a.kernel(code)).enter();
                g.check(
                    got == BP,
                    format_args!("{name} in ring 0 with UMIP: got {got}"),
                );
            }
        }
        write::<u64>(a.data, u64::MAX);
        write::<u64>(a.data + 8, u64::MAX);
        a.user(code64!("sidt [rdi]", "int3")).enter();
        g.eq("SIDT limit", read::<u16>(a.data), 4095);
        g.eq("SIDT writes ten bytes", read::<u16>(a.data + 10), 0xFFFF);
        g.eq(
            "SIDT base",
            read::<u64>(a.data + 2),
            caisson_guest_rt::interrupt::idt_base(),
        );
        let mut c = Context {
            rax: u64::MAX,
            ..a.user(code64!("str rax", "sldt rcx", "int3"))
        };
        c.enter();
        g.eq(
            "STR zero extends",
            c.rax,
            caisson_guest_rt::percpu::sel::TSS.into(),
        );
        g.eq("SLDT", c.rcx, 0);
    });
}

fn flags_and_prefixes(suite: &mut Suite, a: &Arena) {
    suite.group("flag images", |g| {
        let set_all = code64!("push rax", "popfq", "pushfq", "pop rbx", "int3");
        let mut c = Context {
            rax: u64::MAX & !(flags::TF | flags::NT),
            ..a.user(set_all)
        };
        g.run("POPF in ring 3", &mut c, BP, CODE + 5);
        g.eq("IF, IOPL, VM, RF, VIF, VIP stay", c.rbx, 0x24_0CD7);
        let mut c = Context {
            rax: 0x3000 | 2,
            ..a.kernel(set_all)
        };
        g.run("POPF in ring 0 sets IOPL", &mut c, BP, CODE + 5);
        g.eq("IOPL", c.rbx & 0x3000, 0x3000);
        let mut c = Context {
            rax: 0x202,
            rflags: 0x3002,
            ..a.user(set_all)
        };
        g.run("POPF in ring 3 with IOPL 3 sets IF", &mut c, BP, CODE + 5);
        g.eq("IF with IOPL 3", c.rbx, 0x3202);
        g.run(
            "CLI with IOPL 3",
            &mut Context {
                rflags: 0x3202,
                ..a.user(code64!("cli", "int3"))
            },
            BP,
            CODE + 2,
        );
        let mut c = Context {
            rax: 0xFFFF,
            ..a.user(code64!(
                "and ax, 0xBEFF",
                "push ax",
                ".byte 0x66, 0x9D",
                "pushfq",
                "pop rbx",
                "int3"
            ))
        };
        let got = c.enter();
        g.check(got.vector == 3, format_args!("16-bit POPF: got {got}"));
        let mut c = Context {
            rax: 0xD500,
            ..a.user(code64!("sahf", "lahf", "int3"))
        };
        if has::lahf() {
            g.run("SAHF, LAHF", &mut c, BP, CODE + 3);
            g.eq("image", c.rax >> 8 & 0xFF, 0xD7);
        }
        // REX before a legacy prefix is ignored.
        let mut c = Context {
            rcx: 0x1_2345_6789,
            rax: 0,
            ..a.user(code64!(".byte 0x48, 0x66, 0x89, 0xC8", "int3"))
        };
        g.run("misplaced REX", &mut c, BP, CODE + 5);
        g.eq("16-bit move", c.rax, 0x6789);
        let mut c = Context {
            rcx: u64::MAX,
            rax: u64::MAX,
            ..a.user(code64!("mov eax, ecx", "int3"))
        };
        c.enter();
        g.eq("32-bit results zero extend", c.rax, 0xFFFF_FFFF);
        let mut c = Context {
            rax: u64::MAX,
            rcx: 0,
            ..a.user(code64!("mov ax, cx", "mov ah, cl", "int3"))
        };
        c.enter();
        g.eq("16-bit results keep the rest", c.rax, 0xFFFF_FFFF_FFFF_0000);
        let mut c = Context {
            rax: u64::MAX,
            rcx: 0,
            ..a.user(code64!("cmovne eax, ecx", "int3"))
        };
        c.rflags = 2 | flags::ZF;
        c.enter();
        g.eq("CMOV not taken still zero extends", c.rax, 0xFFFF_FFFF);
        let mut c = Context {
            rax: 0xF0,
            ..a.user(code64!(".byte 0x40, 0x88, 0xC4", "int3"))
        };
        let sp = c.rsp;
        c.enter();
        g.eq("REX makes register 4 SPL", c.rsp, sp & !0xFF | 0xF0);
    });
}
