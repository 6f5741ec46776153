//! From the host end to the device.

use std::{
    collections::VecDeque,
    sync::{Arc, OnceLock},
};

use parking_lot::{Condvar, Mutex};

use super::OutputQueue;

/// How many bytes wait for the guest at most before [`SerialInput::push`] blocks.
const CAPACITY: usize = 64 << 10;
/// How many bytes a device is offered at once.
const PIECE: usize = 4096;

/// The machine has ended: nobody reads the port any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine has ended")]
pub struct Closed;

/// The way to send bytes to a guest's serial port. Clones send to the same port.
#[derive(Clone, Default)]
pub struct SerialInput(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    closed: bool,
}

impl SerialInput {
    /// Sends `bytes`, waiting while the guest does not read.
    ///
    /// # Errors
    /// The machine ended first.
    pub fn push(&self, mut bytes: &[u8]) -> Result<(), Closed> {
        while !bytes.is_empty() {
            let mut state = self.0.state.lock();
            while state.bytes.len() >= CAPACITY && !state.closed {
                self.0.changed.wait(&mut state);
            }
            if state.closed {
                return Err(Closed);
            }
            let (now, later) = bytes.split_at(bytes.len().min(CAPACITY - state.bytes.len()));
            state.bytes.extend(now);
            drop(state);
            self.0.changed.notify_all();
            self.wake();
            bytes = later;
        }
        Ok(())
    }

    /// Takes everything that was sent, waiting until there is something; `None` once the port is closed. For whoever
    /// passes it on to a port elsewhere: an input that a machine empties itself is not to be taken from.
    pub fn take(&self) -> Option<Vec<u8>> {
        let mut state = self.0.state.lock();
        while state.bytes.is_empty() {
            if state.closed {
                return None;
            }
            self.0.changed.wait(&mut state);
        }
        let bytes = state.bytes.drain(..).collect();
        drop(state);
        self.0.changed.notify_all();
        Some(bytes)
    }

    /// What has been sent and not yet taken by the guest's device.
    pub(crate) fn waiting(&self) -> Vec<u8> {
        self.0.state.lock().bytes.iter().copied().collect()
    }

    /// Sends `bytes` without waiting, whatever is there already. For senders that bound their bytes themselves.
    pub fn push_now(&self, bytes: &[u8]) {
        let mut state = self.0.state.lock();
        if !state.closed {
            state.bytes.extend(bytes);
        }
        drop(state);
        self.0.changed.notify_all();
        self.wake();
    }

    /// Whether the machine has ended.
    pub fn is_closed(&self) -> bool {
        self.0.state.lock().closed
    }

    pub(crate) fn on_push(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.0.wake.set(Box::new(wake));
    }

    /// Turns senders away.
    pub(crate) fn close(&self) {
        self.0.state.lock().closed = true;
        self.0.changed.notify_all();
    }

    fn wake(&self) {
        if let Some(wake) = self.0.wake.get() {
            wake();
        }
    }
}

/// A device with a port on the outside.
pub(crate) trait SerialDevice: Send + Sync {
    /// Offers bytes and returns how many were taken. A device that takes fewer has the pump woken when it has room.
    fn offer(&self, bytes: &[u8]) -> usize;
    /// The output queue, which had refused bytes, has room again.
    fn output_ready(&self);
}

/// Moves waiting bytes into a device, and tells it when its output goes on.
pub(crate) struct Pump {
    input: SerialInput,
    output: Arc<OutputQueue>,
    device: Arc<dyn SerialDevice>,
}

impl Pump {
    pub(crate) fn new(
        input: SerialInput,
        output: Arc<OutputQueue>,
        device: Arc<dyn SerialDevice>,
    ) -> Self {
        Self {
            input,
            output,
            device,
        }
    }

    /// Does what there is to do now.
    pub(crate) fn run(&self) {
        if self.output.take_room() {
            self.device.output_ready();
        }
        loop {
            let state = self.input.0.state.lock();
            let piece: Vec<u8> = state.bytes.iter().copied().take(PIECE).collect();
            drop(state);
            if piece.is_empty() {
                return;
            }
            // Only this thread takes from the queue, so what was looked at is still in front.
            let taken = self.device.offer(&piece).min(piece.len());
            self.input.0.state.lock().bytes.drain(..taken);
            self.input.0.changed.notify_all();
            if taken < piece.len() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[derive(Default)]
    struct Reader {
        room: Mutex<usize>,
        got: Mutex<Vec<u8>>,
    }

    impl SerialDevice for Reader {
        fn offer(&self, bytes: &[u8]) -> usize {
            let mut room = self.room.lock();
            let taken = bytes.len().min(*room);
            *room -= taken;
            self.got.lock().extend_from_slice(&bytes[..taken]);
            taken
        }
        fn output_ready(&self) {}
    }

    #[test]
    fn senders_wait_for_the_guest_and_nothing_is_lost() {
        let input = SerialInput::default();
        let reader = Arc::new(Reader::default());
        let pump = Pump::new(input.clone(), OutputQueue::new(None), reader.clone());
        let data: Vec<u8> = (0..CAPACITY * 2).map(|n| (n % 251) as u8).collect();
        let (sender, sent) = (input.clone(), data.clone());
        let thread = thread::spawn(move || sender.push(&sent));
        while reader.got.lock().len() < data.len() {
            *reader.room.lock() += 1000;
            pump.run();
        }
        assert_eq!(thread.join().unwrap(), Ok(()));
        assert_eq!(*reader.got.lock(), data);
    }

    #[test]
    fn closing_ends_the_wait() {
        let input = SerialInput::default();
        let sender = input.clone();
        let thread = thread::spawn(move || sender.push(&vec![0; CAPACITY + 1]));
        input.close();
        assert_eq!(thread.join().unwrap(), Err(Closed));
        assert!(input.is_closed());
    }
}
