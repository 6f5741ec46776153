//! Who is to be woken when.

use std::{cmp::Ordering, collections::BinaryHeap, task::Waker, time::Instant};

#[derive(Default)]
pub(super) struct Timers {
    heap: BinaryHeap<Entry>,
}

struct Entry {
    at: Instant,
    waker: Waker,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    /// The earliest is the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.cmp(&self.at)
    }
}

impl Timers {
    pub(super) fn add(&mut self, at: Instant, waker: Waker) {
        self.heap.push(Entry { at, waker });
    }

    /// Takes what is due at `now`, and says when the next is.
    pub(super) fn expire(&mut self, now: Instant) -> (Vec<Waker>, Option<Instant>) {
        let mut due = Vec::new();
        while let Some(entry) = self.heap.peek() {
            if entry.at > now {
                return (due, Some(entry.at));
            }
            due.extend(self.heap.pop().map(|entry| entry.waker));
        }
        (due, None)
    }
}
