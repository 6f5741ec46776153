//! String instructions: across pages, faults in the middle, overlap, both
//! directions, address sizes, ends of REPE and REPNE, interrupts in between.
#![no_std]
#![no_main]

use caisson_guest_rt::apic::{self, reg};
use caisson_guest_rt::context::{BP, Exit, GP0};
use caisson_guest_rt::cpu::{self, flags};
use caisson_guest_rt::interrupt::{self, Frame};
use caisson_guest_rt::memory::{fill, read, write};
use caisson_guest_rt::paging::{self, Arena, CODE, DATA, PAGES};
use caisson_guest_rt::{Context, Suite, code64, guest, ioapic, tsc};
use core::sync::atomic::{AtomicU64, Ordering};

guest!("strings", main);

const END: u64 = DATA + PAGES * 4096;
const DF: u64 = flags::FIXED | flags::DF;

fn main(suite: &mut Suite) {
    let a = Arena::new();
    suite.group("copies across pages", |g| {
        for (name, code, width) in [
            ("movsb", code64!("rep movsb", "int3"), 1u64),
            ("movsw", code64!("rep movsw", "int3"), 2),
            ("movsd", code64!("rep movsd", "int3"), 4),
            ("movsq", code64!("rep movsq", "int3"), 8),
        ] {
            for (from, to) in [(0u64, 0x2000u64), (3, 0x2005), (0xFFD, 0x2FFB)] {
                fill(a.data, PAGES * 4096, 0);
                for i in 0..0x1000 {
                    write::<u8>(a.data + from + i, (i * 7 + i / 256) as u8);
                }
                let count = 0x1000 / width;
                let mut c = Context {
                    rsi: DATA + from,
                    rdi: DATA + to,
                    rcx: count,
                    ..a.user(code)
                };
                let got = c.enter();
                let same =
                    (0..0x1000u64).all(|i| read::<u8>(a.data + to + i) == (i * 7 + i / 256) as u8);
                g.check(
                    got == BP && same && c.rcx == 0,
                    format_args!("{name} {from:#x} to {to:#x}: {got}, same {same}"),
                );
                g.eq("rsi", c.rsi, DATA + from + 0x1000);
                g.eq("rdi", c.rdi, DATA + to + 0x1000);
                g.eq("nothing beyond", read::<u8>(a.data + to + 0x1000), 0);
            }
        }
    });
    suite.group("overlap and direction", |g| {
        let movsb = code64!("rep movsb", "int3");
        fill(a.data, 64, 0);
        write::<u8>(a.data, 0x5A);
        Context {
            rsi: DATA,
            rdi: DATA + 1,
            rcx: 20,
            ..a.user(movsb)
        }
        .enter();
        g.that(
            "a forward copy by one byte repeats it",
            (0..=20).all(|i| read::<u8>(a.data + i) == 0x5A),
        );
        g.eq("and stops", read::<u8>(a.data + 21), 0);
        write::<u64>(a.data, 0x0807_0605_0403_0201);
        Context {
            rsi: DATA,
            rdi: DATA + 3,
            rcx: 9,
            ..a.user(movsb)
        }
        .enter();
        g.eq(
            "distance of three",
            read::<u64>(a.data + 4),
            0x0302_0103_0201_0302,
        );
        write::<u64>(a.data, 0x0807_0605_0403_0201);
        let mut c = Context {
            rsi: DATA + 7,
            rdi: DATA + 9,
            rcx: 8,
            rflags: DF,
            ..a.user(movsb)
        };
        c.enter();
        g.eq(
            "backwards moves up safely",
            read::<u64>(a.data + 2),
            0x0807_0605_0403_0201,
        );
        g.eq("rsi", c.rsi, DATA - 1);
        write::<u64>(a.data, 0x0807_0605_0403_0201);
        Context {
            rsi: DATA + 8,
            rdi: DATA + 7,
            rcx: 8,
            rflags: DF,
            ..a.user(movsb)
        }
        .enter();
        g.that(
            "a backward copy by one byte repeats it",
            (0..8).all(|i| read::<u8>(a.data + i) == read::<u8>(a.data + 8)),
        );
        fill(a.data, 64, 0);
        Context {
            rax: 0x1122_3344,
            rcx: 4,
            rdi: DATA + 12,
            rflags: DF,
            ..a.user(code64!("rep stosd", "int3"))
        }
        .enter();
        g.eq(
            "STOSD backwards",
            read::<u64>(a.data + 8),
            0x1122_3344_1122_3344,
        );
        let mut c = Context {
            rcx: 3,
            rsi: DATA,
            ..a.user(code64!("rep lodsb", "int3"))
        };
        write::<u32>(a.data, 0x0033_2211);
        c.enter();
        g.eq("REP LODSB keeps the last", c.rax & 0xFF, 0x33);
    });
    suite.group("faults in the middle", |g| {
        for (name, code, width) in [
            ("stosb", code64!("rep stosb", "int3"), 1u64),
            ("stosq", code64!("rep stosq", "int3"), 8),
        ] {
            let mut c = Context {
                rdi: END - 24,
                rcx: 100,
                ..a.user(code)
            };
            g.run(name, &mut c, Exit::code(14, 6), CODE);
            g.eq("cr2", c.cr2, END);
            g.eq("rcx", c.rcx, 100 - 24 / width);
            g.eq("rdi", c.rdi, END);
        }
        let mut c = Context {
            rdi: END - 20,
            rcx: 100,
            ..a.user(code64!("rep stosq", "int3"))
        };
        g.run(
            "stosq that straddles the end",
            &mut c,
            Exit::code(14, 6),
            CODE,
        );
        g.eq("cr2 is the second page", c.cr2, END);
        g.eq("rcx", c.rcx, 98);
        g.eq("rdi", c.rdi, END - 4);
        let mut c = Context {
            rsi: END - 5,
            rdi: DATA,
            rcx: 100,
            ..a.user(code64!("rep movsb", "int3"))
        };
        g.run("movsb, source ends", &mut c, Exit::code(14, 4), CODE);
        g.eq("rcx", c.rcx, 95);
        g.eq("rdi", c.rdi, DATA + 5);
        let mut c = Context {
            rsi: DATA,
            rdi: END - 5,
            rcx: 100,
            ..a.user(code64!("rep movsb", "int3"))
        };
        g.run("movsb, destination ends", &mut c, Exit::code(14, 6), CODE);
        g.eq("rsi", c.rsi, DATA + 5);
        let mut c = Context {
            rdi: DATA + 3,
            rcx: 100,
            rflags: DF,
            ..a.user(code64!("rep stosb", "int3"))
        };
        g.run("stosb backwards", &mut c, Exit::code(14, 6), CODE);
        g.eq("cr2", c.cr2, DATA - 1);
        g.eq("rcx", c.rcx, 96);
        let mut c = Context {
            rsi: 0x7FFF_FFFF_FFFF,
            rdi: DATA,
            rcx: 5,
            ..a.user(code64!("rep movsb", "int3"))
        };
        let got = c.enter();
        g.check(
            got.vector == 14 && c.rcx == 5,
            format_args!("unmapped last canonical byte: {got}"),
        );
        let mut c = Context {
            rsi: 0x8000_0000_0000,
            rdi: DATA,
            rcx: 5,
            ..a.user(code64!("rep movsb", "int3"))
        };
        g.run("non-canonical source", &mut c, GP0, CODE);
        let mut c = Context {
            rsi: 0x8000_0000_0000,
            rdi: 0x8000_0000_0000,
            rcx: 0,
            ..a.user(code64!("rep movsb", "int3"))
        };
        g.run("count zero touches nothing", &mut c, BP, CODE + 3);
        let mut c = Context {
            rdi: END - 16,
            rcx: u64::MAX,
            ..a.user(code64!("rep stosb", "int3"))
        };
        g.run("a huge count", &mut c, Exit::code(14, 6), CODE);
        g.eq("rcx", c.rcx, u64::MAX - 16);
        // The write fault of a page made read-only, then completed after the fix.
        let slot = a.space.entry(DATA + 0x1000, 1);
        let entry: u64 = read(slot);
        write(slot, entry & !paging::W);
        cpu::invlpg(DATA + 0x1000);
        fill(a.data, 0x2000, 0);
        let mut c = Context {
            rax: 0x77,
            rdi: DATA + 0xF00,
            rcx: 0x200,
            ..a.user(code64!("rep stosb", "int3"))
        };
        g.run("into a read-only page", &mut c, Exit::code(14, 7), CODE);
        write(slot, entry);
        cpu::invlpg(DATA + 0x1000);
        g.run("resumed", &mut c, BP, CODE + 3);
        g.that(
            "all bytes",
            (0xF00..0x1100).all(|i| read::<u8>(a.data + i) == 0x77),
        );
        g.eq("no more", read::<u8>(a.data + 0x1100), 0);
    });
    suite.group("compare and scan", |g| {
        fill(a.data, 0x3000, 0xAA);
        write::<u8>(a.data + 0x1005, 0xBB);
        let mut c = Context {
            rax: 0xBB,
            rcx: 0x2000,
            ..a.user(code64!("repne scasb", "int3"))
        };
        c.enter();
        g.eq("REPNE SCASB stops after the match", c.rdi, DATA + 0x1006);
        g.eq("rcx", c.rcx, 0x2000 - 0x1006);
        g.eq("ZF", c.rflags & flags::ZF, flags::ZF);
        let mut c = Context {
            rax: 0xCC,
            rcx: 0x100,
            ..a.user(code64!("repne scasb", "int3"))
        };
        c.enter();
        g.eq("no match", c.rflags & flags::ZF | c.rcx, 0);
        let mut c = Context {
            rsi: DATA,
            rdi: DATA + 0x1000,
            rcx: 0x100,
            ..a.user(code64!("repe cmpsb", "int3"))
        };
        c.enter();
        g.eq("REPE CMPSB stops after the difference", c.rsi, DATA + 6);
        g.eq(
            "flags of AA - BB",
            c.rflags & (flags::CF | flags::ZF),
            flags::CF,
        );
        let mut c = Context {
            rsi: DATA,
            rdi: DATA,
            rcx: 0,
            rflags: flags::FIXED | flags::ZF | flags::CF,
            ..a.user(code64!("repe cmpsb", "int3"))
        };
        c.enter();
        g.eq(
            "count zero leaves the flags",
            c.rflags & (flags::CF | flags::ZF),
            flags::CF | flags::ZF,
        );
        let mut c = Context {
            rsi: DATA + 0x2000 - 8,
            rdi: END - 8,
            rcx: 4,
            rax: 0,
            ..a.user(code64!("repe cmpsq", "int3"))
        };
        fill(a.data + 0x3FF8, 8, 0xAA);
        g.run(
            "faults after equal elements",
            &mut c,
            Exit::code(14, 4),
            CODE,
        );
        g.eq("rcx", c.rcx, 3);
        let mut c = Context {
            rax: 0xAAAA,
            rcx: 8,
            ..a.user(code64!("repe scasw", "int3"))
        };
        c.enter();
        g.eq("REPE SCASW", c.rdi, DATA + 16);
        // F2 on MOVS counts like F3.
        let mut c = Context {
            rsi: DATA,
            rdi: DATA + 0x100,
            rcx: 3,
            ..a.user(code64!(".byte 0xF2, 0xA4", "int3"))
        };
        c.enter();
        g.eq("REPNE MOVSB", c.rcx, 0);
    });
    suite.group("address size", |g| {
        let mut c = Context {
            rsi: DATA | 1 << 40,
            rdi: (DATA + 0x100) | 2 << 40,
            rcx: 4 | 1 << 32,
            ..a.user(code64!(".byte 0x67, 0xF3, 0xA4", "int3"))
        };
        g.run("67 REP MOVSB", &mut c, BP, CODE + 4);
        g.eq("RSI is truncated", c.rsi, DATA + 4);
        g.eq("RDI is truncated", c.rdi, DATA + 0x104);
        g.eq("RCX counted in 32 bits", c.rcx, 0);
        let mut c = Context {
            rcx: 1 << 32,
            rdi: 0x8000_0000_0000,
            ..a.user(code64!(".byte 0x67, 0xF3, 0xAA", "int3"))
        };
        g.run("ECX = 0", &mut c, BP, CODE + 4);
        cpu::wrmsr(cpu::msr::FS_BASE, 0x40);
        write::<u8>(a.data + 0x40, 0x99);
        let mut c = Context {
            rsi: DATA,
            ..a.user(code64!("lods al, byte ptr fs:[rsi]", "int3"))
        };
        c.enter();
        g.eq("segment override on the source", c.rax & 0xFF, 0x99);
        cpu::wrmsr(cpu::msr::FS_BASE, 0);
    });
    suite.group("interrupts inside a long REP", |g| {
        ioapic::mask_pics();
        apic::enable(0xFF);
        interrupt::set_handler(0x40, |frame: &mut Frame| {
            TICKS.fetch_add(1, Ordering::SeqCst);
            // Counts down only, in whole elements: RCX is gprs[13].
            let rcx = frame.gprs[13];
            let code = frame.rip;
            if read::<u16>(code) == 0xAAF3 && rcx > LAST.swap(rcx, Ordering::SeqCst) {
                BAD.fetch_add(1, Ordering::SeqCst);
            }
            apic::eoi();
        });
        apic::set(reg::TIMER_DIVIDE, apic::DIVIDE_BY_1);
        apic::set(reg::LVT_TIMER, apic::PERIODIC | 0x40);
        apic::set(reg::TIMER_INITIAL, 100_000);
        let big = paging::frames(1024, 4096);
        cpu::sti();
        let start = tsc::now();
        let mut rounds = 0u64;
        while TICKS.load(Ordering::SeqCst) < 20 && tsc::now() - start < tsc::micros(40_000_000) {
            LAST.store(u64::MAX, Ordering::SeqCst);
            fill(big, 1024 * 4096, rounds as u8);
            rounds += 1;
        }
        cpu::cli();
        apic::set(reg::LVT_TIMER, apic::MASKED);
        apic::set(reg::TIMER_INITIAL, 0);
        g.that(
            "the timer interrupted it",
            TICKS.load(Ordering::SeqCst) >= 20,
        );
        let last = (rounds - 1) as u8;
        g.that(
            "every byte written",
            (0..1024 * 4096 / 64).all(|i| read::<u8>(big + i * 64 + i % 64) == last),
        );
        g.eq("registers whole", BAD.load(Ordering::SeqCst), 0);
    });
}

static TICKS: AtomicU64 = AtomicU64::new(0);
static LAST: AtomicU64 = AtomicU64::new(u64::MAX);
static BAD: AtomicU64 = AtomicU64::new(0);
