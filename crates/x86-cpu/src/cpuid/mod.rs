//! CPUID as the guest sees it, and which instructions follow from it.
//!
//! The guest sees the host's vendor, family and model, with an allow-list of
//! features: those that the host's units execute for the guest, if the host has
//! them, and those that this crate emulates, always. Nothing else is announced:
//! no VMX or SVM, TSX, CET, PKU, MPX, AMX, SGX, PT, PMU, WAITPKG, MONITOR,
//! AVX-512, MCA.

mod features;
mod table;

pub use features::{ANNOUNCED, Bit, Features, Reg};
pub use table::{
    ARCH_CAPABILITIES, Leaf, Machine, SIGNATURE, VcpuState, for_vcpu, lookup, phys_bits, table,
};

/// The host's CPUID.
pub fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// The features that a guest is offered on this host by default.
pub fn host_features() -> Features {
    let machine = Machine {
        vcpus: 1,
        tsc_hz: 1_000_000_000,
        apic_timer_hz: 1_000_000_000,
        la57: false,
    };
    let leaves = table(host, &machine);
    Features::from_cpuid(|leaf, subleaf| lookup(&leaves, leaf, subleaf))
}
