//! CPUID of this host's guests.

use std::sync::Arc;

use caisson_hypervisor::{
    HypervisorError,
    x86::{CpuidEntry, CpuidTable},
};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};
use parking_lot::Mutex;

/// CPUID.1:ECX: running under a hypervisor; TSC-deadline timer; x2APIC.
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const X2APIC: u32 = 1 << 21;
/// CPUID.1:ECX: what the guest has enabled, not what it may.
const OSXSAVE: u32 = 1 << 27;
/// CPUID.1:ECX: nested virtualisation, which is not offered.
const VMX: u32 = 1 << 5;
/// CPUID.8000_0001h:ECX: likewise.
const SVM: u32 = 1 << 2;
/// CPUID.7.0:EDX: AMX, whose state needs a permission that is not asked for.
const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// CPUID.7.0:ECX and EDX: CET, whose shadow stack pointer the neutral state
/// does not have.
const SHADOW_STACKS: u32 = 1 << 7;
const BRANCH_TRACKING: u32 = 1 << 20;
/// CPUID.0Dh.1:ECX: CET's components of IA32_XSS.
const XSS_CET: u32 = 3 << 11;
/// CPUID.7.0:EBX and ECX: SGX and processor trace, whose leaves are left out.
const SGX_AND_TRACE: u32 = 1 << 2 | 1 << 25;
const SGX_LAUNCH: u32 = 1 << 30;
/// XCR0's AMX bits.
const XCR0_AMX: u32 = 3 << 17;
/// The least that a saved vector area holds: x87, SSE and AVX.
const XSAVE_LEN: usize = 576 + 256;

/// What this host, whose guests run on `hardware` or are emulated in part, can
/// offer a guest with `vcpus` vCPUs.
///
/// # Errors
/// The kernel does not say.
pub(crate) fn offers(kvm: &Kvm, vcpus: u32, hardware: bool) -> Result<CpuidTable, HypervisorError> {
    let mut table = supported(kvm, kvm.check_extension(Cap::TscDeadlineTimer))?;
    if !hardware {
        // This KVM emulates much, and leaves more to the software CPU.
        let software = caisson_hypervisor_soft::cpuid_of(&table, vcpus);
        table.restrict(&software);
    }
    Ok(table)
}

/// What the kernel says it supports. It does not change while a process runs, and asking takes as
/// long as making a vCPU where each CPUID instruction of the host is itself trapped.
static SUPPORTED: Mutex<Option<Arc<[kvm_cpuid_entry2]>>> = Mutex::new(None);

/// Asks the kernel, or waits for an answer that is on its way, or takes the earlier one.
///
/// # Errors
/// The kernel does not say.
pub(crate) fn entries(kvm: &Kvm) -> Result<Arc<[kvm_cpuid_entry2]>, HypervisorError> {
    let mut known = SUPPORTED.lock();
    if let Some(entries) = &*known {
        return Ok(entries.clone());
    }
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| HypervisorError::Host {
            what: "asking KVM for the CPUID it supports",
            reason: e.to_string(),
        })?;
    Ok(known.insert(cpuid.as_slice().into()).clone())
}

fn supported(kvm: &Kvm, deadline_timer: bool) -> Result<CpuidTable, HypervisorError> {
    let entries = entries(kvm)?;
    let entries = entries
        .iter()
        // Paravirtual leaves: a guest that used them could not move to another backend.
        .filter(|e| !(0x4000_0000..0x5000_0000).contains(&e.function))
        // SGX, processor trace, AMX, SVM; the host's own topology.
        .filter(|e| {
            !matches!(
                e.function,
                0x12 | 0x14 | 0x1d | 0x1e | 0x8000_000a | 0x8000_0026
            )
        })
        .map(|e| CpuidEntry {
            leaf: e.function,
            subleaf: (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index),
            regs: [e.eax, e.ebx, e.ecx, e.edx],
        })
        .map(|entry| adjust(entry, deadline_timer))
        // Without it, Intel's processors would answer with the highest basic leaf.
        .chain([CpuidEntry {
            leaf: 0x4000_0000,
            subleaf: None,
            regs: [0x4000_0000, 0, 0, 0],
        }]);
    Ok(CpuidTable::new(entries))
}

fn adjust(mut entry: CpuidEntry, deadline_timer: bool) -> CpuidEntry {
    let [eax, ebx, ecx, edx] = &mut entry.regs;
    match (entry.leaf, entry.subleaf.unwrap_or(0)) {
        (1, _) => {
            *ecx |= HYPERVISOR | X2APIC;
            *ecx &= !(VMX | OSXSAVE | TSC_DEADLINE);
            if deadline_timer {
                *ecx |= TSC_DEADLINE;
            }
        }
        (7, 0) => {
            *ebx &= !SGX_AND_TRACE;
            *ecx &= !(SHADOW_STACKS | SGX_LAUNCH);
            *edx &= !(AMX | BRANCH_TRACKING);
        }
        (0xa, _) => (*eax, *ebx, *ecx, *edx) = (0, 0, 0, 0),
        (0xd, 0) => *eax &= !XCR0_AMX,
        (0xd, 1) => *ecx &= !XSS_CET,
        (0xd, 11 | 12 | 17 | 18) => (*eax, *ebx, *ecx, *edx) = (0, 0, 0, 0),
        (0x8000_0001, _) => *ecx &= !SVM,
        _ => {}
    }
    entry
}

/// The table for vCPU `index` of `count`, which has APIC id `index`: one
/// package, a core per vCPU.
///
/// # Errors
/// More entries than the kernel takes.
pub(crate) fn for_vcpu(
    table: &CpuidTable,
    index: u32,
    count: u32,
) -> Result<CpuId, HypervisorError> {
    let width = u32::BITS - (count - 1).leading_zeros();
    let topology = |subleaf: u32| match subleaf {
        0 => [0, 1, 0x100, index],
        1 => [width, count, 0x201, index],
        n => [0, 0, n, index],
    };
    let mut entries: Vec<CpuidEntry> = table
        .entries()
        .iter()
        .filter(|e| !matches!(e.leaf, 0xb | 0x1f))
        .copied()
        .collect();
    if table.get(0, 0)[0] >= 0xb {
        entries.extend((0..3).map(|subleaf| CpuidEntry {
            leaf: 0xb,
            subleaf: Some(subleaf),
            regs: topology(subleaf),
        }));
    }
    let amd = table.get(0, 0)[1] != u32::from_le_bytes(*b"Genu");
    let entries: Vec<_> = entries
        .into_iter()
        .map(|mut e| {
            match e.leaf {
                1 => {
                    let cores = count.next_power_of_two().min(255);
                    e.regs[1] = e.regs[1] & 0xffff | cores << 16 | index << 24;
                    // HTT: the core count above is valid.
                    e.regs[3] = e.regs[3] & !(1 << 28) | u32::from(count > 1) << 28;
                }
                4 if e.regs[0] & 31 != 0 => {
                    let level = e.regs[0] >> 5 & 7;
                    let sharing = if level >= 3 {
                        count.next_power_of_two() - 1
                    } else {
                        0
                    };
                    let cores = count.next_power_of_two() - 1;
                    e.regs[0] =
                        e.regs[0] & 0x3fff | sharing.min(0xfff) << 14 | cores.min(0x3f) << 26;
                }
                // Intel's processors have nothing there.
                0x8000_0008 if amd => {
                    e.regs[2] = e.regs[2] & !0xf0ff | width << 12 | (count - 1).min(255);
                }
                0x8000_001e => e.regs[..3].copy_from_slice(&[index, index, 0]),
                _ => {}
            }
            kvm_cpuid_entry2 {
                function: e.leaf,
                index: e.subleaf.unwrap_or(0),
                flags: if e.subleaf.is_some() {
                    KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                } else {
                    0
                },
                eax: e.regs[0],
                ebx: e.regs[1],
                ecx: e.regs[2],
                edx: e.regs[3],
                ..Default::default()
            }
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| {
        HypervisorError::State(format!("KVM takes no CPUID of {} leaves", entries.len()))
    })
}

/// Bytes of a vector area in standard format in which all of `xcr0` has its
/// place (Intel SDM Vol. 1 §13.4.3).
pub(crate) fn xsave_len(table: &CpuidTable, xcr0: u64) -> usize {
    (2..63)
        .filter(|bit| xcr0 >> bit & 1 != 0)
        .map(|bit| {
            let [size, offset, ..] = table.get(0xd, bit);
            size as usize + offset as usize
        })
        .fold(XSAVE_LEN, usize::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> CpuidTable {
        CpuidTable::new([
            CpuidEntry {
                leaf: 0,
                subleaf: None,
                regs: [0x1f, 0, 0, 0],
            },
            adjust(
                CpuidEntry {
                    leaf: 1,
                    subleaf: None,
                    regs: [0x906ea, 0xff01_0800, VMX | OSXSAVE, 0],
                },
                true,
            ),
            CpuidEntry {
                leaf: 0xd,
                subleaf: Some(5),
                regs: [64, 1088, 0, 0],
            },
        ])
    }

    #[test]
    fn each_vcpu_has_its_own_number() {
        let t = table();
        let of = |index| -> Vec<_> { for_vcpu(&t, index, 6).unwrap().as_slice().to_vec() };
        let leaf = |entries: &[kvm_cpuid_entry2], leaf, index| {
            *entries
                .iter()
                .find(|e| e.function == leaf && e.index == index)
                .unwrap()
        };
        let five = of(5);
        assert_eq!(leaf(&five, 1, 0).ebx, 0x0508_0800);
        assert_eq!(leaf(&five, 0xb, 1).edx, 5);
        assert_eq!((leaf(&five, 0xb, 1).eax, leaf(&five, 0xb, 1).ebx), (3, 6));
        assert_eq!(leaf(&of(0), 1, 0).ebx, 0x0008_0800);
    }

    #[test]
    fn guests_know_of_the_hypervisor_and_get_no_nested_one() {
        let ecx = table().get(1, 0)[2];
        assert_eq!(
            ecx & (HYPERVISOR | X2APIC | TSC_DEADLINE),
            HYPERVISOR | X2APIC | TSC_DEADLINE
        );
        assert_eq!(ecx & (VMX | OSXSAVE), 0);
    }

    #[test]
    fn features_whose_state_is_not_carried_are_taken_away() {
        let all = |leaf, subleaf| CpuidEntry {
            leaf,
            subleaf: Some(subleaf),
            regs: [u32::MAX; 4],
        };
        let [_, ebx, ecx, edx] = adjust(all(7, 0), true).regs;
        assert_eq!(!ebx, 1 << 2 | 1 << 25);
        assert_eq!(!ecx, 1 << 7 | 1 << 30);
        assert_eq!(!edx, 1 << 20 | 1 << 22 | 1 << 24 | 1 << 25);
        assert_eq!(!adjust(all(0xd, 0), true).regs[0], 3 << 17);
        assert_eq!(!adjust(all(0xd, 1), true).regs[2], 3 << 11);
        for component in [11, 12, 17, 18] {
            assert_eq!(adjust(all(0xd, component), true).regs, [0; 4]);
        }
    }

    #[test]
    fn vector_areas_hold_what_xcr0_enables() {
        assert_eq!(xsave_len(&table(), 7), 832);
        assert_eq!(xsave_len(&table(), 0x27), 1152);
    }
}
