//! CPUID of the software CPU.

use caisson_hypervisor::x86::{CpuidEntry, CpuidTable, Feature};
use caisson_lapic::BUS_HZ;
use caisson_x86_cpu::{
    cpuid::{self, Features, Machine},
    state::Cpu,
    vector::Unit,
};

use crate::shared::Shared;

/// The leaf with the widths of addresses.
const WIDTHS: u32 = 0x8000_0008;

/// Everything that this host's processor and the software CPU have in common.
pub(crate) fn host_table(vcpus: u32, tsc_hz: u64) -> CpuidTable {
    table_of(cpuid::host, vcpus, tsc_hz)
}

/// Everything that a processor with the leaves of `host` and the software CPU
/// have in common.
pub(crate) fn table_of(
    host: impl FnMut(u32, u32) -> [u32; 4],
    vcpus: u32,
    tsc_hz: u64,
) -> CpuidTable {
    let machine = Machine {
        vcpus,
        tsc_hz,
        apic_timer_hz: BUS_HZ as u32,
        la57: false,
    };
    let leaves = cpuid::table(host, &machine);
    CpuidTable::new(leaves.iter().map(|l| CpuidEntry {
        leaf: l.leaf,
        subleaf: l.subleaf,
        regs: l.regs,
    }))
}

/// Features that [`host_table`] shows to guests of Intel's processors only,
/// though the core has them everywhere.
const ANY_VENDOR: [&str; 3] = ["spec_ctrl", "stibp", "arch_capabilities"];
/// Bits of a guest physical address that the memory management unit takes,
/// whatever the host's processor does.
const PHYSICAL_BITS: u32 = 46;

/// The most that a guest can be given on this host.
pub(crate) fn most(vcpus: u32, tsc_hz: u64) -> CpuidTable {
    let mut table = host_table(vcpus, tsc_hz);
    for name in ANY_VENDOR {
        if let Some(feature) = Feature::named(name) {
            table.promise(feature, true);
        }
    }
    let mut regs = table.get(WIDTHS, 0);
    regs[0] = regs[0] & !0xff | PHYSICAL_BITS;
    table.set(CpuidEntry {
        leaf: WIDTHS,
        subleaf: None,
        regs,
    });
    table
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
    cpu.gib_pages = Feature::named("pdpe1gb").is_some_and(|f| shared.cpuid.has(f));
    cpu
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_and_the_default_name_the_same_hypervisor() {
        assert_eq!(cpuid::SIGNATURE, caisson_hypervisor::x86::HYPERVISOR_NAME);
    }

    #[test]
    fn guests_of_the_default_get_no_more_than_is_offered() {
        for vcpus in [1, 5] {
            let (default, most) = (host_table(vcpus, 2_000_000_000), most(vcpus, 2_000_000_000));
            assert_eq!(default.lacking(&most), Vec::<String>::new());
            assert!(
                ANY_VENDOR
                    .iter()
                    .all(|f| most.has(Feature::named(f).unwrap()))
            );
        }
    }
}
