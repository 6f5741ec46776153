//! Telling a person how a slow job goes.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::Duration;

/// Where a slow job reports. One step is under way at a time.
pub trait Progress: Send + Sync {
    /// A step begins; `total` is its size in bytes, if known.
    fn begin(&self, step: &str, total: Option<u64>);
    /// So many bytes of the step are done.
    fn advance(&self, done: u64);
    /// The step is over.
    fn finish(&self);
}

/// Reports nowhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _step: &str, _total: Option<u64>) {}
    fn advance(&self, _done: u64) {}
    fn finish(&self) {}
}

/// A progress bar on standard error; nothing when that is not a terminal.
pub struct TerminalProgress {
    bar: Mutex<Option<ProgressBar>>,
    visible: bool,
}

impl TerminalProgress {
    /// A bar that appears with the first step.
    #[must_use]
    pub fn new() -> Self {
        TerminalProgress {
            bar: Mutex::new(None),
            visible: std::io::stderr().is_terminal(),
        }
    }

    fn replace(&self, bar: Option<ProgressBar>) {
        let mut current = self
            .bar
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(old) = std::mem::replace(&mut *current, bar) {
            old.finish_and_clear();
        }
    }
}

impl Default for TerminalProgress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TerminalProgress {
    fn drop(&mut self) {
        self.replace(None);
    }
}

impl Progress for TerminalProgress {
    fn begin(&self, step: &str, total: Option<u64>) {
        if !self.visible {
            return;
        }
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr()),
                "{msg:32!} [{bar:30}] {bytes:>10} of {total_bytes} {bytes_per_sec:>12}",
            ),
            None => (
                ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()),
                "{spinner} {msg}",
            ),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(step.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        self.replace(Some(bar));
    }

    fn advance(&self, done: u64) {
        let bar = self
            .bar
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(bar) = &*bar {
            bar.set_position(done);
        }
    }

    fn finish(&self) {
        self.replace(None);
    }
}
