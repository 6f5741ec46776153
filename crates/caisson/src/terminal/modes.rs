//! What the guest's programs have switched on in the user's terminal, so that it can be switched
//! off when they are gone without having done so themselves.

/// DEC private modes that would disturb the user's shell, with whether "set" is the disturbing
/// state. Numbers: xterm control sequences, "DEC Private Mode Set".
const MODES: [(u32, bool); 11] = [
    (1, true),    // application cursor keys
    (7, false),   // automatic wrap
    (25, false),  // cursor
    (47, true),   // alternate screen
    (1000, true), // mouse: clicks
    (1002, true), // mouse: drags
    (1003, true), // mouse: motion
    (1006, true), // mouse: long coordinates
    (1047, true), // alternate screen
    (1049, true), // alternate screen and cursor
    (2004, true), // bracketed paste
];
/// No mode of interest is this large.
const TOO_LARGE: u32 = 10_000;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Text,
    Escape,
    Bracket,
    Private,
}

/// Follows the guest's output for the modes that it sets. It holds a few numbers, whatever the
/// guest writes.
#[derive(Debug, Default)]
pub(crate) struct ModeTracker {
    state: State,
    /// The number being read.
    number: u32,
    /// Modes that the sequence being read lists, as bits of [`MODES`].
    listed: u16,
    /// Modes in their disturbing state, as bits of [`MODES`].
    disturbed: u16,
    /// The guest changed colours.
    coloured: bool,
}

impl ModeTracker {
    /// Looks at output on its way to the terminal.
    pub(crate) fn watch(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.state = match (self.state, byte) {
                (_, 0x1b) => State::Escape,
                (State::Escape, b'[') => State::Bracket,
                (State::Bracket, b'?') => {
                    (self.number, self.listed) = (0, 0);
                    State::Private
                }
                (State::Bracket, b'0'..=b'9' | b';') => State::Bracket,
                (State::Bracket, b'm') => {
                    self.coloured = true;
                    State::Text
                }
                (State::Private, b'0'..=b'9') => {
                    self.number = (self.number * 10 + u32::from(byte - b'0')).min(TOO_LARGE);
                    State::Private
                }
                (State::Private, b';') => {
                    self.list();
                    State::Private
                }
                (State::Private, b'h' | b'l') => {
                    self.list();
                    self.set(byte == b'h');
                    State::Text
                }
                _ => State::Text,
            };
        }
    }

    fn list(&mut self) {
        if let Some(index) = MODES.iter().position(|(mode, _)| *mode == self.number) {
            self.listed |= 1 << index;
        }
        self.number = 0;
    }

    fn set(&mut self, on: bool) {
        for (index, (_, disturbing)) in MODES.iter().enumerate() {
            let bit = 1 << index;
            if self.listed & bit != 0 {
                if on == *disturbing {
                    self.disturbed |= bit;
                } else {
                    self.disturbed &= !bit;
                }
            }
        }
    }

    /// The bytes that undo what is still set. Empty when there is nothing to undo.
    pub(crate) fn undo(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.coloured {
            bytes.extend(b"\x1b[0m");
        }
        for (index, (mode, disturbing)) in MODES.iter().enumerate() {
            if self.disturbed & (1 << index) != 0 {
                let end = if *disturbing { 'l' } else { 'h' };
                bytes.extend(format!("\x1b[?{mode}{end}").into_bytes());
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn undo(pieces: &[&[u8]]) -> String {
        let mut tracker = ModeTracker::default();
        for piece in pieces {
            tracker.watch(piece);
        }
        String::from_utf8(tracker.undo()).unwrap()
    }

    #[test]
    fn what_is_left_on_is_switched_off() {
        assert_eq!(undo(&[b"plain \x1b[2J text"]), "");
        assert_eq!(undo(&[b"\x1b[?1049h\x1b[?25l"]), "\x1b[?25h\x1b[?1049l");
        assert_eq!(undo(&[b"\x1b[?1049h...\x1b[?1049l"]), "");
        assert_eq!(undo(&[b"\x1b[?1000;1006h"]), "\x1b[?1000l\x1b[?1006l");
        assert_eq!(undo(&[b"\x1b[1;31mred"]), "\x1b[0m");
    }

    #[test]
    fn sequences_may_be_cut_anywhere() {
        let whole = b"\x1b[?12;2004h";
        for at in 0..whole.len() {
            assert_eq!(undo(&[&whole[..at], &whole[at..]]), "\x1b[?2004l", "{at}");
        }
    }

    #[test]
    fn nonsense_is_not_a_mode() {
        assert_eq!(undo(&[b"\x1b[?99999999999999999999h\x1b[?h\x1b[?;;;h"]), "");
        assert_eq!(undo(&[b"\x1b[?1\x1b[?1049x\x1b]?1h"]), "");
    }
}
