//! The thread that gives devices their timers and lets them make progress.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap, HashMap},
    sync::Arc,
    task::{Context, Wake, Waker},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use caisson_device::{Clock, TimerKey, TimerService};
use parking_lot::{Condvar, Mutex};

use super::{clock::MachineClock, slot::DeviceSlot};
use crate::{run::gate::Gate, serial::Pump};

/// Delivers expiries ([`caisson_device::Device::timer`]) and wake-ups ([`caisson_device::Device::poll`]) on one
/// thread. Timers are absolute machine times, so lateness does not add up.
pub(crate) struct Worker {
    state: Mutex<State>,
    changed: Condvar,
    work: ArcSwap<Table>,
    progress: Mutex<u64>,
    progressed: Condvar,
}

/// Who can be woken.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    Device(u32),
    Pump(u32),
}

/// Who is to be called.
#[derive(Default)]
struct Table {
    /// By the number in their [`TimerKey`].
    devices: Vec<Arc<DeviceSlot>>,
    pumps: Vec<Pump>,
}

#[derive(Default)]
struct State {
    /// When each timer is due, and which setting of it that is.
    armed: HashMap<TimerKey, (u64, u64)>,
    /// All settings, stale ones among them.
    queue: BinaryHeap<Reverse<(u64, u64, TimerKey)>>,
    settings: u64,
    woken: BTreeSet<Who>,
    sleeping_until: Option<u64>,
    clock_stands: bool,
    stop: bool,
}

impl State {
    /// The earliest setting that still holds.
    fn next(&mut self) -> Option<(u64, TimerKey)> {
        while let Some(Reverse((at, setting, key))) = self.queue.peek().copied() {
            if self.armed.get(&key) == Some(&(at, setting)) {
                return Some((at, key));
            }
            self.queue.pop();
        }
        None
    }
}

/// Wakes one device or pump.
struct WorkerWaker {
    worker: Arc<Worker>,
    who: Who,
}

impl Wake for WorkerWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut state = self.worker.state.lock();
        if state.woken.insert(self.who) {
            self.worker.changed.notify_all();
        }
    }
}

/// What the worker thread does next.
enum Work {
    Timer(TimerKey),
    Wake(Who),
}

impl Worker {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            work: ArcSwap::default(),
            progress: Mutex::new(0),
            progressed: Condvar::new(),
        })
    }

    /// Says which devices and pumps there are. The position of a device is the number that its timers carry. Each is
    /// called once soon.
    pub(crate) fn set_work(&self, devices: Vec<Arc<DeviceSlot>>, pumps: Vec<Pump>) {
        let all = (0..devices.len() as u32)
            .map(Who::Device)
            .chain((0..pumps.len() as u32).map(Who::Pump));
        let mut state = self.state.lock();
        state.woken.extend(all);
        drop(state);
        self.work.store(Arc::new(Table { devices, pumps }));
        self.changed.notify_all();
    }

    /// Lets go of all devices and pumps, which hold the worker in turn. Nobody is called any more.
    pub(crate) fn forget_work(&self) {
        self.work.store(Arc::default());
    }

    /// Wakes pump number `number`.
    pub(crate) fn pump_waker(self: &Arc<Self>, number: u32) -> Waker {
        self.waker(Who::Pump(number))
    }

    /// Has every device polled soon.
    pub(crate) fn wake_devices(&self) {
        let all = 0..self.work.load().devices.len() as u32;
        self.state.lock().woken.extend(all.map(Who::Device));
        self.changed.notify_all();
    }

    /// Wakes the device at position `device`.
    pub(crate) fn device_waker(self: &Arc<Self>, device: u32) -> Waker {
        self.waker(Who::Device(device))
    }

    fn waker(self: &Arc<Self>, who: Who) -> Waker {
        Waker::from(Arc::new(WorkerWaker {
            worker: self.clone(),
            who,
        }))
    }

    /// Says whether machine time passes. While it does not, no timer comes due.
    pub(crate) fn set_clock_running(&self, running: bool) {
        let mut state = self.state.lock();
        state.clock_stands = !running;
        self.changed.notify_all();
    }

    /// Ends [`run`](Self::run).
    pub(crate) fn stop(&self) {
        self.state.lock().stop = true;
        self.changed.notify_all();
        self.announce();
    }

    /// A number that changes whenever a device may have made progress.
    pub(crate) fn progress(&self) -> u64 {
        *self.progress.lock()
    }

    /// Waits until [`progress`](Self::progress) is no longer `seen`, or for `at_most`.
    pub(crate) fn wait_for_progress(&self, seen: u64, at_most: Duration) {
        let mut progress = self.progress.lock();
        if *progress == seen {
            self.progressed.wait_for(&mut progress, at_most);
        }
    }

    /// Tells waiters that devices may have made progress.
    pub(crate) fn announce(&self) {
        *self.progress.lock() += 1;
        self.progressed.notify_all();
    }

    /// The thread's body: until [`stop`](Self::stop), or until `gate` is gone.
    pub(crate) fn run(self: &Arc<Self>, clock: &MachineClock, gate: &Gate) {
        let table = self.work.load_full();
        let wakers: Vec<Waker> = (0..table.devices.len() as u32)
            .map(|device| self.waker(Who::Device(device)))
            .collect();
        while let Some(work) = self.next_work(clock) {
            let Some(_inside) = gate.enter() else { return };
            match work {
                Work::Timer(key) => {
                    if let Some(slot) = table.devices.get(key.device as usize) {
                        slot.lock().timer(key.id);
                    }
                }
                Work::Wake(Who::Device(device)) => {
                    let device = device as usize;
                    if let (Some(slot), Some(waker)) =
                        (table.devices.get(device), wakers.get(device))
                    {
                        slot.lock().poll(&mut Context::from_waker(waker));
                    }
                }
                Work::Wake(Who::Pump(pump)) => {
                    if let Some(pump) = table.pumps.get(pump as usize) {
                        pump.run();
                    }
                }
            }
            self.announce();
        }
    }

    fn next_work(&self, clock: &MachineClock) -> Option<Work> {
        let mut state = self.state.lock();
        loop {
            if state.stop {
                return None;
            }
            if let Some(who) = state.woken.pop_first() {
                return Some(Work::Wake(who));
            }
            let now = clock.now();
            match state.next() {
                Some((at, key)) if at <= now => {
                    state.queue.pop();
                    state.armed.remove(&key);
                    return Some(Work::Timer(key));
                }
                Some((at, _)) if !state.clock_stands => {
                    let wait = Duration::from_nanos(at - now).min(Duration::from_secs(3600));
                    state.sleeping_until = Some(at);
                    self.changed.wait_until(&mut state, Instant::now() + wait);
                }
                _ => {
                    state.sleeping_until = None;
                    self.changed.wait(&mut state);
                }
            }
        }
    }
}

impl TimerService for Worker {
    fn arm(&self, key: TimerKey, at: u64) {
        let mut state = self.state.lock();
        state.settings += 1;
        let setting = state.settings;
        state.armed.insert(key, (at, setting));
        state.queue.push(Reverse((at, setting, key)));
        // A guest that arms one timer again and again must not make the queue grow.
        if state.queue.len() > 64 + 4 * state.armed.len() {
            let live = state
                .armed
                .iter()
                .map(|(key, (at, setting))| Reverse((*at, *setting, *key)))
                .collect();
            state.queue = live;
        }
        if state.sleeping_until.is_none_or(|until| at < until) {
            self.changed.notify_all();
        }
    }

    fn cancel(&self, key: TimerKey) {
        self.state.lock().armed.remove(&key);
    }
}
