//! New images.

use std::{io, rc::Rc};

use super::{Compression, Header, refcount};
use crate::{
    format::{Format, FormatError, refused},
    layer::{Layer, write_bytes},
};

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes of a cluster: a power of two, 512 to 2 MiB.
    pub cluster: u32,
    /// 2 or 3.
    pub version: u32,
    /// Bits of a refcount: a power of two, 1 to 64. Version 2 has 16.
    pub refcount_bits: u32,
    /// Backing file and its format.
    pub backing: Option<(String, Format)>,
}

impl CreateOptions {
    /// A disk of `size` bytes, with everything else as is usual.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster: 65_536,
            version: 3,
            refcount_bits: 16,
            backing: None,
        }
    }
}

/// Makes an image in `file`, which is empty.
///
/// # Errors
/// The options contradict each other, or the host's.
pub async fn create(file: &Rc<dyn Layer>, options: &CreateOptions) -> Result<(), FormatError> {
    let cluster_bits = options.cluster.trailing_zeros();
    if !options.cluster.is_power_of_two() || !(9..=21).contains(&cluster_bits) {
        return Err(refused(
            "a cluster is a power of two from 512 bytes to 2 MiB",
        ));
    }
    if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
        return Err(refused("a refcount has a power of two of bits, 64 at most"));
    }
    if !matches!(options.version, 2 | 3) || options.version == 2 && options.refcount_bits != 16 {
        return Err(refused(
            "version 2 has refcounts of 16 bits, and there is version 3 besides",
        ));
    }
    let cluster = u64::from(options.cluster);
    let mut header = Header {
        version: options.version,
        backing: options.backing.as_ref().map(|(name, _)| name.clone()),
        backing_format: options.backing.as_ref().map(|(_, f)| f.name().to_owned()),
        cluster_bits,
        size: options.size,
        l1_entries: 0,
        l1_offset: 0,
        refcount_table_offset: cluster,
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: options.refcount_bits.trailing_zeros(),
        compression: Compression::Deflate,
        bitmaps: false,
    };
    header.check_size(options.size).map_err(refused)?;
    header.l1_entries = header.l1_needed(options.size).max(1) as u32;
    // Header, refcount table, its blocks, L1 table.
    let l1_clusters = (u64::from(header.l1_entries) * 8).div_ceil(cluster);
    let per_block = header.refcounts_per_block();
    let (mut blocks, mut table) = (1, 1);
    loop {
        let total = 1 + table + blocks + l1_clusters;
        let (more_blocks, more_table) = (
            total.div_ceil(per_block),
            (total.div_ceil(per_block) * 8).div_ceil(cluster),
        );
        if more_blocks <= blocks && more_table <= table {
            break;
        }
        (blocks, table) = (more_blocks.max(blocks), more_table.max(table));
    }
    let total = 1 + table + blocks + l1_clusters;
    header.refcount_table_clusters = table as u32;
    header.l1_offset = (1 + table + blocks) * cluster;
    let first = header.encode().map_err(refused)?;
    let mut table_bytes = Vec::new();
    for n in 0..blocks {
        let offset = (1 + table + n) * cluster;
        table_bytes.extend(offset.to_be_bytes());
        let mut bytes = vec![0; cluster as usize];
        for within in 0..total.saturating_sub(n * per_block).min(per_block) {
            refcount::set(&mut bytes, header.refcount_order, within, 1);
        }
        write_bytes(&**file, offset, &bytes).await?;
    }
    write_bytes(&**file, cluster, &table_bytes).await?;
    // The L1 table is zeroes; the file has all of it.
    file.resize(total * cluster).await?;
    let written: io::Result<()> = write_bytes(&**file, 0, &first).await;
    written?;
    file.flush().await?;
    Ok(())
}
