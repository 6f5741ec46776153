//! From the device to the host end.

use std::{
    collections::VecDeque,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use caisson_device::ByteSink;
use parking_lot::{Condvar, Mutex};

use super::{HostEnd, PanicWatch};

/// How many bytes wait for the host end at most.
const CAPACITY: usize = 64 << 10;
/// After a write, how long the port's thread lets further bytes gather. Guests write consoles byte by byte, and waking
/// a thread for each would cost more than the write.
const GATHER: Duration = Duration::from_micros(500);

/// Output of one port that the host end has not taken yet.
pub(crate) struct OutputQueue {
    state: Mutex<State>,
    changed: Condvar,
    watch: Option<PanicWatch>,
    /// Has the device told that there is room again.
    on_room: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    /// The device was refused bytes and waits to be told of room.
    refused: bool,
    /// It is to be told.
    room: bool,
    /// The port's thread sleeps until there is something to do.
    idle: bool,
    /// The port's thread is writing.
    writing: bool,
    /// Somebody waits for the queue to be empty: nothing more is to gather.
    draining: bool,
    /// The host end is broken or gone: bytes are dropped.
    broken: bool,
    stop: bool,
    total: u64,
}

impl OutputQueue {
    pub(crate) fn new(watch: Option<PanicWatch>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            watch,
            on_room: OnceLock::new(),
        })
    }

    /// Says whom to call when there is room again for a device that was refused.
    pub(crate) fn on_room(&self, room: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_room.set(Box::new(room));
    }

    /// Whether there is room again since the device was refused and not told of it.
    pub(crate) fn take_room(&self) -> bool {
        core::mem::take(&mut self.state.lock().room)
    }

    /// The last words of a kernel that panicked, if it did.
    pub(crate) fn panic_message(&self) -> Option<String> {
        self.watch.as_ref().and_then(PanicWatch::message)
    }

    /// Takes over that the kernel panicked with `message`.
    pub(crate) fn restore_panic(&self, message: &str) {
        if let Some(watch) = &self.watch {
            watch.restore(message);
        }
    }

    /// Forgets what the guest before a reset said.
    pub(crate) fn reset_watch(&self) {
        if let Some(watch) = &self.watch {
            watch.reset();
        }
    }

    /// How many bytes the guest sent.
    pub(crate) fn total(&self) -> u64 {
        self.state.lock().total
    }

    /// The body of the port's thread: until [`stop`](Self::stop), and then until the queue is empty.
    pub(crate) fn run(&self, end: &mut dyn HostEnd) {
        let mut piece = Vec::new();
        let mut state = self.state.lock();
        loop {
            if state.bytes.is_empty() {
                if state.stop {
                    break;
                }
                state.idle = true;
                self.changed.wait(&mut state);
                state.idle = false;
                continue;
            }
            piece.clear();
            let (front, back) = state.bytes.as_slices();
            piece.extend_from_slice(front);
            piece.extend_from_slice(back);
            state.bytes.clear();
            state.writing = true;
            let refused = core::mem::take(&mut state.refused);
            state.room |= refused;
            let broken = state.broken;
            drop(state);
            if refused && let Some(room) = self.on_room.get() {
                room();
            }
            let failed = !broken && end.send(&piece).is_err();
            state = self.state.lock();
            state.broken |= failed;
            state.writing = false;
            if state.bytes.is_empty() {
                self.changed.notify_all();
            }
            if !refused {
                let until = Instant::now() + GATHER;
                while !state.stop
                    && !state.draining
                    && !self.changed.wait_until(&mut state, until).timed_out()
                {}
            }
        }
        // A thread that leaves by a panic leaves the queue stopped as well: see `abandon`.
        drop(state);
        end.close();
    }

    /// Drops what is there and what comes, because the host end is gone.
    pub(crate) fn abandon(&self) {
        let mut state = self.state.lock();
        state.broken = true;
        state.bytes.clear();
        state.writing = false;
        self.changed.notify_all();
    }

    /// Waits until everything has been taken, until `deadline`, or until `give_up` says so. Returns whether it has.
    pub(crate) fn drain(&self, deadline: Option<Instant>, give_up: impl Fn() -> bool) -> bool {
        let mut state = self.state.lock();
        state.draining = true;
        self.changed.notify_all();
        while !state.bytes.is_empty() || state.writing {
            if give_up() || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return false;
            }
            self.changed.wait_for(&mut state, Duration::from_millis(50));
        }
        true
    }

    /// Ends [`run`](Self::run) once the queue is empty.
    pub(crate) fn stop(&self) {
        self.state.lock().stop = true;
        self.changed.notify_all();
    }
}

impl ByteSink for OutputQueue {
    fn write(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock();
        let taken = if state.broken {
            bytes.len()
        } else {
            bytes.len().min(CAPACITY - state.bytes.len())
        };
        let accepted = bytes.get(..taken).unwrap_or_default();
        if !state.broken {
            state.bytes.extend(accepted);
        }
        state.total += taken as u64;
        state.refused |= taken < bytes.len();
        if state.idle {
            state.idle = false;
            self.changed.notify_all();
        }
        drop(state);
        if let Some(watch) = &self.watch {
            watch.see(accepted);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::mpsc, thread};

    use super::*;

    struct Slow {
        pass: mpsc::Receiver<()>,
        got: mpsc::Sender<Vec<u8>>,
    }

    impl HostEnd for Slow {
        fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
            self.pass.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
            self.got
                .send(bytes.to_vec())
                .map_err(|_| io::ErrorKind::BrokenPipe.into())
        }
    }

    #[test]
    fn a_slow_end_makes_the_device_wait_and_nothing_is_lost() {
        let queue = OutputQueue::new(None);
        let (told, rooms) = mpsc::channel();
        queue.on_room(move || told.send(()).unwrap());
        let (pass, passes) = mpsc::channel();
        let (got, pieces) = mpsc::channel();
        let theirs = queue.clone();
        let thread = thread::spawn(move || theirs.run(&mut Slow { pass: passes, got }));
        let data: Vec<u8> = (0..CAPACITY * 3).map(|n| (n % 251) as u8).collect();
        let mut sent = 0;
        let mut received = Vec::new();
        while sent < data.len() {
            let taken = queue.write(&data[sent..]);
            sent += taken;
            if sent < data.len() {
                pass.send(()).unwrap();
                rooms.recv().unwrap();
            }
        }
        queue.stop();
        while received.len() < data.len() {
            // The thread may be through already, on passes from above.
            let _ = pass.send(());
            received.extend(pieces.recv().unwrap());
        }
        thread.join().unwrap();
        assert_eq!(received, data);
        assert!(queue.drain(None, || false));
    }

    #[test]
    fn a_broken_end_drops_output_and_never_refuses() {
        let queue = OutputQueue::new(None);
        let (pass, passes) = mpsc::channel();
        let (got, _) = mpsc::channel();
        drop(pass);
        let theirs = queue.clone();
        let thread = thread::spawn(move || theirs.run(&mut Slow { pass: passes, got }));
        queue.write(b"lost");
        assert!(queue.drain(None, || false));
        assert_eq!(queue.write(&vec![0; 2 * CAPACITY]), 2 * CAPACITY);
        queue.stop();
        thread.join().unwrap();
    }

    #[test]
    fn draining_gives_up_when_told() {
        let queue = OutputQueue::new(None);
        queue.write(b"stuck");
        assert!(!queue.drain(Some(Instant::now()), || false));
        assert!(!queue.drain(None, || true));
        queue.abandon();
        assert!(queue.drain(None, || false));
    }
}
