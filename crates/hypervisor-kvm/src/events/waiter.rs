//! One thread that waits for many events.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use caisson_hypervisor::{Event, EventWaiter, HypervisorError};
use caisson_memory::Vtl;
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, CreateFlags},
};

use super::{EventFd, descriptor};
use crate::sys;

const WAITING: &str = "waiting for event descriptors";
/// The token of the event that ends a wait.
const WAKE: u64 = u64::MAX;
/// How many signals are reported at once.
const AT_ONCE: usize = 32;

/// An epoll instance, and what it watches.
pub(super) struct Waiter {
    poll: OwnedFd,
    wake: EventFd,
    /// Keeps the events' descriptors open.
    events: Mutex<Vec<Arc<dyn Event>>>,
}

impl Waiter {
    pub(super) fn new(wake: EventFd) -> Result<Self, HypervisorError> {
        let refused = |reason: String| HypervisorError::Host {
            what: WAITING,
            reason,
        };
        let poll = epoll::create(CreateFlags::CLOEXEC).map_err(|e| refused(e.to_string()))?;
        let waiter = Self {
            poll,
            wake,
            events: Mutex::default(),
        };
        waiter.watch(&waiter.wake, WAKE)?;
        Ok(waiter)
    }

    fn watch(&self, event: &dyn Event, token: u64) -> Result<(), HypervisorError> {
        let descriptor = descriptor(WAITING, Vtl::VTL0, event)?;
        sys::watch(&self.poll, descriptor, token).map_err(|e| HypervisorError::Host {
            what: WAITING,
            reason: e.to_string(),
        })
    }
}

impl EventWaiter for Waiter {
    fn add(&self, event: Arc<dyn Event>, token: u64) -> Result<(), HypervisorError> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        self.watch(&*event, token)?;
        events.push(event);
        Ok(())
    }

    fn wait(&self, tokens: &mut Vec<u64>) {
        tokens.clear();
        let mut signalled = Vec::with_capacity(AT_ONCE);
        // Interrupted by a signal: the caller looks around and waits again.
        if epoll::wait(&self.poll, spare_capacity(&mut signalled), None).is_err() {
            return;
        }
        for event in signalled {
            match event.data.u64() {
                WAKE => {}
                token => tokens.push(token),
            }
        }
    }

    fn wake(&self) {
        self.wake.signal();
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn event() -> EventFd {
        EventFd(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
    }

    #[test]
    fn each_signal_is_reported_once_and_a_wake_ends_the_wait() {
        let waiter = Arc::new(Waiter::new(event()).unwrap());
        let (first, second) = (Arc::new(event()), Arc::new(event()));
        waiter.add(first.clone(), 1).unwrap();
        assert!(waiter.add(first.clone(), 3).is_err());
        let mut tokens = vec![9];
        waiter.wake();
        waiter.wait(&mut tokens);
        assert_eq!(tokens, []);
        // Nobody takes the event, and it is reported all the same.
        for _ in 0..3 {
            first.signal();
            first.signal();
            waiter.wait(&mut tokens);
            assert_eq!(tokens, [1]);
        }
        waiter.wake();
        waiter.wait(&mut tokens);
        assert_eq!(tokens, [], "heard before");
        let theirs = waiter.clone();
        let thread = std::thread::spawn(move || {
            let mut tokens = Vec::new();
            theirs.wait(&mut tokens);
            tokens
        });
        // Added while it waits.
        waiter.add(second.clone(), 2).unwrap();
        second.signal();
        assert_eq!(thread.join().unwrap(), [2]);
    }
}
