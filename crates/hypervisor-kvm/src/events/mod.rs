//! Doorbells and interrupt events: event descriptors in the kernel's hands.

mod doorbell;
mod interrupt;
mod waiter;

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use caisson_hypervisor::{Event, EventWaiter, Events, HypervisorError, RawEvent};
use caisson_memory::Vtl;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::{read, write},
};

use crate::partition::Shared;

/// The powers over events of one partition.
pub(crate) struct EventPowers(pub(crate) Arc<Shared>);

/// An event of Linux.
#[derive(Debug)]
struct EventFd(OwnedFd);

impl Event for EventFd {
    fn signal(&self) {
        // It is refused only where as many signals wait as it can count.
        let _ = write(&self.0, &1u64.to_ne_bytes());
    }

    fn take(&self) -> bool {
        let mut count = [0; 8];
        read(&self.0, &mut count).is_ok()
    }

    fn is_signalled(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
    }

    fn raw(&self) -> RawEvent {
        RawEvent::Descriptor(self.0.as_raw_fd())
    }
}

impl EventFd {
    fn new() -> Result<Self, HypervisorError> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| {
            HypervisorError::Host {
                what: "making an event descriptor",
                reason: e.to_string(),
            }
        })?;
        Ok(Self(fd))
    }
}

impl Events for EventPowers {
    fn event(&self) -> Result<Arc<dyn Event>, HypervisorError> {
        Ok(Arc::new(EventFd::new()?))
    }

    fn waiter(&self) -> Result<Box<dyn EventWaiter>, HypervisorError> {
        Ok(Box::new(waiter::Waiter::new(EventFd::new()?)?))
    }
}

/// The event's descriptor, if it is of this kind of host and there is such a
/// trust level.
fn descriptor(what: &'static str, vtl: Vtl, event: &dyn Event) -> Result<RawFd, HypervisorError> {
    let refused = |reason: String| HypervisorError::Host { what, reason };
    if vtl != Vtl::VTL0 {
        let level = vtl.index();
        return Err(refused(format!("this partition has no VTL{level}")));
    }
    match event.raw() {
        RawEvent::Descriptor(descriptor) => Ok(descriptor),
        other => Err(refused(format!(
            "{other:?} is no event descriptor of Linux"
        ))),
    }
}

/// The answer of a handle whose partition is gone.
fn gone(what: &'static str) -> HypervisorError {
    HypervisorError::Host {
        what,
        reason: "the partition is gone".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_nobody_heard_count_as_one() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let event = EventFd(fd);
        assert!(!event.is_signalled() && !event.take());
        for _ in 0..3 {
            event.signal();
        }
        assert!(event.is_signalled() && event.is_signalled());
        assert!(event.take());
        assert!(!event.is_signalled() && !event.take());
        // As many as can be counted.
        write(&event.0, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal();
        assert!(event.take() && !event.take());
    }
}
