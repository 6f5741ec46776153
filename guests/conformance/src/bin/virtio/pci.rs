//! Configuration space and ranges.

use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::port::{inb, inl, inw, outb, outl, outw};
use caisson_guest_rt::{Group, Suite};

/// Where the tables say that bus 0 is.
const ECAM: u64 = 0xE000_0000;
/// The configuration page of 00:01.0.
pub const PAGE: u64 = ECAM + (1 << 15);
const ADDRESS: u16 = 0xCF8;
const DATA: u16 = 0xCFC;
const COMMAND: u64 = 4;
/// Memory decoding and bus mastering.
pub const ENABLED: u16 = 6;

/// Selects a register of 00:`device`.0 by the ports.
fn select(device: u32, register: u32) {
    outl(ADDRESS, 1 << 31 | device << 11 | register & 0xFC);
}

/// Address of the capability `id` of 00:01.0 whose byte at 3 is `kind`, if that matters.
pub fn capability(id: u8, kind: Option<u8>) -> Option<u64> {
    let mut at: u8 = read(PAGE + 0x34);
    for _ in 0..48 {
        let here = PAGE + u64::from(at);
        if at == 0 {
            return None;
        }
        if read::<u8>(here) == id && kind.is_none_or(|kind| read::<u8>(here + 3) == kind) {
            return Some(here);
        }
        at = read(here + 1);
    }
    None
}

/// The address in base address register `index`, 64-bit if its type says so.
pub fn bar(index: u64) -> u64 {
    let low: u32 = read(PAGE + 0x10 + 4 * index);
    let high: u32 = match low & 0b110 {
        0b100 => read(PAGE + 0x14 + 4 * index),
        _ => 0,
    };
    u64::from(high) << 32 | u64::from(low & !0xF)
}

pub fn run(suite: &mut Suite) {
    suite.group("configuration by ports and by memory", both_ways);
    suite.group("functions that are not there", absent);
    suite.group("the reset register among the ports", reset_register);
    suite.group("sizing", sizing);
    suite.group("moving", moving);
}

fn both_ways(g: &mut Group) {
    for device in 0..2u32 {
        for register in (0..0x100).step_by(4) {
            select(device, register);
            let by_port = inl(DATA);
            let by_memory: u32 = read(ECAM + u64::from(device << 15 | register));
            g.eqf(
                format_args!("register {register:#x} of device {device}"),
                by_port,
                by_memory,
            );
        }
    }
    g.eq("host bridge", read::<u16>(ECAM + 10), 0x0600);
    g.eq("entropy device", read::<u32>(PAGE), 0x1044_1AF4);
    select(1, 0);
    g.eq("a byte by port", inb(DATA + 3), 0x10);
    g.eq("a word by port", inw(DATA + 2), 0x1044);
    select(1, 0x3C);
    outb(DATA, 0x5A);
    g.eq("written by port", read::<u8>(PAGE + 0x3C), 0x5A);
    write(PAGE + 0x3C, 0xA5u8);
    g.eq("written by memory", inb(DATA), 0xA5);
    outl(ADDRESS, 0x7FFF_FFFF);
    g.eq("switched off", inl(DATA), 0xFFFF_FFFF);
    g.eq("fixed bits of the address", inl(ADDRESS), 0x00FF_FFFC);
    // An access across the end of a page reaches both, and one across registers all of them.
    g.eq("eight bytes", read::<u64>(PAGE) as u32, 0x1044_1AF4);
    g.eq(
        "unaligned",
        read::<u32>(PAGE + 1),
        (read::<u64>(PAGE) >> 8) as u32,
    );
}

fn absent(g: &mut Group) {
    for place in [9 << 15, 1 << 15 | 1 << 12, 31 << 15 | 7 << 12] {
        g.eq("nobody answers", read::<u32>(ECAM + place), 0xFFFF_FFFF);
        write(ECAM + place, 0u32);
    }
    outl(ADDRESS, 1 << 31 | 5 << 16);
    g.eq("another bus", inl(DATA), 0xFFFF_FFFF);
    outl(DATA, 0);
    g.eq("past 256 bytes", read::<u32>(PAGE + 0x100), 0);
}

fn reset_register(g: &mut Group) {
    outl(ADDRESS, 0x8000_0E00);
    g.eq("a whole address is no reset", inl(ADDRESS), 0x8000_0E00);
    outb(0xCF9, 0x02);
    g.eq("the register", inb(0xCF9), 0x02);
    outb(0xCF9, 0);
    outw(ADDRESS, 0x0600);
    g.eq("half an address is nothing", inl(ADDRESS), 0x8000_0E00);
}

fn sizing(g: &mut Group) {
    let kept = [0, 4, 8].map(|at| read::<u32>(PAGE + 0x10 + at));
    for at in [0, 4, 8] {
        write(PAGE + 0x10 + at, 0xFFFF_FFFFu32);
    }
    g.eq(
        "16 KiB of 64-bit memory",
        read::<u64>(PAGE + 0x10),
        0xFFFF_FFFF_FFFF_C004,
    );
    g.eq("4 KiB of memory", read::<u32>(PAGE + 0x18), 0xFFFF_F000);
    g.eq("no further range", read::<u32>(PAGE + 0x1C), 0);
    for (at, value) in [0, 4, 8].into_iter().zip(kept) {
        write(PAGE + 0x10 + at, value);
    }
    g.eq("put back", read::<u32>(PAGE + 0x10), kept[0]);
}

fn moving(g: &mut Group) {
    // The number of queues, in the common configuration.
    let queues = |base: u64| read::<u16>(base + 0x12);
    let home = bar(0);
    g.eq("off", queues(home), 0xFFFF);
    write(PAGE + COMMAND, ENABLED);
    g.eq("on", queues(home), 1);
    for base in [0xC800_0000u64, 0xDFFF_C000, 0xC800_0000] {
        write(PAGE + 0x10, base as u32);
        g.eqf(format_args!("at {base:#x}"), queues(base), 1);
        g.eq("no longer at home", queues(home), 0xFFFF);
    }
    // Over the other range of the same function, over the I/O APIC, and over memory: the one that was there stays.
    let msix = bar(2);
    for base in [msix & !0x3FFF, 0xFEC0_0000, 0x10_0000] {
        write(PAGE + 0x10, base as u32);
        g.eq("the bridge is still there", read::<u16>(ECAM + 10), 0x0600);
    }
    write(PAGE + 0x10, home as u32);
    g.eq("home again", queues(home), 1);
    write(PAGE + COMMAND, 0u16);
    g.eq("off again", queues(home), 0xFFFF);
}
