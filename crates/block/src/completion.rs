//! The answer to a request.

use alloc::sync::Arc;
use core::{
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicU8, AtomicU64, Ordering},
    task::{Context, Poll},
};

use atomic_waker::AtomicWaker;

use crate::BlockError;

const PENDING: u8 = 0;
const DONE: u8 = u8::MAX;

struct Shared {
    /// [`PENDING`], [`DONE`] or the code of an error.
    outcome: AtomicU8,
    waker: AtomicWaker,
}

static ABANDONED: AtomicU64 = AtomicU64::new(0);

/// How many requests of this process were dropped without having been completed. Anything but 0 is a bug of a backend;
/// tests assert it.
pub fn abandoned() -> u64 {
    ABANDONED.load(Ordering::Acquire)
}

/// A connected pair.
pub(crate) fn pair() -> (Completer, Completion) {
    let shared = Arc::new(Shared {
        outcome: AtomicU8::new(PENDING),
        waker: AtomicWaker::new(),
    });
    let completer = Completer {
        shared: Some(shared.clone()),
    };
    (completer, Completion { shared })
}

/// The backend's end: the duty to answer.
#[must_use = "a request must be completed"]
pub struct Completer {
    shared: Option<Arc<Shared>>,
}

impl Completer {
    /// Answers. Wakes the device, so no lock that a waker may take is held meanwhile.
    pub fn complete(mut self, outcome: Result<(), BlockError>) {
        self.settle(outcome);
    }

    fn settle(&mut self, outcome: Result<(), BlockError>) {
        if let Some(shared) = self.shared.take() {
            let code = outcome.map_or_else(BlockError::code, |()| DONE);
            shared.outcome.store(code, Ordering::Release);
            shared.waker.wake();
        }
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        if self.shared.is_some() {
            ABANDONED.fetch_add(1, Ordering::AcqRel);
            self.settle(Err(BlockError::Abandoned));
        }
    }
}

impl core::fmt::Debug for Completer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Completer")
    }
}

/// The device's end: a future of the outcome. May be polled again after it was ready, and moved between threads.
#[must_use = "the device's guest waits for it"]
pub struct Completion {
    shared: Arc<Shared>,
}

impl Completion {
    /// The outcome, if it is there.
    pub fn try_outcome(&self) -> Option<Result<(), BlockError>> {
        match self.shared.outcome.load(Ordering::Acquire) {
            PENDING => None,
            DONE => Some(Ok(())),
            code => Some(Err(BlockError::from_code(code))),
        }
    }
}

impl Future for Completion {
    type Output = Result<(), BlockError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(outcome) = self.try_outcome() {
            return Poll::Ready(outcome);
        }
        self.shared.waker.register(cx.waker());
        self.try_outcome().map_or(Poll::Pending, Poll::Ready)
    }
}

impl core::fmt::Debug for Completion {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Completion({:?})", self.try_outcome())
    }
}
