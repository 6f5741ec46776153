//! Buffers of an in-order queue that are done before those in front of them (§2.6, `VIRTIO_F_IN_ORDER`).

use alloc::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// A buffer that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Taken {
    pub(super) id: u16,
    pub(super) slots: u16,
    /// How many bytes were written into it, once it is done.
    pub(super) written: Option<u32>,
}

/// The buffers in the order in which they were taken; never more than the queue has entries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reorder {
    taken: VecDeque<Taken>,
}

impl Reorder {
    pub(super) fn take(&mut self, id: u16, slots: u16) {
        let written = None;
        self.taken.push_back(Taken { id, slots, written });
    }

    /// The buffer is done. Those that may be given back now come out of [`Reorder::next`].
    pub(super) fn done(&mut self, id: u16, written: u32) {
        let mut waiting = self.taken.iter_mut();
        if let Some(taken) = waiting.find(|taken| taken.id == id && taken.written.is_none()) {
            taken.written = Some(written);
        }
    }

    pub(super) fn next(&mut self) -> Option<Taken> {
        self.taken.pop_front_if(|taken| taken.written.is_some())
    }

    /// How many of them are not done.
    pub(super) fn unfinished(&self) -> usize {
        let unfinished = |taken: &&Taken| taken.written.is_none();
        self.taken.iter().filter(unfinished).count()
    }

    pub(super) fn is_possible(&self, size: u16) -> bool {
        self.taken.len() <= usize::from(size)
            && self
                .taken
                .iter()
                .all(|taken| (1..=size).contains(&taken.slots))
    }
}
