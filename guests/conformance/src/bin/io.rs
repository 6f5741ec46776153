//! Port and MMIO accesses of each width and through each kind of instruction,
//! the I/O permission bitmap, string I/O.
//!
//! QEMU TCG 7.2 fails this: unclaimed MMIO reads as zero there.
#![no_std]
#![no_main]

use caisson_guest_rt::apic::{self, reg};
use caisson_guest_rt::context::{BP, Exit, GP0};
use caisson_guest_rt::cpu::flags;
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{Arena, CODE, DATA, PCD};
use caisson_guest_rt::percpu::{self, TSS_LIMIT, TSS_LIMIT_IO};
use caisson_guest_rt::port::{COM1, DEBUGCON, inb, inl, inw, outb, outw};
use caisson_guest_rt::{Context, Suite, code64, guest, ioapic, paging};

guest!("io", main);

/// COM1's scratch register: a byte of storage.
const SCRATCH: u16 = COM1 + 7;
/// A port that nothing claims.
const EMPTY: u16 = 0x5A50;
/// Physical memory that nothing claims.
const HOLE: u64 = 0xD000_0000;

fn main(suite: &mut Suite) {
    let a = Arena::new();
    ports(suite, &a);
    bitmap(suite, &a);
    strings(suite, &a);
    mmio(suite, &a);
}

fn ports(suite: &mut Suite, a: &Arena) {
    suite.group("ports", |g| {
        g.eq("debug console reads its own number", inb(DEBUGCON), 0xE9);
        for value in [0x00, 0xFF, 0x5A, 0xA5] {
            outb(SCRATCH, value);
            g.eq("scratch register", inb(SCRATCH), value);
        }
        g.eq("unclaimed byte", inb(EMPTY), 0xFF);
        g.eq("unclaimed word", inw(EMPTY), 0xFFFF);
        g.eq("unclaimed dword", inl(EMPTY), u32::MAX);
        // A word written to a byte-wide pair reaches both: RTC index, then data.
        outw(0x70, 0x3750);
        outb(0x70, 0x50);
        g.eq("word access splits into two bytes", inb(0x71), 0x37);
        outb(SCRATCH, 0x42);
        let mut c = Context {
            rax: u64::MAX,
            rdx: SCRATCH.into(),
            ..a.kernel(code64!("in al, dx", "int3"))
        };
        c.enter();
        g.eq("IN AL keeps the rest of RAX", c.rax, 0xFFFF_FFFF_FFFF_FF42);
        let mut c = Context {
            rax: 0,
            rdx: EMPTY.into(),
            ..a.kernel(code64!("in ax, dx", "int3"))
        };
        c.enter();
        g.eq("IN AX", c.rax, 0xFFFF);
        let mut c = Context {
            rax: u64::MAX,
            rdx: 0xFFFF_FFFF_0000_0000 | u64::from(EMPTY),
            ..a.kernel(code64!("in eax, dx", "int3"))
        };
        c.enter();
        g.eq(
            "IN EAX zero extends; only DX names the port",
            c.rax,
            0xFFFF_FFFF,
        );
        let mut c = Context {
            rax: 0,
            ..a.kernel(code64!("in al, 0xE9", "int3"))
        };
        c.enter();
        g.eq("immediate port", c.rax, 0xE9);
    });
}

fn bitmap(suite: &mut Suite, a: &Arena) {
    suite.group("I/O permission bitmap", |g| {
        let at = |port: u16, code: &[u8]| Context {
            rdx: port.into(),
            ..a.user(code)
        };
        let byte = code64!("in al, dx", "int3");
        let word = code64!("in ax, dx", "int3");
        let dword = code64!("in eax, dx", "int3");
        let pc = percpu::this();
        g.run("no bitmap", &mut at(SCRATCH, byte), GP0, CODE);
        g.run(
            "IOPL 3 needs none",
            &mut Context {
                rflags: flags::FIXED | flags::IOPL3,
                ..at(SCRATCH, byte)
            },
            BP,
            CODE + 2,
        );
        pc.load_tss(TSS_LIMIT_IO);
        g.run("all denied", &mut at(SCRATCH, byte), GP0, CODE);
        pc.tss.io_bitmap[usize::from(SCRATCH / 8)] &= !(1 << (SCRATCH % 8));
        g.run("one byte allowed", &mut at(SCRATCH, byte), BP, CODE + 2);
        g.run(
            "its neighbour is not",
            &mut at(SCRATCH - 1, byte),
            GP0,
            CODE,
        );
        g.run("a word needs both", &mut at(SCRATCH, word), GP0, CODE);
        pc.tss.io_bitmap[usize::from(EMPTY / 8)] = 0xF0;
        g.run("dword allowed", &mut at(EMPTY, dword), BP, CODE + 2);
        g.run("dword half allowed", &mut at(EMPTY + 2, dword), GP0, CODE);
        g.run("word allowed", &mut at(EMPTY + 2, word), BP, CODE + 3);
        pc.tss.io_bitmap[8191] = 0;
        g.run("last port", &mut at(0xFFFF, byte), BP, CODE + 2);
        g.run(
            "word past the last port reads the closing byte",
            &mut at(0xFFFF, word),
            GP0,
            CODE,
        );
        g.run(
            "OUT",
            &mut at(EMPTY, code64!("out dx, al", "int3")),
            BP,
            CODE + 2,
        );
        g.run(
            "OUT denied",
            &mut at(EMPTY + 8, code64!("out dx, al", "int3")),
            GP0,
            CODE,
        );
        g.run(
            "INSB denied",
            &mut at(EMPTY + 8, code64!("insb", "int3")),
            GP0,
            CODE,
        );
        g.run(
            "INSB allowed",
            &mut at(EMPTY, code64!("insb", "int3")),
            BP,
            CODE + 2,
        );
        // A bitmap cut short by the limit denies.
        pc.load_tss(TSS_LIMIT + 1 + u32::from(EMPTY / 8));
        g.run(
            "second bitmap byte beyond the limit",
            &mut at(EMPTY, byte),
            GP0,
            CODE,
        );
        pc.load_tss(TSS_LIMIT + 2 + u32::from(EMPTY / 8));
        g.run("both bytes inside", &mut at(EMPTY, byte), BP, CODE + 2);
        pc.tss.io_bitmap[usize::from(EMPTY / 8)] = 0xFF;
        pc.load_tss(TSS_LIMIT);
    });
}

fn strings(suite: &mut Suite, a: &Arena) {
    suite.group("string I/O", |g| {
        outb(SCRATCH, 0x5C);
        let mut c = Context {
            rdx: SCRATCH.into(),
            rcx: 8,
            ..a.kernel(code64!("rep insb", "int3"))
        };
        g.run("REP INSB", &mut c, BP, CODE + 3);
        g.eq("bytes", read::<u64>(a.data), 0x5C5C_5C5C_5C5C_5C5C);
        g.eq("rdi", c.rdi, DATA + 8);
        g.eq("rcx", c.rcx, 0);
        write::<u32>(a.data, 0x4433_2211);
        let mut c = Context {
            rdx: SCRATCH.into(),
            rcx: 4,
            rsi: DATA,
            ..a.kernel(code64!("rep outsb", "int3"))
        };
        g.run("REP OUTSB", &mut c, BP, CODE + 3);
        g.eq("last byte out", inb(SCRATCH), 0x44);
        let mut c = Context {
            rdx: SCRATCH.into(),
            rcx: 4,
            rsi: DATA + 3,
            rflags: flags::FIXED | flags::DF,
            ..a.kernel(code64!("rep outsb", "int3"))
        };
        c.enter();
        g.eq("backwards", inb(SCRATCH), 0x11);
        g.eq("rsi", c.rsi, DATA - 1);
        let mut c = Context {
            rdx: EMPTY.into(),
            rcx: 3,
            ..a.kernel(code64!("rep insd", "int3"))
        };
        write::<u32>(a.data + 12, 0);
        c.enter();
        g.eq("REP INSD", read::<u64>(a.data + 8), 0xFFFF_FFFF);
        // Across a page, then into a hole.
        let end = DATA + paging::PAGES * 4096;
        let mut c = Context {
            rdx: SCRATCH.into(),
            rcx: 10,
            rdi: end - 4,
            ..a.kernel(code64!("rep insb", "int3"))
        };
        g.run("REP INSB into a hole", &mut c, Exit::code(14, 2), CODE);
        g.eq("progress: rcx", c.rcx, 6);
        g.eq("progress: rdi", c.rdi, end);
        let mut c = Context {
            rdx: SCRATCH.into(),
            rcx: 10,
            rsi: end - 4,
            ..a.kernel(code64!("rep outsb", "int3"))
        };
        g.run("REP OUTSB from a hole", &mut c, Exit::code(14, 0), CODE);
        g.eq("progress: rcx", c.rcx, 6);
        let mut c = Context {
            rdx: SCRATCH.into(),
            rcx: 0,
            rdi: 0x8000_0000_0000,
            ..a.kernel(code64!("rep insb", "int3"))
        };
        g.run("no iteration, no access", &mut c, BP, CODE + 3);
    });
}

fn mmio(suite: &mut Suite, a: &Arena) {
    suite.group("unclaimed memory", |g| {
        g.eq("byte", read::<u8>(HOLE), 0xFF);
        g.eq("word", read::<u16>(HOLE + 1), 0xFFFF);
        g.eq("dword", read::<u32>(HOLE + 2), u32::MAX);
        g.eq("qword", read::<u64>(HOLE + 3), u64::MAX);
        write::<u8>(HOLE, 1);
        write::<u16>(HOLE, 1);
        write::<u32>(HOLE, 1);
        write::<u64>(HOLE, 1);
        let mut c = Context {
            rsi: HOLE,
            ..a.kernel(code64!(
                "movups xmm0, [rsi]",
                "movq rax, xmm0",
                "psrldq xmm0, 8",
                "movq rbx, xmm0",
                "int3"
            ))
        };
        c.enter();
        g.eq("16 bytes, low", c.rax, u64::MAX);
        g.eq("16 bytes, high", c.rbx, u64::MAX);
        g.eq("across a page", read::<u64>(HOLE + 4092), u64::MAX);
        // A read-modify-write of nothing still sets flags from all-ones.
        let mut c = Context {
            rsi: HOLE,
            ..a.kernel(code64!("add byte ptr [rsi], 1", "int3"))
        };
        c.enter();
        g.eq(
            "0xFF + 1 sets ZF and CF",
            c.rflags & (flags::ZF | flags::CF),
            flags::ZF | flags::CF,
        );
    });
    suite.group("MMIO through every kind of instruction", |g| {
        // The masked timer's initial count is 32 bits of storage.
        apic::set(reg::LVT_TIMER, apic::MASKED | 0x40);
        let timer = apic::base() + u64::from(reg::TIMER_INITIAL);
        let user_timer = 0x5000_0000 + u64::from(reg::TIMER_INITIAL);
        a.space.map(
            0x5000_0000,
            apic::base(),
            1,
            paging::P | paging::W | paging::U | PCD,
        );
        type Case<'a> = (&'a str, &'a [u8], u32);
        let cases: [Case; 20] = [
            (
                "mov",
                code64!("mov dword ptr [rdi], 0x11223344", "int3"),
                0x1122_3344,
            ),
            ("mov reg", code64!("mov [rdi], eax", "int3"), 0x0000_1000),
            ("add", code64!("add dword ptr [rdi], 5", "int3"), 0x105),
            (
                "sub",
                code64!("sub [rdi], eax", "int3"),
                0x100u32.wrapping_sub(0x1000),
            ),
            ("inc", code64!("inc dword ptr [rdi]", "int3"), 0x101),
            (
                "neg",
                code64!("neg dword ptr [rdi]", "int3"),
                0x100u32.wrapping_neg(),
            ),
            ("not", code64!("not dword ptr [rdi]", "int3"), !0x100),
            ("or", code64!("or dword ptr [rdi], 0xF", "int3"), 0x10F),
            ("and", code64!("and dword ptr [rdi], 0", "int3"), 0),
            ("xor", code64!("xor [rdi], eax", "int3"), 0x1100),
            ("shl", code64!("shl dword ptr [rdi], 4", "int3"), 0x1000),
            ("xchg", code64!("xchg [rdi], eax", "int3"), 0x1000),
            ("lock xadd", code64!("lock xadd [rdi], eax", "int3"), 0x1100),
            (
                "cmpxchg equal",
                code64!(
                    "mov ecx, 0x77",
                    "mov eax, 0x100",
                    "cmpxchg [rdi], ecx",
                    "int3"
                ),
                0x77,
            ),
            ("bts", code64!("bts dword ptr [rdi], 0", "int3"), 0x101),
            ("stosd", code64!("stosd", "int3"), 0x1000),
            ("movsd", code64!("movsd", "int3"), 0x5566_7788),
            (
                "pop",
                code64!("push 0x55", "pop rcx", "mov [rdi], ecx", "int3"),
                0x55,
            ),
            (
                "movd",
                code64!("movd xmm0, eax", "movd [rdi], xmm0", "int3"),
                0x1000,
            ),
            ("shld", code64!("shld [rdi], eax, 4", "int3"), 0x1000),
        ];
        for user in [false, true] {
            for (name, code, want) in cases {
                write::<u32>(a.data, 0x5566_7788);
                apic::set(reg::TIMER_INITIAL, 0x100);
                let mut c = if user { a.user(code) } else { a.kernel(code) };
                c.rax = 0x1000;
                c.rsi = DATA;
                c.rdi = if user { user_timer } else { timer };
                let got = c.enter();
                let value = apic::get(reg::TIMER_INITIAL);
                g.check(
                    got == BP && value == want,
                    format_args!("{name}: {got}, register {value:#x}, want {want:#x}"),
                );
            }
        }
        apic::set(reg::TIMER_INITIAL, 0x8000_0001);
        let loads: [(&str, &[u8], u64); 10] = [
            ("mov", code64!("mov eax, [rsi]", "int3"), 0x8000_0001),
            (
                "movsxd",
                code64!("movsxd rax, dword ptr [rsi]", "int3"),
                0xFFFF_FFFF_8000_0001,
            ),
            ("lodsd", code64!("lodsd", "int3"), 0x8000_0001),
            (
                "add reg",
                code64!("xor eax, eax", "add eax, [rsi]", "int3"),
                0x8000_0001,
            ),
            ("imul", code64!("mov eax, 2", "imul eax, [rsi]", "int3"), 2),
            (
                "cmp sets CF",
                code64!("xor eax, eax", "cmp eax, [rsi]", "setb al", "int3"),
                1,
            ),
            (
                "bt",
                code64!("bt dword ptr [rsi], 31", "sbb eax, eax", "neg eax", "int3"),
                1,
            ),
            (
                "cmov",
                code64!("xor eax, eax", "cmovz eax, [rsi]", "int3"),
                0x8000_0001,
            ),
            (
                "movd",
                code64!("movd xmm0, [rsi]", "movd eax, xmm0", "int3"),
                0x8000_0001,
            ),
            (
                "fild",
                code64!(
                    "fild dword ptr [rsi]",
                    "fistp qword ptr [rdi]",
                    "mov rax, [rdi]",
                    "int3"
                ),
                0xFFFF_FFFF_8000_0001,
            ),
        ];
        for (name, code, want) in loads {
            let mut c = Context {
                rsi: timer,
                ..a.kernel(code)
            };
            let got = c.enter();
            let (bp, rax) = (got == BP, c.rax);
            g.check(
                bp && rax == want,
                format_args!("{name}: {got}, rax {rax:#x}, want {want:#x}"),
            );
        }
        apic::set(reg::TIMER_INITIAL, 0);
        // The I/O APIC's index and window, and a string copy out of it.
        ioapic::set_entry(5, ioapic::MASKED | 0x55);
        write::<u32>(ioapic::BASE, 0x1A);
        let mut c = Context {
            rsi: ioapic::BASE + 0x10,
            rcx: 1,
            ..a.kernel(code64!("rep movsd", "int3"))
        };
        c.enter();
        g.eq(
            "REP MOVSD from a device",
            read::<u32>(a.data),
            (ioapic::MASKED | 0x55) as u32,
        );
        g.eq("byte of the index register", read::<u8>(ioapic::BASE), 0x1A);
    });
}
