//! What takes a thread out of the guest.

use std::{
    io,
    mem::offset_of,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{
        Once,
        atomic::{AtomicU8, Ordering},
    },
};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

use super::pages::Pages;

/// The byte by which a vCPU is told to leave the guest at once, in a mapping of
/// its own of the run page.
#[derive(Debug)]
pub(crate) struct ImmediateExit(Pages);

impl ImmediateExit {
    /// That of `vcpu`.
    ///
    /// # Errors
    /// The host's: too many mappings.
    pub(crate) fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open as long as the vCPU is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let len = (offset_of!(kvm_run, immediate_exit) + 1).next_multiple_of(4096);
        Pages::map(fd, 0, len).map(Self)
    }

    /// Sets or clears it.
    pub(crate) fn set(&self, on: bool) {
        let at = offset_of!(kvm_run, immediate_exit);
        // SAFETY: the mapping covers the byte; the kernel and other threads read
        // and write it as one.
        let byte = unsafe { self.0.base().add(at).cast::<AtomicU8>().as_ref() };
        byte.store(on.into(), Ordering::SeqCst);
    }
}

/// The signal that interrupts KVM_RUN: the first that programs may use freely.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn nothing(_: libc::c_int) {}

/// Makes the kick signal interrupt system calls instead of ending the process.
pub(crate) fn install_kick_signal() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all zeros is a valid `sigaction`; the handler does nothing, so
        // it may run at any point.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal(), &action, std::ptr::null_mut());
        }
    });
}

/// The calling thread's number.
pub(crate) fn thread_id() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Takes `thread` of this process out of KVM_RUN. A thread that is gone is no error.
pub(crate) fn interrupt_thread(thread: i32) {
    // SAFETY: a signal whose handler does nothing, to a thread of this process.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal());
    }
}
