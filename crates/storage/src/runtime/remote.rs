//! What other threads may do to an executor: wake its tasks and its sleep.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::Wake,
};

use rustix::event::{EventfdFlags, eventfd};

/// The number of the future that [`block_on`](super::Runtime::block_on) runs.
pub(super) const MAIN: usize = usize::MAX;

pub(crate) struct Remote {
    woken: Mutex<Vec<usize>>,
    sleeping: AtomicBool,
    bell: OwnedFd,
}

impl Remote {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            woken: Mutex::default(),
            sleeping: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Becomes readable when the executor is to end its sleep.
    pub(super) fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    /// Silences the bell.
    pub(super) fn hush(&self) {
        let mut count = [0; 8];
        // Nothing to read means that it is silent.
        let _ = rustix::io::read(&self.bell, &mut count);
    }

    /// Ends a sleep. Everything that the sleeper is to see must have been stored before.
    pub(super) fn ring(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // The counter cannot overflow: it is written once per sleep.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    fn list(&self) -> MutexGuard<'_, Vec<usize>> {
        self.woken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who was woken since the last call.
    pub(super) fn take(&self) -> Vec<usize> {
        std::mem::take(&mut *self.list())
    }

    /// Announces a sleep; whether there is no reason against it.
    pub(super) fn begin_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        let idle = self.list().is_empty();
        if !idle {
            self.sleeping.store(false, Ordering::SeqCst);
        }
        idle
    }

    pub(super) fn end_sleep(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }
}

/// Wakes one task.
pub(super) struct TaskWaker {
    remote: Arc<Remote>,
    id: usize,
    queued: AtomicBool,
}

impl TaskWaker {
    pub(super) fn new(remote: Arc<Remote>, id: usize) -> Self {
        Self {
            remote,
            id,
            queued: AtomicBool::new(false),
        }
    }

    /// The task is about to be polled: from here on a wake-up counts anew.
    pub(super) fn taken(&self) {
        self.queued.store(false, Ordering::SeqCst);
    }

    pub(super) fn wake_now(&self) {
        if !self.queued.swap(true, Ordering::SeqCst) {
            self.remote.list().push(self.id);
            self.remote.ring();
        }
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_now();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_now();
    }
}
