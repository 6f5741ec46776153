//! Goes on computing, round after round, while it is moved from machine to
//! machine, until a byte arrives on COM1: every round has to come to what the
//! first one did, registers stay what they were set to, the timer ticks on and
//! time never goes back.
#![no_std]
#![no_main]

use caisson_guest_rt::apic::{self, reg};
use caisson_guest_rt::cpu::{self, msr, rdmsr, wrmsr};
use caisson_guest_rt::interrupt::{self, Frame};
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::frames;
use caisson_guest_rt::port::{COM1, inb};
use caisson_guest_rt::{Suite, guest, ioapic, println, tsc};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

guest!("travel", main);

const VECTOR: u8 = 0x45;
/// Words of the table that each round fills and reads.
const WORDS: u64 = 256;
/// MSRs that no other part of the guest needs, and what is in them.
const MSRS: [(u32, u64); 4] = [
    (msr::SYSENTER_ESP, 0x1122_3344_5566),
    (msr::SYSENTER_EIP, 0x0077_6655_4433),
    (msr::LSTAR, 0x0000_1234_5678_9ABC),
    (msr::STAR, 0x0013_0008_0000_0000),
];
static LAST_TSC: AtomicU64 = AtomicU64::new(0);
static BACKWARDS: AtomicU64 = AtomicU64::new(0);

fn look_at_time() {
    let now = tsc::now();
    if LAST_TSC.swap(now, Ordering::SeqCst) > now {
        BACKWARDS.fetch_add(1, Ordering::SeqCst);
    }
}

fn tick(_: &mut Frame) {
    look_at_time();
    apic::eoi();
}

/// What a round comes to.
#[derive(Clone, Copy, PartialEq)]
struct Sums {
    integer: u64,
    sse: u64,
    x87: u64,
    /// What four vector registers held all through it.
    held: [u64; 4],
}

/// Fills the table from a seed, hashes it backwards, and sums its bytes as numbers with SSE and
/// the x87 in turn, while four vector registers and the top of the x87's stack hold on to a value.
fn round(table: u64) -> Sums {
    let mut word = 0x9E37_79B9_7F4A_7C15u64;
    let mut integer = 0xCBF2_9CE4_8422_2325u64;
    let mut held = [0u64; 4];
    let (sse, x87): (f64, f64);
    for i in 0..WORDS {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        write(table + i * 8, word);
    }
    for i in (0..WORDS).rev() {
        integer = (integer ^ read::<u64>(table + i * 8)).wrapping_mul(0x100_0000_01B3);
        integer = integer.rotate_left(i as u32 & 63);
    }
    // SAFETY: reads the table, writes `held`, and changes the registers listed.
    unsafe {
        asm!(
            "movups xmm4, [{table}]", "movups xmm9, [{table} + 16]",
            "movaps xmm12, xmm4", "pxor xmm12, xmm9", "movaps xmm15, xmm9",
            "xorps xmm0, xmm0", "fldpi", "fldz",
            "xor {i:e}, {i:e}",
            "2:",
            "movzx {byte:e}, byte ptr [{table} + {i}]",
            "cvtsi2sd xmm1, {byte:e}",
            "addsd xmm0, xmm1",
            "sqrtsd xmm1, xmm1",
            "addsd xmm0, xmm1",
            "fild word ptr [{table} + {i}]",
            "fabs", "fsqrt", "fadd st(0), st(2)", "faddp",
            "add {i:e}, 37",
            "cmp {i:e}, 2040",
            "jb 2b",
            "fmulp",
            "sub rsp, 16", "fstp qword ptr [rsp]", "movsd xmm1, qword ptr [rsp]", "add rsp, 16",
            "movq [{held}], xmm4", "movq [{held} + 8], xmm9",
            "movq [{held} + 16], xmm12", "movq [{held} + 24], xmm15",
            table = in(reg) table, held = in(reg) held.as_mut_ptr(),
            i = out(reg) _, byte = out(reg) _,
            out("xmm0") sse, out("xmm1") x87, out("xmm4") _, out("xmm9") _, out("xmm12") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    Sums {
        integer,
        sse: sse.to_bits(),
        x87: x87.to_bits(),
        held,
    }
}

fn told_to_end() -> bool {
    inb(COM1 + 5) & 1 != 0 && inb(COM1) == b'.'
}

fn main(suite: &mut Suite) {
    ioapic::mask_pics();
    apic::enable(0xFF);
    interrupt::set_handler(VECTOR, tick);
    let table = frames(1, 4096);
    for (index, value) in MSRS {
        wrmsr(index, value);
    }
    cpu::set_dr0(table);
    cpu::set_dr3(table + 8);
    apic::set(reg::TPR, 0x10);
    apic::set(reg::TIMER_DIVIDE, apic::DIVIDE_BY_16);
    apic::set(reg::LVT_TIMER, apic::PERIODIC | u32::from(VECTOR));
    apic::set(reg::TIMER_INITIAL, 1_000_000);
    suite.group("on the way", |g| {
        let first = round(table);
        g.that(
            "the first round comes to something",
            f64::from_bits(first.sse) > 1000.0 && f64::from_bits(first.x87) > 1000.0,
        );
        let mut rounds = 0u64;
        cpu::sti();
        loop {
            rounds += 1;
            let now = round(table);
            g.eq("integers", now.integer, first.integer);
            g.eq("SSE", now.sse, first.sse);
            g.eq("x87", now.x87, first.x87);
            g.check(
                now.held == first.held,
                format_args!("vector registers: {:x?}, want {:x?}", now.held, first.held),
            );
            for (index, value) in MSRS {
                g.eqf(format_args!("MSR {index:#x}"), rdmsr(index), value);
            }
            g.eq("DR0", cpu::dr0(), table);
            g.eq("DR3", cpu::dr3(), table + 8);
            g.eq("TPR", apic::get(reg::TPR), 0x10);
            // The timer goes on in every machine. Where a hypervisor cannot move the TSC, it
            // jumps ahead on the way there, and a time of waiting is over at once.
            let ticks = interrupt::count(VECTOR);
            let ticked = || tsc::wait_until(20_000_000, || interrupt::count(VECTOR) > ticks);
            g.that("ticks", (0..3).any(|_| ticked()));
            look_at_time();
            println!("round {rounds}");
            if told_to_end() {
                break;
            }
        }
        cpu::cli();
        apic::set(reg::LVT_TIMER, apic::MASKED | u32::from(VECTOR));
        g.eq("time went back", BACKWARDS.load(Ordering::SeqCst), 0);
    });
}
