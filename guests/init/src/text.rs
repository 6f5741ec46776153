//! Strings without an allocator, and the options on the kernel's command line.

use crate::sys::{self, Fd};
use core::ffi::CStr;

/// Where complaints go: the kernel's console.
const CONSOLE: Fd = Fd(2);

/// What the kernel's command line asks for.
#[derive(Default, Clone, Copy)]
pub struct Options {
    pub exec: bool,
    pub host_name: Option<&'static [u8]>,
    pub terminal: Option<&'static [u8]>,
    /// Columns and rows.
    pub size: Option<(u16, u16)>,
}

impl Options {
    pub fn parse(line: &'static [u8]) -> Options {
        let mut options = Options::default();
        for word in line.split(|byte| byte.is_ascii_whitespace()) {
            if word == b"caisson.exec=1" {
                options.exec = true;
            } else if let Some(name) = word.strip_prefix(b"caisson.hostname=") {
                options.host_name = Some(name).filter(|name| !name.is_empty());
            } else if let Some(kind) = word.strip_prefix(b"caisson.term=") {
                options.terminal = Some(kind).filter(|kind| !kind.is_empty());
            } else if let Some(size) = word.strip_prefix(b"caisson.size=") {
                options.size = parse_size(size);
            }
        }
        options
    }
}

fn parse_size(text: &[u8]) -> Option<(u16, u16)> {
    let cross = text.iter().position(|&byte| byte == b'x')?;
    Some((number(&text[..cross])?, number(&text[cross + 1..])?))
}

fn number(digits: &[u8]) -> Option<u16> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u16, |value, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value.checked_mul(10)?.checked_add(digit.into())
    })
}

/// Writes `value` in decimal into `digits` and gives the part that was written.
pub fn decimal(mut value: u32, digits: &mut [u8; 10]) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            return &digits[at..];
        }
    }
}

/// A NUL-terminated string of up to 4,095 bytes, put together from pieces.
pub struct Path {
    bytes: [u8; 4096],
}

impl Path {
    /// `None` if the pieces are too long together or contain a NUL byte.
    pub fn new(pieces: &[&[u8]]) -> Option<Path> {
        let mut bytes = [0; 4096];
        let mut len = 0;
        for piece in pieces {
            let end = len + piece.len();
            if end >= bytes.len() || piece.contains(&0) {
                return None;
            }
            bytes[len..end].copy_from_slice(piece);
            len = end;
        }
        Some(Path { bytes })
    }

    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}

/// Writes all of `bytes` to a blocking file; gives up if it fails.
pub fn write_all(fd: Fd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match sys::write(fd, bytes) {
            Ok(count) if count > 0 => bytes = &bytes[count..],
            Err(sys::EINTR) => {}
            _ => return,
        }
    }
}

/// Tells the person who watches the console.
pub fn complain(pieces: &[&[u8]]) {
    for piece in pieces {
        write_all(CONSOLE, piece);
    }
}

/// As [`complain`], for a failed system call.
pub fn complain_errno(what: &[u8], name: &[u8], errno: sys::Errno) {
    let mut digits = [0; 10];
    complain(&[
        b"init: cannot ",
        what,
        b" ",
        name,
        b": error ",
        decimal(errno.0.unsigned_abs(), &mut digits),
        b"\n",
    ]);
}
