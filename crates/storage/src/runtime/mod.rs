//! The executor of an I/O thread: tasks that never leave the thread, timers, and one engine for calls to the host.
//!
//! All tasks that can run are run, and then the engine is entered once, which submits what they asked for and waits if
//! nothing can run. So the number of system calls goes down as the load goes up.

mod engine;
pub mod local;
mod pool;
mod remote;
mod ring;
mod slab;
mod thread;
mod timer;

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Instant,
};

pub use engine::{Call, EngineKind};
pub use thread::IoThread;

use caisson_memory::Pinned;
use engine::Engine;
use remote::{MAIN, Remote, TaskWaker};
use slab::Slab;
use timer::Timers;

/// A future of one thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// How many rounds of tasks may run before the engine is looked at.
const ROUNDS: usize = 8;

struct Task {
    /// `None` while it runs.
    future: Option<LocalFuture<'static, ()>>,
    waker: Arc<TaskWaker>,
}

struct Inner {
    engine: Engine,
    tasks: RefCell<Slab<Task>>,
    timers: RefCell<Timers>,
    remote: Arc<Remote>,
    running: Cell<bool>,
}

/// A single-threaded executor with its engine. Clones are the same executor.
#[derive(Clone)]
pub struct Runtime {
    inner: Rc<Inner>,
}

impl Runtime {
    /// An executor with the engine asked for; [`EngineKind::Auto`] takes io_uring where the host has it, and else
    /// threads.
    ///
    /// # Errors
    /// The host's: no io_uring where it was asked for, no descriptors left.
    pub fn new(kind: EngineKind) -> io::Result<Self> {
        let remote = Arc::new(Remote::new()?);
        let engine = Engine::new(kind, &remote)?;
        Ok(Self {
            inner: Rc::new(Inner {
                engine,
                tasks: RefCell::default(),
                timers: RefCell::default(),
                remote,
                running: Cell::new(false),
            }),
        })
    }

    /// Which engine it is: never [`EngineKind::Auto`].
    pub fn engine(&self) -> EngineKind {
        self.inner.engine.kind()
    }

    /// Starts a task of its own.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let mut tasks = self.inner.tasks.borrow_mut();
        let remote = &self.inner.remote;
        let id = tasks.insert_with(|id| Task {
            future: Some(Box::pin(future)),
            waker: Arc::new(TaskWaker::new(remote.clone(), id)),
        });
        let waker = tasks.get(id).map(|task| task.waker.clone());
        drop(tasks);
        if let Some(waker) = waker {
            waker.wake_now();
        }
    }

    /// How many tasks have not ended.
    pub fn tasks(&self) -> usize {
        self.inner.tasks.borrow().len()
    }

    /// Makes a call to the host's kernel. What it uses (`file`, `memory`) stays until the kernel is done with it, also
    /// when the future is dropped before: then only the answer is lost.
    pub fn call(
        &self,
        file: &Arc<std::fs::File>,
        call: Call,
        memory: Pinned,
    ) -> impl Future<Output = io::Result<usize>> + use<> {
        let inner = self.inner.clone();
        let key = inner.engine.start(file, call, memory);
        engine::Pending::new(inner, key)
    }

    /// Waits until `at`.
    pub async fn sleep_until(&self, at: Instant) {
        std::future::poll_fn(|cx| {
            if Instant::now() >= at {
                return Poll::Ready(());
            }
            let mut timers = self.inner.timers.borrow_mut();
            timers.add(at, cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Runs `future` to its end, and meanwhile all tasks.
    ///
    /// # Panics
    /// When called within itself.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let inner = &*self.inner;
        assert!(!inner.running.replace(true), "an executor runs itself");
        let mut future = pin!(future);
        let main = Arc::new(TaskWaker::new(inner.remote.clone(), MAIN));
        main.wake_now();
        let waker = Waker::from(main.clone());
        loop {
            for _ in 0..ROUNDS {
                let woken = inner.remote.take();
                if woken.is_empty() {
                    break;
                }
                for id in woken {
                    if id == MAIN {
                        main.taken();
                        if let Poll::Ready(value) =
                            future.as_mut().poll(&mut Context::from_waker(&waker))
                        {
                            inner.running.set(false);
                            return value;
                        }
                    } else {
                        self.run(id);
                    }
                }
            }
            self.turn();
        }
    }

    /// Polls one task.
    fn run(&self, id: usize) {
        let taken = {
            let mut tasks = self.inner.tasks.borrow_mut();
            tasks
                .get_mut(id)
                .and_then(|task| Some((task.future.take()?, task.waker.clone())))
        };
        let Some((mut future, task)) = taken else {
            return;
        };
        task.taken();
        let waker = Waker::from(task);
        let ended = future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready();
        if ended {
            // Dropped while the table is not borrowed: its destructor may start a task.
            drop(future);
            let task = self.inner.tasks.borrow_mut().remove(id);
            drop(task);
        } else if let Some(task) = self.inner.tasks.borrow_mut().get_mut(id) {
            task.future = Some(future);
        }
    }

    /// Enters the engine: waits if nothing can run.
    fn turn(&self) {
        let inner = &*self.inner;
        let now = Instant::now();
        let (due, next) = inner.timers.borrow_mut().expire(now);
        for waker in due {
            waker.wake();
        }
        let sleep = inner.remote.begin_sleep();
        let timeout = next.map(|at| at.saturating_duration_since(now));
        inner.engine.turn(sleep, timeout);
        inner.remote.end_sleep();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Tasks hold pending calls, which look at the engine when they are dropped.
        let tasks = self.tasks.get_mut().take_all();
        drop(tasks);
        self.engine.drain();
    }
}
