//! What happens to the machine as a whole, on its way to the supervisor.

use std::sync::{Arc, OnceLock};

use caisson_device::{PowerRequest, PowerSink};
use caisson_hypervisor::KickHandle;
use parking_lot::{Condvar, Mutex};

use crate::Fault;

/// Something that ends or restarts the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Power(PowerRequest),
    TripleFault(Fault),
    Crash(String),
    Stop,
}

/// Holds the first event until the supervisor has dealt with it. Posting never blocks, so that devices may do it from
/// within an access.
#[derive(Default)]
pub(crate) struct Events {
    state: Mutex<Option<Event>>,
    changed: Condvar,
    kicks: OnceLock<Vec<Arc<dyn KickHandle>>>,
}

impl Events {
    /// The vCPUs to stop when something happens.
    pub(crate) fn set_kicks(&self, kicks: Vec<Arc<dyn KickHandle>>) {
        let _ = self.kicks.set(kicks);
    }

    /// Notes `event`, unless another is waiting. A crash and a stop go before whatever is waiting.
    pub(crate) fn post(&self, event: Event) {
        let mut state = self.state.lock();
        let urgent = matches!(event, Event::Crash(_) | Event::Stop)
            && !matches!(*state, Some(Event::Crash(_) | Event::Stop));
        if state.is_none() || urgent {
            *state = Some(event);
            self.changed.notify_all();
            drop(state);
            for kick in self.kicks.get().into_iter().flatten() {
                kick.kick();
            }
        }
    }

    /// Whether an event waits: vCPUs hold still until it is dealt with.
    pub(crate) fn waiting(&self) -> bool {
        self.state.lock().is_some()
    }

    /// Whether somebody called for a stop, perhaps after the event that is being dealt with.
    pub(crate) fn stop_posted(&self) -> bool {
        *self.state.lock() == Some(Event::Stop)
    }

    /// Waits for an event and returns it. It stays in place, so that later ones are dropped, until
    /// [`clear`](Self::clear).
    pub(crate) fn wait(&self) -> Event {
        let mut state = self.state.lock();
        loop {
            if let Some(event) = &*state {
                return event.clone();
            }
            self.changed.wait(&mut state);
        }
    }

    /// Forgets `event`, which has been dealt with.
    pub(crate) fn clear(&self, event: &Event) {
        let mut state = self.state.lock();
        if state.as_ref() == Some(event) {
            *state = None;
        }
    }
}

impl PowerSink for Events {
    fn request(&self, request: PowerRequest) {
        self.post(Event::Power(request));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_request_wins_and_a_stop_goes_before_it() {
        let events = Events::default();
        events.request(PowerRequest::Reset);
        events.request(PowerRequest::PowerOff);
        assert_eq!(events.wait(), Event::Power(PowerRequest::Reset));
        events.post(Event::Stop);
        events.post(Event::Crash("late".into()));
        assert_eq!(events.wait(), Event::Stop);
        events.clear(&Event::Power(PowerRequest::Reset));
        assert!(events.waiting());
        events.clear(&Event::Stop);
        assert!(!events.waiting());
    }
}
