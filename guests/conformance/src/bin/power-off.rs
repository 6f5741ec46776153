//! Switches the machine off through ACPI's S5, found in its tables.
#![no_std]
#![no_main]

use caisson_guest_rt::port::{inw, outw};
use caisson_guest_rt::{Suite, acpi, guest, println, tsc};

guest!("power-off", main);

fn main(suite: &mut Suite) {
    suite.group("power-off", |g| {
        let (Some(port), Some(kind)) = (acpi::pm1a_control(), acpi::s5_sleep_type()) else {
            g.that("the FADT names PM1a control and the DSDT has _S5", false);
            return;
        };
        println!("caisson-guest: power-off: S5 is type {kind} at port {port:#x}");
        outw(port, inw(port) & !0x3C00 | u16::from(kind) << 10 | 1 << 13);
        tsc::delay(1_000_000);
        g.that("the machine is off", false);
    });
}
