//! The `ar` archive around a Debian package, in its simple form: short names only.

use std::io::{self, Read};

const MAGIC: &[u8; 8] = b"!<arch>\n";
/// More members than any package has.
const MAX_MEMBERS: u32 = 64;

/// The members of an archive, one after the other.
pub(super) struct Members<R> {
    reader: R,
    left: u64,
    padding: bool,
    seen: u32,
}

impl<R: Read> Members<R> {
    pub(super) fn new(mut reader: R) -> io::Result<Self> {
        let mut magic = [0; 8];
        reader.read_exact(&mut magic)?;
        if magic != *MAGIC {
            return Err(invalid("it does not begin like an ar archive"));
        }
        Ok(Members {
            reader,
            left: 0,
            padding: false,
            seen: 0,
        })
    }

    /// Goes to the next member and gives its name; what is unread of the present one is skipped.
    pub(super) fn next(&mut self) -> io::Result<Option<String>> {
        let skip = self.left + u64::from(self.padding);
        let skipped = io::copy(&mut self.reader.by_ref().take(skip), &mut io::sink())?;
        // The padding of the last member may be missing.
        if skipped < self.left {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut header = [0; 60];
        let mut filled = 0;
        while filled < header.len() {
            match self.reader.read(&mut header[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => filled += count,
            }
        }
        self.seen += 1;
        if header[58..] != *b"`\n" || self.seen > MAX_MEMBERS {
            return Err(invalid("it has a damaged ar header"));
        }
        let text = |range: std::ops::Range<usize>| {
            std::str::from_utf8(&header[range])
                .map(|text| text.trim_end_matches(' '))
                .map_err(|_| invalid("it has a damaged ar header"))
        };
        let name = text(0..16)?.trim_end_matches('/').to_owned();
        self.left = text(48..58)?
            .parse()
            .map_err(|_| invalid("it has a damaged ar header"))?;
        self.padding = self.left % 2 == 1;
        Ok(Some(name))
    }

    /// The content of the present member.
    pub(super) fn into_content(self) -> Content<R> {
        Content {
            inner: self.reader.take(self.left),
        }
    }
}

/// A member's content; ends early with an error if the archive does.
pub(super) struct Content<R> {
    inner: io::Take<R>,
}

impl<R: Read> Read for Content<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if count == 0 && !buffer.is_empty() && self.inner.limit() > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(count)
    }
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::tests::ar;

    #[test]
    fn members_are_found_whatever_was_read_of_the_one_before() {
        let bytes = ar(&[("one", b"1"), ("two/", b"22"), ("three", b"")]);
        let mut members = Members::new(&bytes[..]).unwrap();
        let mut names = Vec::new();
        while let Some(name) = members.next().unwrap() {
            names.push(name);
        }
        assert_eq!(names, ["one", "two", "three"]);

        let mut members = Members::new(&bytes[..]).unwrap();
        members.next().unwrap();
        members.next().unwrap();
        let mut content = String::new();
        members.into_content().read_to_string(&mut content).unwrap();
        assert_eq!(content, "22");
    }

    #[test]
    fn what_is_no_archive_is_refused() {
        assert!(Members::new(&b"\x7fELF...."[..]).is_err());
        assert!(Members::new(&b"!<ar"[..]).is_err());
        let mut bytes = ar(&[("one", b"1")]);
        bytes[8 + 48] = b'-';
        assert!(Members::new(&bytes[..]).unwrap().next().is_err());
    }

    #[test]
    fn content_that_ends_early_is_an_error() {
        let bytes = ar(&[("one", b"12345678")]);
        let mut members = Members::new(&bytes[..bytes.len() - 3]).unwrap();
        members.next().unwrap();
        let mut content = Vec::new();
        let error = members
            .into_content()
            .read_to_end(&mut content)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
