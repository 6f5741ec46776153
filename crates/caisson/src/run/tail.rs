//! The end of what a guest said, for when nobody was to hear it until it went wrong.

use std::collections::VecDeque;

/// The last bytes of a stream.
#[derive(Debug)]
pub(super) struct Tail {
    bytes: VecDeque<u8>,
    capacity: usize,
}

impl Tail {
    /// Keeps the last `capacity` bytes.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            capacity,
        }
    }

    /// Takes more of the stream.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(self.capacity)..];
        let excess = (self.bytes.len() + kept.len()).saturating_sub(self.capacity);
        self.bytes.drain(..excess);
        self.bytes.extend(kept);
    }

    /// The last `count` lines that have text, safe to print: what the guest meant for a terminal
    /// (colours, cursor movements, bells) is left out.
    pub(super) fn lines(&self, count: usize) -> Vec<String> {
        let bytes: Vec<u8> = self.bytes.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let mut lines: Vec<String> = text
            .split('\n')
            .map(|line| printable(line).trim_end().to_owned())
            .filter(|line| !line.is_empty())
            .collect();
        lines.drain(..lines.len().saturating_sub(count));
        lines
    }
}

/// Drops control characters and escape sequences.
fn printable(line: &str) -> String {
    let mut out = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            // A control sequence runs to its final byte (ECMA-48 §5.4); others are two characters.
            '\x1b' => {
                if chars.next() == Some('[') {
                    chars.find(|c| ('\x40'..='\x7e').contains(c));
                }
            }
            '\t' => out.push(' '),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept() {
        let mut tail = Tail::new(10);
        tail.push(b"0123456789");
        tail.push(b"ab\ncd");
        assert_eq!(tail.lines(9), ["56789ab", "cd"]);
        tail.push(&[b'x'; 100]);
        assert_eq!(tail.lines(9), ["xxxxxxxxxx"]);
    }

    #[test]
    fn lines_are_counted_from_the_end_and_made_harmless() {
        let mut tail = Tail::new(1000);
        tail.push(b"one\r\n\r\n\x1b[1;31mtwo\x1b[0m\x07\r\n\x1b]0;title\x07three \xff\tx\n\x1b[");
        assert_eq!(tail.lines(2), ["two", "0;titlethree \u{fffd} x"]);
        assert_eq!(tail.lines(9).len(), 3);
    }
}
