//! Model-specific registers: which are a vCPU's state, and access to them.

use std::io;

use caisson_hypervisor::{HypervisorError, x86::MsrEntry};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::sys::error;

/// IA32_TIME_STAMP_COUNTER.
pub(crate) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_APIC_BASE.
const APIC_BASE: u32 = 0x1b;
/// IA32_EFER.
const EFER: u32 = 0xc000_0080;

/// The memory type range registers: pairs of variable ranges, fixed ranges, the default type (SDM
/// volume 3, 13.11). The kernel keeps them for each vCPU and does not list them.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];

/// Not saved among the MSRs: they have places of their own, or belong to
/// interfaces that guests are not offered (Hyper-V's and KVM's own, nested
/// virtualisation, performance counters).
fn is_state(index: u32) -> bool {
    !matches!(
        index,
        TSC_DEADLINE
            | APIC_BASE
            | EFER
            | 0x11
            | 0x12
            | 0x4000_0000..=0x4000_01ff
            | 0x4b56_4d00..=0x4b56_4dff
            | 0x480..=0x493
            | 0xc1..=0xc8
            | 0x186..=0x18d
            | 0x309..=0x30c
            | 0x38d..=0x390
            | 0x3f1
            | 0xc001_0000..=0xc001_0007
            | 0xc001_0200..=0xc001_020b
            | 0xc000_0300..=0xc000_0302
    )
}

/// The MSRs of this host's vCPUs.
#[derive(Default)]
pub(crate) struct MsrList {
    /// Which are read and written with a vCPU's state.
    indices: Vec<u32>,
    /// Their values when a vCPU is made, but for the time stamp counter.
    pub(crate) at_power_on: Vec<MsrEntry>,
}

impl MsrList {
    /// Asks the kernel, and `vcpu`, which must not have run.
    pub(crate) fn new(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, HypervisorError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(|e| HypervisorError::Host {
                what: "asking KVM for its MSRs",
                reason: e.to_string(),
            })?;
        let mut indices: Vec<u32> = list.as_slice().to_vec();
        indices.extend(MTRRS.into_iter().flatten());
        indices.retain(|index| is_state(*index));
        indices.sort_unstable();
        indices.dedup();
        let listed = Self {
            indices,
            at_power_on: Vec::new(),
        };
        // The kernel lists some that this processor or this vCPU's CPUID lacks.
        let mut at_power_on = listed.read(vcpu).map_err(|e| HypervisorError::Host {
            what: "reading a vCPU's MSRs",
            reason: e.to_string(),
        })?;
        let indices = at_power_on.iter().map(|e| e.index).collect();
        at_power_on.retain(|e| e.index != TSC);
        Ok(Self {
            indices,
            at_power_on,
        })
    }

    /// All of them, as `vcpu` has them.
    pub(crate) fn read(&self, vcpu: &VcpuFd) -> io::Result<Vec<MsrEntry>> {
        let mut entries = Vec::with_capacity(self.indices.len());
        let mut rest = self.indices.as_slice();
        // The kernel stops at the first that it refuses; that one is left out.
        while !rest.is_empty() {
            let mut batch = batch(rest.iter().map(|&index| (index, 0)))?;
            let done = vcpu.get_msrs(&mut batch).map_err(error)?.min(rest.len());
            entries.extend(batch.as_slice().iter().take(done).map(|e| MsrEntry {
                index: e.index,
                value: e.data,
            }));
            rest = rest.get(done + 1..).unwrap_or_default();
        }
        Ok(entries)
    }

    /// Writes those of `entries` that this host's vCPUs have; the time stamp
    /// counter is left alone. Gives those that the kernel refused.
    pub(crate) fn write(&self, vcpu: &VcpuFd, entries: &[MsrEntry]) -> io::Result<Vec<u32>> {
        let entries: Vec<_> = entries
            .iter()
            .filter(|e| e.index != TSC && self.indices.binary_search(&e.index).is_ok())
            .collect();
        let mut refused = Vec::new();
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let batch = batch(rest.iter().map(|e| (e.index, e.value)))?;
            let done = vcpu.set_msrs(&batch).map_err(error)?.min(rest.len());
            refused.extend(rest.get(done).map(|e| e.index));
            rest = rest.get(done + 1..).unwrap_or_default();
        }
        Ok(refused)
    }

    /// Whether this host's vCPUs have MSR `index`.
    pub(crate) fn has(&self, index: u32) -> bool {
        self.indices.binary_search(&index).is_ok()
    }
}

fn batch(entries: impl Iterator<Item = (u32, u64)>) -> io::Result<Msrs> {
    let entries: Vec<_> = entries
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            reserved: 0,
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// One MSR of `vcpu`.
pub(crate) fn read(vcpu: &VcpuFd, index: u32) -> io::Result<u64> {
    let mut one = batch([(index, 0)].into_iter())?;
    match vcpu.get_msrs(&mut one).map_err(error)? {
        1 => Ok(one.as_slice()[0].data),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Sets one MSR of `vcpu`.
pub(crate) fn write(vcpu: &VcpuFd, index: u32, value: u64) -> io::Result<()> {
    let one = batch([(index, value)].into_iter())?;
    match vcpu.set_msrs(&one).map_err(error)? {
        1 => Ok(()),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// IA32_ARCH_CAPABILITIES, and its bit that says that IBRS need be set only once.
const ARCH_CAPABILITIES: u32 = 0x10a;
const IBRS_ALL: u64 = 1 << 1;

/// Takes back what IA32_ARCH_CAPABILITIES says of IBRS, for a guest whose CPUID
/// has no IBRS.
pub(crate) fn hide_ibrs(vcpu: &VcpuFd) -> io::Result<()> {
    let value = read(vcpu, ARCH_CAPABILITIES)?;
    if value & IBRS_ALL != 0 {
        write(vcpu, ARCH_CAPABILITIES, value & !IBRS_ALL)?;
    }
    Ok(())
}

/// IA32_TSC_ADJUST.
pub(crate) const TSC_ADJUST: u32 = 0x3b;
/// IA32_XSS.
const XSS: u32 = 0xda0;

/// MSRs that the software CPU always saves; a host without them loses nothing
/// by not restoring what its guests cannot see.
pub(crate) fn may_be_missing(index: u32) -> bool {
    matches!(index, TSC_ADJUST | XSS)
}

impl MsrList {
    /// Whether `state` leaves MSR `index` at the value that it has at power-on:
    /// some are read-only.
    pub(crate) fn is_as_at_power_on(
        &self,
        state: &caisson_hypervisor::x86::VcpuState,
        index: u32,
    ) -> bool {
        let of = |entries: &[MsrEntry]| entries.iter().find(|e| e.index == index).copied();
        of(&state.msrs) == of(&self.at_power_on)
    }
}
