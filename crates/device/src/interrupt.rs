//! Interrupts as a device sees them: a line with a level, or a message.

use alloc::{collections::BTreeMap, sync::Arc};
use core::fmt;

/// How many sources can share one line.
pub const MAX_LINE_SOURCES: u8 = 64;

/// Where lines end: the interrupt controllers.
///
/// Called while the lock of the raising device is held: an implementation may take the interrupt controllers' lock
/// and post to vCPUs, but never calls a device.
pub trait LineSink: Send + Sync {
    /// Source `source` (0 to [`MAX_LINE_SOURCES`] − 1) of line `line` now drives `level`. The line is asserted while
    /// any of its sources is. Repeating the same level has no effect.
    fn set(&self, line: u32, source: u8, level: bool);
}

/// One device's end of a numbered interrupt input (on x86, a global system interrupt).
///
/// Clones are the same source. Several sources may share a line: the input is asserted while any of them is, and
/// whether the input reacts to the level or to its rising edge is the interrupt controller's programming.
#[derive(Clone)]
pub struct Line {
    sink: Arc<dyn LineSink>,
    number: u32,
    source: u8,
}

impl Line {
    /// Drives the line to `level`.
    pub fn set(&self, level: bool) {
        self.sink.set(self.number, self.source, level);
    }

    /// Drives the line high, then low: one edge for an edge-triggered input.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The number of the line.
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Line({}, source {})", self.number, self.source)
    }
}

/// Hands out [`Line`]s with distinct source numbers. The order of the calls decides the numbers, so a machine that is
/// assembled in the same order gets the same ones.
pub struct Lines {
    sink: Arc<dyn LineSink>,
    used: BTreeMap<u32, u8>,
}

/// A line has no free source number left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "interrupt line {line} is already shared by {MAX_LINE_SOURCES} devices; give the device another line or use MSIs"
)]
pub struct TooManySources {
    /// The line that was asked for.
    pub line: u32,
}

impl Lines {
    /// Lines that end at `sink`.
    pub fn new(sink: Arc<dyn LineSink>) -> Self {
        Self {
            sink,
            used: BTreeMap::new(),
        }
    }

    /// A new source of line `number`.
    ///
    /// # Errors
    /// When [`MAX_LINE_SOURCES`] sources share the line already.
    pub fn line(&mut self, number: u32) -> Result<Line, TooManySources> {
        let used = self.used.entry(number).or_insert(0);
        if *used >= MAX_LINE_SOURCES {
            return Err(TooManySources { line: number });
        }
        let source = *used;
        *used += 1;
        Ok(Line {
            sink: self.sink.clone(),
            number,
            source,
        })
    }
}

/// A message-signalled interrupt: a 32-bit write to an address that the interrupt fabric claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Msi {
    /// The address; on x86 0xFEExxxxx with the destination (Intel SDM Vol. 3, section "Message Address Register").
    pub address: u64,
    /// The data; on x86 the vector, delivery mode and trigger mode.
    pub data: u32,
}

/// Where MSIs end. The same rule as for [`LineSink`] holds: an implementation never calls a device.
pub trait MsiSink: Send + Sync {
    /// Delivers `msi`. One that nobody can accept is lost, as on hardware.
    fn send(&self, msi: Msi);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::RecordedLines;

    #[test]
    fn a_line_is_asserted_while_any_source_is() {
        let sink = RecordedLines::new();
        let mut lines = Lines::new(sink.clone());
        let (a, b) = (lines.line(9).unwrap(), lines.line(9).unwrap());
        let other = lines.line(4).unwrap();
        a.set(true);
        b.set(true);
        a.set(false);
        assert!(sink.level(9));
        assert!(!sink.level(4));
        b.clone().set(false);
        assert!(!sink.level(9));
        other.pulse();
        assert_eq!((sink.edges(4), sink.edges(9), sink.level(4)), (1, 1, false));
    }

    #[test]
    fn sources_run_out_with_an_error() {
        let mut lines = Lines::new(RecordedLines::new());
        for _ in 0..MAX_LINE_SOURCES {
            lines.line(11).unwrap();
        }
        assert_eq!(lines.line(11).unwrap_err(), TooManySources { line: 11 });
        assert!(lines.line(12).is_ok());
    }
}
