//! Hypervisor traits, neutral x86 vCPU state, exits, capability probe.
#![no_std]
extern crate alloc;
