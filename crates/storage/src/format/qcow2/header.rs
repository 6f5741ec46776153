//! The header and its extensions.

use crate::{
    format::{Format, FormatError, refused},
    layer::{Layer, read_bytes},
};

/// What a header begins with.
pub(crate) const MAGIC: u32 = 0x5146_49fb;

pub(super) const DIRTY: u64 = 1 << 0;
pub(super) const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// The longest L1 table, in bytes.
const MAX_L1: u64 = 32 << 20;
/// The longest refcount table, in bytes.
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// The most internal snapshots.
pub(super) const MAX_SNAPSHOTS: u32 = 65_536;
/// The longest name of a backing file, in bytes.
const MAX_NAME: u32 = 1023;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate (RFC 1951) with a window of 4 KiB.
    Deflate,
    /// Zstandard (RFC 8878).
    Zstd,
}

/// A header, with its numbers checked against each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The backing file's name.
    pub backing: Option<String>,
    /// The backing file's format, as written.
    pub backing_format: Option<String>,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Offset of the L1 table.
    pub l1_offset: u64,
    /// Offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Offset of the table of snapshots.
    pub snapshots_offset: u64,
    /// Incompatible features.
    pub incompatible: u64,
    /// Compatible features.
    pub compatible: u64,
    /// Features that are cleared by who does not know them.
    pub autoclear: u64,
    /// log2 of the bits of a refcount, 0 to 6.
    pub refcount_order: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Whether there are persistent bitmaps.
    pub bitmaps: bool,
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_be_bytes(field.unwrap_or_default())
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_be_bytes(field.unwrap_or_default())
}

impl Header {
    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether its refcounts were not written completely.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// Whether somebody found it damaged.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }

    /// Whether L2 entries have bitmaps of subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & EXTENDED_L2 != 0
    }

    /// Bytes of an L2 entry.
    pub(super) fn entry_size(&self) -> u64 {
        if self.extended_l2() { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster() / self.entry_size()
    }

    /// Bytes of the disk that an L2 table maps.
    pub(super) fn l2_reach(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub(super) fn l1_needed(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_reach())
    }

    /// Refcounts in a block of them.
    pub(super) fn refcounts_per_block(&self) -> u64 {
        (self.cluster() * 8) >> self.refcount_order
    }

    /// The most that a refcount counts to.
    pub(super) fn refcount_max(&self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1u32 << order)) - 1,
        }
    }

    /// Whether a disk of `size` bytes fits the largest L1 table.
    pub(super) fn check_size(&self, size: u64) -> Result<(), String> {
        if size > 1 << 62 || self.l1_needed(size) * 8 > MAX_L1 {
            return Err(format!(
                "{size} bytes are too many for clusters of {}",
                self.cluster()
            ));
        }
        Ok(())
    }

    /// Reads the header of the image in `file`.
    pub async fn read(file: &dyn Layer) -> Result<Self, FormatError> {
        let bytes = read_bytes(file, 0, 512).await?;
        if be32(&bytes, 0) != MAGIC {
            return Err(refused("it does not begin as a qcow2 image does"));
        }
        let cluster_bits = be32(&bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(refused(format!(
                "its cluster size is 2^{cluster_bits} bytes; 2^9 to 2^21 are possible"
            )));
        }
        // The name and the extensions are within the first cluster.
        let bytes = read_bytes(file, 0, 1 << cluster_bits).await?;
        Self::parse(&bytes, file.size())
    }

    /// Parses the first cluster of an image of `file_size` bytes.
    pub fn parse(bytes: &[u8], file_size: u64) -> Result<Self, FormatError> {
        let version = be32(bytes, 4);
        if be32(bytes, 0) != MAGIC || !matches!(version, 2 | 3) {
            return Err(refused(format!("version {version} is not known")));
        }
        let v3 = version == 3;
        let header_len = if v3 { be32(bytes, 100) } else { 72 };
        let incompatible = if v3 { be64(bytes, 72) } else { 0 };
        let mut header = Self {
            version,
            backing: None,
            backing_format: None,
            cluster_bits: be32(bytes, 20),
            size: be64(bytes, 24),
            l1_entries: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            refcount_table_offset: be64(bytes, 48),
            refcount_table_clusters: be32(bytes, 56),
            snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible,
            compatible: if v3 { be64(bytes, 80) } else { 0 },
            autoclear: if v3 { be64(bytes, 88) } else { 0 },
            refcount_order: if v3 { be32(bytes, 96) } else { 4 },
            compression: Compression::Deflate,
            bitmaps: false,
        };
        if !(9..=21).contains(&header.cluster_bits) {
            return Err(refused("its cluster size is impossible"));
        }
        match be32(bytes, 32) {
            0 => {}
            1 => {
                return Err(refused(
                    "it is encrypted (AES); decrypt it with `qemu-img convert`",
                ));
            }
            2 => {
                return Err(refused(
                    "it is encrypted (LUKS); decrypt it with `qemu-img convert`",
                ));
            }
            other => return Err(refused(format!("it is encrypted (method {other})"))),
        }
        if v3
            && (header_len < 104 || u64::from(header_len) > header.cluster() || header_len % 8 != 0)
        {
            return Err(refused(format!("its header is {header_len} bytes long")));
        }
        let unknown = incompatible & !(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2);
        if unknown != 0 {
            return Err(refused(format!(
                "it has features that are not known here (bits {unknown:#x})"
            )));
        }
        if incompatible & EXTERNAL_DATA != 0 {
            return Err(refused(
                "its data is in another file, which is not supported; bring them together with `qemu-img convert`",
            ));
        }
        if v3 && header_len > 104 {
            header.compression = match bytes.get(104) {
                Some(0) => Compression::Deflate,
                Some(1) => Compression::Zstd,
                other => return Err(refused(format!("its compression {other:?} is not known"))),
            };
        }
        if (incompatible & COMPRESSION != 0) != (header.compression != Compression::Deflate) {
            return Err(refused("its header contradicts itself about compression"));
        }
        if header.extended_l2() && header.cluster_bits < 14 {
            return Err(refused("its clusters are too small for subclusters"));
        }
        header.check_numbers(file_size)?;
        header.parse_extensions(bytes, header_len as usize)?;
        let (offset, len) = (be64(bytes, 8), be32(bytes, 16));
        if offset != 0 {
            let end = offset.saturating_add(len.into());
            if len > MAX_NAME || offset < header_len.into() || end > header.cluster() {
                return Err(refused("the backing file's name is not within the header"));
            }
            let name = bytes.get(offset as usize..end as usize).unwrap_or_default();
            let name = core::str::from_utf8(name)
                .map_err(|_| refused("the backing file's name is not text"))?;
            if name.contains('\0') {
                return Err(refused("the backing file's name is not text"));
            }
            header.backing = (!name.is_empty()).then(|| name.to_owned());
        }
        Ok(header)
    }

    fn check_numbers(&self, file_size: u64) -> Result<(), FormatError> {
        let cluster = self.cluster();
        let table = |what: &str, offset: u64, len: u64, most: u64| {
            let end = offset.checked_add(len);
            if len > most {
                Err(refused(format!("its {what} is {len} bytes long")))
            } else if len > 0
                && (!offset.is_multiple_of(cluster)
                    || offset < cluster
                    || end.is_none_or(|end| end > file_size.next_multiple_of(cluster)))
            {
                Err(refused(format!(
                    "its {what} at {offset:#x} is not within the file"
                )))
            } else {
                Ok(())
            }
        };
        if file_size >= 1 << 56 {
            return Err(refused("the file is too long"));
        }
        self.check_size(self.size).map_err(refused)?;
        if self.refcount_order > 6 {
            return Err(refused("its refcounts are wider than 64 bits"));
        }
        let l1 = u64::from(self.l1_entries) * 8;
        table("L1 table", self.l1_offset, l1, MAX_L1)?;
        if u64::from(self.l1_entries) < self.l1_needed(self.size) {
            return Err(refused("its L1 table is too short for its size"));
        }
        let refcounts = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if refcounts == 0 {
            return Err(refused("it has no refcount table"));
        }
        let most = MAX_REFCOUNT_TABLE.max(cluster);
        table(
            "refcount table",
            self.refcount_table_offset,
            refcounts,
            most,
        )?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(refused(format!("it has {} snapshots", self.snapshots)));
        }
        // Each has 40 bytes at least.
        let snapshots = u64::from(self.snapshots) * 40;
        table("snapshot table", self.snapshots_offset, snapshots, u64::MAX)
    }

    fn parse_extensions(&mut self, bytes: &[u8], from: usize) -> Result<(), FormatError> {
        let end = match be64(bytes, 8) {
            0 => bytes.len(),
            name => (name as usize).min(bytes.len()),
        };
        let mut at = from;
        while at + 8 <= end {
            let (kind, len) = (be32(bytes, at), be32(bytes, at + 4) as usize);
            at += 8;
            if kind == 0 {
                break;
            }
            let Some(data) = bytes.get(at..at.saturating_add(len)) else {
                return Err(refused("a header extension leaves the header"));
            };
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    let name = core::str::from_utf8(data);
                    let name = name.map_err(|_| refused("the backing format is not text"))?;
                    self.backing_format = Some(name.to_owned());
                }
                EXTENSION_BITMAPS => self.bitmaps = true,
                _ => {}
            }
            at += len.next_multiple_of(8);
        }
        Ok(())
    }

    /// The header as bytes, without what other programs may have added. At most a cluster.
    ///
    /// # Errors
    /// The backing file's name does not fit.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let v3 = self.version == 3;
        let mut out = Vec::with_capacity(512);
        out.extend(MAGIC.to_be_bytes());
        out.extend(self.version.to_be_bytes());
        // Where the backing file's name is, filled in below.
        out.extend([0; 12]);
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(0u32.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.refcount_table_offset.to_be_bytes());
        out.extend(self.refcount_table_clusters.to_be_bytes());
        out.extend(self.snapshots.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
        if v3 {
            out.extend(self.incompatible.to_be_bytes());
            out.extend(self.compatible.to_be_bytes());
            out.extend(self.autoclear.to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            out.extend(112u32.to_be_bytes());
            out.push(match self.compression {
                Compression::Deflate => 0,
                Compression::Zstd => 1,
            });
            out.extend([0; 7]);
        }
        let mut extension = |kind: u32, data: &[u8]| {
            out.extend(kind.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            out.resize(out.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            extension(EXTENSION_BACKING_FORMAT, format.as_bytes());
        }
        // The smallest clusters have no room for names of features.
        if v3 && self.cluster_bits >= 12 {
            let mut names = Vec::new();
            let known: [(u8, u8, &[u8]); 6] = [
                (0, 0, b"dirty bit"),
                (0, 1, b"corrupt bit"),
                (0, 2, b"external data file"),
                (0, 3, b"compression type"),
                (0, 4, b"extended L2 entries"),
                (1, 0, b"lazy refcounts"),
            ];
            for (kind, bit, name) in known {
                names.extend([kind, bit]);
                names.extend(name);
                names.resize(names.len() + 46 - name.len(), 0);
            }
            extension(EXTENSION_FEATURE_NAMES, &names);
        }
        extension(0, &[]);
        if let Some(name) = &self.backing {
            let at = out.len() as u64;
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            out.extend(name.as_bytes());
            if name.len() > MAX_NAME as usize {
                return Err(format!(
                    "a backing file's name has {MAX_NAME} bytes at most"
                ));
            }
        }
        if out.len() as u64 > self.cluster() {
            return Err(format!(
                "a header with this backing file's name does not fit a cluster of {} bytes",
                self.cluster()
            ));
        }
        Ok(out)
    }

    /// The backing file's format, which must be said.
    pub(super) fn backing_format(&self) -> Result<Format, FormatError> {
        match &self.backing_format {
            None => Err(refused(
                "it does not say its backing file's format, which is not guessed; say it with `qemu-img rebase -u -F`",
            )),
            Some(name) => name.parse().map_err(refused),
        }
    }
}
