//! Says a byte on COM1 and halts for good.
#![no_std]
#![no_main]

caisson_guest_tiny::tiny!("mov dx, 0x3f8", "mov al, '!'", "out dx, al", "stop");
