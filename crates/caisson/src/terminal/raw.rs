//! Raw mode, and the way back from it.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// The terminal's settings before and during raw mode. Written once, so that a signal handler can
/// read them without a lock.
struct Settings {
    before: Termios,
    raw: Termios,
}

static SETTINGS: OnceLock<Settings> = OnceLock::new();
/// Whether the terminal is in raw mode now.
static ACTIVE: AtomicBool = AtomicBool::new(false);

pub(super) fn is_active() -> bool {
    ACTIVE.load(Ordering::Relaxed)
}

/// The terminal at standard input in raw mode, until this is dropped: every key goes to the guest,
/// and the guest's output is not touched.
pub(crate) struct RawMode(());

impl RawMode {
    /// Puts the terminal at standard input into raw mode.
    ///
    /// # Errors
    /// Standard input is no terminal, or the host refuses.
    pub(crate) fn enter() -> io::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        SETTINGS.get_or_init(|| Settings { before, raw });
        reenter()?;
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal its former settings if it is in raw mode. Async-signal-safe: an atomic and
/// a system call.
pub(super) fn restore() {
    if ACTIVE.swap(false, Ordering::SeqCst)
        && let Some(settings) = SETTINGS.get()
    {
        // Now rather than after draining: draining waits for a terminal that may be stopped.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &settings.before);
    }
}

/// Enters raw mode again after a stop, when the shell has had the terminal.
pub(super) fn resume() {
    // A process in the background must leave the terminal alone, and would be stopped for trying.
    if SETTINGS.get().is_some() && tcgetpgrp(stdin()).ok() == Some(rustix::process::getpgrp()) {
        let _ = reenter();
    }
}

fn reenter() -> io::Result<()> {
    if let Some(settings) = SETTINGS.get() {
        // Before the call, so that a signal between the two finds something to restore.
        ACTIVE.store(true, Ordering::SeqCst);
        tcsetattr(stdin(), OptionalActions::Now, &settings.raw)?;
    }
    Ok(())
}
