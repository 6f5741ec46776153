//! Times the benchmark kernels and counts their instructions.
//!
//! One line per kernel: `bench NAME units=U nanoseconds=T instructions=I
//! bytes=B checksum=C`. The instructions of one unit are counted by single-stepping
//! (a REP iteration counts as one); the time is of undisturbed execution.
#![no_std]
#![no_main]

mod cold;

use caisson_bench_kernels::KERNELS;
use caisson_guest_rt::interrupt::{Gate, INTERRUPT_GATE, reset_gate, set_gate};
use caisson_guest_rt::percpu::sel;
use caisson_guest_rt::{Suite, guest, println, tsc};
use core::arch::{asm, global_asm};

guest!("bench", main);

/// How long a kernel runs between two looks at the clock, in microseconds.
const TARGET_US: u64 = 10_000;
/// How often it is timed: the least time counts, since a busy host takes the
/// processor away for long.
const ROUNDS: u32 = 12;

global_asm!(
    ".section .text.step, \"ax\"",
    ".balign 16",
    ".global step_handler",
    "step_handler:",
    "inc qword ptr [step_count]",
    "iretq",
    ".section .bss.step, \"aw\", @nobits",
    ".balign 8",
    ".global step_count",
    "step_count: .skip 8",
    ".text",
);

unsafe extern "C" {
    static step_handler: u8;
}

/// Instructions that a kernel executes for so many units, call and return included.
fn count(kernel: usize, units: u64) -> u64 {
    extern "C" fn call(kernel: usize, units: u64) -> u64 {
        (KERNELS[kernel].run)(units)
    }
    set_gate(
        1,
        Gate::new(
            sel::CODE64,
            &raw const step_handler as u64,
            1,
            INTERRUPT_GATE,
        ),
    );
    let steps: u64;
    // SAFETY: the handler changes its counter only; the trap flag is set around
    // the call, on a stack aligned for it.
    unsafe {
        asm!(
            "mov r12, rsp", "and rsp, -16", "mov r13, rax",
            "mov qword ptr [step_count], 0",
            "pushfq", "or qword ptr [rsp], 0x100", "popfq",
            "call r13",
            "pushfq", "and qword ptr [rsp], -257", "popfq",
            "mov rsp, r12", "mov r13, [step_count]",
            inout("rax") call as extern "C" fn(usize, u64) -> u64 as usize => _,
            inout("rdi") kernel => _, inout("rsi") units => _,
            out("r12") _, out("r13") steps, clobber_abi("C")
        );
    }
    reset_gate(1);
    steps
}

/// Lets programs use AVX, if the processor has it.
fn enable_avx() {
    let features = core::arch::x86_64::__cpuid(1).ecx;
    if features & (1 << 26 | 1 << 28) != 1 << 26 | 1 << 28 {
        return;
    }
    // SAFETY: CR4.OSXSAVE, then x87, SSE and AVX in XCR0; the processor has both.
    unsafe {
        asm!("mov {t}, cr4", "or {t}, 0x40000", "mov cr4, {t}", "xor ecx, ecx", "xgetbv", "or eax, 7", "xsetbv",
            t = out(reg) _, out("eax") _, out("ecx") _, out("edx") _, options(nostack));
    }
}

fn main(suite: &mut Suite) {
    enable_avx();
    cold::run();
    suite.group("kernels", |g| {
        let hz = tsc::hz();
        for (index, kernel) in KERNELS.iter().enumerate().filter(|(_, k)| k.runs()) {
            let per_unit = count(index, 2).wrapping_sub(count(index, 1));
            let again = count(index, 3).wrapping_sub(count(index, 2));
            g.check(per_unit > 100 && per_unit < 1_000_000, format_args!("{}: {per_unit} instructions a unit", kernel.name));
            g.check(
                again.abs_diff(per_unit) * 100 <= per_unit,
                format_args!("{}: a unit took {per_unit} and then {again} instructions", kernel.name),
            );
            let mut units = 16;
            let (mut ticks, checksum) = loop {
                let start = tsc::now();
                let checksum = (kernel.run)(units);
                let ticks = tsc::now() - start;
                if ticks >= tsc::micros(TARGET_US) || units >= 1 << 32 {
                    break (ticks, checksum);
                }
                units *= 2;
            };
            for _ in 1..ROUNDS {
                let start = tsc::now();
                (kernel.run)(units);
                ticks = ticks.min(tsc::now() - start);
            }
            let nanoseconds = u128::from(ticks) * 1_000_000_000 / u128::from(hz);
            println!(
                "bench {} units={units} nanoseconds={nanoseconds} instructions={} bytes={} checksum={checksum:#x}",
                kernel.name,
                u128::from(per_unit) * u128::from(units),
                kernel.bytes * units,
            );
            g.that("checksum repeats", (kernel.run)(5) == (kernel.run)(5));
        }
    });
}
