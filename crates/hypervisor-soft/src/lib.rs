//! The software CPU backend: x86-64 on x86-64 with no hypervisor.
//!
//! [`Soft`] needs no privilege and no kernel support. Every vCPU is a thread of
//! the caller's that runs decoded blocks of [`caisson_x86_cpu`]; this crate adds
//! what is between vCPUs: interrupts and IPIs, timers, the clock, and the rules
//! by which code written by one vCPU (or by a device) reaches the others.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod clock;
mod code_map;
mod exec_memory;
mod hypervisor;
mod msr;
mod partition;
mod shared;
mod timer;
mod vcpu;

pub use hypervisor::{MAX_VCPUS, Soft};
