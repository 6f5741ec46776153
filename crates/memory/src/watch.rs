//! Who hears of writes that no vCPU made.

use alloc::{boxed::Box, sync::Arc};

use once_cell::race::OnceBox;

use crate::Gpa;

/// Hears of every write through a [`MemoryView`](crate::MemoryView), after it was
/// made: a backend that keeps decoded guest code has to forget what was there.
/// Called by any thread, so it must be quick and take no lock that a writer may
/// hold.
pub trait WriteWatch: Send + Sync {
    /// `len` bytes at `gpa`, one or more and in one region, were written.
    fn written(&self, gpa: Gpa, len: u64);
}

/// All who watch one memory table: a list that only grows, so that a writer
/// needs no lock to go through it.
#[derive(Default)]
pub(crate) struct Watches {
    first: OnceBox<Node>,
}

struct Node {
    watch: Arc<dyn WriteWatch>,
    next: OnceBox<Node>,
}

impl Watches {
    /// One that watches already is not told twice.
    pub(crate) fn add(&self, watch: Arc<dyn WriteWatch>) {
        let mut place = &self.first;
        let mut node = Box::new(Node {
            watch,
            next: OnceBox::new(),
        });
        loop {
            match place.set(node) {
                Ok(()) => return,
                Err(back) => node = back,
            }
            if let Some(taken) = place.get() {
                if Arc::ptr_eq(&taken.watch, &node.watch) {
                    return;
                }
                place = &taken.next;
            }
        }
    }

    pub(crate) fn tell(&self, gpa: Gpa, len: u64) {
        let mut place = &self.first;
        while let Some(node) = place.get() {
            node.watch.written(gpa, len);
            place = &node.next;
        }
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    struct Sum(AtomicU64);

    impl WriteWatch for Sum {
        fn written(&self, gpa: Gpa, len: u64) {
            self.0.fetch_add(gpa.0 + len, Ordering::Relaxed);
        }
    }

    #[test]
    fn everybody_hears_from_when_they_came() {
        let watches = Watches::default();
        let sums = [0, 0, 0].map(|n| Arc::new(Sum(AtomicU64::new(n))));
        watches.tell(Gpa(1), 1);
        for sum in &sums {
            watches.add(sum.clone());
            watches.tell(Gpa(8), 2);
        }
        let heard = sums.map(|s| s.0.load(Ordering::Relaxed));
        assert_eq!(heard, [30, 20, 10]);
    }

    #[test]
    fn who_watches_twice_hears_once() {
        let watches = Watches::default();
        let sum = Arc::new(Sum(AtomicU64::new(0)));
        let other = Arc::new(Sum(AtomicU64::new(0)));
        for watch in [&sum, &other, &sum, &other] {
            watches.add(watch.clone());
        }
        watches.tell(Gpa(8), 2);
        assert_eq!(sum.0.load(Ordering::Relaxed), 10);
        assert_eq!(other.0.load(Ordering::Relaxed), 10);
    }
}
