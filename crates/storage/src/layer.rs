//! What disks are stacked from.

use std::{io, rc::Rc};

use caisson_memory::Pinned;

use crate::runtime::LocalFuture;

/// The answer of a layer.
pub type Answer<'a, T = ()> = LocalFuture<'a, io::Result<T>>;

/// What a range of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes that this layer stores.
    Data,
    /// Zeroes, and this layer says so.
    Zero,
    /// Nothing of this layer's: what is below it shows, or zeroes where there is nothing below.
    Absent,
}

/// The beginning of a range that holds one kind of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// What is there.
    pub content: Content,
}

/// What a layer is to the one above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// The unit in which space is taken and given back, in bytes: a power of two.
    pub granularity: u32,
    /// Whether it is never written to.
    pub read_only: bool,
    /// Whether a discard gives space back.
    pub discards: bool,
    /// Whether completed writes may need a flush to be durable.
    pub write_cache: bool,
}

/// A GUID as it lies in files.
pub type Guid = [u8; 16];

/// Bytes by offset: a file of the host's, an image in a file, memory, or something that sits between. All layers of a
/// disk live on one thread.
///
/// - Ranges lie within [`Layer::size`], except that writing to a file makes it longer.
/// - Operations under way are not ordered. A flush covers what was completed before.
/// - Cancelling (dropping a future) is allowed for reads only; everything else runs to its end.
pub trait Layer {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// What it is to the one above.
    fn traits(&self) -> Traits;

    /// Fills `into` with the bytes from `at` on.
    fn read<'a>(&'a self, at: u64, into: Pinned) -> Answer<'a>;

    /// Writes `from` to `at`. With `durable` it is completed only when a power cut cannot take it back.
    fn write<'a>(&'a self, at: u64, from: Pinned, durable: bool) -> Answer<'a>;

    /// Makes all that was completed before durable.
    fn flush<'a>(&'a self) -> Answer<'a>;

    /// The range's content is not needed any more.
    fn discard<'a>(&'a self, at: u64, len: u64) -> Answer<'a>;

    /// The range reads as zeroes; its space may be given back if `unmap`.
    fn write_zeroes<'a>(&'a self, at: u64, len: u64, unmap: bool) -> Answer<'a>;

    /// What is at `at`, for at most `len` bytes.
    fn extent<'a>(&'a self, at: u64, len: u64) -> Answer<'a, Extent>;

    /// Changes the size; what is new reads as zeroes.
    fn resize<'a>(&'a self, size: u64) -> Answer<'a>;

    /// Puts everything in order and makes it durable, because nothing follows.
    fn close<'a>(&'a self) -> Answer<'a> {
        self.flush()
    }

    /// What images that are stored as differences to this one know it by, in formats that have that.
    fn identity(&self) -> Option<Guid> {
        None
    }
}

impl<L: Layer + ?Sized> Layer for Rc<L> {
    fn size(&self) -> u64 {
        (**self).size()
    }
    fn traits(&self) -> Traits {
        (**self).traits()
    }
    fn read<'a>(&'a self, at: u64, into: Pinned) -> Answer<'a> {
        (**self).read(at, into)
    }
    fn write<'a>(&'a self, at: u64, from: Pinned, durable: bool) -> Answer<'a> {
        (**self).write(at, from, durable)
    }
    fn flush<'a>(&'a self) -> Answer<'a> {
        (**self).flush()
    }
    fn discard<'a>(&'a self, at: u64, len: u64) -> Answer<'a> {
        (**self).discard(at, len)
    }
    fn write_zeroes<'a>(&'a self, at: u64, len: u64, unmap: bool) -> Answer<'a> {
        (**self).write_zeroes(at, len, unmap)
    }
    fn extent<'a>(&'a self, at: u64, len: u64) -> Answer<'a, Extent> {
        (**self).extent(at, len)
    }
    fn resize<'a>(&'a self, size: u64) -> Answer<'a> {
        (**self).resize(size)
    }
    fn close<'a>(&'a self) -> Answer<'a> {
        (**self).close()
    }
    fn identity(&self) -> Option<Guid> {
        (**self).identity()
    }
}

/// A whole range as one [`Content`], as far as it is one.
pub async fn content_of(layer: &dyn Layer, at: u64, len: u64) -> io::Result<Option<Content>> {
    let mut found = None;
    let mut done = 0;
    while done < len {
        let extent = layer.extent(at + done, len - done).await?;
        match found {
            None => found = Some(extent.content),
            Some(content) if content != extent.content => return Ok(None),
            Some(_) => {}
        }
        done += extent.len.max(1);
    }
    Ok(found)
}

/// Reads `len` bytes at `at` into memory of one's own. For tables, whose length was checked.
pub async fn read_bytes(layer: &dyn Layer, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let memory = Pinned::zeroed(len);
    layer.read(at, memory.clone()).await?;
    Ok(memory.to_vec())
}

/// Writes `bytes` at `at`.
pub async fn write_bytes(layer: &dyn Layer, at: u64, bytes: &[u8]) -> io::Result<()> {
    layer.write(at, Pinned::copy_of(bytes), false).await
}
