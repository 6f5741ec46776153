//! The local APIC's registers and modes, its timer in three modes, HLT and
//! wake-up, the I/O APIC with edge and level triggers and remote IRR.
//!
//! QEMU TCG 7.2 fails this: its software-disabled APIC keeps LVT entries
//! unmasked, and it delivers vectors below 16.
#![no_std]
#![no_main]

use caisson_guest_rt::apic::{self, reg};
use caisson_guest_rt::context::{BP, Exit, GP0};
use caisson_guest_rt::cpu::{self, has, msr, rdmsr, wrmsr};
use caisson_guest_rt::interrupt::{self, Frame};
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{Arena, CODE};
use caisson_guest_rt::port::{COM1, inb, outb};
use caisson_guest_rt::{Context, Group, Suite, code64, guest, ioapic, tsc};
use core::sync::atomic::{AtomicU64, Ordering};

guest!("timer", main);

const VECTOR: u8 = 0x45;
static LAST_TSC: AtomicU64 = AtomicU64::new(0);

fn tick(_: &mut Frame) {
    LAST_TSC.store(tsc::now(), Ordering::SeqCst);
    apic::eoi();
}

/// Runs with interrupts on until `done` or a timeout in microseconds.
fn open_until(us: u64, done: impl FnMut() -> bool) -> bool {
    cpu::sti();
    let held = tsc::wait_until(us, done);
    cpu::cli();
    held
}

/// The timer's count and the TSC at one moment: of several readings the one
/// that took the least time, since a host may be busy elsewhere in between.
fn sample() -> (u32, u64) {
    let read = || {
        let before = tsc::now();
        let count = apic::get(reg::TIMER_CURRENT);
        let after = tsc::now();
        (after - before, count, before + (after - before) / 2)
    };
    let (_, count, at) = (0..5).map(|_| read()).min().unwrap_or_else(read);
    (count, at)
}

fn stop() {
    apic::set(reg::LVT_TIMER, apic::MASKED | u32::from(VECTOR));
    apic::set(reg::TIMER_INITIAL, 0);
}

fn main(suite: &mut Suite) {
    let a = Arena::new();
    ioapic::mask_pics();
    apic::enable(0xFF);
    interrupt::set_handler(VECTOR, tick);
    tsc::hz();
    registers(suite);
    timer(suite, "timer, xAPIC");
    halt(suite, &a);
    io_apic(suite);
    x2apic(suite, &a);
    if has::x2apic() {
        timer(suite, "timer, x2APIC");
    }
}

fn registers(suite: &mut Suite) {
    suite.group("xAPIC registers", |g| {
        let version = apic::get(reg::VERSION);
        g.that(
            "version is an integrated APIC's",
            (0x10..=0x1F).contains(&(version & 0xFF)),
        );
        g.that("at least six LVT entries", version >> 16 & 0xFF >= 5);
        g.eq(
            "TPR is eight bits",
            {
                apic::set(reg::TPR, 0xFFFF_FF75);
                apic::get(reg::TPR)
            },
            0x75,
        );
        g.eq("PPR follows TPR", apic::get(reg::PPR), 0x75);
        apic::set(reg::TPR, 0);
        g.eq(
            "DFR's low bits read as one",
            {
                apic::set(reg::DFR, 0);
                apic::get(reg::DFR)
            },
            0x0FFF_FFFF,
        );
        apic::set(reg::DFR, u32::MAX);
        g.eq(
            "LDR has eight bits at the top",
            {
                apic::set(reg::LDR, 0x1234_5678);
                apic::get(reg::LDR)
            },
            0x1200_0000,
        );
        apic::set(reg::LVT_LINT1, apic::MASKED | 0x77);
        g.eq(
            "LVT reads back",
            apic::get(reg::LVT_LINT1),
            apic::MASKED | 0x77,
        );
        apic::set(reg::TIMER_DIVIDE, u32::MAX);
        g.eq(
            "divide configuration has three bits",
            apic::get(reg::TIMER_DIVIDE),
            0xB,
        );
        // Software disable masks every LVT entry and keeps it masked.
        apic::set(reg::LVT_TIMER, VECTOR.into());
        apic::set(reg::SVR, 0xFF);
        g.eq(
            "software disable masks",
            apic::get(reg::LVT_TIMER) & apic::MASKED,
            apic::MASKED,
        );
        apic::set(reg::LVT_TIMER, VECTOR.into());
        g.eq(
            "and keeps it so",
            apic::get(reg::LVT_TIMER) & apic::MASKED,
            apic::MASKED,
        );
        apic::enable(0xFF);
        apic::set(reg::ESR, 0);
        apic::set(reg::ESR, 0);
        // A vector below 16 is illegal to send; a non-existing register too.
        interrupt::set_handler(5, |_| apic::eoi());
        apic::set(reg::ICR_HIGH, apic::id() << 24);
        apic::set(reg::ICR, apic::ASSERT | 5);
        cpu::interrupt_window();
        g.eq("illegal vector not delivered", interrupt::count(5), 0);
        apic::set(reg::ESR, 0);
        g.eq("illegal vector sent", apic::get(reg::ESR) & 0x20, 0x20);
        apic::set(reg::ESR, 0);
        g.eq("ESR clears", apic::get(reg::ESR), 0);
        g.eq(
            "ICR high reads back",
            {
                apic::set(reg::ICR_HIGH, 0x0300_0000);
                apic::get(reg::ICR_HIGH)
            },
            0x0300_0000,
        );
    });
}

fn timer(suite: &mut Suite, name: &'static str) {
    suite.group(name, |g| {
        apic::set(reg::TIMER_DIVIDE, apic::DIVIDE_BY_1);
        // How fast does it count?
        stop();
        apic::set(reg::TIMER_INITIAL, u32::MAX);
        let (c0, t0) = sample();
        tsc::delay(2000);
        let (c1, t1) = sample();
        g.that("counts down", c1 < c0);
        let per_second =
            u128::from(c0.wrapping_sub(c1)) * u128::from(tsc::hz()) / u128::from(t1 - t0);
        let ticks = |us: u64| {
            (per_second * u128::from(us) / 1_000_000).clamp(1, u128::from(u32::MAX)) as u32
        };
        g.check(
            (1_000_000..10_000_000_000).contains(&per_second),
            format_args!("between 1 MHz and 10 GHz: {per_second} Hz"),
        );
        apic::set(reg::TIMER_DIVIDE, apic::DIVIDE_BY_16);
        apic::set(reg::TIMER_INITIAL, u32::MAX);
        let (d0, s0) = sample();
        tsc::delay(2000);
        let (d1, s1) = sample();
        let slow = u128::from(d0.wrapping_sub(d1)) * u128::from(tsc::hz()) / u128::from(s1 - s0);
        let ratio = per_second * 10 / slow.max(1);
        g.check(
            (120..200).contains(&ratio),
            format_args!("divide by 16 runs {ratio}/10 times slower"),
        );
        apic::set(reg::TIMER_DIVIDE, apic::DIVIDE_BY_1);
        stop();

        // One shot.
        interrupt::set_handler(VECTOR, tick);
        apic::set(reg::LVT_TIMER, VECTOR.into());
        let start = tsc::now();
        apic::set(reg::TIMER_INITIAL, ticks(1000));
        g.that(
            "one shot fires",
            open_until(2_000_000, || interrupt::count(VECTOR) > 0),
        );
        let waited = LAST_TSC.load(Ordering::SeqCst) - start;
        g.check(
            waited >= tsc::micros(800),
            format_args!("not early: after {waited} of {} ticks", tsc::micros(1000)),
        );
        open_until(5000, || false);
        g.eq("once", interrupt::count(VECTOR), 1);
        g.eq("current count is zero", apic::get(reg::TIMER_CURRENT), 0);
        // Masked: no interrupt.
        interrupt::set_handler(VECTOR, tick);
        stop();
        apic::set(reg::TIMER_INITIAL, ticks(300));
        open_until(3000, || false);
        g.eq("masked", interrupt::count(VECTOR), 0);
        // Periodic.
        apic::set(reg::LVT_TIMER, apic::PERIODIC | u32::from(VECTOR));
        let start = tsc::now();
        apic::set(reg::TIMER_INITIAL, ticks(500));
        g.that(
            "periodic fires",
            open_until(5_000_000, || interrupt::count(VECTOR) >= 10),
        );
        let waited = LAST_TSC.load(Ordering::SeqCst) - start;
        g.check(
            waited >= tsc::micros(3500),
            format_args!("ten periods took {waited} of {} ticks", tsc::micros(5000)),
        );
        apic::set(reg::TIMER_INITIAL, 0);
        interrupt::set_handler(VECTOR, tick);
        open_until(3000, || false);
        g.that(
            "an initial count of zero stops it",
            interrupt::count(VECTOR) <= 1,
        );
        stop();
        deadline(g);
    });
}

fn deadline(g: &mut Group) {
    if !has::tsc_deadline() {
        return;
    }
    let arm = |value: u64| wrmsr(msr::TSC_DEADLINE, value);
    arm(tsc::now() + 1000);
    g.eq(
        "outside deadline mode the MSR reads zero",
        rdmsr(msr::TSC_DEADLINE),
        0,
    );
    interrupt::set_handler(VECTOR, tick);
    apic::set(reg::LVT_TIMER, apic::DEADLINE | u32::from(VECTOR));
    cpu::mfence();
    let at = tsc::now() + tsc::micros(100_000);
    arm(at);
    g.eq("reads back while armed", rdmsr(msr::TSC_DEADLINE), at);
    g.that(
        "deadline fires",
        open_until(2_000_000, || interrupt::count(VECTOR) > 0),
    );
    let fired = LAST_TSC.load(Ordering::SeqCst);
    g.check(
        fired >= at,
        format_args!("fired at {fired:#x}, deadline {at:#x}"),
    );
    g.eq("reads zero afterwards", rdmsr(msr::TSC_DEADLINE), 0);
    open_until(3000, || false);
    g.eq("once", interrupt::count(VECTOR), 1);
    interrupt::set_handler(VECTOR, tick);
    arm(1);
    g.that(
        "a deadline in the past fires at once",
        open_until(1_000_000, || interrupt::count(VECTOR) == 1),
    );
    // A deadline that passes before the disarming proves nothing.
    let disarmed_in_time = || {
        let at = tsc::now() + tsc::micros(2000);
        interrupt::set_handler(VECTOR, tick);
        arm(at);
        arm(0);
        let in_time = tsc::now() < at;
        open_until(5000, || false);
        in_time
    };
    if (0..20).any(|_| disarmed_in_time()) {
        g.eq("zero disarms", interrupt::count(VECTOR), 0);
    } else {
        g.skip("no time: 2 ms passed between arming and disarming, 20 times");
    }
    apic::set(reg::TIMER_INITIAL, 1000);
    g.eq(
        "the count is ignored in deadline mode",
        apic::get(reg::TIMER_CURRENT),
        0,
    );
    arm(tsc::now() + tsc::micros(2000));
    apic::set(reg::LVT_TIMER, apic::MASKED | u32::from(VECTOR));
    g.eq("leaving deadline mode disarms", rdmsr(msr::TSC_DEADLINE), 0);
    stop();
}

fn halt(suite: &mut Suite, a: &Arena) {
    suite.group("HLT", |g| {
        apic::set(reg::TIMER_DIVIDE, apic::DIVIDE_BY_16);
        interrupt::set_handler(VECTOR, tick);
        apic::set(reg::LVT_TIMER, VECTOR.into());
        for round in 1..=20usize {
            apic::set(reg::TIMER_INITIAL, 2000);
            cpu::sti_hlt();
            cpu::cli();
            g.eq("woken by the timer", interrupt::count(VECTOR), round);
        }
        // HLT is over even when the interrupt is already pending.
        apic::send(apic::id(), apic::ASSERT | u32::from(VECTOR));
        tsc::wait_until(1_000_000, || apic::bit(reg::IRR, VECTOR));
        cpu::sti_hlt();
        cpu::cli();
        g.eq("woken by a pending interrupt", interrupt::count(VECTOR), 21);
        // An NMI ends a HLT with interrupts off.
        let code = code64!("mov [rdi + 0x10], ebx", "mov [rdi], eax", "hlt", "int3");
        let mut c = Context {
            rdi: apic::base() + u64::from(reg::ICR),
            rbx: u64::from(apic::id()) << 24,
            rax: (apic::mode::NMI | apic::ASSERT).into(),
            ..a.kernel(code)
        };
        let got = c.enter();
        g.check(
            got == Exit::plain(2),
            format_args!("NMI: {got} at {:#x}", c.rip),
        );
        // The saved address is after HLT.
        apic::set(reg::TIMER_INITIAL, 2000);
        let mut c = a.kernel(code64!("sti", "hlt", "nop", "int3"));
        g.run(
            "interrupt in HLT",
            &mut c,
            Exit::plain(VECTOR.into()),
            CODE + 2,
        );
        apic::eoi();
        stop();
    });
}

static SERIAL: u8 = 0x52;

/// Reading the identification register does not lower the line: it stays
/// asserted, so a level-triggered entry fires again after each EOI. The third
/// time the source is switched off.
fn serial_handler(_: &mut Frame) {
    if interrupt::count(SERIAL) >= 2 {
        outb(COM1 + 1, 0);
    }
    apic::eoi();
}

fn io_apic(suite: &mut Suite) {
    suite.group("I/O APIC", |g| {
        g.eq("24 inputs", ioapic::pins(), 24);
        let pin = 4;
        ioapic::set_entry(pin, u64::MAX);
        let got = ioapic::entry(pin);
        g.eq(
            "writable bits, read-only ones clear",
            got & 0xFF00_0000_0001_FFFF & !0x5000,
            0xFF00_0000_0001_AFFF,
        );
        for pin in 0..24 {
            ioapic::set_entry(pin, ioapic::MASKED);
        }
        // COM1's transmitter-empty interrupt is a level that software controls.
        let id = u64::from(apic::id()) << 56;
        outb(COM1 + 4, 0x0B);
        outb(COM1 + 1, 0);
        let _ = inb(COM1 + 2);
        interrupt::set_handler(SERIAL, serial_handler);
        ioapic::set_entry(pin, id | ioapic::LEVEL | u64::from(SERIAL));
        outb(COM1 + 1, 2);
        g.that(
            "arrives",
            tsc::wait_until(1_000_000, || apic::bit(reg::IRR, SERIAL)),
        );
        g.eq(
            "remote IRR",
            ioapic::entry(pin) & ioapic::REMOTE_IRR,
            ioapic::REMOTE_IRR,
        );
        g.that("TMR says level", apic::bit(reg::TMR, SERIAL));
        g.that(
            "repeats while the line is high",
            open_until(1_000_000, || interrupt::count(SERIAL) >= 3),
        );
        open_until(2000, || false);
        g.eq("stops with the line", interrupt::count(SERIAL), 3);
        g.eq(
            "remote IRR clear",
            ioapic::entry(pin) & ioapic::REMOTE_IRR,
            0,
        );
        // Edge: one interrupt per rise however long the line is high.
        interrupt::set_handler(SERIAL, |_| apic::eoi());
        ioapic::set_entry(pin, id | u64::from(SERIAL));
        outb(COM1 + 1, 2);
        g.that(
            "edge arrives",
            open_until(1_000_000, || interrupt::count(SERIAL) == 1),
        );
        open_until(2000, || false);
        g.eq("once", interrupt::count(SERIAL), 1);
        g.that("TMR says edge", !apic::bit(reg::TMR, SERIAL));
        outb(COM1 + 1, 0);
        outb(COM1 + 1, 2);
        g.that(
            "a second rise",
            open_until(1_000_000, || interrupt::count(SERIAL) == 2),
        );
        outb(COM1 + 1, 0);
        // A level that was high while masked is delivered on unmasking.
        interrupt::set_handler(SERIAL, |_| {
            outb(COM1 + 1, 0);
            apic::eoi();
        });
        ioapic::set_entry(pin, id | ioapic::MASKED | ioapic::LEVEL | u64::from(SERIAL));
        outb(COM1 + 1, 2);
        open_until(1000, || false);
        g.eq("masked", interrupt::count(SERIAL), 0);
        ioapic::set_entry(pin, id | ioapic::LEVEL | u64::from(SERIAL));
        g.that(
            "unmasking delivers it",
            open_until(1_000_000, || interrupt::count(SERIAL) == 1),
        );
        ioapic::set_entry(pin, ioapic::MASKED);
        // The PIT's channel 0 on input 2.
        interrupt::set_handler(SERIAL, |_| apic::eoi());
        ioapic::set_entry(2, id | u64::from(SERIAL));
        outb(0x43, 0x34);
        outb(0x40, 0xA9);
        outb(0x40, 0x04);
        g.that(
            "PIT ticks",
            open_until(2_000_000, || interrupt::count(SERIAL) >= 5),
        );
        ioapic::set_entry(2, ioapic::MASKED);
        outb(0x43, 0x30);
        outb(0x40, 0);
        outb(0x40, 0);
        g.eq(
            "APIC ID register of the I/O APIC",
            {
                ioapic::set(0, 0x0300_0000);
                ioapic::get(0)
            },
            0x0300_0000,
        );
        ioapic::set(0, 0);
    });
    suite.group("8259 through LINT0", |g| {
        // Vector base 0x60, only IRQ 4 open; the APIC passes ExtINT on.
        for (port, value) in [
            (0x20u16, 0x11u8),
            (0x21, 0x60),
            (0x21, 4),
            (0x21, 1),
            (0xA0, 0x11),
            (0xA1, 0x68),
            (0xA1, 2),
            (0xA1, 1),
            (0x21, 0xEF),
            (0xA1, 0xFF),
        ] {
            outb(port, value);
        }
        interrupt::set_handler(0x64, |_| {
            outb(COM1 + 1, 0);
            outb(0x20, 0x20);
        });
        apic::set(reg::LVT_LINT0, 0x700);
        outb(COM1 + 1, 2);
        g.that(
            "ExtINT arrives with the 8259's vector",
            open_until(1_000_000, || interrupt::count(0x64) == 1),
        );
        apic::set(reg::LVT_LINT0, apic::MASKED | 0x700);
        outb(COM1 + 1, 2);
        interrupt::set_handler(0x64, |_| outb(0x20, 0x20));
        open_until(1000, || false);
        g.eq("LINT0 masked", interrupt::count(0x64), 0);
        outb(COM1 + 1, 0);
        ioapic::mask_pics();
    });
}

fn x2apic(suite: &mut Suite, a: &Arena) {
    suite.group("x2APIC", |g| {
        let base = rdmsr(msr::APIC_BASE);
        let set = |value: u64| {
            Context {
                rcx: msr::APIC_BASE.into(),
                rax: value & 0xFFFF_FFFF,
                rdx: value >> 32,
                ..a.kernel(code64!("wrmsr", "int3"))
            }
            .enter()
        };
        let off = base & !apic::ENABLE;
        if !has::x2apic() {
            g.check(
                set(base | apic::EXTD) == GP0,
                format_args!("EXTD is masked"),
            );
            g.skip("CPUID offers no x2APIC");
            return;
        }
        let id = apic::id();
        g.check(
            set(off | apic::EXTD) == GP0,
            format_args!("EXTD without EN"),
        );
        g.check(
            set(base | apic::EXTD) == BP,
            format_args!("xAPIC to x2APIC"),
        );
        g.check(set(base) == GP0, format_args!("x2APIC to xAPIC"));
        g.check(set(base | apic::EXTD) == BP, format_args!("no change"));
        g.eq("ID is 32 bits", apic::get(reg::ID), id);
        g.eq(
            "LDR is derived",
            apic::get(reg::LDR),
            (id >> 4) << 16 | 1 << (id & 15),
        );
        let wr = |offset: u32, value: u64| {
            let index = u64::from(msr::X2APIC + offset / 16);
            Context {
                rcx: index,
                rax: value & 0xFFFF_FFFF,
                rdx: value >> 32,
                ..a.kernel(code64!("wrmsr", "int3"))
            }
            .enter()
        };
        let rd = |offset: u32| {
            Context {
                rcx: u64::from(msr::X2APIC + offset / 16),
                ..a.kernel(code64!("rdmsr", "int3"))
            }
            .enter()
        };
        for (what, offset, value) in [
            ("ID", reg::ID, 0u64),
            ("version", reg::VERSION, 0),
            ("LDR", reg::LDR, 0),
            ("DFR", reg::DFR, 0),
            ("EOI other than zero", reg::EOI, 1),
            ("TPR upper bits", reg::TPR, 0x100),
            ("TPR upper half", reg::TPR, 1 << 32),
            ("ESR other than zero", reg::ESR, 1),
            ("ICR high", reg::ICR_HIGH, 0),
            ("SVR reserved bits", reg::SVR, 1 << 31),
            ("LVT reserved bits", reg::LVT_TIMER, 1 << 20),
            ("current count", reg::TIMER_CURRENT, 0),
            ("ISR", reg::ISR, 0),
            ("self IPI upper bits", reg::SELF_IPI, 0x100),
        ] {
            let got = wr(offset, value);
            g.check(got == GP0, format_args!("WRMSR {what}: {got}"));
        }
        for (what, offset) in [
            ("EOI", reg::EOI),
            ("DFR", reg::DFR),
            ("ICR high", reg::ICR_HIGH),
            ("self IPI", reg::SELF_IPI),
            ("APR", reg::APR),
            ("unused", 0x40),
        ] {
            let got = rd(offset);
            g.check(got == GP0, format_args!("RDMSR {what}: {got}"));
        }
        interrupt::set_handler(VECTOR, tick);
        apic::set(reg::SELF_IPI, VECTOR.into());
        g.that(
            "self IPI",
            open_until(1_000_000, || interrupt::count(VECTOR) == 1),
        );
        apic::send(id, apic::ASSERT | u32::from(VECTOR));
        g.that(
            "IPI by ID",
            open_until(1_000_000, || interrupt::count(VECTOR) == 2),
        );
        g.eq(
            "ICR is one 64-bit register",
            rdmsr(msr::X2APIC + 0x30),
            u64::from(id) << 32 | u64::from(apic::ASSERT) | u64::from(VECTOR),
        );
        // Back through disabled.
        g.check(set(off) == BP, format_args!("to disabled"));
        g.eq("CPUID.APIC is clear", cpu::cpuid(1, 0).edx >> 9 & 1, 0);
        g.check(
            set(base | apic::EXTD) == GP0,
            format_args!("disabled to x2APIC"),
        );
        g.check(set(base) == BP, format_args!("disabled to xAPIC"));
        g.eq("CPUID.APIC is set", cpu::cpuid(1, 0).edx >> 9 & 1, 1);
        g.eq(
            "software-disabled after that",
            read::<u32>(apic::base() + u64::from(reg::SVR)),
            0xFF,
        );
        g.check(
            set(base | apic::EXTD) == BP,
            format_args!("to x2APIC again"),
        );
        write::<u32>(apic::base() + u64::from(reg::TPR), 0x50);
        g.eq("the memory page does not reach it", apic::get(reg::TPR), 0);
        apic::enable(0xFF);
        interrupt::set_handler(VECTOR, tick);
    });
}
