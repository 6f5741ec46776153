//! The user-mode network: the thread that runs its router, and the queues to the device.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    thread::{self, JoinHandle},
    time::Instant,
};

use atomic_waker::AtomicWaker;
use caisson_packet::{Frame, Offloads, PacketBackend, PacketInfo};
use caisson_user_net::{FlowId, Protocol, Router};
use rustix::{
    event::{EventfdFlags, Timespec, epoll, eventfd},
    io::Errno,
};

use crate::{
    NetError, UserNetworkSpec,
    sockets::{FORWARDS, Sockets, WAKE},
};

/// How many frames wait in each direction.
const FRAMES: usize = 256;
/// The most that do: answers and resets are sent without asking for room.
const MOST_FRAMES: usize = 8192;
/// Events that are taken at once.
const EVENTS: usize = 256;
/// Connections to a forward that are accepted at once, and datagrams taken.
const ACCEPTS: usize = 64;
/// The longest sleep, in nanoseconds.
const HOUR: u64 = 3600 * 1_000_000_000;

/// A user-mode network. Dropping it ends its connections.
pub struct UserNetwork {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    engine: Mutex<Engine>,
    to_router: Mutex<VecDeque<Frame>>,
    to_guest: Mutex<VecDeque<Frame>>,
    /// The device waits for room, or for a frame.
    sender: AtomicWaker,
    receiver: AtomicWaker,
    /// The router waits for room for frames.
    starved: AtomicBool,
    stop: AtomicBool,
    /// Connections of another process's are to be ended.
    restored: AtomicBool,
    wake: OwnedFd,
    epoch: Instant,
    info: PacketInfo,
}

struct Engine {
    router: Router,
    sockets: Sockets,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl UserNetwork {
    /// Opens the host's ends and starts the thread.
    ///
    /// # Errors
    /// A forward's port that is taken, or a host out of descriptors or threads.
    pub fn open(spec: UserNetworkSpec) -> Result<Arc<Self>, NetError> {
        let setup = |errno: Errno| NetError::Setup(errno.into());
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(setup)?;
        let sockets = Sockets::open(&spec, &wake)?;
        let events = sockets.events().map_err(NetError::Setup)?;
        let mtu = spec.router.mtu;
        let router = Router::new(spec.router);
        let shared = Arc::new(Shared {
            engine: Mutex::new(Engine { router, sockets }),
            to_router: Mutex::default(),
            to_guest: Mutex::default(),
            sender: AtomicWaker::new(),
            receiver: AtomicWaker::new(),
            starved: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            restored: AtomicBool::new(false),
            wake,
            epoch: Instant::now(),
            info: PacketInfo {
                mtu,
                offloads: true,
            },
        });
        let worker = shared.clone();
        let thread = thread::Builder::new()
            .name("net".into())
            .spawn(move || worker.run(&events))
            .map_err(NetError::Setup)?;
        Ok(Arc::new(Self {
            shared,
            thread: Some(thread),
        }))
    }
}

impl Drop for UserNetwork {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn wake(&self) {
        // Full means that it is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn run(&self, events: &OwnedFd) {
        let mut list = Vec::with_capacity(EVENTS);
        let mut again = false;
        while !self.stop.load(Ordering::SeqCst) {
            let wait = match again {
                true => 0,
                false => {
                    let next = lock(&self.engine).router.next_deadline();
                    // A millisecond late rather than twice.
                    next.map_or(HOUR, |at| at.saturating_sub(self.now()).min(HOUR))
                }
            };
            let wait = Timespec {
                tv_sec: (wait / 1_000_000_000) as i64,
                tv_nsec: (wait % 1_000_000_000) as _,
            };
            list.clear();
            match epoll::wait(
                events,
                rustix::buffer::spare_capacity(&mut list),
                Some(&wait),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!("the network ends: {}", io::Error::from(errno));
                    return;
                }
            }
            again = self.turn(&list);
        }
    }

    /// Works off what there is. Returns whether there is more.
    fn turn(&self, events: &[epoll::Event]) -> bool {
        let mut engine = lock(&self.engine);
        let Engine { router, sockets } = &mut *engine;
        let now = self.now();
        let frames = std::mem::take(&mut *lock(&self.to_router));
        if !frames.is_empty() {
            self.sender.wake();
        }
        let waiting = lock(&self.to_guest).len();
        router.set_room(FRAMES.saturating_sub(waiting), waiting > 0, now, sockets);
        for frame in &frames {
            router.receive(frame, now, sockets);
        }
        for event in events {
            // It is packed.
            let (data, flags) = (event.data, event.flags);
            match data.u64() {
                WAKE => {
                    let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                }
                number if number > FORWARDS - (1 << 16) => {
                    forward(router, sockets, (FORWARDS - number) as usize, now);
                }
                number => {
                    let readable = flags.intersects(
                        epoll::EventFlags::IN
                            | epoll::EventFlags::HUP
                            | epoll::EventFlags::RDHUP
                            | epoll::EventFlags::ERR,
                    );
                    router.on_ready(FlowId::from_bits(number), readable, now, sockets);
                }
            }
        }
        router.on_timer(now, sockets);
        router.flush(now, sockets);
        self.deliver(router)
    }

    /// Passes the router's frames on. Returns whether it wants to go on at once.
    fn deliver(&self, router: &mut Router) -> bool {
        let mut queue = lock(&self.to_guest);
        let before = queue.len();
        while let Some(frame) = router.take_frame() {
            if queue.len() < MOST_FRAMES {
                queue.push_back(frame);
            }
        }
        let after = queue.len();
        if router.is_stalled() {
            self.starved.store(true, Ordering::SeqCst);
        }
        drop(queue);
        if after > before {
            self.receiver.wake();
        }
        router.is_stalled() && after <= FRAMES / 2
    }
}

/// Somebody comes to a forward.
fn forward(router: &mut Router, sockets: &mut Sockets, index: usize, now: u64) {
    let Some(spec) = sockets.forward(index) else {
        return;
    };
    match spec.protocol {
        Protocol::Tcp => {
            for _ in 0..ACCEPTS {
                let Some((socket, peer)) = sockets.accept(index) else {
                    return;
                };
                // Where there is no room the connection ends here.
                if let Some(flow) = router.accept(peer, spec.guest, now, sockets)
                    && sockets.adopt(flow, socket, true).is_err()
                {
                    tracing::warn!("network: no room for a connection to {spec}");
                }
            }
        }
        Protocol::Udp => {
            let mut buffer = vec![0; 1 << 16];
            for _ in 0..ACCEPTS {
                let Some((len, peer)) = sockets.receive(index, &mut buffer) else {
                    return;
                };
                let data = buffer.get(..len).unwrap_or_default();
                router.forward_datagram(index as u16, peer, spec.guest, data, now, sockets);
            }
        }
    }
}

impl PacketBackend for UserNetwork {
    fn info(&self) -> PacketInfo {
        self.shared.info
    }

    fn set_receive_offloads(&self, offloads: Offloads) {
        lock(&self.shared.engine).router.set_offloads(offloads);
    }

    fn poll_send(&self, cx: &mut Context<'_>) -> Poll<()> {
        let has_room = || lock(&self.shared.to_router).len() < FRAMES;
        if has_room() {
            return Poll::Ready(());
        }
        self.shared.sender.register(cx.waker());
        match has_room() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    fn send(&self, frame: Frame) {
        let mut queue = lock(&self.shared.to_router);
        if queue.len() < FRAMES {
            queue.push_back(frame);
        }
    }

    fn kick(&self) {
        self.shared.wake();
    }

    fn poll_receive(&self, cx: &mut Context<'_>) -> Poll<Frame> {
        if self.shared.restored.swap(false, Ordering::SeqCst) {
            let mut engine = lock(&self.shared.engine);
            engine.router.end_restored();
            self.shared.deliver(&mut engine.router);
        }
        let take = || {
            let mut queue = lock(&self.shared.to_guest);
            let frame = queue.pop_front();
            (frame, queue.len())
        };
        let (mut frame, mut left) = take();
        if frame.is_none() {
            self.shared.receiver.register(cx.waker());
            (frame, left) = take();
        }
        if left <= FRAMES / 2 && self.shared.starved.swap(false, Ordering::SeqCst) {
            self.shared.wake();
        }
        frame.map_or(Poll::Pending, Poll::Ready)
    }

    fn reset(&self) {
        let mut engine = lock(&self.shared.engine);
        let Engine { router, sockets } = &mut *engine;
        lock(&self.shared.to_router).clear();
        lock(&self.shared.to_guest).clear();
        router.reset(sockets);
        self.shared.sender.wake();
    }

    fn save(&self) -> Vec<u8> {
        lock(&self.shared.engine).router.save()
    }

    fn restore(&self, saved: &[u8]) {
        let mut engine = lock(&self.shared.engine);
        engine.router.restore(saved);
        // The guest is told when it runs again.
        self.shared.restored.store(true, Ordering::SeqCst);
    }
}
