//! A reader of tar archives in the forms that packages use: POSIX ustar with the GNU extensions for
//! long names, and pax headers for long names and sizes. Every header is bounded.

use std::io::{self, Read};

const BLOCK: usize = 512;
/// The longest path or link target, in bytes (`PATH_MAX`).
const MAX_PATH: u64 = 4096;
/// The longest pax header, in bytes.
const MAX_PAX: u64 = 64 * 1024;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// A plain file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link to the text given.
    Symlink(String),
    /// Another name for the file at the path given.
    Hardlink(String),
    /// A device, a FIFO or something else that a guest image has no use for.
    Other,
}

/// One entry; reading it gives a plain file's content.
pub(super) struct Entry<'a, R> {
    /// The path, without a leading `./` or `/` and without a trailing slash; it may be empty (the
    /// root) and may contain `..`.
    pub(super) path: String,
    /// What it is.
    pub(super) kind: EntryKind,
    /// The permission bits.
    pub(super) mode: u32,
    /// The content's length, in bytes.
    pub(super) len: u64,
    entries: &'a mut Entries<R>,
}

/// The entries of an archive, one after the other.
pub(super) struct Entries<R> {
    reader: R,
    left: u64,
    padding: u64,
    remaining: u64,
}

#[derive(Default)]
struct Overrides {
    path: Option<String>,
    link: Option<String>,
    size: Option<u64>,
}

impl<R: Read> Entries<R> {
    /// The entries of `reader`; more than `max` of them are an error.
    pub(super) fn new(reader: R, max: u64) -> Self {
        Entries {
            reader,
            left: 0,
            padding: 0,
            remaining: max,
        }
    }

    /// The next entry; what is unread of the one before is skipped.
    pub(super) fn next(&mut self) -> io::Result<Option<Entry<'_, R>>> {
        let mut overrides = Overrides::default();
        loop {
            self.skip_rest()?;
            let mut header = [0; BLOCK];
            self.reader.read_exact(&mut header)?;
            if header == [0; BLOCK] {
                return Ok(None);
            }
            self.remaining = self
                .remaining
                .checked_sub(1)
                .ok_or_else(|| invalid("it has too many entries"))?;
            check(&header)?;
            let size = number(&header[124..136])?;
            match header[156] {
                b'L' => overrides.path = Some(self.long_text(size)?),
                b'K' => overrides.link = Some(self.long_text(size)?),
                b'x' => self.pax(size, &mut overrides)?,
                b'g' => self.set_content(size),
                kind => return self.entry(&header, kind, size, overrides).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &[u8; BLOCK],
        kind: u8,
        size: u64,
        overrides: Overrides,
    ) -> io::Result<Entry<'_, R>> {
        let len = overrides.size.unwrap_or(size);
        let path = match overrides.path {
            Some(path) => path,
            None => {
                let name = text(&header[..100])?;
                let prefix = if header[257..263] == *b"ustar\0" {
                    text(&header[345..500])?
                } else {
                    ""
                };
                if prefix.is_empty() {
                    name.to_owned()
                } else {
                    format!("{prefix}/{name}")
                }
            }
        };
        let link = match overrides.link {
            Some(link) => link,
            None => text(&header[157..257])?.to_owned(),
        };
        // Only plain files have content; in other entries the size may be set without any.
        let (kind, len) = match kind {
            b'0' | 0 | b'7' => (EntryKind::File, len),
            b'1' => (EntryKind::Hardlink(plain(&link).to_owned()), 0),
            b'2' => (EntryKind::Symlink(link), 0),
            b'5' => (EntryKind::Folder, 0),
            b'3' | b'4' | b'6' => (EntryKind::Other, 0),
            _ => (EntryKind::Other, len),
        };
        let mode = (number(&header[100..108])? & 0o777) as u32;
        self.set_content(len);
        Ok(Entry {
            path: plain(&path).to_owned(),
            kind,
            mode,
            len,
            entries: self,
        })
    }

    fn set_content(&mut self, len: u64) {
        self.left = len;
        self.padding = (BLOCK as u64 - len % BLOCK as u64) % BLOCK as u64;
    }

    fn skip_rest(&mut self) -> io::Result<()> {
        let skip = self.left.saturating_add(self.padding);
        let skipped = io::copy(&mut self.reader.by_ref().take(skip), &mut io::sink())?;
        (self.left, self.padding) = (0, 0);
        if skipped < skip {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn small_content(&mut self, size: u64, max: u64) -> io::Result<Vec<u8>> {
        if size > max {
            return Err(invalid("it has a name of more than 4096 bytes"));
        }
        self.set_content(size);
        let mut content = vec![0; size as usize];
        self.reader.read_exact(&mut content)?;
        self.left = 0;
        Ok(content)
    }

    fn long_text(&mut self, size: u64) -> io::Result<String> {
        let content = self.small_content(size, MAX_PATH + 1)?;
        text(&content).map(str::to_owned)
    }

    fn pax(&mut self, size: u64, overrides: &mut Overrides) -> io::Result<()> {
        let content = self.small_content(size, MAX_PAX)?;
        let damaged = || invalid("it has a damaged pax header");
        let mut rest = &content[..];
        while !rest.is_empty() {
            let space = rest.iter().position(|&b| b == b' ').ok_or_else(damaged)?;
            let len: usize = std::str::from_utf8(&rest[..space])
                .ok()
                .and_then(|digits| digits.parse().ok())
                .filter(|&len| len > space + 1 && len <= rest.len())
                .ok_or_else(damaged)?;
            let record = std::str::from_utf8(&rest[space + 1..len])
                .ok()
                .and_then(|record| record.strip_suffix('\n'));
            rest = &rest[len..];
            let Some((key, value)) = record.and_then(|record| record.split_once('=')) else {
                continue;
            };
            let path = || {
                if value.len() as u64 > MAX_PATH || value.contains('\0') {
                    return Err(damaged());
                }
                Ok(Some(value.to_owned()))
            };
            match key {
                "path" => overrides.path = path()?,
                "linkpath" => overrides.link = path()?,
                "size" => overrides.size = Some(value.parse().map_err(|_| damaged())?),
                _ => {}
            }
        }
        Ok(())
    }
}

impl<R: Read> Read for Entry<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let entries = &mut *self.entries;
        let count = entries.reader.by_ref().take(entries.left).read(buffer)?;
        if count == 0 && entries.left > 0 && !buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        entries.left -= count as u64;
        Ok(count)
    }
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

fn plain(path: &str) -> &str {
    let mut path = path;
    while let Some(rest) = path.strip_prefix("./").or_else(|| path.strip_prefix('/')) {
        path = rest;
    }
    let path = path.trim_end_matches('/');
    if path == "." { "" } else { path }
}

fn text(field: &[u8]) -> io::Result<&str> {
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    std::str::from_utf8(&field[..end]).map_err(|_| invalid("it has a name that is not UTF-8"))
}

/// A number in octal digits, or big-endian binary after a byte with its top bit set (GNU).
fn number(field: &[u8]) -> io::Result<u64> {
    let damaged = || invalid("it has a damaged tar header");
    if field[0] & 0x80 != 0 {
        return field[1..].iter().try_fold(0u64, |value, &byte| {
            value
                .checked_mul(256)
                .map(|shifted| shifted | u64::from(byte))
                .ok_or_else(damaged)
        });
    }
    field
        .iter()
        .skip_while(|&&byte| byte == b' ')
        .take_while(|&&byte| byte != b' ' && byte != 0)
        .try_fold(0u64, |value, &byte| match byte {
            b'0'..=b'7' => value
                .checked_mul(8)
                .map(|shifted| shifted | u64::from(byte - b'0'))
                .ok_or_else(damaged),
            _ => Err(damaged()),
        })
}

fn check(header: &[u8; BLOCK]) -> io::Result<()> {
    let sum: u64 = header
        .iter()
        .enumerate()
        .map(|(at, &byte)| u64::from(if (148..156).contains(&at) { b' ' } else { byte }))
        .sum();
    if number(&header[148..156])? == sum {
        Ok(())
    } else {
        Err(invalid("it has a tar header with a wrong checksum"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::tests::tar_with;
    use ::tar::EntryType;

    type Listed = (String, EntryKind, Vec<u8>);

    fn list(bytes: &[u8]) -> io::Result<Vec<Listed>> {
        let mut entries = Entries::new(bytes, 100);
        let mut listed = Vec::new();
        while let Some(mut entry) = entries.next()? {
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            listed.push((entry.path.clone(), entry.kind.clone(), content));
        }
        Ok(listed)
    }

    #[test]
    fn long_names_and_links_are_read_in_both_dialects() {
        let long = format!("deep/{}/file", "x".repeat(200));
        let mut builder = ::tar::Builder::new(Vec::new());
        let mut header = ::tar::Header::new_gnu();
        header.set_size(3);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, &long, &b"abc"[..])
            .unwrap();
        let mut header = ::tar::Header::new_gnu();
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, "link", &long).unwrap();
        builder
            .append_pax_extensions([("path", long.as_bytes()), ("mtime", b"1.5")])
            .unwrap();
        let mut header = ::tar::Header::new_ustar();
        header.set_path("short").unwrap();
        header.set_size(1);
        header.set_cksum();
        builder.append(&header, &b"z"[..]).unwrap();
        let listed = list(&builder.into_inner().unwrap()).unwrap();
        assert_eq!(
            listed,
            [
                (long.clone(), EntryKind::File, b"abc".to_vec()),
                ("link".into(), EntryKind::Symlink(long.clone()), Vec::new()),
                (long, EntryKind::File, b"z".to_vec()),
            ]
        );
    }

    #[test]
    fn a_name_beyond_path_max_is_refused() {
        let mut builder = ::tar::Builder::new(Vec::new());
        let mut header = ::tar::Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        builder.append(&header, io::empty()).unwrap();
        assert!(list(&builder.into_inner().unwrap()).is_err());
    }

    #[test]
    fn damage_is_noticed() {
        let good = tar_with(&[("./x", EntryType::Regular, "", b"abc")]);
        assert_eq!(list(&good).unwrap().len(), 1);
        let mut flipped = good.clone();
        flipped[1] ^= 1;
        assert!(list(&flipped).is_err());
        for cut in [0, 100, 512, 514, 1000, 1024] {
            assert!(list(&good[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn too_many_entries_are_refused() {
        let entries = vec![("./x", EntryType::Regular, "", &b""[..]); 101];
        assert!(list(&tar_with(&entries)).is_err());
    }

    #[test]
    fn numbers_do_not_overflow() {
        assert_eq!(number(b"0000644\0").unwrap(), 0o644);
        assert_eq!(number(b"  17 \0\0\0").unwrap(), 0o17);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 1, 0]).unwrap(), 256);
        assert!(number(&[0xFF; 12]).is_err());
        assert!(number(b"99999999").is_err());
    }
}
