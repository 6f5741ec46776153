//! The description of a disk: text in a file of its own, or in the image.

use crate::format::{FormatError, refused};

/// What a description begins with.
pub(super) const SIGNATURE: &[u8] = b"# Disk DescriptorFile";
/// The longest description, in bytes.
pub(super) const MAX_LEN: u64 = 1 << 20;
/// The most extents of a disk.
const MAX_EXTENTS: usize = 4096;

/// Where a part of the disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// As it is, in a file from this byte on.
    Flat {
        /// The file's name.
        file: String,
        /// The first byte in it.
        offset: u64,
    },
    /// In the grains of a sparse extent.
    Sparse {
        /// The file's name.
        file: String,
    },
    /// Nowhere: it reads as zeroes.
    Zero,
}

/// A part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes.
    pub len: u64,
    /// Where it is.
    pub place: Place,
}

/// A description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// What kind of disk it is said to be, such as `monolithicSparse`.
    pub kind: String,
    /// Its parts, in order.
    pub pieces: Vec<Piece>,
}

impl Descriptor {
    /// Parses a description, which may be followed by zeroes.
    ///
    /// # Errors
    /// It is damaged, or the disk is a difference to another one.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let end = bytes.iter().position(|&byte| byte == 0);
        let bytes = &bytes[..end.unwrap_or(bytes.len())];
        if !bytes.starts_with(SIGNATURE) || bytes.len() as u64 > MAX_LEN {
            return Err(refused("it has no description of the disk"));
        }
        let text = core::str::from_utf8(bytes);
        let text = text.map_err(|_| refused("its description is not in UTF-8"))?;
        let mut kind = String::new();
        let mut pieces = Vec::new();
        for line in text.lines().map(str::trim) {
            if line.starts_with('#') || line.is_empty() {
                continue;
            }
            if let Some(piece) = piece(line)? {
                if pieces.len() == MAX_EXTENTS {
                    return Err(refused("it has too many extents"));
                }
                pieces.push(piece);
                continue;
            }
            let Some((key, value)) = line.split_once('=') else {
                continue;
            };
            let value = value.trim().trim_matches('"');
            match key.trim() {
                "createType" => value.clone_into(&mut kind),
                "parentCID" if !value.eq_ignore_ascii_case("ffffffff") => {
                    return Err(refused(
                        "it is a difference to another image (a snapshot), which is not supported; convert it with its parent by `qemu-img convert`",
                    ));
                }
                _ => {}
            }
        }
        Ok(Self { kind, pieces })
    }
}

/// Parses a line such as `RW 4192256 SPARSE "disk-s001.vmdk"`; `None` for another line.
fn piece(line: &str) -> Result<Option<Piece>, FormatError> {
    let mut words = line.splitn(4, [' ', '\t']);
    match words.next() {
        Some("RW" | "RDONLY") => {}
        Some("NOACCESS") => return Err(refused("one of its extents may not be accessed")),
        _ => return Ok(None),
    }
    let damaged = || refused(format!("the line `{line}` of its description is damaged"));
    let sectors: u64 = words
        .next()
        .and_then(|n| n.parse().ok())
        .ok_or_else(damaged)?;
    let len = sectors.checked_mul(512).ok_or_else(damaged)?;
    let kind = words.next().ok_or_else(damaged)?;
    let rest = words.next().unwrap_or_default().trim();
    let name = || {
        let (name, rest) = rest.strip_prefix('"')?.split_once('"')?;
        (!name.is_empty() && !name.contains('\0')).then(|| (name.to_owned(), rest.trim()))
    };
    let place = match kind {
        "ZERO" => Place::Zero,
        "FLAT" | "VMFS" => {
            let (file, rest) = name().ok_or_else(damaged)?;
            let first: u64 = match rest {
                "" => 0,
                number => number.parse().map_err(|_| damaged())?,
            };
            let offset = first.checked_mul(512).ok_or_else(damaged)?;
            Place::Flat { file, offset }
        }
        "SPARSE" => {
            let (file, _) = name().ok_or_else(damaged)?;
            Place::Sparse { file }
        }
        other => {
            return Err(refused(format!(
                "its extents of kind {other} are not supported"
            )));
        }
    };
    Ok(Some(Piece { len, place }))
}
