//! What tasks of one thread wait for each other with.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, Waker},
};

use super::LocalFuture;

/// Lets other tasks run first.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Runs all of `futures` at once; their results in order.
pub async fn join_all<T>(futures: Vec<LocalFuture<'_, T>>) -> Vec<T> {
    let mut slots: Vec<(Option<LocalFuture<'_, T>>, Option<T>)> = futures
        .into_iter()
        .map(|future| (Some(future), None))
        .collect();
    poll_fn(|cx| {
        let mut pending = false;
        for (future, result) in &mut slots {
            if let Some(running) = future {
                match running.as_mut().poll(cx) {
                    Poll::Ready(value) => {
                        *result = Some(value);
                        *future = None;
                    }
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
    slots.into_iter().filter_map(|(_, result)| result).collect()
}

/// Locks on ranges of numbers (bytes, clusters): shared or exclusive, in the order in which they were asked for where
/// they overlap.
#[derive(Default)]
pub struct RangeLocks {
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    held: Vec<Range>,
    waiting: VecDeque<(Range, Option<Waker>)>,
}

#[derive(Clone, Copy)]
struct Range {
    id: u64,
    start: u64,
    end: u64,
    exclusive: bool,
}

impl Range {
    fn conflicts(&self, other: &Self) -> bool {
        (self.exclusive || other.exclusive) && self.start < other.end && other.start < self.end
    }
}

impl RangeLocks {
    /// Waits for `start..end`.
    pub fn lock(&self, start: u64, end: u64, exclusive: bool) -> Acquire<'_> {
        let mut state = self.state.borrow_mut();
        let id = state.next;
        state.next += 1;
        Acquire {
            locks: self,
            range: Range {
                id,
                start,
                end,
                exclusive,
            },
            place: Place::New,
        }
    }

    fn wake_waiting(&self) {
        let wakers: Vec<Waker> = {
            let mut state = self.state.borrow_mut();
            if state.waiting.is_empty() {
                return;
            }
            let wakers = state.waiting.iter_mut().map(|(_, waker)| waker.take());
            wakers.flatten().collect()
        };
        for waker in wakers {
            waker.wake();
        }
    }
}

#[derive(PartialEq)]
enum Place {
    New,
    Queued,
    Held,
}

/// A lock to be.
pub struct Acquire<'a> {
    locks: &'a RangeLocks,
    range: Range,
    place: Place,
}

impl<'a> Future for Acquire<'a> {
    type Output = RangeGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let locks = self.locks;
        let mut state = locks.state.borrow_mut();
        let range = self.range;
        let before = state
            .waiting
            .iter()
            .take_while(|(waiting, _)| waiting.id != range.id);
        let blocked = before
            .map(|(waiting, _)| waiting)
            .chain(&state.held)
            .any(|other| other.conflicts(&range));
        if blocked {
            let waker = Some(cx.waker().clone());
            if self.place == Place::New {
                state.waiting.push_back((range, waker));
                self.place = Place::Queued;
            } else if let Some(entry) = state.waiting.iter_mut().find(|(w, _)| w.id == range.id) {
                entry.1 = waker;
            }
            return Poll::Pending;
        }
        if self.place == Place::Queued {
            state.waiting.retain(|(waiting, _)| waiting.id != range.id);
        }
        state.held.push(range);
        self.place = Place::Held;
        Poll::Ready(RangeGuard {
            locks,
            id: range.id,
        })
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        if self.place == Place::Queued {
            let id = self.range.id;
            let mut state = self.locks.state.borrow_mut();
            state.waiting.retain(|(waiting, _)| waiting.id != id);
            drop(state);
            self.locks.wake_waiting();
        }
    }
}

/// A range that is held.
pub struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.locks.state.borrow_mut();
        if let Some(index) = state.held.iter().position(|held| held.id == self.id) {
            state.held.swap_remove(index);
        }
        drop(state);
        self.locks.wake_waiting();
    }
}

/// One at a time, in order.
#[derive(Default)]
pub struct Turnstile(RangeLocks);

impl Turnstile {
    /// Waits for one's turn, which ends with the guard.
    pub async fn pass(&self) -> RangeGuard<'_> {
        self.0.lock(0, 1, true).await
    }
}

/// A count that tasks wait for to become zero.
#[derive(Default)]
pub struct Gauge {
    count: Cell<usize>,
    waiting: RefCell<Vec<Waker>>,
}

impl Gauge {
    /// Counts one more until the guard is dropped.
    pub fn enter(&self) -> GaugeGuard<'_> {
        self.count.set(self.count.get() + 1);
        GaugeGuard(self)
    }

    /// Waits until nobody is counted.
    pub async fn empty(&self) {
        poll_fn(|cx| {
            if self.count.get() == 0 {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// One that is counted.
pub struct GaugeGuard<'a>(&'a Gauge);

impl Drop for GaugeGuard<'_> {
    fn drop(&mut self) {
        self.0.count.set(self.0.count.get() - 1);
        if self.0.count.get() == 0 {
            for waker in self.0.waiting.take() {
                waker.wake();
            }
        }
    }
}
