//! Four processors: start-up, IPIs in every addressing mode, TSC order, locked
//! operations, memory ordering, TLB shoot-down, cross-modifying code.
//!
//! QEMU TCG 7.2 fails this: it keeps a SIPI that came without INIT.
#![no_std]
#![no_main]

use caisson_guest_rt::apic::{self, reg};
use caisson_guest_rt::cpu;
use caisson_guest_rt::interrupt;
use caisson_guest_rt::memory::{read, write, write_bytes};
use caisson_guest_rt::paging::{Arena, CODE, P, U, W, frame};
use caisson_guest_rt::{Suite, boot, code64, guest, ioapic, percpu, smp, tsc};
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

guest!("smp", main);

const CPUS: usize = 4;
const VECTOR: u8 = 0x48;
const SHOOTDOWN: u8 = 0x49;
const VA: u64 = 0x5000_0000;

static SEEN: [AtomicUsize; CPUS] = [const { AtomicUsize::new(0) }; CPUS];
static LAST: [AtomicU64; CPUS] = [const { AtomicU64::new(0) }; CPUS];
static STOP: AtomicBool = AtomicBool::new(false);
static A: AtomicU64 = AtomicU64::new(0);
static B: AtomicU64 = AtomicU64::new(0);
static BAD: AtomicU64 = AtomicU64::new(0);
static WIDE: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

fn me() -> usize {
    percpu::this().index
}

/// Takes interrupts until told to stop.
fn listen(_: usize) {
    cpu::sti();
    while !STOP.load(Ordering::SeqCst) {
        cpu::pause();
    }
    cpu::cli();
}

fn seen() -> [usize; CPUS] {
    core::array::from_fn(|i| SEEN[i].load(Ordering::SeqCst))
}

fn main(suite: &mut Suite) {
    let a = Arena::new();
    ioapic::mask_pics();
    let mut running = 0;
    suite.group("start-up", |g| {
        running = smp::start();
        g.eq("processors", running, CPUS);
        g.eq(
            "each passed the start-up code once",
            boot::trampoline_count() as usize,
            CPUS - 1,
        );
        for i in 0..running {
            for j in 0..i {
                g.that("APIC IDs differ", smp::apic_id(i) != smp::apic_id(j));
            }
        }
        let bsp = cpu::rdmsr(cpu::msr::APIC_BASE) & apic::BSP;
        g.eq("this one is the boot processor", bsp, apic::BSP);
        g.that(
            "the others are not",
            smp::run_all(
                running,
                |_| {
                    if me() != 0 && cpu::rdmsr(cpu::msr::APIC_BASE) & apic::BSP != 0 {
                        BAD.fetch_add(1, Ordering::SeqCst);
                    }
                },
                0,
            ),
        );
        g.eq("BSP flags", BAD.swap(0, Ordering::SeqCst), 0);
    });
    if running != CPUS {
        return;
    }
    interprocessor(suite);
    clocks(suite);
    atomics(suite);
    ordering(suite);
    shootdown(suite, &a);
    cross_modify(suite, &a);
    restart(suite);
}

fn interprocessor(suite: &mut Suite) {
    suite.group("interrupts between processors", |g| {
        interrupt::set_handler(VECTOR, |_| {
            SEEN[me()].fetch_add(1, Ordering::SeqCst);
            apic::eoi();
        });
        STOP.store(false, Ordering::SeqCst);
        for i in 1..CPUS {
            smp::submit(i, listen, 0);
        }
        cpu::sti();
        let mut send = |what: &str, destination: u32, command: u32, want: [usize; CPUS]| {
            for s in &SEEN {
                s.store(0, Ordering::SeqCst);
            }
            apic::send(destination, command | apic::ASSERT | u32::from(VECTOR));
            tsc::wait_until(10_000_000, || seen() == want);
            tsc::delay(300);
            g.check(
                seen() == want,
                format_args!("{what}: got {:?}, want {want:?}", seen()),
            );
        };
        for i in 0..CPUS {
            send(
                "physical",
                smp::apic_id(i),
                0,
                core::array::from_fn(|j| usize::from(i == j)),
            );
        }
        send("self", 0, apic::shorthand::SELF, [1, 0, 0, 0]);
        send("all", 0, apic::shorthand::ALL, [1; 4]);
        send("others", 0, apic::shorthand::OTHERS, [0, 1, 1, 1]);
        send("physical broadcast", 0xFF, 0, [1; 4]);
        cpu::cli();
        STOP.store(true, Ordering::SeqCst);
        for i in 1..CPUS {
            smp::join(i, 10_000_000);
        }
        // Flat logical mode: each processor has the bit of its index.
        smp::run_all(
            CPUS,
            |_| {
                apic::set(reg::DFR, u32::MAX);
                apic::set(reg::LDR, 1 << (24 + me()));
            },
            0,
        );
        STOP.store(false, Ordering::SeqCst);
        for i in 1..CPUS {
            smp::submit(i, listen, 0);
        }
        cpu::sti();
        for mask in 1..16u32 {
            send(
                "logical flat",
                mask,
                1 << 11,
                core::array::from_fn(|j| (mask >> j & 1) as usize),
            );
        }
        for s in &SEEN {
            s.store(0, Ordering::SeqCst);
        }
        apic::send(
            0xF,
            apic::mode::LOWEST | 1 << 11 | apic::ASSERT | u32::from(VECTOR),
        );
        tsc::wait_until(10_000_000, || seen().iter().sum::<usize>() > 0);
        tsc::delay(300);
        g.eq(
            "lowest priority goes to exactly one",
            seen().iter().sum::<usize>(),
            1,
        );
        // NMIs.
        interrupt::set_handler(2, |_| {
            SEEN[me()].fetch_add(100, Ordering::SeqCst);
        });
        for s in &SEEN {
            s.store(0, Ordering::SeqCst);
        }
        apic::send(0, apic::mode::NMI | apic::shorthand::OTHERS | apic::ASSERT);
        tsc::wait_until(10_000_000, || seen() == [0, 100, 100, 100]);
        g.check(
            seen() == [0, 100, 100, 100],
            format_args!("NMI to others: {:?}", seen()),
        );
        interrupt::clear_handler(2);
        // Many in a row: a vector pends at most twice, none is lost for good.
        for _ in 0..2000 {
            apic::send(
                0,
                apic::shorthand::OTHERS | apic::ASSERT | u32::from(VECTOR),
            );
        }
        for s in &SEEN {
            s.store(0, Ordering::SeqCst);
        }
        apic::send(
            0,
            apic::shorthand::OTHERS | apic::ASSERT | u32::from(VECTOR),
        );
        tsc::wait_until(10_000_000, || seen()[1..].iter().all(|&n| n >= 1));
        g.that(
            "still delivered after a storm",
            seen()[1..].iter().all(|&n| n >= 1),
        );
        cpu::cli();
        STOP.store(true, Ordering::SeqCst);
        for i in 1..CPUS {
            g.that("stopped", smp::join(i, 10_000_000));
        }
        // HLT on another processor is ended by an IPI.
        for s in &SEEN {
            s.store(0, Ordering::SeqCst);
        }
        for round in 1..=50 {
            smp::submit(
                1,
                |_| {
                    cpu::sti_hlt();
                    cpu::cli();
                },
                0,
            );
            tsc::delay(if round % 2 == 0 { 50 } else { 0 });
            // The interrupt may come before the HLT: it then ends the next one.
            let woke = tsc::wait_until(10_000_000, || {
                if smp::busy(1) {
                    apic::send(smp::apic_id(1), apic::ASSERT | u32::from(VECTOR));
                    tsc::delay(20);
                }
                !smp::busy(1)
            });
            if !g.that("HLT woken by an IPI", woke) {
                break;
            }
        }
    });
}

fn clocks(suite: &mut Suite) {
    suite.group("time stamp counters", |g| {
        A.store(0, Ordering::SeqCst);
        BAD.store(0, Ordering::SeqCst);
        let done = smp::run_all(
            CPUS,
            |_| {
                for _ in 0..20_000 {
                    let last = A.load(Ordering::SeqCst);
                    let now = tsc::now();
                    if now < last {
                        BAD.fetch_add(1, Ordering::SeqCst);
                    }
                    A.fetch_max(now, Ordering::SeqCst);
                }
            },
            0,
        );
        g.that("finished", done);
        g.eq(
            "never behind a value another processor has shown",
            BAD.load(Ordering::SeqCst),
            0,
        );
    });
}

fn atomics(suite: &mut Suite) {
    suite.group("locked operations", |g| {
        const N: u64 = 50_000;
        A.store(0, Ordering::SeqCst);
        smp::run_all(CPUS, |n| {
            for _ in 0..n {
                A.fetch_add(1, Ordering::SeqCst);
            }
        }, N as usize);
        g.eq("LOCK XADD", A.load(Ordering::SeqCst), N * CPUS as u64);
        A.store(0, Ordering::SeqCst);
        smp::run_all(CPUS, |n| {
            for _ in 0..n {
                let mut old = A.load(Ordering::Relaxed);
                while let Err(now) = A.compare_exchange(old, old + 3, Ordering::SeqCst, Ordering::Relaxed) {
                    old = now;
                }
            }
        }, N as usize / 4);
        g.eq("LOCK CMPXCHG", A.load(Ordering::SeqCst), 3 * (N / 4) * CPUS as u64);
        // A spin lock made of XCHG guards a plain counter.
        A.store(0, Ordering::SeqCst);
        B.store(0, Ordering::SeqCst);
        smp::run_all(CPUS, |n| {
            for _ in 0..n {
                while A.swap(1, Ordering::SeqCst) != 0 {
                    cpu::pause();
                }
                B.store(B.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                A.store(0, Ordering::Release);
            }
        }, N as usize / 10);
        g.eq("XCHG spin lock", B.load(Ordering::SeqCst), N / 10 * CPUS as u64);
        // A locked add that straddles a cache line, and one that straddles a page.
        static PAGES: AtomicU64 = AtomicU64::new(0);
        let two = caisson_guest_rt::paging::frames(2, 4096);
        for offset in [60u64, 4092] {
            write::<u64>(two + offset, 0);
            PAGES.store(two + offset, Ordering::SeqCst);
            smp::run_all(CPUS, |n| {
                let at = PAGES.load(Ordering::SeqCst);
                for _ in 0..n {
                    // SAFETY: the address is a frame of this guest outside of Rust's objects.
                    unsafe { core::arch::asm!("lock add qword ptr [{}], 1", in(reg) at, options(nostack)) };
                }
            }, 5000);
            g.eq("split LOCK ADD", read::<u64>(two + offset), 5000 * CPUS as u64);
        }
        if cpu::has::cx16() {
            // Both halves always change together.
            let pair = frame();
            PAGES.store(pair, Ordering::SeqCst);
            BAD.store(0, Ordering::SeqCst);
            smp::run_all(CPUS, |n| {
                let at = PAGES.load(Ordering::SeqCst);
                let (mut low, mut high) = (0u64, 0u64);
                let mut done = 0;
                while done < n {
                    let ok: u8;
                    let (next_low, next_high) = (low + 1, high + 1);
                    // SAFETY: as above; RBX is kept by exchanging it.
                    unsafe {
                        core::arch::asm!("xchg rbx, {b}", "lock cmpxchg16b [{at}]", "sete {ok}", "xchg rbx, {b}",
                            at = in(reg) at, b = inout(reg) next_low => _, ok = out(reg_byte) ok, in("rcx") next_high,
                            inout("rax") low, inout("rdx") high, options(nostack));
                    }
                    if low != high {
                        BAD.fetch_add(1, Ordering::SeqCst);
                    }
                    done += usize::from(ok);
                }
            }, 5000);
            g.eq("LOCK CMPXCHG16B, count", read::<u64>(pair), 5000 * CPUS as u64);
            g.eq("LOCK CMPXCHG16B, torn values", BAD.load(Ordering::SeqCst), 0);
        }
        // Aligned 8-byte accesses are never torn.
        BAD.store(0, Ordering::SeqCst);
        smp::run_all(CPUS, |n| {
            let pattern = [0u64, u64::MAX, 0x5555_5555_5555_5555, 0xAAAA_AAAA_AAAA_AAAA];
            for i in 0..n {
                WIDE[0].store(pattern[(i + me()) & 3], Ordering::Relaxed);
                if !pattern.contains(&WIDE[0].load(Ordering::Relaxed)) {
                    BAD.fetch_add(1, Ordering::SeqCst);
                }
            }
        }, 50_000);
        g.eq("torn 8-byte stores", BAD.load(Ordering::SeqCst), 0);
    });
}

fn ordering(suite: &mut Suite) {
    suite.group("memory ordering", |g| {
        // Message passing: data before flag, never seen the other way round.
        A.store(0, Ordering::SeqCst);
        B.store(0, Ordering::SeqCst);
        BAD.store(0, Ordering::SeqCst);
        smp::submit(
            1,
            |n| {
                for i in 1..=n as u64 {
                    A.store(i, Ordering::Relaxed);
                    B.store(i, Ordering::Release);
                }
            },
            200_000,
        );
        let mut last = 0;
        while last < 200_000 {
            let flag = B.load(Ordering::Acquire);
            let data = A.load(Ordering::Relaxed);
            if data < flag || flag < last {
                BAD.fetch_add(1, Ordering::SeqCst);
            }
            last = flag;
        }
        g.eq("stores seen out of order", BAD.load(Ordering::SeqCst), 0);
        smp::join(1, 10_000_000);
        // Store buffering with MFENCE: both cannot read the old value.
        static ROUND: AtomicU64 = AtomicU64::new(0);
        static READ: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
        static READY: AtomicU64 = AtomicU64::new(0);
        smp::submit(
            1,
            |n| {
                for round in 1..=n as u64 {
                    while ROUND.load(Ordering::Acquire) != round {
                        cpu::pause();
                    }
                    B.store(round, Ordering::Relaxed);
                    cpu::mfence();
                    READ[1].store(A.load(Ordering::Relaxed), Ordering::Relaxed);
                    READY.store(round, Ordering::Release);
                }
            },
            5000,
        );
        A.store(0, Ordering::SeqCst);
        B.store(0, Ordering::SeqCst);
        let mut forbidden = 0u64;
        for round in 1..=5000u64 {
            ROUND.store(round, Ordering::Release);
            A.store(round, Ordering::Relaxed);
            cpu::mfence();
            let mine = B.load(Ordering::Relaxed);
            while READY.load(Ordering::Acquire) != round {
                cpu::pause();
            }
            if mine < round && READ[1].load(Ordering::Relaxed) < round {
                forbidden += 1;
            }
        }
        g.eq("store buffering with fences", forbidden, 0);
        smp::join(1, 10_000_000);
    });
}

fn shootdown(suite: &mut Suite, a: &Arena) {
    suite.group("TLB shoot-down", |g| {
        let (one, two) = (frame(), frame());
        write::<u64>(one, 1);
        write::<u64>(two, 2);
        a.space.map(VA, one, 1, P | W);
        // The other processors run on the same tables.
        A.store(a.space.root, Ordering::SeqCst);
        smp::run_all(CPUS, |_| cpu::set_cr3(A.load(Ordering::SeqCst)), 0);
        interrupt::set_handler(SHOOTDOWN, |_| {
            cpu::invlpg(VA);
            SEEN[me()].fetch_add(1, Ordering::SeqCst);
            apic::eoi();
        });
        STOP.store(false, Ordering::SeqCst);
        BAD.store(0, Ordering::SeqCst);
        B.store(1, Ordering::SeqCst);
        for i in 1..CPUS {
            smp::submit(
                i,
                |_| {
                    cpu::sti();
                    while !STOP.load(Ordering::SeqCst) {
                        // Between two equal readings of the generation the mapping was stable.
                        let before = B.load(Ordering::SeqCst);
                        let value: u64 = read(VA);
                        let after = B.load(Ordering::SeqCst);
                        if before == after && before != 0 && value != before {
                            BAD.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                    cpu::cli();
                },
                0,
            );
        }
        let slot = a.space.entry(VA, 1);
        let mut lost = 0u64;
        for round in 0..100u64 {
            let next = 1 + (round + 1) % 2;
            let base: usize = SEEN[1..].iter().map(|s| s.load(Ordering::SeqCst)).sum();
            B.store(0, Ordering::SeqCst);
            write(slot, (if next == 1 { one } else { two }) | P | W);
            cpu::invlpg(VA);
            apic::send(
                0,
                apic::shorthand::OTHERS | apic::ASSERT | u32::from(SHOOTDOWN),
            );
            let acknowledged = tsc::wait_until(10_000_000, || {
                SEEN[1..]
                    .iter()
                    .map(|s| s.load(Ordering::SeqCst))
                    .sum::<usize>()
                    >= base + CPUS - 1
            });
            lost += u64::from(!acknowledged);
            B.store(next, Ordering::SeqCst);
            if !acknowledged {
                break;
            }
        }
        STOP.store(true, Ordering::SeqCst);
        for i in 1..CPUS {
            g.that("stopped", smp::join(i, 10_000_000));
        }
        g.eq("acknowledged", lost, 0);
        g.eq(
            "stale reads after the acknowledgement",
            BAD.load(Ordering::SeqCst),
            0,
        );
    });
}

fn cross_modify(suite: &mut Suite, a: &Arena) {
    suite.group("cross-modifying code", |g| {
        const ALIAS: u64 = 0x6000_0000;
        a.space.map(ALIAS, a.code, 1, P | W | U);
        for (name, at) in [("same address", CODE), ("alias", ALIAS)] {
            // A function that returns its immediate; the operand is aligned, so each store is whole.
            write_bytes(a.code + 3, code64!("mov eax, 0", "ret"));
            let immediate = a.code + 4;
            write::<u32>(immediate, 0);
            STOP.store(false, Ordering::SeqCst);
            A.store(0, Ordering::SeqCst);
            BAD.store(0, Ordering::SeqCst);
            for i in 1..CPUS {
                smp::submit(
                    i,
                    |at| {
                        // SAFETY: the code at this address is a complete function of the C ABI.
                        let function: extern "C" fn() -> u64 = unsafe { core::mem::transmute(at) };
                        let mut last = 0;
                        while !STOP.load(Ordering::SeqCst) {
                            let floor = A.load(Ordering::SeqCst);
                            // CPUID serialises, as cross-modifying code must.
                            core::arch::x86_64::__cpuid(0);
                            let value = function() & 0xFFFF_FFFF;
                            if value < floor || value < last {
                                BAD.fetch_add(1, Ordering::SeqCst);
                            }
                            last = value;
                            SEEN[me()].fetch_add(1, Ordering::SeqCst);
                            LAST[me()].store(last, Ordering::SeqCst);
                        }
                    },
                    at as usize + 3,
                );
            }
            for i in 1..=5_000u32 {
                write::<u32>(CODE + 4, i);
                // From here on every processor that serialises must execute the new bytes.
                A.store(i.into(), Ordering::SeqCst);
                // Everyone gets to run now and then, and once more at the end.
                if i % 500 == 0 {
                    let before = seen();
                    tsc::wait_until(10_000_000, || (1..CPUS).all(|n| seen()[n] > before[n] + 1));
                }
            }
            STOP.store(true, Ordering::SeqCst);
            for i in 1..CPUS {
                g.that("stopped", smp::join(i, 10_000_000));
            }
            g.eqf(
                format_args!("{name}: stale or backward results"),
                BAD.load(Ordering::SeqCst),
                0,
            );
            for last in &LAST[1..] {
                g.eqf(
                    format_args!("{name}: last value"),
                    last.load(Ordering::SeqCst),
                    5_000,
                );
            }
        }
    });
}

fn restart(suite: &mut Suite) {
    suite.group("INIT and start-up again", |g| {
        let before = boot::trampoline_count();
        // A processor in the start-up code ignores further SIPIs; only INIT makes it wait for one.
        let id = smp::apic_id(3);
        apic::send(
            id,
            apic::mode::STARTUP | apic::ASSERT | (boot::TRAMPOLINE >> 12) as u32,
        );
        tsc::delay(1000);
        g.eq(
            "SIPI without INIT is ignored",
            boot::trampoline_count(),
            before,
        );
        apic::send(id, apic::mode::INIT | apic::ASSERT);
        tsc::delay(1000);
        apic::send(id, apic::mode::INIT | 1 << 15);
        tsc::delay(1000);
        g.eq(
            "INIT alone does not start it",
            boot::trampoline_count(),
            before,
        );
        smp::start_one(id);
        g.that(
            "started again",
            tsc::wait_until(10_000_000, || boot::trampoline_count() == before + 1),
        );
        tsc::delay(1000);
        g.eq("once", boot::trampoline_count(), before + 1);
    });
}
