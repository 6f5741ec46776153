//! Device trait, address-space bus, interrupt lines, MSI, timers, saved state, inspect.
#![no_std]
extern crate alloc;
