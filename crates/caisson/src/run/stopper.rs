//! Stopping a machine from a key, a signal or a broken pipe, whenever it comes.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use caisson_machine::{Machine, Phase};

use super::saving::SaveTo;
use crate::terminal::{end_by_signal, say};

/// How long a machine gets to stop after a signal. It needs milliseconds; this bounds a fault of
/// ours, or a reader of its output that does not read.
const PATIENCE: Duration = Duration::from_secs(3);

/// Stops the machine, now or as soon as there is one, and saves it before if that is asked.
#[derive(Default)]
pub(super) struct Stopper {
    save: Option<SaveTo>,
    quiet: bool,
    machine: OnceLock<Arc<Machine>>,
    asked: AtomicBool,
    /// Saving was tried: once is enough.
    saved: AtomicBool,
    failed: AtomicBool,
    /// The signal that asked, 0 for none.
    signal: AtomicI32,
}

impl Stopper {
    pub(super) fn new(save: Option<SaveTo>, quiet: bool) -> Self {
        Self {
            save,
            quiet,
            ..Self::default()
        }
    }

    /// Says which machine it is.
    pub(super) fn set(&self, machine: &Arc<Machine>) {
        let _ = self.machine.set(machine.clone());
        if self.asked.load(Ordering::SeqCst) {
            self.leave(machine);
        }
    }

    /// Stops the machine.
    pub(super) fn stop(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if let Some(machine) = self.machine.get() {
            self.leave(machine);
        }
    }

    fn leave(&self, machine: &Machine) {
        if let Some(save) = &self.save
            && !self.saved.swap(true, Ordering::SeqCst)
        {
            match save.save(machine) {
                Ok(()) if self.quiet => {}
                Ok(()) => say(&save.farewell()),
                // The guest has just ended by itself: there is nothing to save.
                Err(_) if machine.phase() == Phase::Ended => {}
                Err(error) => {
                    say(&format!("error: the machine is not saved: {error:#}"));
                    self.failed.store(true, Ordering::SeqCst);
                }
            }
        }
        machine.stop();
    }

    /// Whether the machine was to be saved and could not be.
    pub(super) fn save_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Stops the machine because of a signal, by which the process then ends: see
    /// [`Stopper::follow_signal`]. The second time, and if the machine takes too long, at once.
    pub(super) fn stop_by_signal(self: &Arc<Self>, signal: i32) {
        if self.signal.swap(signal, Ordering::SeqCst) != 0 {
            end_by_signal(signal);
        }
        if self.save.is_some() {
            // Saving takes as long as it takes; a second signal ends it.
            let stopper = self.clone();
            let saving = thread::Builder::new()
                .name("saving".into())
                .spawn(move || stopper.stop());
            if saving.is_err() {
                self.stop();
            }
            return;
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
