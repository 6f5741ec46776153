//! The file of all records: a header, then each part's name and record.
//!
//! All numbers little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `caisson` and a line feed |
//! | 2 | version of this layout, 1 |
//! | 2 | zero |
//! | 4 | number of parts, at most [`MAX_PARTS`] |
//! | 8 | length of what follows the header |
//! | 4 | CRC-32 (IEEE) of what follows the header |
//! | 4 | CRC-32 (IEEE) of the 28 bytes before |
//!
//! Each part is one byte with its name's length (1 to 255), the name in UTF-8, and a record as [`StateRecord`] has it.

use std::io;

use caisson_device::{StateError, StateRecord};

use super::SavedMachine;

const MAGIC: &[u8; 8] = b"caisson\n";
const VERSION: u16 = 1;
const HEADER: usize = 32;
/// More than any machine has: 4096 vCPUs and as many devices.
pub(super) const MAX_PARTS: usize = 8192;

/// Why a snapshot cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The host's.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// No file.
    #[error("there is no such file; a folder without it holds no complete snapshot")]
    Missing,
    /// Another kind of file.
    #[error("this is not a snapshot of Caisson's; name the folder that the machine was saved to")]
    Foreign,
    /// Of a Caisson to come.
    #[error(
        "its layout has version {found}, this Caisson reads up to {VERSION}; use the Caisson that saved it"
    )]
    Newer {
        /// The version found.
        found: u16,
    },
    /// Fewer or more bytes than it should have.
    #[error("it has {found} bytes instead of {expected}; it was not written or copied completely")]
    Length {
        /// What the file has.
        found: u64,
        /// What it should have.
        expected: u64,
    },
    /// A checksum does not match, or a value is impossible.
    #[error("it is damaged ({what}); restore it from a copy, or save the machine again")]
    Damaged {
        /// What is wrong.
        what: &'static str,
    },
    /// A part's record is damaged.
    #[error("part \"{part}\": {source}")]
    Part {
        /// The part.
        part: String,
        /// What is wrong.
        source: StateError,
    },
    /// Memory of another snapshot.
    #[error("it belongs to another snapshot than the state beside it; keep the two files together")]
    OtherSnapshot,
    /// Far more than a machine's state.
    #[error("it is longer than any machine's state")]
    TooLong,
}

fn damaged(what: &'static str) -> SnapshotError {
    SnapshotError::Damaged { what }
}

impl SavedMachine {
    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        for (name, record) in self.parts() {
            // Names are ours: "vcpu17", "com1".
            let name = &name.as_bytes()[..name.len().min(255)];
            body.push(name.len() as u8);
            body.extend_from_slice(name);
            record.encode(&mut body);
        }
        let mut file = Vec::with_capacity(HEADER + body.len());
        file.extend_from_slice(MAGIC);
        file.extend_from_slice(&VERSION.to_le_bytes());
        file.extend_from_slice(&[0; 2]);
        file.extend_from_slice(&(self.parts().len() as u32).to_le_bytes());
        file.extend_from_slice(&(body.len() as u64).to_le_bytes());
        file.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
        file.extend_from_slice(&crc32fast::hash(&file).to_le_bytes());
        file.extend_from_slice(&body);
        file
    }

    /// Reads the file's bytes. What the records hold is checked when they are restored.
    ///
    /// # Errors
    /// Anything that [`SavedMachine::encode`] would not have written.
    pub fn decode(file: &[u8]) -> Result<Self, SnapshotError> {
        if !file.starts_with(&MAGIC[..file.len().min(MAGIC.len())]) {
            return Err(SnapshotError::Foreign);
        }
        let Some((header, mut rest)) = file.split_first_chunk::<HEADER>() else {
            return Err(SnapshotError::Length {
                found: file.len() as u64,
                expected: HEADER as u64,
            });
        };
        let header = Header::decode(header)?;
        if rest.len() as u64 != header.length {
            return Err(SnapshotError::Length {
                found: file.len() as u64,
                expected: header.length.saturating_add(HEADER as u64),
            });
        }
        if crc32fast::hash(rest) != header.crc {
            return Err(blame(rest));
        }
        let mut parts = Vec::with_capacity(header.parts);
        for _ in 0..header.parts {
            let (name, record) = part(&mut rest)?;
            if parts.iter().any(|(other, _)| *other == name) {
                return Err(damaged("two parts have one name"));
            }
            parts.push((name, record));
        }
        if !rest.is_empty() {
            return Err(damaged("something follows the last part"));
        }
        Ok(Self::from_parts(parts))
    }
}

/// The header's fields.
struct Header {
    parts: usize,
    length: u64,
    crc: u32,
}

impl Header {
    fn decode(bytes: &[u8; HEADER]) -> Result<Self, SnapshotError> {
        let word = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |w| u32::from_le_bytes(*w))
        };
        if crc32fast::hash(&bytes[..HEADER - 4]) != word(28) {
            return Err(damaged("the header's checksum does not match"));
        }
        let version = word(8) as u16;
        if version > VERSION {
            return Err(SnapshotError::Newer { found: version });
        }
        if version == 0 || word(8) >> 16 != 0 {
            return Err(damaged("the header is impossible"));
        }
        let parts = word(12) as usize;
        if parts > MAX_PARTS {
            return Err(damaged("it has more parts than a machine"));
        }
        Ok(Self {
            parts,
            length: u64::from(word(16)) | u64::from(word(20)) << 32,
            crc: word(24),
        })
    }
}

/// Takes one part off the front of `bytes`.
fn part(bytes: &mut &[u8]) -> Result<(String, StateRecord), SnapshotError> {
    let short = || damaged("a part is cut short");
    let (&length, rest) = bytes.split_first().ok_or_else(short)?;
    let (name, mut rest) = rest
        .split_at_checked(usize::from(length))
        .ok_or_else(short)?;
    let name = match core::str::from_utf8(name) {
        Ok(name) if !name.is_empty() => name.to_owned(),
        _ => return Err(damaged("a part has no name")),
    };
    let record = StateRecord::decode(&mut rest).map_err(|source| SnapshotError::Part {
        part: name.clone(),
        source,
    })?;
    *bytes = rest;
    Ok((name, record))
}

/// Names the part that is damaged, if it can be found.
fn blame(mut bytes: &[u8]) -> SnapshotError {
    while !bytes.is_empty() {
        if let Err(error) = part(&mut bytes) {
            return error;
        }
    }
    damaged("the checksum does not match")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> SavedMachine {
        let record = |id, body: &[u8]| StateRecord::new(id, 1, body.to_vec()).unwrap();
        SavedMachine::from_parts(vec![
            ("machine".into(), record("machine", b"whole")),
            ("vcpu0".into(), record("x86-vcpu", &[7; 300])),
            ("com1".into(), record("uart16550", b"")),
        ])
    }

    /// Gives a file whose header was changed a header that fits again.
    fn sealed(mut file: Vec<u8>) -> Vec<u8> {
        let crc = crc32fast::hash(&file[..HEADER - 4]);
        file[HEADER - 4..HEADER].copy_from_slice(&crc.to_le_bytes());
        file
    }

    #[test]
    fn what_was_written_is_read() {
        let file = sample().encode();
        assert_eq!(SavedMachine::decode(&file).unwrap(), sample());
    }

    #[test]
    fn each_truncation_and_each_longer_file_is_noticed() {
        let file = sample().encode();
        for len in 0..file.len() {
            let error = SavedMachine::decode(&file[..len]).unwrap_err();
            assert!(
                matches!(error, SnapshotError::Length { .. }),
                "{len}: {error}"
            );
        }
        let longer = [&file[..], &[0]].concat();
        assert!(matches!(
            SavedMachine::decode(&longer),
            Err(SnapshotError::Length { .. })
        ));
    }

    #[test]
    fn each_flipped_bit_is_noticed() {
        let file = sample().encode();
        for bit in 0..file.len() * 8 {
            let mut damaged = file.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(SavedMachine::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn the_damaged_part_is_named() {
        let mut file = sample().encode();
        let at = file.len() - 1;
        file[at - 100] ^= 1;
        let error = SavedMachine::decode(&file).unwrap_err().to_string();
        assert!(error.contains("part \"vcpu0\""), "{error}");
    }

    #[test]
    fn other_files_and_newer_ones_are_told_apart() {
        let error = SavedMachine::decode(b"[machine]\nname = 1").unwrap_err();
        assert!(matches!(error, SnapshotError::Foreign));
        let mut newer = sample().encode();
        newer[8] = 2;
        assert!(matches!(
            SavedMachine::decode(&sealed(newer)),
            Err(SnapshotError::Newer { found: 2 })
        ));
        let mut many = sample().encode();
        many[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            SavedMachine::decode(&sealed(many)),
            Err(SnapshotError::Damaged { .. })
        ));
        let mut fewer = sample().encode();
        fewer[12] = 2;
        assert!(matches!(
            SavedMachine::decode(&sealed(fewer)),
            Err(SnapshotError::Damaged { .. })
        ));
    }

    #[test]
    fn a_name_is_there_once() {
        let mut parts = sample().parts().to_vec();
        parts.push(parts[1].clone());
        let file = SavedMachine::from_parts(parts).encode();
        assert!(matches!(
            SavedMachine::decode(&file),
            Err(SnapshotError::Damaged { .. })
        ));
    }
}
