//! Reading.

use std::{
    io::{self, Read},
    rc::Rc,
};

use caisson_memory::Pinned;
use flate2::{Decompress, FlushDecompress, Status};

use super::{Compression, Qcow2, entry::Mapping};
use crate::{error::corrupt, layer::read_bytes};

/// The largest window of zstd that is decompressed: 2^27 bytes, as the format's readers commonly allow.
const ZSTD_WINDOW: u32 = 27;

impl Qcow2 {
    /// Reads, with the mapping held by the caller.
    pub(super) async fn read_mapped(&self, at: u64, into: Pinned) -> io::Result<()> {
        let end = at + into.len() as u64;
        let mut here = at;
        while here < end {
            let (mapping, run) = self.lookup(here, end - here).await?;
            let part = if run == into.len() as u64 {
                into.clone()
            } else {
                into.slice((here - at) as usize, run as usize)
            };
            self.read_as(mapping, here, part).await?;
            here += run;
        }
        Ok(())
    }

    /// Reads from clusters that `mapping` describes.
    pub(super) async fn read_as(&self, mapping: Mapping, at: u64, into: Pinned) -> io::Result<()> {
        let within = at & (self.cluster() - 1);
        match mapping {
            Mapping::Absent => self.read_backing(at, into).await,
            Mapping::Zero { .. } => {
                into.fill(0, into.len(), 0);
                Ok(())
            }
            Mapping::Data { host, .. } => self.file.read(host + within, into).await,
            Mapping::Compressed { host, len } => {
                let bytes = self.unpack(host, len).await?;
                let from = within as usize;
                into.write(0, &bytes[from..from + into.len()]);
                Ok(())
            }
            Mapping::Parts { host, bitmap } => self.read_parts(host, bitmap, at, into).await,
        }
    }

    /// Reads from a cluster with subclusters.
    async fn read_parts(
        &self,
        host: Option<u64>,
        bitmap: u64,
        at: u64,
        into: Pinned,
    ) -> io::Result<()> {
        let part = self.cluster() / 32;
        let end = at + into.len() as u64;
        let mut here = at;
        let kind = |at: u64| {
            let n = (at & (self.cluster() - 1)) / part;
            (bitmap >> n & 1 == 1, bitmap >> (32 + n) & 1 == 1)
        };
        while here < end {
            let is = kind(here);
            let mut stop = (here / part + 1) * part;
            while stop < end && kind(stop) == is {
                stop += part;
            }
            let stop = stop.min(end);
            let into = into.slice((here - at) as usize, (stop - here) as usize);
            match (is, host) {
                ((true, _), Some(host)) => {
                    let within = here & (self.cluster() - 1);
                    self.file.read(host + within, into).await?;
                }
                ((_, true), _) => into.fill(0, into.len(), 0),
                _ => self.read_backing(here, into).await?,
            }
            here = stop;
        }
        Ok(())
    }

    /// The content of a compressed cluster.
    async fn unpack(&self, host: u64, len: u64) -> io::Result<Rc<Vec<u8>>> {
        let last = self.unpacked.borrow().clone();
        if let Some((key, bytes)) = last
            && key == (host, len)
        {
            return Ok(bytes);
        }
        if host.saturating_add(len) > self.file.size().saturating_add(self.cluster() + 512) {
            return Err(corrupt("a compressed cluster is beyond the file's end"));
        }
        let packed = read_bytes(&*self.file, host, len as usize).await?;
        let cluster = self.cluster() as usize;
        let compression = self.header.borrow().compression;
        let bytes = match compression {
            Compression::Deflate => inflate(&packed, cluster),
            Compression::Zstd => unzstd(&packed, cluster),
        };
        let bytes =
            Rc::new(bytes.ok_or_else(|| {
                corrupt(format!("the compressed cluster at {host:#x} is damaged"))
            })?);
        *self.unpacked.borrow_mut() = Some(((host, len), bytes.clone()));
        Ok(bytes)
    }
}

fn inflate(packed: &[u8], cluster: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; cluster];
    let mut stream = Decompress::new(false);
    let status = stream
        .decompress(packed, &mut bytes, FlushDecompress::Finish)
        .ok()?;
    // What follows the stream belongs to the next cluster.
    let whole = stream.total_out() == cluster as u64;
    (whole && matches!(status, Status::StreamEnd | Status::Ok | Status::BufError)).then_some(bytes)
}

fn unzstd(packed: &[u8], cluster: usize) -> Option<Vec<u8>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(packed).ok()?;
    decoder.window_log_max(ZSTD_WINDOW).ok()?;
    let mut bytes = vec![0; cluster];
    decoder.read_exact(&mut bytes).ok()?;
    Some(bytes)
}
