//! Translation caching, accessed and dirty bits, large pages, global pages,
//! accesses that straddle pages, aliases, PCID and INVPCID, and the faults of
//! control-register writes.
//!
//! QEMU TCG 7.2 fails this: reserved bits (P missing), read-modify-write
//! faults as reads, CR3's reserved bits; it offers no PCID.
#![no_std]
#![no_main]

mod accessed_dirty;
mod caching;
mod control;
mod large;
mod places;

use caisson_guest_rt::Suite;
use caisson_guest_rt::guest;
use caisson_guest_rt::memory::read;
use caisson_guest_rt::paging::{A, Arena, D, P, U, W};

guest!("paging", main);

const VA: u64 = 0x5000_0000;
const RW: u64 = P | W | U;

fn bits(slot: u64) -> u64 {
    read::<u64>(slot) & (A | D)
}

fn main(suite: &mut Suite) {
    let a = Arena::new();
    accessed_dirty::accessed_dirty(suite, &a);
    caching::caching(suite, &a);
    large::large(suite, &a);
    places::straddle(suite, &a);
    places::aliases(suite, &a);
    control::control(suite, &a);
    control::pcid(suite, &a);
}
