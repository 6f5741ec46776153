//! Entries of L1 and L2 tables.

use super::header::Header;
use crate::error::corrupt;
use std::io;

/// The cluster behind the entry is used by it alone.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (version 3).
pub(super) const ZERO: u64 = 1;
/// The offset in an entry.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What an L2 entry says about a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// Nothing: the backing file shows.
    Absent,
    /// Zeroes, and perhaps a host cluster that is kept for it.
    Zero {
        /// Offset of that cluster, and whether it may be written to.
        kept: Option<(u64, bool)>,
    },
    /// Data at a host offset.
    Data {
        /// Offset of the cluster.
        host: u64,
        /// Whether it may be written to.
        copied: bool,
    },
    /// Compressed data.
    Compressed {
        /// Where it begins.
        host: u64,
        /// How long it is at most: it ends with a sector.
        len: u64,
    },
    /// Data with a bitmap: subclusters are data, zeroes or absent.
    Parts {
        /// Offset of the cluster, if any subcluster is data.
        host: Option<u64>,
        /// Bit `n`: subcluster `n` is data; bit `32 + n`: it is zeroes.
        bitmap: u64,
    },
}

impl Mapping {
    /// Decodes an entry and, with subclusters, its bitmap.
    pub(super) fn decode(header: &Header, entry: u64, bitmap: Option<u64>) -> io::Result<Self> {
        let host = entry & OFFSET;
        if entry & COMPRESSED != 0 {
            let x = 62 - (header.cluster_bits - 8);
            let at = entry & ((1 << x) - 1) & !(0xff << 56);
            let sectors = (entry >> x) & ((1 << (62 - x)) - 1);
            let end = (at & !511) + (sectors + 1) * 512;
            if entry & COPIED != 0 {
                return Err(corrupt("a compressed cluster is said to be writable"));
            }
            return Ok(Self::Compressed {
                host: at,
                len: end - at,
            });
        }
        if !host.is_multiple_of(header.cluster()) {
            return Err(corrupt(format!("an L2 entry points to {host:#x}")));
        }
        let copied = entry & COPIED != 0;
        if let Some(bitmap) = bitmap {
            if bitmap & (bitmap >> 32) & 0xffff_ffff != 0 {
                return Err(corrupt("a subcluster is both data and zeroes"));
            }
            let has_data = bitmap & 0xffff_ffff != 0;
            if has_data && host == 0 {
                return Err(corrupt("a subcluster has data and no cluster"));
            }
            return Ok(Self::Parts {
                host: (host != 0).then_some(host),
                bitmap,
            });
        }
        let zero = header.version >= 3 && entry & ZERO != 0;
        Ok(match (zero, host) {
            (true, 0) => Self::Zero { kept: None },
            (true, host) => Self::Zero {
                kept: Some((host, copied)),
            },
            (false, 0) => Self::Absent,
            (false, host) => Self::Data { host, copied },
        })
    }

    /// The host range that it refers to, if any, and whether that is whole clusters.
    pub(super) fn range(&self, cluster: u64) -> Option<(u64, u64)> {
        match *self {
            Self::Data { host, .. }
            | Self::Zero {
                kept: Some((host, _)),
            }
            | Self::Parts {
                host: Some(host), ..
            } => Some((host, cluster)),
            Self::Compressed { host, len } => Some((host, len)),
            _ => None,
        }
    }
}
