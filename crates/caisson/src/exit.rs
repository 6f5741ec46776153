//! Exit codes, and how an error ends the process.

use std::io;
use std::process::ExitCode;

use thiserror::Error;

use crate::terminal;

/// What the `caisson` process exits with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The guest shut down, or the command did what it was asked.
    Clean,
    /// Caisson could not do it.
    Failed,
    /// The request itself makes no sense.
    Usage,
    /// The guest crashed.
    GuestCrash,
    /// The status of the command in the guest, or of its debug-exit device.
    Guest(u8),
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(match exit {
            Exit::Clean => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::GuestCrash => 3,
            Exit::Guest(status) => status,
        })
    }
}

/// An error in what was asked for, as opposed to one in doing it.
#[derive(Debug, Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// Prints an error with its causes and chooses the exit code.
pub(crate) fn report(error: &anyhow::Error) -> Exit {
    let closed = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe);
    if !closed {
        terminal::say(&format!("error: {error:#}"));
    }
    if error.is::<UsageError>() {
        Exit::Usage
    } else {
        Exit::Failed
    }
}
