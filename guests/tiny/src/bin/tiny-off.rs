//! Powers off at once.
#![no_std]
#![no_main]

caisson_guest_tiny::tiny!("power_off", "stop");
