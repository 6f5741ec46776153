//! The KVM backend: hardware virtualisation on Linux.
//!
//! The local APICs are the kernel's (the *split* irqchip, Linux 4.5), everything
//! that raises interrupts is Caisson's own. So the same PC runs here and on the
//! software CPU, and nothing of the I/O APIC, the 8259 pair or the timers lives
//! in the kernel; the full in-kernel irqchip is not used.
//!
//! What KVM's own instruction emulator does not know (KVM_EXIT_INTERNAL_ERROR)
//! is executed by [`caisson_hypervisor_soft::Stepper`] on the same memory.
//!
//! Unsafe code lives in `sys` alone, but for handing memory to the kernel
//! (`memslots`).
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod backend_memory;
mod cpuid;
mod dirty;
mod events;
mod hypervisor;
mod memslots;
mod msr;
mod partition;
mod probe;
mod routes;
mod sys;
mod vcpu;

pub use hypervisor::Kvm;
