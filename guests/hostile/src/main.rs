//! Abuses the machine without end, in the way that the command line names: `abuse=NAME`.
//!
//! It checks nothing: what matters is what becomes of the machine. Each round of attempts ends with a line on the debug
//! console. An attempt may fault; the next one follows all the same. It may also break the guest for good: then the
//! triple fault restarts it, and another sequence of random numbers begins.
#![no_std]
#![no_main]

mod apic;
mod memory;
mod msr;
mod ports;
mod random;
mod rescue;

use caisson_guest_rt::memory::read;
use caisson_guest_rt::port::{DEBUGCON, outb};
use caisson_guest_rt::{Suite, boot, cpu, guest};
use random::Random;

guest!("hostile", main);

fn main(suite: &mut Suite) {
    let mut name = [0; 16];
    let name = abuse(&mut name);
    say("hostile: ");
    say(name);
    say("\n");
    rescue::install();
    let mut random = Random::new();
    let abuse: fn(&mut Random) = match name {
        "triple-fault" => |_| triple_fault(),
        "ports" => ports::round,
        "endless-rep" => |_| ports::endless(),
        "flood" => |_| ports::flood(),
        "memory" => memory::round,
        "apic" => apic::round,
        "ipi" => apic::storm,
        "msr" => msr::round,
        _ => {
            suite.group("hostile", |g| {
                g.that("the command line names an abuse", false);
            });
            return;
        }
    };
    loop {
        abuse(&mut random);
        say("round\n");
    }
}

/// Writes to the debug console alone: COM1 may be under attack.
fn say(text: &str) {
    text.bytes().for_each(|byte| outb(DEBUGCON, byte));
}

/// Faults without a way to tell of it.
fn triple_fault() {
    cpu::lidt(cpu::TablePointer { limit: 0, base: 0 });
    caisson_guest_rt::memory::write(u64::MAX >> 1, 0u8);
}

/// The word behind `abuse=` in the command line.
fn abuse(name: &mut [u8; 16]) -> &str {
    const KEY: &[u8] = b"abuse=";
    let info = boot::info();
    let mut at: u64 = if boot::protocol() == boot::PVH_MAGIC {
        read(info + 24)
    } else {
        u64::from(read::<u32>(info + 16))
    };
    let mut matched = 0;
    let mut len = 0;
    loop {
        let byte: u8 = read(at);
        at += 1;
        match KEY.get(matched) {
            _ if byte == 0 => break,
            Some(expected) => matched = if byte == *expected { matched + 1 } else { 0 },
            None if byte == b' ' || len == name.len() => break,
            None => {
                name[len] = byte;
                len += 1;
            }
        }
    }
    core::str::from_utf8(&name[..len]).unwrap_or("")
}
