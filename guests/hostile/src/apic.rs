//! The local APIC: every register in both modes, and more interrupts than anybody can take.

use crate::random::Random;
use crate::rescue::{self, attempt};
use caisson_guest_rt::apic::{ASSERT, BSP, ENABLE, EXTD, mode, reg, shorthand};
use caisson_guest_rt::cpu::{self, msr};
use caisson_guest_rt::memory::{read, write};

/// Where the page lies after a reset.
const BASE: u64 = 0xFEE0_0000;
/// Attempts of a round.
const ATTEMPTS: u32 = 64;
/// Interrupts of a round.
const STORM: u32 = 256;
/// x2APIC registers.
const X2APIC_LEN: u64 = 0x100;

/// What an attempt does, packed into its argument: 8 bits of kind, 24 of place, 32 of value.
const fn pack(kind: u64, place: u64, value: u64) -> u64 {
    kind << 56 | (place & 0xFF_FFFF) << 32 | value & 0xFFFF_FFFF
}

extern "C" fn touch(what: u64) {
    let (kind, place, value) = (what >> 56, what >> 32 & 0xFF_FFFF, what as u32);
    match kind {
        0 => _ = read::<u8>(BASE + place),
        1 => _ = read::<u16>(BASE + place),
        2 => _ = read::<u32>(BASE + place),
        3 => _ = read::<u64>(BASE + place),
        4 => write(BASE + place, value as u8),
        5 => write(BASE + place, value as u16),
        6 => write(BASE + (place & !15), value),
        7 => write(BASE + place, u64::from(value) << 32 | u64::from(value)),
        8 => _ = cpu::rdmsr(msr::X2APIC + place as u32),
        9 => cpu::wrmsr(msr::X2APIC + place as u32, u64::from(value)),
        _ => cpu::wrmsr(
            msr::X2APIC + place as u32,
            u64::from(value) << 32 | u64::from(value),
        ),
    }
}

extern "C" fn move_to(base: u64) {
    cpu::wrmsr(msr::APIC_BASE, base);
}

/// Reads and writes of registers at random, in one mode and then the other; the interrupt command register among them,
/// with whatever that sends to this processor and the other.
pub(crate) fn round(random: &mut Random) {
    for _ in 0..ATTEMPTS {
        let what = pack(random.below(8), random.below(4096), random.value());
        attempt(touch, what);
    }
    attempt(move_to, BASE | BSP | ENABLE | EXTD);
    for _ in 0..ATTEMPTS {
        let what = pack(
            8 + random.below(3),
            random.below(X2APIC_LEN),
            random.value(),
        );
        attempt(touch, what);
    }
    // Transitions, most of them not allowed, and addresses of which most are none.
    for _ in 0..8 {
        attempt(move_to, random.value());
        attempt(
            move_to,
            random.value() & 0xFF_F000 | BASE & 0xFF00_0000 | random.below(4096),
        );
    }
    attempt(move_to, BASE | BSP);
    attempt(move_to, BASE | BSP | ENABLE);
}

extern "C" fn send(command: u64) {
    write(BASE + u64::from(reg::ICR_HIGH), (command >> 32) as u32);
    write(BASE + u64::from(reg::ICR), command as u32);
}

extern "C" fn open(_: u64) {
    write(BASE + u64::from(reg::SVR), 0x1FFu32);
    write(BASE + u64::from(reg::TPR), 0u32);
    cpu::sti();
}

/// Interrupts to this processor, which takes them, and start-up, INIT and NMI to the other without a pause.
pub(crate) fn storm(random: &mut Random) {
    rescue::take_interrupts();
    attempt(open, 0);
    for _ in 0..STORM {
        let vector = random.next() as u32 & 0xFF;
        let one: u64 = 1 << 56;
        let command = match random.below(8) {
            0 => one | u64::from(mode::INIT | ASSERT),
            1 => one | u64::from(mode::STARTUP | ASSERT | vector),
            2 => one | u64::from(mode::NMI | ASSERT),
            3 => u64::from(shorthand::OTHERS | mode::FIXED | ASSERT | vector),
            4 => u64::from(shorthand::ALL | mode::LOWEST | ASSERT | vector),
            _ => u64::from(shorthand::SELF | mode::FIXED | ASSERT | vector),
        };
        attempt(send, command);
        // An attempt that faults ends with interrupts off.
        cpu::sti();
    }
    cpu::cli();
}
