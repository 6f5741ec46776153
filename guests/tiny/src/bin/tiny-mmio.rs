//! Writes 100,000 times to device memory where no device is, with a byte on the debug console before and after.
#![no_std]
#![no_main]

caisson_guest_tiny::tiny!(
    "say '<'",
    "mov ecx, 100000",
    "mov ebx, 0xd0000000",
    "2: mov dword ptr [ebx], eax",
    "dec ecx",
    "jnz 2b",
    "say '>'",
    "power_off",
    "stop",
);
