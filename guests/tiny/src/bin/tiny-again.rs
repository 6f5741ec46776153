//! Says a byte on the debug console again and again, a moment apart: whenever it goes on, that shows.
#![no_std]
#![no_main]

caisson_guest_tiny::tiny!(
    "2: say '.'",
    "mov ecx, 100",
    "3: dec ecx",
    "jnz 3b",
    "jmp 2b",
);
