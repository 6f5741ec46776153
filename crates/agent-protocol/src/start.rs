//! The command that the guest is asked to run.

use crate::wire::{MAX_START, StartHeader};
use alloc::string::String;
use alloc::vec::Vec;

/// A command, as the caller describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartRequest {
    /// The program and its arguments, at least one string. A name without a slash is looked up in
    /// the `PATH` of `environment`, or a default path.
    pub arguments: Vec<Vec<u8>>,
    /// `NAME=value` strings: the whole environment. Empty: the guest's default (`PATH`, `HOME`,
    /// `USER`, `TERM`).
    pub environment: Vec<Vec<u8>>,
    /// The working directory; empty: the user's home.
    pub directory: Vec<u8>,
    /// The user to run as.
    pub uid: u32,
    /// The group to run as.
    pub gid: u32,
    /// Whether the command gets a pseudo-terminal instead of pipes.
    pub terminal: bool,
    /// The terminal's width and height in characters, if known.
    pub size: Option<(u16, u16)>,
}

/// Why a command cannot be sent to the guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StartError {
    /// There is no program to run.
    #[error("no command given")]
    Empty,
    /// A string has a NUL byte, which no program can be passed.
    #[error("{0:?} contains a NUL byte, which no argument, variable or folder name can")]
    Nul(String),
    /// The record would be longer than [`MAX_START`].
    #[error(
        "the command and its environment take {0} bytes; the guest accepts {MAX_START}: pass the data on standard input instead"
    )]
    TooLong(usize),
    /// More than 65,535 arguments or variables.
    #[error("more than 65535 arguments or environment variables")]
    TooMany,
}

impl StartRequest {
    /// The start record that goes over the wire.
    ///
    /// # Errors
    /// If there is no command, a string contains a NUL byte, or it is all too long.
    pub fn to_record(&self) -> Result<Vec<u8>, StartError> {
        if self.arguments.is_empty() {
            return Err(StartError::Empty);
        }
        let (columns, rows) = self.size.unwrap_or((0, 0));
        let header = StartHeader {
            terminal: self.terminal,
            uid: self.uid,
            gid: self.gid,
            columns,
            rows,
            arguments: u16::try_from(self.arguments.len()).map_err(|_| StartError::TooMany)?,
            variables: u16::try_from(self.environment.len()).map_err(|_| StartError::TooMany)?,
        };
        let mut record = Vec::from(header.to_bytes());
        let strings = core::iter::once(&self.directory)
            .chain(&self.arguments)
            .chain(&self.environment);
        for string in strings {
            if string.contains(&0) {
                return Err(StartError::Nul(
                    String::from_utf8_lossy(string).into_owned(),
                ));
            }
            record.extend_from_slice(string);
            record.push(0);
        }
        if record.len() > MAX_START {
            return Err(StartError::TooLong(record.len()));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn request(arguments: &[&[u8]]) -> StartRequest {
        StartRequest {
            arguments: arguments.iter().map(|a| a.to_vec()).collect(),
            ..StartRequest::default()
        }
    }

    #[test]
    fn the_record_reads_back() {
        let mut start = request(&[b"echo", b"", b"a b"]);
        start.environment = vec![b"X=1".to_vec()];
        start.directory = b"/tmp".to_vec();
        start.size = Some((100, 40));
        let record = start.to_record().unwrap();
        let (header, strings) = StartHeader::parse(&record).unwrap();
        assert_eq!((header.arguments, header.variables), (3, 1));
        assert_eq!((header.columns, header.rows), (100, 40));
        assert_eq!(strings, b"/tmp\0echo\0\0a b\0X=1\0");
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        assert_eq!(request(&[]).to_record(), Err(StartError::Empty));
        assert_eq!(
            request(&[b"a\0b"]).to_record(),
            Err(StartError::Nul("a\0b".into()))
        );
        let long = vec![b'x'; MAX_START];
        assert!(matches!(
            request(&[&long]).to_record(),
            Err(StartError::TooLong(_))
        ));
        let many = vec![&b"x"[..]; 65_536];
        assert_eq!(request(&many).to_record(), Err(StartError::TooMany));
    }
}
