//! Event descriptors in the kernel's hands.

use std::{io, os::fd::RawFd};

use kvm_bindings::{
    KVM_IRQFD_FLAG_DEASSIGN, KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_irqfd,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::{ioctl::ioctl_with_ref, ioctl_iow_nr};

use super::check;

ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// Guest writes that signal an event descriptor (KVM API §4.59).
#[derive(Clone, Copy, Debug)]
pub(crate) struct IoEvent {
    /// Of an event descriptor; the kernel refuses others.
    pub(crate) descriptor: RawFd,
    pub(crate) port: bool,
    pub(crate) address: u64,
    /// 0: any.
    pub(crate) length: u32,
    pub(crate) value: Option<u64>,
}

fn ioevent(vm: &VmFd, event: &IoEvent, flags: u32) -> io::Result<()> {
    let flag = |nr: u32, on: bool| u32::from(on) << nr;
    let argument = kvm_ioeventfd {
        datamatch: event.value.unwrap_or(0),
        addr: event.address,
        len: event.length,
        fd: event.descriptor,
        flags: flags
            | flag(kvm_ioeventfd_flag_nr_datamatch, event.value.is_some())
            | flag(kvm_ioeventfd_flag_nr_pio, event.port),
        ..Default::default()
    };
    // SAFETY: the argument is the structure that the call reads, and outlives it.
    check(unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &argument) })?;
    Ok(())
}

/// Registers the event.
///
/// # Errors
/// The host's. EEXIST: there is one for some of these writes.
pub(crate) fn assign_ioevent(vm: &VmFd, event: &IoEvent) -> io::Result<()> {
    ioevent(vm, event, 0)
}

/// Takes back what [`assign_ioevent`] did.
///
/// # Errors
/// The host's. ENOENT: there is none.
pub(crate) fn deassign_ioevent(vm: &VmFd, event: &IoEvent) -> io::Result<()> {
    ioevent(vm, event, 1 << kvm_ioeventfd_flag_nr_deassign)
}

fn irq_event(vm: &VmFd, descriptor: RawFd, gsi: u32, flags: u32) -> io::Result<()> {
    let argument = kvm_irqfd {
        fd: u32::try_from(descriptor).map_err(|_| io::ErrorKind::InvalidInput)?,
        gsi,
        flags,
        ..Default::default()
    };
    // SAFETY: the argument is the structure that the call reads, and outlives it.
    check(unsafe { ioctl_with_ref(vm, KVM_IRQFD(), &argument) })?;
    Ok(())
}

/// Has an event descriptor raise the interrupt that is routed as `gsi` (KVM API
/// §4.75). One that is signalled already raises it at once.
///
/// # Errors
/// The host's. EBUSY: it raises one already.
pub(crate) fn assign_irq_event(vm: &VmFd, descriptor: RawFd, gsi: u32) -> io::Result<()> {
    irq_event(vm, descriptor, gsi, 0)
}

/// Takes back what [`assign_irq_event`] did; once this returns, no more
/// interrupts come of it.
///
/// # Errors
/// The host's.
pub(crate) fn deassign_irq_event(vm: &VmFd, descriptor: RawFd, gsi: u32) -> io::Result<()> {
    irq_event(vm, descriptor, gsi, KVM_IRQFD_FLAG_DEASSIGN)
}
