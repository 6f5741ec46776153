//! Ends in a triple fault: the machine must treat it as a reset, not crash.
#![no_std]
#![no_main]

use caisson_guest_rt::cpu::{self, TablePointer};
use caisson_guest_rt::{Suite, guest, println};

guest!("triple-fault", main);

fn main(_: &mut Suite) {
    println!("caisson-guest: triple-fault: now");
    cpu::lidt(TablePointer { limit: 0, base: 0 });
    cpu::int3();
    println!("FAIL triple-fault: still running");
}
