//! Local APIC state machine: xAPIC, x2APIC, timer, IPIs.
#![no_std]
extern crate alloc;
