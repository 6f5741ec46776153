//! Stopping a machine from a key, a signal or a broken pipe, whenever it comes.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use caisson_machine::Machine;

use crate::terminal::end_by_signal;

/// How long a machine gets to stop after a signal. It needs milliseconds; this bounds a fault of
/// ours, or a reader of its output that does not read.
const PATIENCE: Duration = Duration::from_secs(3);

/// Stops the machine, now or as soon as there is one.
#[derive(Default)]
pub(super) struct Stopper {
    machine: OnceLock<Arc<Machine>>,
    asked: AtomicBool,
    /// The signal that asked, 0 for none.
    signal: AtomicI32,
}

impl Stopper {
    /// Says which machine it is.
    pub(super) fn set(&self, machine: &Arc<Machine>) {
        let _ = self.machine.set(machine.clone());
        if self.asked.load(Ordering::SeqCst) {
            machine.stop();
        }
    }

    /// Stops the machine.
    pub(super) fn stop(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if let Some(machine) = self.machine.get() {
            machine.stop();
        }
    }

    /// Stops the machine because of a signal, by which the process then ends: see
    /// [`Stopper::follow_signal`]. The second time, and if the machine takes too long, at once.
    pub(super) fn stop_by_signal(&self, signal: i32) {
        if self.signal.swap(signal, Ordering::SeqCst) != 0 {
            end_by_signal(signal);
        }
        let watchdog = thread::Builder::new()
            .name("patience".into())
            .spawn(move || {
                thread::sleep(PATIENCE);
                end_by_signal(signal);
            });
        if watchdog.is_err() {
            end_by_signal(signal);
        }
        self.stop();
    }

    /// Ends the process by the signal that stopped the machine, if one did.
    pub(super) fn follow_signal(&self) {
        let signal = self.signal.load(Ordering::SeqCst);
        if signal != 0 {
            end_by_signal(signal);
        }
    }
}
