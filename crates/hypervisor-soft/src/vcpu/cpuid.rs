//! CPUID of the software CPU.

use caisson_hypervisor::x86::{CpuidEntry, CpuidTable};
use caisson_lapic::BUS_HZ;
use caisson_x86_cpu::{
    cpuid::{self, Features, Machine},
    state::Cpu,
    vector::Unit,
};

use crate::shared::Shared;

/// Everything that this host's processor and the software CPU have in common.
pub(crate) fn host_table(vcpus: u32, tsc_hz: u64) -> CpuidTable {
    let machine = Machine {
        vcpus,
        tsc_hz,
        apic_timer_hz: BUS_HZ as u32,
        la57: false,
    };
    let leaves = cpuid::table(cpuid::host, &machine);
    CpuidTable::new(leaves.iter().map(|l| CpuidEntry {
        leaf: l.leaf,
        subleaf: l.subleaf,
        regs: l.regs,
    }))
}

/// IA32_ARCH_CAPABILITIES.
pub(crate) fn arch_capabilities() -> u64 {
    cpuid::ARCH_CAPABILITIES
}

fn lookup(table: &CpuidTable, leaf: u32, subleaf: u32) -> [u32; 4] {
    // Beyond the highest basic leaf, Intel's processors answer with that one.
    let max = table.get(0, 0);
    let amd = max[1] == u32::from_le_bytes(*b"Auth") || max[1] == u32::from_le_bytes(*b"Hygo");
    if leaf > max[0] && leaf < 0x4000_0000 {
        return if amd {
            [0; 4]
        } else {
            table.get(max[0], subleaf)
        };
    }
    table.get(leaf, subleaf)
}

/// A leaf as vCPU `index` sees it, but for what follows its control registers.
pub(crate) fn leaf(table: &CpuidTable, index: u32, leaf: u32, subleaf: u32) -> [u32; 4] {
    let vcpu = cpuid::VcpuState {
        apic_id: index,
        osxsave: false,
        xcr0: 1,
    };
    cpuid::for_vcpu(leaf, subleaf, lookup(table, leaf, subleaf), &vcpu)
}

/// A vCPU's core after power-on.
pub(crate) fn new_cpu(shared: &Shared) -> Cpu {
    let mut cpu = Cpu::new(shared.phys_bits);
    let features = Features::from_cpuid(|l, s| lookup(&shared.cpuid, l, s));
    cpu.vector = Unit::new(features);
    cpu
}
