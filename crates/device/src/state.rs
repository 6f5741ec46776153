//! Saved state: versioned, self-described records.
//!
//! One record is, all numbers little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 1 | length of the id, 1 to 255 |
//! | n | id, UTF-8: which kind of state this is |
//! | 2 | version of the body's schema, from 1 |
//! | 4 | length of the body, at most [`MAX_BODY_LEN`] |
//! | 4 | CRC-32 (IEEE) of everything before it and of the body |
//! | m | body, in the postcard format |
//!
//! A reader that does not know an id can step over it; nothing is interpreted before the CRC has been checked.

use alloc::{borrow::ToOwned, string::String, vec::Vec};

use serde::{Serialize, de::DeserializeOwned};

/// The longest body of a record, in bytes. Guest memory is saved elsewhere; 64 MiB is far more than a device holds.
pub const MAX_BODY_LEN: usize = 64 << 20;

/// The saved state of one device, vCPU or other part of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateRecord {
    id: String,
    version: u16,
    body: Vec<u8>,
}

/// Why a state cannot be saved or restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The bytes end before the record does.
    #[error(
        "saved state is cut short: {needed} more bytes expected; the file was not written completely"
    )]
    Truncated {
        /// How many bytes are missing, as far as known.
        needed: usize,
    },
    /// A field of the record's frame has an impossible value.
    #[error("saved state is damaged: {what}; save the machine again")]
    Malformed {
        /// What is wrong.
        what: &'static str,
    },
    /// The checksum does not match.
    #[error(
        "saved state of \"{id}\" is damaged: its checksum is {found:#010x} instead of {expected:#010x}"
    )]
    Crc {
        /// The record's id, as far as it can be trusted.
        id: String,
        /// The checksum of the bytes found.
        found: u32,
        /// The checksum written in the record.
        expected: u32,
    },
    /// The record holds another kind of state.
    #[error(
        "saved state is of \"{found}\" where \"{expected}\" is needed; the machines differ in their devices"
    )]
    WrongId {
        /// The id needed.
        expected: &'static str,
        /// The id found.
        found: String,
    },
    /// The record is of a version that this Caisson cannot read.
    #[error(
        "saved state of \"{id}\" has version {found}, this Caisson reads up to {newest}; use the Caisson that saved it"
    )]
    Version {
        /// The record's id.
        id: &'static str,
        /// The version found.
        found: u16,
        /// The newest version known here.
        newest: u16,
    },
    /// The body does not decode as its version's schema says, or has bytes left over.
    #[error("saved state of \"{id}\" version {version} does not decode; save the machine again")]
    Body {
        /// The record's id.
        id: &'static str,
        /// The record's version.
        version: u16,
    },
    /// The body decodes to values that cannot be.
    #[error("saved state of \"{id}\" is impossible: {what}; save the machine again")]
    Invalid {
        /// The record's id.
        id: &'static str,
        /// What cannot be.
        what: &'static str,
    },
    /// The state cannot be encoded.
    #[error("state of \"{id}\" cannot be saved: {what}")]
    Encode {
        /// The record's id.
        id: String,
        /// Why.
        what: &'static str,
    },
}

impl StateRecord {
    /// A record of the given parts, for state that does not use [`SaveState`].
    ///
    /// # Errors
    /// When the id is empty or longer than 255 bytes, or the body longer than [`MAX_BODY_LEN`].
    pub fn new(id: &str, version: u16, body: Vec<u8>) -> Result<Self, StateError> {
        if id.is_empty() || id.len() > 255 {
            return Err(StateError::Encode {
                id: id.to_owned(),
                what: "an id has 1 to 255 bytes",
            });
        }
        if body.len() > MAX_BODY_LEN {
            return Err(StateError::Encode {
                id: id.to_owned(),
                what: "the body is longer than 64 MiB",
            });
        }
        Ok(Self {
            id: id.to_owned(),
            version,
            body,
        })
    }

    /// Which kind of state this is.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The version of the body's schema.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The body, in the postcard format.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.push(self.id.len() as u8);
        out.extend_from_slice(self.id.as_bytes());
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&(self.body.len() as u32).to_le_bytes());
        let crc = checksum(&out[start..], &self.body);
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(&self.body);
    }

    /// Decodes the record at the front of `bytes` and moves `bytes` past it.
    ///
    /// # Errors
    /// When the bytes are cut short or damaged; `bytes` is then unchanged.
    pub fn decode(bytes: &mut &[u8]) -> Result<Self, StateError> {
        let whole = *bytes;
        let mut rest = whole;
        let id_len = usize::from(take(&mut rest, 1)?[0]);
        if id_len == 0 {
            return Err(StateError::Malformed {
                what: "a record has an empty id",
            });
        }
        let id =
            core::str::from_utf8(take(&mut rest, id_len)?).map_err(|_| StateError::Malformed {
                what: "a record's id is not UTF-8",
            })?;
        let version = take_array(&mut rest).map(u16::from_le_bytes)?;
        let body_len = take_array(&mut rest).map(u32::from_le_bytes)? as usize;
        if body_len > MAX_BODY_LEN {
            return Err(StateError::Malformed {
                what: "a record's body is longer than 64 MiB",
            });
        }
        let head = &whole[..whole.len() - rest.len()];
        let expected = take_array(&mut rest).map(u32::from_le_bytes)?;
        let body = take(&mut rest, body_len)?;
        let found = checksum(head, body);
        if found != expected {
            return Err(StateError::Crc {
                id: id.to_owned(),
                found,
                expected,
            });
        }
        *bytes = rest;
        Ok(Self {
            id: id.to_owned(),
            version,
            body: body.to_vec(),
        })
    }
}

fn checksum(head: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(body);
    hasher.finalize()
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Result<&'a [u8], StateError> {
    match rest.split_at_checked(len) {
        Some((taken, left)) => {
            *rest = left;
            Ok(taken)
        }
        None => Err(StateError::Truncated {
            needed: len - rest.len(),
        }),
    }
}

fn take_array<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], StateError> {
    match rest.split_first_chunk() {
        Some((taken, left)) => {
            *rest = left;
            Ok(*taken)
        }
        None => Err(StateError::Truncated {
            needed: N - rest.len(),
        }),
    }
}

/// A state that is saved as its serde form.
///
/// When the struct changes, `VERSION` goes up by one, the old struct is kept beside it under a name with its version,
/// and [`SaveState::migrate`] turns each old one into the new one.
pub trait SaveState: Serialize + DeserializeOwned {
    /// The record's id, the same for all versions: `"uart16550"`.
    const ID: &'static str;
    /// The current version of the schema, from 1.
    const VERSION: u16;

    /// Decodes the body of an older version.
    ///
    /// # Errors
    /// [`StateError::Version`] for a version that never existed, [`StateError::Body`] when the body does not decode.
    fn migrate(version: u16, body: &[u8]) -> Result<Self, StateError> {
        let _ = body;
        Err(StateError::Version {
            id: Self::ID,
            found: version,
            newest: Self::VERSION,
        })
    }

    /// Decodes `body` as `T`, all of it: what [`SaveState::migrate`] uses for old structs.
    ///
    /// # Errors
    /// [`StateError::Body`] when the bytes are not a `T` or something follows it.
    fn decode_body<T: DeserializeOwned>(version: u16, body: &[u8]) -> Result<T, StateError> {
        match postcard::take_from_bytes(body) {
            Ok((value, [])) => Ok(value),
            _ => Err(StateError::Body {
                id: Self::ID,
                version,
            }),
        }
    }

    /// The record of this state.
    ///
    /// # Errors
    /// [`StateError::Encode`] when the state has no postcard form or is too long.
    fn to_record(&self) -> Result<StateRecord, StateError> {
        let body = postcard::to_allocvec(self).map_err(|_| StateError::Encode {
            id: Self::ID.to_owned(),
            what: "it has no postcard form",
        })?;
        StateRecord::new(Self::ID, Self::VERSION, body)
    }

    /// The state in `record`, migrated if it is of an older version. The caller checks the values.
    ///
    /// # Errors
    /// When the record has another id, a version not known here, or a body that does not decode.
    fn from_record(record: &StateRecord) -> Result<Self, StateError> {
        if record.id != Self::ID {
            return Err(StateError::WrongId {
                expected: Self::ID,
                found: record.id.clone(),
            });
        }
        if record.version == Self::VERSION {
            Self::decode_body(record.version, &record.body)
        } else if record.version > Self::VERSION {
            Err(StateError::Version {
                id: Self::ID,
                found: record.version,
                newest: Self::VERSION,
            })
        } else {
            Self::migrate(record.version, &record.body)
        }
    }

    /// A [`StateError::Invalid`] of this kind of state.
    fn invalid(what: &'static str) -> StateError {
        StateError::Invalid { id: Self::ID, what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{string::ToString, vec, vec::Vec};

    #[derive(serde::Serialize, serde::Deserialize, Debug, PartialEq)]
    struct Counter {
        count: u32,
        running: bool,
    }

    #[derive(serde::Serialize, serde::Deserialize)]
    struct CounterV1 {
        count: u8,
    }

    impl SaveState for Counter {
        const ID: &'static str = "counter";
        const VERSION: u16 = 2;
        fn migrate(version: u16, body: &[u8]) -> Result<Self, StateError> {
            match version {
                1 => {
                    let old: CounterV1 = Self::decode_body(1, body)?;
                    Ok(Self {
                        count: old.count.into(),
                        running: false,
                    })
                }
                _ => Err(StateError::Version {
                    id: Self::ID,
                    found: version,
                    newest: Self::VERSION,
                }),
            }
        }
    }

    #[derive(serde::Serialize, serde::Deserialize)]
    struct Other;
    impl SaveState for Other {
        const ID: &'static str = "other";
        const VERSION: u16 = 1;
    }

    fn sample() -> Vec<u8> {
        let mut bytes = vec![];
        Counter {
            count: 300,
            running: true,
        }
        .to_record()
        .unwrap()
        .encode(&mut bytes);
        bytes
    }

    #[test]
    fn the_format_is_the_documented_one() {
        assert_eq!(
            sample(),
            [
                &[7][..],
                b"counter",
                &[2, 0],
                &[3, 0, 0, 0],
                &crc32fast::hash(b"\x07counter\x02\0\x03\0\0\0\xac\x02\x01").to_le_bytes(),
                &[0xac, 0x02, 0x01],
            ]
            .concat()
        );
    }

    #[test]
    fn records_follow_each_other() {
        let mut bytes = sample();
        Other.to_record().unwrap().encode(&mut bytes);
        let mut rest = &bytes[..];
        let first = StateRecord::decode(&mut rest).unwrap();
        let second = StateRecord::decode(&mut rest).unwrap();
        assert!(rest.is_empty());
        assert_eq!(
            Counter::from_record(&first).unwrap(),
            Counter {
                count: 300,
                running: true
            }
        );
        assert!(Other::from_record(&second).is_ok());
        assert_eq!(
            Other::from_record(&first).err().unwrap().to_string(),
            "saved state is of \"counter\" where \"other\" is needed; the machines differ in their devices"
        );
    }

    #[test]
    fn each_truncation_is_noticed() {
        let bytes = sample();
        for len in 0..bytes.len() {
            let mut rest = &bytes[..len];
            assert!(
                matches!(
                    StateRecord::decode(&mut rest),
                    Err(StateError::Truncated { .. })
                ),
                "{len}"
            );
            assert_eq!(rest.len(), len);
        }
    }

    #[test]
    fn each_flipped_bit_is_noticed() {
        let bytes = sample();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(StateRecord::decode(&mut &damaged[..]).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn old_versions_migrate_and_new_ones_are_refused() {
        let old = StateRecord::new("counter", 1, vec![9]).unwrap();
        assert_eq!(
            Counter::from_record(&old).unwrap(),
            Counter {
                count: 9,
                running: false
            }
        );
        let never = StateRecord::new("counter", 0, vec![9]).unwrap();
        assert!(matches!(
            Counter::from_record(&never),
            Err(StateError::Version { found: 0, .. })
        ));
        let future = StateRecord::new("counter", 3, vec![9]).unwrap();
        assert_eq!(
            Counter::from_record(&future),
            Err(StateError::Version {
                id: "counter",
                found: 3,
                newest: 2
            })
        );
    }

    #[test]
    fn bodies_must_decode_completely() {
        for body in [vec![], vec![1], vec![1, 7], vec![1, 1, 0]] {
            let record = StateRecord::new("counter", 2, body).unwrap();
            assert_eq!(
                Counter::from_record(&record),
                Err(StateError::Body {
                    id: "counter",
                    version: 2
                })
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut rest = &bytes[..];
            if let Ok(record) = StateRecord::decode(&mut rest) {
                let mut again = vec![];
                record.encode(&mut again);
                prop_assert_eq!(&again[..], &bytes[..bytes.len() - rest.len()]);
            }
        }
    }
}
