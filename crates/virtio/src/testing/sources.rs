//! A source of entropy that a test can stop.

use alloc::sync::Arc;
use core::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::{Context, Poll, Waker},
};
use std::sync::{Mutex, PoisonError};

use crate::rng::{EntropyError, EntropySource};

/// What a [`Counting`] source has done, and whether it may go on.
#[derive(Debug, Default)]
pub struct Counts {
    /// It has nothing to give for now.
    pub dry: AtomicBool,
    /// It fails.
    pub broken: AtomicBool,
    /// How many bytes it gave.
    pub given: AtomicU64,
    waker: Mutex<Option<Waker>>,
}

impl Counts {
    /// Lets the source go on and wakes whoever waits.
    pub fn refill(&self) {
        self.dry.store(false, Ordering::SeqCst);
        let mut waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waker) = waker.take() {
            waker.wake();
        }
    }
}

/// Gives 1, 2, 3 and so on up to 251, then 1 again.
pub struct Counting(pub Arc<Counts>);

impl EntropySource for Counting {
    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<Result<(), EntropyError>> {
        if self.0.broken.load(Ordering::SeqCst) {
            return Poll::Ready(Err(EntropyError));
        }
        if self.0.dry.load(Ordering::SeqCst) {
            let mut waker = self.0.waker.lock().unwrap_or_else(PoisonError::into_inner);
            *waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        for byte in buffer.iter_mut() {
            *byte = (self.0.given.fetch_add(1, Ordering::SeqCst) % 251) as u8 + 1;
        }
        Poll::Ready(Ok(()))
    }
}
