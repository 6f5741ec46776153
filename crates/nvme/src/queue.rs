//! Submission and completion queues (§4.1).

use core::sync::atomic::{Ordering, fence};

use caisson_memory::{Gpa, MemoryView};
use serde::{Deserialize, Serialize};

use crate::command::{Answer, COMMAND_LEN, COMPLETION_LEN, Command};

/// The most entries of an I/O queue.
pub(crate) const MAX_ENTRIES: u32 = 1024;
/// The most entries of an admin queue (§3.1.8).
pub(crate) const MAX_ADMIN_ENTRIES: u32 = 4096;
/// The most commands of one submission queue that are under way.
pub(crate) const MAX_UNDER_WAY: u32 = 256;

/// A submission queue.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SubmissionQueue {
    pub(crate) base: u64,
    pub(crate) size: u32,
    pub(crate) head: u32,
    pub(crate) tail: u32,
    /// Its completion queue.
    pub(crate) completion: u16,
    /// It is being deleted: nothing more is taken from it.
    pub(crate) deleting: bool,
}

impl SubmissionQueue {
    pub(crate) fn new(base: u64, size: u32, completion: u16) -> Self {
        Self {
            base,
            size,
            head: 0,
            tail: 0,
            completion,
            deleting: false,
        }
    }

    /// Whether it holds commands that were not taken.
    pub(crate) fn has_commands(&self) -> bool {
        self.head != self.tail && !self.deleting
    }

    /// Takes the next command. `None` if it cannot be read.
    pub(crate) fn take(&mut self, memory: &MemoryView) -> Option<Command> {
        let mut bytes = [0; COMMAND_LEN as usize];
        let at = self.base.checked_add(u64::from(self.head) * COMMAND_LEN)?;
        memory.read(Gpa(at), &mut bytes).ok()?;
        self.head = (self.head + 1) % self.size;
        Some(Command::new(bytes))
    }

    pub(crate) fn is_possible(&self) -> bool {
        (2..=MAX_ADMIN_ENTRIES).contains(&self.size)
            && self.head < self.size
            && self.tail < self.size
    }
}

/// A completion queue.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CompletionQueue {
    pub(crate) base: u64,
    pub(crate) size: u32,
    pub(crate) head: u32,
    pub(crate) tail: u32,
    /// The phase of the entries that are written now.
    pub(crate) phase: bool,
    /// The vector that its interrupts use, if they are on.
    pub(crate) vector: Option<u16>,
}

impl CompletionQueue {
    pub(crate) fn new(base: u64, size: u32, vector: Option<u16>) -> Self {
        Self {
            base,
            size,
            head: 0,
            tail: 0,
            phase: true,
            vector,
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        (self.tail + 1) % self.size == self.head
    }

    /// Whether it holds completions that the host has not seen.
    pub(crate) fn has_completions(&self) -> bool {
        self.head != self.tail
    }

    /// Puts the completion of command `id` of queue `queue`, whose head is `head`, at the end. The caller has seen that
    /// there is room. `None` if it cannot be written.
    pub(crate) fn put(
        &mut self,
        memory: &MemoryView,
        (queue, head, id): (u16, u32, u16),
        answer: Answer,
    ) -> Option<()> {
        let at = self
            .base
            .checked_add(u64::from(self.tail) * COMPLETION_LEN)?;
        let status = u32::from(answer.status.0) << 1 | u32::from(self.phase);
        let [r0, r1, r2, r3] = answer.result.to_le_bytes();
        let [h0, h1] = (head as u16).to_le_bytes();
        let [q0, q1] = queue.to_le_bytes();
        let front = [r0, r1, r2, r3, 0, 0, 0, 0, h0, h1, q0, q1];
        memory.write(Gpa(at), &front).ok()?;
        // The phase says that the rest is there.
        fence(Ordering::Release);
        let back = u32::from(id) | status << 16;
        memory
            .write(Gpa(at.checked_add(12)?), &back.to_le_bytes())
            .ok()?;
        self.tail += 1;
        if self.tail == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        }
        Some(())
    }

    pub(crate) fn is_possible(&self, vectors: u16) -> bool {
        (2..=MAX_ADMIN_ENTRIES).contains(&self.size)
            && self.head < self.size
            && self.tail < self.size
            && self.vector.is_none_or(|vector| vector < vectors)
    }
}
