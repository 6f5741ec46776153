//! Resets the machine through the keyboard controller.
#![no_std]
#![no_main]

use caisson_guest_rt::port::{inb, outb};
use caisson_guest_rt::{Suite, guest, println, tsc};

guest!("reset", main);

fn main(suite: &mut Suite) {
    suite.group("reset", |g| {
        println!("caisson-guest: reset: now");
        tsc::wait_until(100_000, || inb(0x64) & 2 == 0);
        outb(0x64, 0xFE);
        tsc::delay(1_000_000);
        g.that("the machine was reset", false);
    });
}
