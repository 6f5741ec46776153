//! What this process holds: descriptors, threads, memory.

use std::{fmt, fs, io};

use anyhow::{Context, Result};

/// A count of what could leak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open file descriptors, without the one that counts them.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Resident memory in KiB, without what is shared: guest memory is.
    pub resident_kib: u64,
}

impl Holdings {
    /// Of this process, now.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn now() -> Result<Self> {
        let count = |folder: &str| -> io::Result<usize> { Ok(fs::read_dir(folder)?.count()) };
        Ok(Self {
            descriptors: count("/proc/self/fd")?.saturating_sub(1),
            threads: count("/proc/self/task")?,
            resident_kib: resident_kib()?,
        })
    }
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} descriptors, {} threads, {} KiB resident",
            self.descriptors, self.threads, self.resident_kib
        )
    }
}

/// Private and file-backed resident memory of this process, in KiB.
///
/// # Errors
/// `/proc` cannot be read.
pub fn resident_kib() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|rest| rest.split_ascii_whitespace().next());
        let number = number.with_context(|| format!("/proc/self/status has no {name}"))?;
        Ok(number.parse()?)
    };
    Ok(field("RssAnon:")? + field("RssFile:")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_touched_is_counted() {
        let before = resident_kib().unwrap();
        let touched = vec![1u8; 32 << 20];
        let after = resident_kib().unwrap();
        assert!(after >= before + (30 << 10), "{before} and {after} KiB");
        drop(touched);
    }
}
