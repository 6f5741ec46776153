//! How other threads reach a vCPU that is in the guest.

use std::{
    sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    time::Duration,
};

use caisson_hypervisor::KickHandle;

use crate::sys::{self, ImmediateExit};

/// The part of a vCPU that any thread may touch.
pub(crate) struct Doorstep {
    exit: ImmediateExit,
    /// The thread that runs the vCPU, or 0.
    thread: AtomicI32,
    /// Times that KVM_RUN was begun or ended: odd while it goes on. Only the
    /// thread that runs the vCPU changes it.
    passages: AtomicU64,
    kicked: AtomicBool,
    nmi: AtomicBool,
}

/// How long to wait before looking again whether a vCPU left the guest.
const PATIENCE: Duration = Duration::from_micros(20);

impl Doorstep {
    pub(crate) fn new(exit: ImmediateExit) -> Self {
        Self {
            exit,
            thread: AtomicI32::new(0),
            passages: AtomicU64::new(0),
            kicked: AtomicBool::new(false),
            nmi: AtomicBool::new(false),
        }
    }

    /// The calling thread is about to run the vCPU, until the answer is dropped.
    pub(crate) fn enter(&self) -> Turn<'_> {
        self.thread.store(sys::thread_id(), Ordering::SeqCst);
        Turn(self)
    }

    /// To be called before KVM_RUN and after it.
    pub(crate) fn pass(&self) {
        let passages = self.passages.load(Ordering::Relaxed);
        self.passages.store(passages + 1, Ordering::Release);
    }

    /// Returns once the vCPU has been outside of KVM_RUN since the call.
    pub(crate) fn wait_outside(&self) {
        let passages = self.passages.load(Ordering::Acquire);
        if passages.is_multiple_of(2) {
            return;
        }
        self.call_out();
        while self.passages.load(Ordering::Acquire) == passages {
            std::thread::sleep(PATIENCE);
        }
    }

    /// Makes KVM_RUN return soon, now or the next time.
    pub(crate) fn call_out(&self) {
        self.hurry(true);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            sys::interrupt_thread(thread);
        }
    }

    /// Whether KVM_RUN is to return at once.
    pub(crate) fn hurry(&self, on: bool) {
        self.exit.set(on);
    }

    pub(crate) fn raise_nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
        self.call_out();
    }

    pub(crate) fn take_nmi(&self) -> bool {
        // Asked before each entry: looking is cheaper than taking.
        self.nmi.load(Ordering::SeqCst) && self.nmi.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.call_out();
    }
}

/// See [`Doorstep::enter`].
pub(crate) struct Turn<'a>(&'a Doorstep);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.thread.store(0, Ordering::SeqCst);
    }
}

/// See [`KickHandle`].
pub(super) struct Kick(pub(super) std::sync::Arc<super::Cell>);

impl KickHandle for Kick {
    fn kick(&self) {
        self.0.doorstep.kick();
    }
}
