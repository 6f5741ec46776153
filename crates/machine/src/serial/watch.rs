//! Notices a kernel's last words on its console.

use parking_lot::Mutex;

/// What Linux prints before the reason, in `kernel/panic.c` since version 1: part of its interface to people and tools.
const MARKER: &[u8] = b"Kernel panic - not syncing: ";
/// How much of the reason is kept, in bytes.
const KEPT: usize = 200;

/// Watches console output for a Linux panic, so that the reset that follows it (`panic=-1`) can be told from a reboot
/// that somebody wanted. It works from the first line a kernel prints, without a driver in the guest; a guest that
/// prints the words itself only misleads about its own end.
#[derive(Debug, Default)]
pub(crate) struct PanicWatch(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// How much of the marker the last bytes were.
    matched: usize,
    reason: Option<Vec<u8>>,
    complete: bool,
}

impl PanicWatch {
    /// Looks at more output.
    pub(crate) fn see(&self, bytes: &[u8]) {
        let mut state = self.0.lock();
        for byte in bytes.iter().copied() {
            state.step(byte);
        }
    }

    /// The reason the kernel gave, if it panicked.
    pub(crate) fn message(&self) -> Option<String> {
        let state = self.0.lock();
        let reason = state.reason.as_ref()?;
        let text: String = String::from_utf8_lossy(reason)
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        Some(text)
    }

    /// Knows of a panic that was seen before the machine was saved.
    pub(crate) fn restore(&self, message: &str) {
        *self.0.lock() = State {
            matched: 0,
            reason: Some(message.bytes().take(KEPT).collect()),
            complete: true,
        };
    }

    pub(crate) fn reset(&self) {
        *self.0.lock() = State::default();
    }
}

impl State {
    fn step(&mut self, byte: u8) {
        if let Some(reason) = &mut self.reason {
            if !self.complete {
                self.complete = byte == b'\r' || byte == b'\n' || reason.len() >= KEPT;
                if !self.complete {
                    reason.push(byte);
                }
            }
            return;
        }
        // No proper prefix of the marker but the empty one is also a suffix of another, so a mismatch starts over.
        self.matched = match MARKER.get(self.matched) {
            Some(expected) if *expected == byte => self.matched + 1,
            _ => usize::from(MARKER.first() == Some(&byte)),
        };
        if self.matched == MARKER.len() {
            self.reason = Some(Vec::new());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_reason_however_the_output_is_cut() {
        let output = b"[ 0.5] KKernel panic - not KKernel panic - not syncing: VFS: no root\x1b\r\n[ 0.6] Kernel panic - not syncing: again\n";
        for size in 1..output.len() {
            let watch = PanicWatch::default();
            for piece in output.chunks(size) {
                watch.see(piece);
            }
            assert_eq!(watch.message().as_deref(), Some("VFS: no root"));
            watch.reset();
            assert_eq!(watch.message(), None);
        }
    }

    #[test]
    fn keeps_no_more_than_a_line() {
        let watch = PanicWatch::default();
        watch.see(MARKER);
        watch.see(&[b'x'; 100_000]);
        assert_eq!(watch.message().unwrap().len(), KEPT);
    }
}
