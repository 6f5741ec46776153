//! CPUID as the guest sees it, and which instructions follow from it.

mod features;

pub use features::{ANNOUNCED, Bit, Features, Reg};

/// The host's CPUID.
pub fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// What a guest is offered on this host.
pub fn guest_on_this_host(leaf: u32, subleaf: u32) -> [u32; 4] {
    host(leaf, subleaf)
}
