//! Accesses of every kind to device memory.

use crate::random::Random;
use crate::rescue::attempt_on;
use core::arch::asm;

/// Device memory: nobody's, the video hole, the I/O APIC's and around it, the local APIC's, flash, behind the end of
/// 128 MiB of RAM.
const PLACES: [u64; 8] = [
    0xD000_0000,
    0xA_0000,
    0xFEC0_0000,
    0xFED0_0000,
    0xFEE0_0000,
    0xFFFF_F000,
    (128 << 20) - 16,
    0x8000_0000,
];
/// RAM that nothing else is in.
const BUFFER: u64 = 32 << 20;
/// Attempts of a round.
const ATTEMPTS: u32 = 64;
/// Kinds of access.
const KINDS: u64 = 17;

/// One access.
struct Access {
    address: u64,
    value: u64,
    kind: u64,
}

extern "C" fn access(what: &Access) {
    let Access {
        address,
        value,
        kind,
    } = *what;
    macro_rules! at {
        ($($line:literal),+) => {
            // SAFETY: device memory, or RAM that no Rust object lies in.
            unsafe {
                asm!($($line),+, in("rdi") address, inout("rax") value => _, out("rcx") _, out("rdx") _,
                    out("xmm0") _)
            }
        };
    }
    macro_rules! repeated {
        ($line:literal, $from:expr, $to:expr, $count:expr) => {
            // SAFETY: as above.
            unsafe {
                asm!($line, inout("rsi") $from => _, inout("rdi") $to => _, inout("rcx") $count => _, in("rax") value)
            }
        };
    }
    match kind {
        0 => at!("mov [rdi], al"),
        1 => at!("mov [rdi], ax"),
        2 => at!("mov [rdi], eax"),
        3 => at!("mov [rdi], rax"),
        4 => at!("mov al, [rdi]"),
        5 => at!("mov rax, [rdi]"),
        6 => at!("movups [rdi], xmm0"),
        7 => at!("movups xmm0, [rdi]"),
        8 => at!("lock xadd [rdi], rax"),
        9 => at!("xchg [rdi], rax"),
        10 => at!(
            "push rbx",
            "mov rbx, rax",
            "lock cmpxchg16b [rdi]",
            "pop rbx"
        ),
        11 => at!("lock bts dword ptr [rdi], 3"),
        12 => at!("add [rdi], rax", "sbb rax, [rdi]"),
        13 => repeated!("rep movsb", BUFFER, address, value & 0xFFF),
        14 => repeated!("rep movsb", address, BUFFER, value & 0xFFF),
        15 => repeated!("rep stosq", BUFFER, address, value & 0xFF),
        // What is fetched there is no instruction, or one that ends badly.
        _ => at!("call rdi"),
    }
}

/// Some accesses at random.
pub(crate) fn round(random: &mut Random) {
    for _ in 0..ATTEMPTS {
        let what = Access {
            address: random.of(&PLACES) + random.below(4096),
            value: random.value(),
            kind: random.below(KINDS),
        };
        attempt_on(access, &what);
    }
}
