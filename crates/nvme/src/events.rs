//! Asynchronous events (§5.2), and the errors that they tell of (§5.14.1.1).

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::command::Status;

/// Event information: a doorbell that does not exist was written.
pub(crate) const INVALID_DOORBELL: u8 = 0;
/// Event information: a doorbell was written with a value that its queue does not have.
pub(crate) const INVALID_VALUE: u8 = 1;
/// How many event requests the host may have waiting.
pub(crate) const MAX_REQUESTS: usize = 4;
/// How many errors are remembered.
pub(crate) const MAX_ERRORS: usize = 16;
/// Log pages.
pub(crate) const ERROR_LOG: u8 = 1;
pub(crate) const CHANGED_NAMESPACES: u8 = 4;
/// In the event configuration: changes of namespaces are told.
const NAMESPACE_NOTICE: u32 = 1 << 8;

/// An error of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ErrorEntry {
    pub(crate) number: u64,
    pub(crate) queue: u16,
    pub(crate) command: u16,
    pub(crate) status: u16,
    pub(crate) lba: u64,
}

/// What is to be told, and who waits to hear it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Events {
    /// Ids of the requests that wait.
    pub(crate) requests: Vec<u16>,
    /// A doorbell error that was not told.
    error: Option<u8>,
    /// Told; nothing more of the kind is until the host has read the log.
    error_told: bool,
    /// The namespace has changed: not told yet.
    changed: bool,
    changed_told: bool,
    /// What the log of changed namespaces shows.
    pub(crate) in_log: bool,
    /// Newest last.
    pub(crate) errors: Vec<ErrorEntry>,
    pub(crate) error_count: u64,
}

impl Events {
    /// What a reset of the controller does: the log of errors stays.
    pub(crate) fn reset(&mut self) {
        *self = Self {
            errors: core::mem::take(&mut self.errors),
            error_count: self.error_count,
            ..Self::default()
        };
    }

    pub(crate) fn doorbell_error(&mut self, information: u8) {
        self.error.get_or_insert(information);
    }

    pub(crate) fn namespace_changed(&mut self) {
        self.changed = true;
        self.in_log = true;
    }

    /// Remembers that command `command` of `queue` failed.
    pub(crate) fn command_failed(&mut self, queue: u16, command: u16, status: Status, lba: u64) {
        self.error_count = self.error_count.saturating_add(1);
        if self.errors.len() >= MAX_ERRORS {
            self.errors.remove(0);
        }
        self.errors.push(ErrorEntry {
            number: self.error_count,
            queue,
            command,
            status: status.0 << 1,
            lba,
        });
    }

    /// The host has read `page`: further events of its kind are told again.
    pub(crate) fn log_was_read(&mut self, page: u8) {
        match page {
            ERROR_LOG => self.error_told = false,
            CHANGED_NAMESPACES => {
                self.changed_told = false;
                self.in_log = false;
            }
            _ => {}
        }
    }

    /// The next event for a request that waits: the request's id, and completion dword 0.
    pub(crate) fn next(&mut self, configuration: u32) -> Option<(u16, u32)> {
        if configuration & NAMESPACE_NOTICE == 0 {
            self.changed = false;
        }
        if self.requests.is_empty() {
            return None;
        }
        let word = |kind: u32, information: u8, page: u8| {
            kind | u32::from(information) << 8 | u32::from(page) << 16
        };
        let told = if !self.error_told && self.error.is_some() {
            self.error_told = true;
            word(0, self.error.take().unwrap_or_default(), ERROR_LOG)
        } else if !self.changed_told && self.changed {
            self.changed_told = true;
            self.changed = false;
            word(2, 0, CHANGED_NAMESPACES)
        } else {
            return None;
        };
        Some((self.requests.remove(0), told))
    }

    pub(crate) fn is_possible(&self) -> bool {
        self.requests.len() <= MAX_REQUESTS && self.errors.len() <= MAX_ERRORS
    }
}
