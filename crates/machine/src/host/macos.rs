//! macOS. Type-checked only.

/// Precise waits for a thread. There is nothing to ask for: what macOS calls timer leeway depends on a thread's
/// quality of service, and the one that threads have by default is not put off.
pub(crate) struct PreciseTimers;

impl PreciseTimers {
    pub(crate) fn new() -> Self {
        Self
    }
}
