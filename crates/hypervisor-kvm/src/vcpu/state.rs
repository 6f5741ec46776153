//! A vCPU's state in neutral form.

use std::io;

use caisson_hypervisor::{
    HypervisorError,
    x86::{ApicState, DebugRegs, MsrEntry, RunState, VcpuState, XsaveArea, vector},
};
use caisson_memory::Vtl;
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_debugregs, kvm_mp_state, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::{Held, Kernel, registers as r};
use crate::{msr, partition::Shared, sys};

/// LVT LINT1: its word in the register page.
const LVT_LINT1: usize = 0x36;
/// Delivery mode NMI, not masked.
const LVT_MODE_AND_MASK: u32 = 0x1_0700;
const LVT_NMI: u32 = 0x400;

/// This backend has no trust levels yet.
pub(super) fn check_vtl(vtl: Vtl) -> Result<(), HypervisorError> {
    if vtl == Vtl::VTL0 {
        return Ok(());
    }
    Err(HypervisorError::State(format!(
        "this partition has no VTL{}",
        vtl.index()
    )))
}

fn failed<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> HypervisorError {
    move |e| HypervisorError::State(format!("KVM refuses {what}: {e}"))
}

/// All of the vCPU's state.
pub(super) fn get(shared: &Shared, kernel: &mut Kernel) -> Result<VcpuState, HypervisorError> {
    if let Some(pending) = &kernel.pending {
        return Ok(untold(pending, shared, kernel.held.as_ref()));
    }
    let fd = &kernel.fd;
    // First, because the kernel lets INIT and start-up IPIs take effect here.
    let mp_state = fd.get_mp_state().map_err(failed("the run state"))?;
    let mut state = VcpuState {
        gprs: r::gprs(&fd.get_regs().map_err(failed("the general registers"))?),
        run_state: r::run_state(mp_state.mp_state),
        ..VcpuState::default()
    };
    let sregs = fd.get_sregs().map_err(failed("the system registers"))?;
    r::take_sregs(&mut state, &sregs);
    let debug = fd.get_debug_regs().map_err(failed("the debug registers"))?;
    state.debug = DebugRegs {
        address: debug.db,
        dr6: debug.dr6,
        dr7: debug.dr7,
    };
    state.msrs = shared.msrs.read(fd).map_err(failed("the MSRs"))?;
    state.xsave = xsave(shared, fd)?;
    let events = fd.get_vcpu_events().map_err(failed("the pending events"))?;
    state.events = r::events(&events);
    if r::has_triple_fault(&events) {
        state.run_state = RunState::Shutdown;
    }
    if let Some(exception) = &mut state.events.exception
        && exception.vector == vector::PF
    {
        exception.payload = state.cr2;
    }
    let (page, deadline) = match &kernel.held {
        Some(held) => {
            if let Some(tsc) = state.msrs.iter_mut().find(|e| e.index == msr::TSC) {
                tsc.value = held.tsc;
            }
            (held.apic, held.deadline)
        }
        None => (
            fd.get_lapic().map_err(failed("the local APIC"))?,
            msr::read(fd, msr::TSC_DEADLINE).map_err(failed("the deadline"))?,
        ),
    };
    state.apic = ApicState {
        base: state.apic.base,
        regs: r::apic_words(&page),
        tsc_deadline: deadline,
        timer_remaining_ns: None,
    };
    Ok(state)
}

/// The state that the kernel has not been given yet, as it would tell it: with the counter that stands
/// still, and vector registers that nothing has used.
fn untold(pending: &VcpuState, shared: &Shared, held: Option<&Held>) -> VcpuState {
    let mut state = pending.clone();
    let len = crate::cpuid::xsave_len(&shared.cpuid, state.xsave.xcr0);
    state.xsave.area.resize(len, 0);
    if let Some(held) = held
        && shared.msrs.has(msr::TSC)
        && let Err(at) = state.msrs.binary_search_by_key(&msr::TSC, |e| e.index)
    {
        let tsc = MsrEntry {
            index: msr::TSC,
            value: held.tsc,
        };
        state.msrs.insert(at, tsc);
    }
    state
}

/// Gives the kernel the state that it has not been given yet.
pub(crate) fn settle_pending(shared: &Shared, kernel: &mut Kernel) -> Result<(), HypervisorError> {
    match kernel.pending.take() {
        Some(state) => put(shared, kernel, &state),
        None => Ok(()),
    }
}

/// Replaces all of the vCPU's state, or leaves it as it was.
pub(super) fn set(
    shared: &Shared,
    kernel: &mut Kernel,
    state: &VcpuState,
) -> Result<(), HypervisorError> {
    check(shared, state)?;
    let before = get(shared, kernel)?;
    put(shared, kernel, state).inspect_err(|_| {
        let _ = put(shared, kernel, &before);
    })
}

/// Whether a vCPU of this host can have `state`, as far as that can be told beforehand.
pub(super) fn check(shared: &Shared, state: &VcpuState) -> Result<(), HypervisorError> {
    if r::to_apic(&state.apic).is_none() && !state.apic.regs.is_empty() {
        return Err(HypervisorError::State(
            "the local APIC's register page has the wrong length".into(),
        ));
    }
    let unknown = state
        .msrs
        .iter()
        .find(|e| !shared.msrs.has(e.index) && e.value != 0 && !msr::may_be_missing(e.index));
    if let Some(e) = unknown {
        return Err(HypervisorError::State(format!(
            "MSR {:#x} is {:#x}, and this host's vCPUs do not have it",
            e.index, e.value
        )));
    }
    Ok(())
}

/// As [`set`], but a state that is refused is taken in part.
pub(super) fn put(
    shared: &Shared,
    kernel: &mut Kernel,
    state: &VcpuState,
) -> Result<(), HypervisorError> {
    kernel.pending = None;
    let fd = &kernel.fd;
    let mut sregs = r::to_sregs(state);
    let mut debug = state.debug;
    if let Some(e) = state.events.exception {
        match e.vector {
            vector::PF => sregs.cr2 = e.payload,
            vector::DB => debug.dr6 |= e.payload,
            _ => {}
        }
    }
    fd.set_sregs(&sregs)
        .map_err(failed("the system registers"))?;
    fd.set_regs(&r::to_regs(&state.gprs))
        .map_err(failed("the general registers"))?;
    put_xsave(shared, fd, &state.xsave)?;
    put_debug(fd, &debug)?;
    let refused = shared
        .msrs
        .write(fd, &state.msrs)
        .map_err(failed("the MSRs"))?;
    if let Some(index) = refused
        .iter()
        .find(|index| !shared.msrs.is_as_at_power_on(state, **index))
    {
        return Err(HypervisorError::State(format!(
            "KVM refuses the value of MSR {index:#x}"
        )));
    }
    let tsc = state.msrs.iter().find(|e| e.index == msr::TSC);
    let apic = r::to_apic(&state.apic);
    shared.routes.announce_accepted(&shared.vm, &state.apic);
    match &mut kernel.held {
        // Written when the clock goes on.
        Some(held) => {
            held.tsc = tsc.map_or(held.tsc, |e| e.value);
            held.deadline = state.apic.tsc_deadline;
            if let Some(page) = apic {
                held.apic = page;
            }
        }
        None => {
            if let Some(page) = &apic {
                fd.set_lapic(page).map_err(failed("the local APIC"))?;
            }
            msr::write(fd, msr::TSC_DEADLINE, state.apic.tsc_deadline)
                .map_err(failed("the deadline"))?;
        }
    }
    let mp_state = kvm_mp_state {
        mp_state: r::to_mp_state(state),
    };
    fd.set_mp_state(mp_state).map_err(failed("the run state"))?;
    let mut events = r::to_events(&state.events);
    if shared.triple_fault_event {
        // None on its way: a vCPU that is shut down does not run at all.
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    }
    fd.set_vcpu_events(&events)
        .map_err(failed("the pending events"))
}

/// Takes over what one instruction, executed elsewhere, made of `before`. Time
/// and the local APIC are the kernel's and have gone on.
pub(super) fn set_after_step(
    shared: &Shared,
    kernel: &Kernel,
    before: &VcpuState,
    after: &VcpuState,
) -> Result<(), HypervisorError> {
    let fd = &kernel.fd;
    let (old, new) = (r::to_sregs(before), r::to_sregs(after));
    if old != new {
        fd.set_sregs(&new).map_err(failed("the system registers"))?;
    }
    fd.set_regs(&r::to_regs(&after.gprs))
        .map_err(failed("the general registers"))?;
    if before.xsave != after.xsave {
        put_xsave(shared, fd, &after.xsave)?;
    }
    if before.debug != after.debug {
        put_debug(fd, &after.debug)?;
    }
    let changed: Vec<_> = after
        .msrs
        .iter()
        .filter(|e| e.index != msr::TSC_ADJUST && !before.msrs.contains(e))
        .copied()
        .collect();
    shared
        .msrs
        .write(fd, &changed)
        .map_err(failed("the MSRs"))?;
    if before.run_state != after.run_state {
        let mp_state = kvm_mp_state {
            mp_state: r::to_mp_state(after),
        };
        fd.set_mp_state(mp_state).map_err(failed("the run state"))?;
    }
    fd.set_vcpu_events(&r::to_events(&after.events))
        .map_err(failed("the pending events"))
}

fn xsave(shared: &Shared, fd: &VcpuFd) -> Result<XsaveArea, HypervisorError> {
    let xcr0 = match fd.get_xcrs() {
        Ok(xcrs) => xcrs
            .xcrs
            .iter()
            .take(xcrs.nr_xcrs as usize)
            .find(|x| x.xcr == 0)
            .map_or(1, |x| x.value),
        // A host without XSAVE.
        Err(_) => 1,
    };
    let mut area = sys::get_xsave(fd, shared.xsave_len).map_err(failed("the vector registers"))?;
    area.truncate(crate::cpuid::xsave_len(&shared.cpuid, xcr0));
    // MXCSR_MASK tells of the processor, not of its state.
    area[28..32].fill(0);
    // Bytes that are software's, not the processor's: the kernel leaves notes there.
    area[464..512].fill(0);
    // XSTATE_BV; some kernels name components here that XCR0 does not enable. The x87's and SSE's
    // registers are state without it too, of a guest that uses FXSAVE.
    for (byte, mask) in area.iter_mut().skip(512).zip((xcr0 | 3).to_le_bytes()) {
        *byte &= mask;
    }
    Ok(XsaveArea { xcr0, area })
}

fn put_xsave(shared: &Shared, fd: &VcpuFd, xsave: &XsaveArea) -> Result<(), HypervisorError> {
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0] = kvm_xcr {
        xcr: 0,
        reserved: 0,
        value: xsave.xcr0,
    };
    fd.set_xcrs(&xcrs).map_err(failed("XCR0"))?;
    if !xsave.area.is_empty() {
        sys::set_xsave(fd, &xsave.area, shared.xsave_len)
            .map_err(failed("the vector registers"))?;
    }
    Ok(())
}

fn put_debug(fd: &VcpuFd, debug: &DebugRegs) -> Result<(), HypervisorError> {
    fd.set_debug_regs(&kvm_debugregs {
        db: debug.address,
        dr6: debug.dr6,
        dr7: debug.dr7,
        ..Default::default()
    })
    .map_err(failed("the debug registers"))
}

/// Raises an NMI if LINT1 is one.
pub(super) fn deliver_nmi(fd: &VcpuFd) -> io::Result<()> {
    let page = fd.get_lapic().map_err(sys::error)?;
    let lint1 = r::apic_words(&page).get(LVT_LINT1).copied().unwrap_or(0);
    if lint1 & LVT_MODE_AND_MASK == LVT_NMI {
        fd.nmi().map_err(sys::error)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use caisson_hypervisor::{Partition, PartitionConfig};
    use caisson_memory::{
        Gpa, GuestMemory, RegionKind,
        host::{HugePages, Mapping},
    };

    use super::*;
    use crate::{partition::KvmPartition, probe};

    #[test]
    fn a_triple_fault_on_its_way_is_a_shutdown() {
        let kvm = match probe::open() {
            Ok(kvm) => kvm,
            Err(refusal) => return println!("not tested: {refusal}"),
        };
        let mapping = Mapping::new("test", 0x4000, HugePages::Off).unwrap();
        let region = mapping.region("ram", Gpa(0), 0, 0x4000, RegionKind::Ram);
        let memory = GuestMemory::new(vec![region]).unwrap();
        let partition = KvmPartition::new(&kvm, PartitionConfig::new(1, memory)).unwrap();
        if !partition.shared.triple_fault_event {
            return println!("not tested: this kernel does not tell of triple faults");
        }
        let mut vcpu = partition.create_vcpu(0).unwrap();
        let before = vcpu.state(Vtl::VTL0).unwrap();
        assert_eq!(before.run_state, RunState::Running);
        let cell = partition.shared.cells[0].clone();
        let events = cell.kernel.lock().fd.get_vcpu_events().unwrap();
        let mut faulting = events;
        faulting.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        faulting.triple_fault.pending = 1;
        cell.kernel.lock().fd.set_vcpu_events(&faulting).unwrap();
        let state = vcpu.state(Vtl::VTL0).unwrap();
        assert_eq!(state.run_state, RunState::Shutdown);
        vcpu.set_state(Vtl::VTL0, &before).unwrap();
        let after = vcpu.state(Vtl::VTL0).unwrap();
        assert_eq!(after.run_state, RunState::Running, "it is gone");
    }
}
