//! Keeps the machine's own threads out of the devices while the machine is paused.

use parking_lot::{Condvar, Mutex};

/// A gate through which each thread that is not a vCPU passes before it calls a device, so that closing it leaves
/// every device untouched until it is opened again.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    inside: u32,
    closed: bool,
    gone: bool,
}

/// Proof of being inside. Leaves on drop.
pub(crate) struct Inside<'a>(&'a Gate);

impl Gate {
    /// Waits until the gate is open and goes in. `None` once the gate is gone for good.
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        let mut state = self.state.lock();
        while state.closed && !state.gone {
            self.changed.wait(&mut state);
        }
        if state.gone {
            return None;
        }
        state.inside += 1;
        Some(Inside(self))
    }

    /// Lets nobody in any more and waits until everybody is out. What threads do inside is bounded.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        while state.inside > 0 {
            self.changed.wait(&mut state);
        }
    }

    /// Opens the gate.
    pub(crate) fn open(&self) {
        self.state.lock().closed = false;
        self.changed.notify_all();
    }

    /// Turns everybody away from now on and waits until those inside are out.
    pub(crate) fn shut_down(&self) {
        let mut state = self.state.lock();
        state.gone = true;
        self.changed.notify_all();
        while state.inside > 0 {
            self.changed.wait(&mut state);
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.inside -= 1;
        drop(state);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        thread,
    };

    use super::*;

    #[test]
    fn a_closed_gate_holds_and_a_gone_one_turns_away() {
        let gate = Arc::new(Gate::default());
        drop(gate.enter().unwrap());
        gate.close();
        let passed = Arc::new(AtomicBool::new(false));
        let (theirs, flag) = (gate.clone(), passed.clone());
        let waiting = thread::spawn(move || {
            let inside = theirs.enter().is_some();
            flag.store(true, Ordering::SeqCst);
            inside
        });
        thread::yield_now();
        assert!(!passed.load(Ordering::SeqCst));
        gate.open();
        assert!(waiting.join().unwrap());
        gate.close();
        let theirs = gate.clone();
        let waiting = thread::spawn(move || theirs.enter().is_some());
        gate.shut_down();
        assert!(!waiting.join().unwrap());
    }
}
