//! Says a byte with its first instructions, then powers off.
#![no_std]
#![no_main]

caisson_guest_tiny::tiny!("say '!'", "power_off", "stop");
