//! Repeated port accesses, with more elements and to more places than any driver would.

use crate::random::Random;
use crate::rescue::attempt_on;
use caisson_guest_rt::port::COM1;
use core::arch::asm;

/// Where the guest's own image is not.
const BUFFER: u64 = 32 << 20;
const BUFFER_LEN: u64 = 64 << 20;
/// Device memory where no device is, the I/O APIC's and the local APIC's.
const HOLES: [u64; 3] = [0xD000_0000, 0xFEC0_0000, 0xFEE0_0000];
/// Ports of devices.
const DEVICES: [u16; 20] = [
    0x20, 0x21, 0x40, 0x43, 0x4D0, 0x60, 0x61, 0x70, 0x71, 0x80, 0xA0, 0xA1, 0x2F8, 0x3F8, 0x3FA,
    0x3FD, 0x510, 0x511, 0x514, 0xCF8,
];
/// Attempts of a round.
const ATTEMPTS: u32 = 8;
/// The most elements of one attempt, but for few.
const ELEMENTS: u64 = 256;

/// Bytes of output between two signs of life.
const FLOOD: u64 = 4096;

/// One repeated access.
struct Access {
    port: u16,
    address: u64,
    count: u64,
    kind: u64,
}

extern "C" fn access(what: &Access) {
    let Access {
        port,
        address,
        count,
        kind,
    } = *what;
    macro_rules! repeated {
        ($instruction:literal, $register:tt) => {
            // SAFETY: reads and writes memory that no Rust object lies in.
            unsafe {
                asm!($instruction, inout("rcx") count => _, inout($register) address => _, in("dx") port)
            }
        };
    }
    match kind {
        0 => repeated!("rep outsb", "rsi"),
        1 => repeated!("rep outsw", "rsi"),
        2 => repeated!("rep outsd", "rsi"),
        3 => repeated!("rep insb", "rdi"),
        4 => repeated!("rep insw", "rdi"),
        5 => repeated!("rep insd", "rdi"),
        6 => repeated!("std; rep outsb; cld", "rsi"),
        _ => repeated!("std; rep insd; cld", "rdi"),
    }
}

/// Some accesses at random. Spared are the ports that switch the machine off or restart it: that would be obeyed.
pub(crate) fn round(random: &mut Random) {
    for _ in 0..ATTEMPTS {
        let port = match random.below(4) {
            0 => random.next() as u16,
            _ => random.of(&DEVICES),
        };
        if matches!(port, 0x64 | 0x92 | 0xE9 | 0xF4 | 0x600..=0x60F | 0xCF9..=0xCFC) {
            continue;
        }
        let address = match random.below(8) {
            0 => random.of(&HOLES) + random.below(4096),
            _ => BUFFER + random.below(BUFFER_LEN),
        };
        let count = match random.below(16) {
            0 => ELEMENTS * 16,
            _ => random.below(ELEMENTS),
        };
        let what = Access {
            port,
            address,
            count,
            kind: random.below(8),
        };
        attempt_on(access, &what);
    }
}

/// One instruction that goes on for as long as anybody has patience.
pub(crate) fn endless() {
    let what = Access {
        port: 0x80,
        address: 1 << 20,
        count: u64::MAX,
        kind: 0,
    };
    attempt_on(access, &what);
}

/// More output on COM1 than anybody reads, without asking whether there is room.
pub(crate) fn flood() {
    let what = Access {
        port: COM1,
        address: BUFFER,
        count: FLOOD,
        kind: 0,
    };
    attempt_on(access, &what);
}
