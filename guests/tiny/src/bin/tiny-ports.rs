//! Writes 100,000 times to the POST code port, which does nothing, with a byte on the debug console before and after.
#![no_std]
#![no_main]

caisson_guest_tiny::tiny!(
    "say '<'",
    "mov ecx, 100000",
    "2: out 0x80, al",
    "dec ecx",
    "jnz 2b",
    "say '>'",
    "power_off",
    "stop",
);
