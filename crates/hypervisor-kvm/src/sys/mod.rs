//! What `kvm-ioctls` lacks, and all of the backend's unsafe code but for handing
//! memory to the kernel.

mod dirty;
mod eventfd;
mod guest_memfd;
mod kick;
mod pages;
mod run;
mod vcpu;
mod wait;

use std::io;

pub(crate) use self::{
    dirty::{DirtyRing, clear_dirty_log, reset_dirty_rings},
    eventfd::{IoEvent, assign_ioevent, assign_irq_event, deassign_ioevent, deassign_irq_event},
    guest_memfd::GuestMemfd,
    kick::{ImmediateExit, install_kick_signal, interrupt_thread, thread_id},
    run::{Data, device_exit, internal_error},
    vcpu::{XSAVE_LEN, get_xsave, host_tsc, interrupt, set_tsc_offset, set_xsave, tsc_offset},
    wait::watch,
};

/// The answer of a call that gives a number or -1.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// The host's error in the standard library's form.
pub(crate) fn error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}
