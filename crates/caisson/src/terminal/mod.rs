//! The user's terminal: raw mode and back under all circumstances, the keys that are Caisson's
//! own, and what Caisson itself says.

mod escape;
mod modes;
mod raw;
mod rescue;

pub(crate) use escape::{Escape, HELP, Key};
pub(crate) use modes::ModeTracker;
pub(crate) use raw::RawMode;
pub(crate) use rescue::{Blocked, Notice, block_signals, end_by_signal};

use std::io::{self, Write};
use std::os::fd::AsFd;

use rustix::termios;

/// Whether `fd` is a terminal.
pub(crate) fn is_terminal(fd: impl AsFd) -> bool {
    termios::isatty(fd)
}

/// The width and height of the terminal at `fd` in characters, if it knows them.
pub(crate) fn size(fd: impl AsFd) -> Option<(u16, u16)> {
    let size = termios::tcgetwinsize(fd).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Says something on standard error, each line marked as Caisson's.
pub(crate) fn say(text: &str) {
    let mut lines = String::new();
    for line in text.lines() {
        lines.push_str("caisson: ");
        lines.push_str(line);
        lines.push('\n');
    }
    // There is nobody left to tell when standard error is gone.
    let _ = write_lines(lines.as_bytes());
}

/// Writes text to standard error with the line ends that the terminal needs in its present mode.
pub(crate) fn write_lines(bytes: &[u8]) -> io::Result<()> {
    let mut err = io::stderr().lock();
    if !raw::is_active() {
        return err.write_all(bytes);
    }
    let mut out = Vec::with_capacity(bytes.len() + 8);
    for &byte in bytes {
        if byte == b'\n' {
            out.push(b'\r');
        }
        out.push(byte);
    }
    err.write_all(&out)
}
