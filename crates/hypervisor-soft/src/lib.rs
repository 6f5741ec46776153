//! The software CPU backend: x86-64 on x86-64 with no hypervisor.
//!
//! [`Soft`] needs no privilege and no kernel support. Every vCPU is a thread of
//! the caller's that runs decoded blocks of [`caisson_x86_cpu`]; this crate adds
//! what is between vCPUs: interrupts and IPIs, timers, the clock, and the rules
//! by which code written by one vCPU (or by a device) reaches the others.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod clock;
mod code_map;
mod counters;
mod exec_memory;
mod hypervisor;
mod msr;
mod partition;
mod shared;
mod speculation;
mod stepper;
mod tier;
mod timer;
mod vcpu;

pub use counters::Counters;
pub use hypervisor::{MAX_VCPUS, Soft};
pub use stepper::{StepEnd, Stepper, Steppers};
pub use tier::Tier;

/// The CPUID that guests of this backend see by default, with `vcpus` vCPUs.
pub fn cpuid(vcpus: u32) -> caisson_hypervisor::x86::CpuidTable {
    vcpu::cpuid::host_table(vcpus, clock::host_tsc_hz())
}

/// What the software CPU would offer on a host with the leaves of `host`, whose
/// TSC's frequency does not matter. Takes no CPUID instruction, which is slow in
/// a virtual machine, and no time to measure a frequency.
pub fn cpuid_of(
    host: &caisson_hypervisor::x86::CpuidTable,
    vcpus: u32,
) -> caisson_hypervisor::x86::CpuidTable {
    const SOME_HZ: u64 = 1_000_000_000;
    vcpu::cpuid::table_of(|leaf, subleaf| host.get(leaf, subleaf), vcpus, SOME_HZ)
}
