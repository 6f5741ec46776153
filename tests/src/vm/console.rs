//! What a guest printed.

use std::{
    fmt,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How much of a console a failure shows, in bytes.
const TAIL: usize = 4000;

/// What a guest printed, shared between the machine and the test.
#[derive(Clone, Default)]
pub struct Console(Arc<(Mutex<Printed>, Condvar)>);

#[derive(Default)]
struct Printed {
    bytes: Vec<u8>,
    /// How the machine ended: nothing more comes.
    over: Option<String>,
}

impl Console {
    fn lock(&self) -> MutexGuard<'_, Printed> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what the guest printed.
    pub(super) fn push(&self, bytes: &[u8]) {
        self.lock().bytes.extend_from_slice(bytes);
        self.0.1.notify_all();
    }

    /// The machine has ended as `how` says: nobody waits any longer.
    pub(super) fn close(&self, how: String) {
        self.lock().over.get_or_insert(how);
        self.0.1.notify_all();
    }

    /// Everything so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// Everything so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// Waits until `text` has been printed at or after byte `from`. Gives the position behind it.
    ///
    /// # Errors
    /// It does not come within `patience`, or the machine has ended; the error shows the console's end.
    pub fn wait_for(&self, text: &str, from: usize, patience: Duration) -> Result<usize> {
        let deadline = Instant::now() + patience;
        let mut printed = self.lock();
        loop {
            let found = printed
                .bytes
                .get(from..)
                .and_then(|rest| rest.windows(text.len()).position(|w| w == text.as_bytes()));
            if let Some(at) = found {
                return Ok(from + at + text.len());
            }
            if let Some(how) = &printed.over {
                let how = how.clone();
                drop(printed);
                bail!("{text:?} does not appear, and the machine has ended: {how}\n{self}");
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                drop(printed);
                bail!("{text:?} does not appear within {patience:?}:\n{self}");
            };
            printed = self
                .0
                .1
                .wait_timeout(printed, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Display for Console {
    /// The end of what was printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = &self.lock().bytes;
        let start = bytes.len().saturating_sub(TAIL);
        writeln!(f, "--- console, {} bytes ---", bytes.len())?;
        f.write_str(&String::from_utf8_lossy(&bytes[start..]))
    }
}
