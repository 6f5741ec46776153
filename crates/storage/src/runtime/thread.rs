//! A thread that does nothing but disks.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    task::{Poll, Waker},
    thread::{self, JoinHandle},
};

use super::{EngineKind, LocalFuture, Runtime};

type Job = Box<dyn FnOnce(&Runtime) -> LocalFuture<'static, ()> + Send>;

#[derive(Default)]
struct Inbox {
    jobs: Vec<Job>,
    waker: Option<Waker>,
    stop: bool,
}

struct Shared {
    inbox: Mutex<Inbox>,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Inbox)) {
        let waker = {
            let mut inbox = self.inbox();
            change(&mut inbox);
            inbox.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// An I/O thread: one executor with its engine. Disks are opened on one and stay there. When the last handle is
/// dropped, the thread ends once all its tasks have.
#[derive(Clone)]
pub struct IoThread {
    owner: Arc<Owner>,
}

struct Owner {
    shared: Arc<Shared>,
    engine: EngineKind,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl IoThread {
    /// Starts a thread called `name`.
    ///
    /// # Errors
    /// The host's: no thread, or not the engine asked for.
    pub fn start(name: &str, kind: EngineKind) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
        });
        let (say, hear) = mpsc::sync_channel(1);
        let theirs = shared.clone();
        let thread =
            thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || match Runtime::new(kind) {
                    Ok(runtime) => {
                        let _ = say.send(Ok(runtime.engine()));
                        drop(say);
                        runtime.block_on(serve(&runtime, &theirs));
                    }
                    Err(error) => {
                        let _ = say.send(Err(error));
                    }
                })?;
        let engine = hear
            .recv()
            .map_err(|_| io::Error::other("the I/O thread ended"))??;
        Ok(Self {
            owner: Arc::new(Owner {
                shared,
                engine,
                thread: Mutex::new(Some(thread)),
            }),
        })
    }

    /// Which engine it has: never [`EngineKind::Auto`].
    pub fn engine(&self) -> EngineKind {
        self.owner.engine
    }

    /// Has the thread run a task.
    pub fn spawn<F>(&self, job: impl FnOnce(&Runtime) -> F + Send + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        let job: Job = Box::new(move |runtime| Box::pin(job(runtime)));
        self.owner.shared.change(|inbox| inbox.jobs.push(job));
    }

    /// Has the thread run a task and waits for its result. Must not be called on the thread itself.
    ///
    /// # Errors
    /// When the thread has ended, or the task was dropped.
    pub fn ask<T, F>(&self, job: impl FnOnce(Runtime) -> F + Send + 'static) -> io::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (say, hear) = mpsc::sync_channel(1);
        self.spawn(move |runtime| {
            let future = job(runtime.clone());
            async move {
                let _ = say.send(future.await);
            }
        });
        hear.recv()
            .map_err(|_| io::Error::other("the I/O thread ended"))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.change(|inbox| inbox.stop = true);
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.thread().id() != thread::current().id()
        {
            // If it panicked, that was said; there is nothing to add.
            let _ = thread.join();
        }
    }
}

/// Starts what arrives, until it is told to stop and every task has ended.
async fn serve(runtime: &Runtime, shared: &Shared) {
    loop {
        let (jobs, stop) = std::future::poll_fn(|cx| {
            let mut inbox = shared.inbox();
            if inbox.jobs.is_empty() && !inbox.stop {
                inbox.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready((std::mem::take(&mut inbox.jobs), inbox.stop))
        })
        .await;
        for job in jobs {
            runtime.spawn(job(runtime));
        }
        if stop {
            break;
        }
    }
    while runtime.tasks() > 0 {
        super::local::yield_now().await;
        if runtime.tasks() > 0 {
            let soon = std::time::Instant::now() + std::time::Duration::from_millis(1);
            runtime.sleep_until(soon).await;
        }
    }
}
