//! What the guest starts from: Linux boot protocol, PVH, Multiboot, ACPI tables.
#![no_std]
extern crate alloc;
