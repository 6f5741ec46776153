//! How calls reach the host's kernel.

use std::{
    cell::RefCell,
    fs::File,
    future::Future,
    io,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use caisson_memory::Pinned;

use super::{Inner, pool::Pool, remote::Remote, ring::Ring, slab::Slab};

/// Ways to reach the host's kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring where the host allows it, else threads.
    #[default]
    Auto,
    /// io_uring: one ring for the thread.
    Ring,
    /// Threads that make blocking calls: costs two to four times the processor time.
    Threads,
}

/// A call that may take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Reads into memory from this offset on; the answer is how many bytes.
    Read {
        /// Offset in the file.
        at: u64,
    },
    /// Writes from memory to this offset; the answer is how many bytes.
    Write {
        /// Offset in the file.
        at: u64,
        /// Whether the data is to be durable when the call ends.
        durable: bool,
    },
    /// Makes data, and what is needed to find it, durable.
    Sync,
    /// Gives a range's space back; it reads as zeroes.
    Punch {
        /// Offset in the file.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Makes a range read as zeroes and keeps its space; may make the file longer.
    Zero {
        /// Offset in the file.
        at: u64,
        /// Bytes.
        len: u64,
    },
}

/// Where a call stands.
pub(super) enum Progress {
    Waiting(Option<Waker>),
    /// Nobody wants the answer any more.
    Detached,
    /// The answer as the kernel gives it: negative error numbers.
    Done(i32),
}

/// The calls under way, with all that the kernel uses for them.
pub(super) struct Operation {
    pub(super) progress: Progress,
    /// Read by the kernel when the call is submitted.
    pub(super) _iovecs: Vec<libc::iovec>,
    pub(super) _file: Arc<File>,
    pub(super) _memory: Pinned,
}

pub(super) type Operations = RefCell<Slab<Operation>>;

/// Notes an answer and wakes who waits for it.
pub(super) fn finish(operations: &Operations, key: usize, answer: i32) {
    let mut table = operations.borrow_mut();
    let Some(operation) = table.get_mut(key) else {
        return;
    };
    let before = std::mem::replace(&mut operation.progress, Progress::Done(answer));
    let ended = match before {
        Progress::Detached => table.remove(key),
        Progress::Waiting(waker) => {
            drop(table);
            if let Some(waker) = waker {
                waker.wake();
            }
            None
        }
        Progress::Done(_) => None,
    };
    // Its destructor may unmap memory, so not while the table is borrowed.
    drop(ended);
}

pub(super) enum Engine {
    Ring(Box<Ring>),
    Pool(Pool),
}

impl Engine {
    pub(super) fn new(kind: EngineKind, remote: &Arc<Remote>) -> io::Result<Self> {
        Ok(match kind {
            EngineKind::Ring => Self::Ring(Box::new(Ring::new(remote.clone())?)),
            EngineKind::Threads => Self::Pool(Pool::new(remote.clone())),
            EngineKind::Auto => match Ring::new(remote.clone()) {
                Ok(ring) => Self::Ring(Box::new(ring)),
                Err(error) => {
                    tracing::info!("no io_uring ({error}): disks use threads");
                    Self::Pool(Pool::new(remote.clone()))
                }
            },
        })
    }

    pub(super) fn kind(&self) -> EngineKind {
        match self {
            Self::Ring(_) => EngineKind::Ring,
            Self::Pool(_) => EngineKind::Threads,
        }
    }

    fn operations(&self) -> &Operations {
        match self {
            Self::Ring(ring) => ring.operations(),
            Self::Pool(pool) => pool.operations(),
        }
    }

    /// Begins a call, or queues it for the next [`Engine::turn`].
    pub(super) fn start(&self, file: &Arc<File>, call: Call, memory: Pinned) -> usize {
        match self {
            Self::Ring(ring) => ring.start(file, call, memory),
            Self::Pool(pool) => pool.start(file, call, memory),
        }
    }

    /// Hands queued calls to the kernel and takes answers; waits for one of them, the bell or `timeout` if `sleep`.
    pub(super) fn turn(&self, sleep: bool, timeout: Option<Duration>) {
        match self {
            Self::Ring(ring) => ring.turn(sleep, timeout),
            Self::Pool(pool) => pool.turn(sleep, timeout),
        }
    }

    /// Waits for the end of every call.
    pub(super) fn drain(&self) {
        while self.operations().borrow().len() > 0 {
            self.turn(true, Some(Duration::from_millis(100)));
        }
    }
}

/// The answer of a call.
pub(super) struct Pending {
    inner: Rc<Inner>,
    key: Option<usize>,
}

impl Pending {
    pub(super) fn new(inner: Rc<Inner>, key: usize) -> Self {
        Self {
            inner,
            key: Some(key),
        }
    }
}

impl Future for Pending {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(key) = self.key else {
            return Poll::Ready(Err(io::Error::other("a call was awaited twice")));
        };
        let mut table = self.inner.engine.operations().borrow_mut();
        let Some(operation) = table.get_mut(key) else {
            return Poll::Ready(Err(io::Error::other("a call was forgotten")));
        };
        let answer = match &mut operation.progress {
            Progress::Done(answer) => *answer,
            progress => {
                *progress = Progress::Waiting(Some(cx.waker().clone()));
                return Poll::Pending;
            }
        };
        let ended = table.remove(key);
        drop(table);
        drop(ended);
        self.key = None;
        Poll::Ready(
            usize::try_from(answer)
                .map_err(|_| io::Error::from_raw_os_error(answer.wrapping_neg())),
        )
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let Some(key) = self.key else {
            return;
        };
        let mut table = self.inner.engine.operations().borrow_mut();
        let ended = match table.get_mut(key) {
            Some(operation) if matches!(operation.progress, Progress::Waiting(_)) => {
                operation.progress = Progress::Detached;
                None
            }
            _ => table.remove(key),
        };
        drop(table);
        drop(ended);
    }
}
