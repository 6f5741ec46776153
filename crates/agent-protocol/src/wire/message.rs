//! Messages: the kinds of frames and what their payloads mean.

/// The version that [`ToHost::Hello`] carries. A host refuses any other.
pub const VERSION: u16 = 1;
/// The window that our guest grants, in wire bytes: within what its terminal layer buffers (4 KiB
/// in the line discipline and 64 KiB before it) and within what the guest sets aside for standard
/// input that the command has not read yet.
pub const WINDOW: u32 = 8192;
/// The longest start record, in bytes: arguments, environment and working directory together.
pub const MAX_START: usize = 256 * 1024;
/// Bytes of a start record before its strings.
pub const START_FIXED: usize = 17;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// It exited with this status. 126: found but not executable; 127: not found.
    Code(u8),
    /// It was killed by this signal.
    Signal(u8),
}

impl ExitStatus {
    /// The status that a shell would give: the code itself, or 128 plus the signal's number.
    #[must_use]
    pub fn shell_code(self) -> u8 {
        match self {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => 128u8.saturating_add(signal),
        }
    }
}

/// A payload that does not fit its kind, or a kind that this version does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireError {
    /// The frame's kind.
    pub kind: u8,
}

/// Messages from the host to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToGuest<'a> {
    /// A piece of the start record ([`StartHeader`] and its strings); `last` makes it run.
    Start {
        /// Whether the record is complete with this piece.
        last: bool,
        /// The piece.
        piece: &'a [u8],
    },
    /// Bytes for the command's standard input.
    Stdin(&'a [u8]),
    /// The end of standard input.
    StdinEof,
    /// Send this signal to the command's process group.
    Signal(u8),
    /// The terminal has a new size.
    WindowSize {
        /// In characters.
        columns: u16,
        /// In characters.
        rows: u16,
    },
}

impl<'a> ToGuest<'a> {
    /// Reads a message out of a frame.
    ///
    /// # Errors
    /// If the kind is unknown or the payload has the wrong size.
    pub fn parse(kind: u8, payload: &'a [u8]) -> Result<Self, WireError> {
        match (kind, payload) {
            (0x01, piece) => Ok(ToGuest::Start { last: false, piece }),
            (0x02, piece) => Ok(ToGuest::Start { last: true, piece }),
            (0x03, bytes) => Ok(ToGuest::Stdin(bytes)),
            (0x04, []) => Ok(ToGuest::StdinEof),
            (0x05, &[signal]) => Ok(ToGuest::Signal(signal)),
            (0x06, &[c0, c1, r0, r1]) => Ok(ToGuest::WindowSize {
                columns: u16::from_le_bytes([c0, c1]),
                rows: u16::from_le_bytes([r0, r1]),
            }),
            _ => Err(WireError { kind }),
        }
    }

    /// The message as a frame's kind and payload; `scratch` holds payloads that are not borrowed.
    pub fn pieces<'b>(&self, scratch: &'b mut [u8; 8]) -> (u8, &'b [u8])
    where
        'a: 'b,
    {
        match *self {
            ToGuest::Start { last: false, piece } => (0x01, piece),
            ToGuest::Start { last: true, piece } => (0x02, piece),
            ToGuest::Stdin(bytes) => (0x03, bytes),
            ToGuest::StdinEof => (0x04, &[]),
            ToGuest::Signal(signal) => {
                scratch[0] = signal;
                (0x05, &scratch[..1])
            }
            ToGuest::WindowSize { columns, rows } => {
                scratch[..2].copy_from_slice(&columns.to_le_bytes());
                scratch[2..4].copy_from_slice(&rows.to_le_bytes());
                (0x06, &scratch[..4])
            }
        }
    }
}

/// Messages from the guest to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToHost<'a> {
    /// The guest is up and waits for a command. The first message.
    Hello {
        /// [`VERSION`].
        version: u16,
        /// How many wire bytes the host may have under way.
        window: u32,
    },
    /// Bytes from the command's standard output.
    Stdout(&'a [u8]),
    /// Bytes from the command's standard error, or the guest's own reason why it did not run.
    Stderr(&'a [u8]),
    /// So many more wire bytes may be sent.
    Credit(u32),
    /// The command has ended and all its output has been sent. The last message.
    Exit(ExitStatus),
}

impl<'a> ToHost<'a> {
    /// Reads a message out of a frame.
    ///
    /// # Errors
    /// If the kind is unknown or the payload has the wrong size or values.
    pub fn parse(kind: u8, payload: &'a [u8]) -> Result<Self, WireError> {
        match (kind, payload) {
            (0x81, &[v0, v1, w0, w1, w2, w3]) => Ok(ToHost::Hello {
                version: u16::from_le_bytes([v0, v1]),
                window: u32::from_le_bytes([w0, w1, w2, w3]),
            }),
            (0x82, bytes) => Ok(ToHost::Stdout(bytes)),
            (0x83, bytes) => Ok(ToHost::Stderr(bytes)),
            (0x84, &[a, b, c, d]) => Ok(ToHost::Credit(u32::from_le_bytes([a, b, c, d]))),
            (0x85, &[0, code]) => Ok(ToHost::Exit(ExitStatus::Code(code))),
            (0x85, &[1, signal]) => Ok(ToHost::Exit(ExitStatus::Signal(signal))),
            _ => Err(WireError { kind }),
        }
    }

    /// The message as a frame's kind and payload; `scratch` holds payloads that are not borrowed.
    pub fn pieces<'b>(&self, scratch: &'b mut [u8; 8]) -> (u8, &'b [u8])
    where
        'a: 'b,
    {
        match *self {
            ToHost::Hello { version, window } => {
                scratch[..2].copy_from_slice(&version.to_le_bytes());
                scratch[2..6].copy_from_slice(&window.to_le_bytes());
                (0x81, &scratch[..6])
            }
            ToHost::Stdout(bytes) => (0x82, bytes),
            ToHost::Stderr(bytes) => (0x83, bytes),
            ToHost::Credit(bytes) => {
                scratch[..4].copy_from_slice(&bytes.to_le_bytes());
                (0x84, &scratch[..4])
            }
            ToHost::Exit(status) => {
                let (how, value) = match status {
                    ExitStatus::Code(code) => (0, code),
                    ExitStatus::Signal(signal) => (1, signal),
                };
                scratch[..2].copy_from_slice(&[how, value]);
                (0x85, &scratch[..2])
            }
        }
    }
}

/// The fixed part of a start record. After it come NUL-terminated strings: the working directory
/// (empty: `/root` for the superuser, `/` for others), then `arguments` of them, then `variables`
/// of the form `NAME=value`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StartHeader {
    /// Whether the command gets a pseudo-terminal instead of pipes; standard error then arrives
    /// as standard output.
    pub terminal: bool,
    /// The user to run as.
    pub uid: u32,
    /// The group to run as.
    pub gid: u32,
    /// The terminal's width in characters; 0: unknown.
    pub columns: u16,
    /// The terminal's height in characters; 0: unknown.
    pub rows: u16,
    /// How many argument strings follow, the program's name included.
    pub arguments: u16,
    /// How many environment strings follow the arguments.
    pub variables: u16,
}

impl StartHeader {
    /// The header as it stands at the front of a start record.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; START_FIXED] {
        let mut out = [0; START_FIXED];
        out[0] = u8::from(self.terminal);
        out[1..5].copy_from_slice(&self.uid.to_le_bytes());
        out[5..9].copy_from_slice(&self.gid.to_le_bytes());
        out[9..11].copy_from_slice(&self.columns.to_le_bytes());
        out[11..13].copy_from_slice(&self.rows.to_le_bytes());
        out[13..15].copy_from_slice(&self.arguments.to_le_bytes());
        out[15..17].copy_from_slice(&self.variables.to_le_bytes());
        out
    }

    /// Splits a start record into its header and its strings; `None` if it is too short or has
    /// fewer strings than the header counts.
    #[must_use]
    pub fn parse(record: &[u8]) -> Option<(Self, &[u8])> {
        let (fixed, strings) = record.split_at_checked(START_FIXED)?;
        let word = |at: usize| u16::from_le_bytes([fixed[at], fixed[at + 1]]);
        let long = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        let header = StartHeader {
            terminal: fixed[0] & 1 == 1,
            uid: long(1),
            gid: long(5),
            columns: word(9),
            rows: word(11),
            arguments: word(13),
            variables: word(15),
        };
        let terminators = strings.iter().filter(|&&byte| byte == 0).count();
        let wanted = 1 + usize::from(header.arguments) + usize::from(header.variables);
        (terminators == wanted && strings.last() == Some(&0)).then_some((header, strings))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_survives_the_wire() {
        let mut scratch = [0; 8];
        for message in [
            ToGuest::Start {
                last: false,
                piece: b"abc",
            },
            ToGuest::Start {
                last: true,
                piece: b"",
            },
            ToGuest::Stdin(b"\0\xff"),
            ToGuest::StdinEof,
            ToGuest::Signal(15),
            ToGuest::WindowSize {
                columns: 300,
                rows: 7,
            },
        ] {
            let (kind, payload) = message.pieces(&mut scratch);
            assert_eq!(ToGuest::parse(kind, payload), Ok(message));
            assert_eq!(ToHost::parse(kind, payload), Err(WireError { kind }));
        }
        let mut scratch = [0; 8];
        for message in [
            ToHost::Hello {
                version: 1,
                window: 70_000,
            },
            ToHost::Stdout(b"out"),
            ToHost::Stderr(b""),
            ToHost::Credit(u32::MAX),
            ToHost::Exit(ExitStatus::Code(255)),
            ToHost::Exit(ExitStatus::Signal(9)),
        ] {
            let (kind, payload) = message.pieces(&mut scratch);
            assert_eq!(ToHost::parse(kind, payload), Ok(message));
            assert_eq!(ToGuest::parse(kind, payload), Err(WireError { kind }));
        }
    }

    #[test]
    fn payloads_of_the_wrong_size_are_refused() {
        for kind in [0x04, 0x81, 0x84, 0x85] {
            let payload = [0u8; 9];
            assert!(ToHost::parse(kind, &payload).is_err());
            assert!(ToGuest::parse(kind, &payload).is_err());
        }
        assert!(ToHost::parse(0x85, &[2, 0]).is_err());
    }

    #[test]
    fn a_signal_becomes_the_status_a_shell_gives() {
        assert_eq!(ExitStatus::Signal(9).shell_code(), 137);
        assert_eq!(ExitStatus::Signal(255).shell_code(), 255);
        assert_eq!(ExitStatus::Code(3).shell_code(), 3);
    }

    #[test]
    fn a_start_record_must_have_the_strings_it_counts() {
        let header = StartHeader {
            arguments: 2,
            variables: 1,
            uid: 0x0102_0304,
            gid: 5,
            columns: 80,
            rows: 24,
            terminal: true,
        };
        let mut record = std::vec::Vec::from(header.to_bytes());
        record.extend(b"/\0sh\0-l\0A=1\0");
        let (parsed, strings) = StartHeader::parse(&record).unwrap();
        assert_eq!(parsed, header);
        assert_eq!(strings, b"/\0sh\0-l\0A=1\0");
        for cut in 0..record.len() {
            assert!(StartHeader::parse(&record[..cut]).is_none());
        }
        record.extend(b"more\0");
        assert!(StartHeader::parse(&record).is_none());
    }
}
