//! VMDK (VMware's *Virtual Disk Format*, version 5.0), read only: one or several sparse or flat extents, and the compressed
//! grains of `streamOptimized`. Differences to other images (VMware's snapshots), and the `seSparse` and `COWD` extents of ESX,
//! are refused by name.
//!
//! A description names the files of its extents, and so could name any: they are opened only where backing files are
//! allowed. The one sparse extent of an image that describes itself is the image, whatever the description says.

mod descriptor;
mod sparse;

use std::{io, rc::Rc};

use caisson_memory::Pinned;

pub use descriptor::{Descriptor, Piece, Place};
pub use sparse::Header;

use crate::{
    format::{Format, FormatError, Opener, refused},
    layer::{Answer, Content, Extent, Layer, Traits, read_bytes},
    open::{read_only_error, read_or_zeroes},
};
use sparse::Sparse;

/// A part of the disk that is open.
enum Source {
    Zero,
    Flat(Rc<dyn Layer>, u64),
    Sparse(Sparse),
}

/// An open image.
pub struct Vmdk {
    /// Parts, with where each ends on the disk.
    parts: Vec<(u64, Source)>,
    size: u64,
    grain: Option<u64>,
    descriptor: Option<Descriptor>,
}

impl Vmdk {
    /// Opens the image in `file`; `opener` opens the extents that it names.
    ///
    /// # Errors
    /// It is damaged or has something that is not supported; it is to be written to.
    pub async fn open(
        file: Rc<dyn Layer>,
        write: bool,
        opener: &dyn Opener,
    ) -> Result<Self, FormatError> {
        if write {
            return Err(refused(
                "a VMDK can only be read here; convert it, open it read-only, or use a throw-away layer (,ephemeral)",
            ));
        }
        let head = read_bytes(&*file, 0, 512).await?;
        if head.starts_with(b"COWD") {
            return Err(refused(
                "it is an extent of an old ESX; convert it with `qemu-img convert`",
            ));
        }
        if head.starts_with(sparse::SIGNATURE) {
            return Self::open_sparse(file).await;
        }
        let len = file.size().min(descriptor::MAX_LEN + 1);
        let descriptor = Descriptor::parse(&read_bytes(&*file, 0, len as usize).await?)?;
        let mut image = Self::empty();
        for piece in &descriptor.pieces {
            let source = match &piece.place {
                Place::Zero => Source::Zero,
                Place::Flat { file, offset } => {
                    let layer = opener.open(file, Some(Format::Raw)).await?;
                    let end = offset.checked_add(piece.len);
                    if end.is_none_or(|end| end > layer.size().next_multiple_of(512)) {
                        return Err(refused(format!("its extent \"{file}\" is too short")));
                    }
                    Source::Flat(layer, *offset)
                }
                Place::Sparse { file } => {
                    let sparse = Sparse::open(opener.open(file, Some(Format::Raw)).await?).await?;
                    if sparse.header.size < piece.len {
                        return Err(refused(format!("its extent \"{file}\" is too short")));
                    }
                    image.grain = Some(sparse.header.grain);
                    Source::Sparse(sparse)
                }
            };
            image.add(piece.len, source)?;
        }
        image.descriptor = Some(descriptor);
        Ok(image)
    }

    /// An image whose only extent is itself.
    async fn open_sparse(file: Rc<dyn Layer>) -> Result<Self, FormatError> {
        let sparse = Sparse::open(file.clone()).await?;
        let mut image = Self::empty();
        let (at, len) = sparse.header.descriptor;
        if len > 0 {
            let bytes = read_bytes(&*file, at, len as usize).await?;
            let descriptor = Descriptor::parse(&bytes)?;
            let sparse = |piece: &Piece| matches!(piece.place, Place::Sparse { .. });
            if descriptor.pieces.len() != 1 || !descriptor.pieces.iter().all(sparse) {
                return Err(refused("it describes a disk of other files besides itself"));
            }
            image.descriptor = Some(descriptor);
        }
        image.grain = Some(sparse.header.grain);
        image.add(sparse.header.size, Source::Sparse(sparse))?;
        Ok(image)
    }

    /// Reads what an image says about itself, and opens nothing else.
    ///
    /// # Errors
    /// As [`Vmdk::open`].
    pub async fn describe(
        file: Rc<dyn Layer>,
    ) -> Result<(u64, Option<u64>, Vec<String>), FormatError> {
        let head = read_bytes(&*file, 0, 512).await?;
        if head.starts_with(sparse::SIGNATURE) {
            let image = Self::open_sparse(file).await?;
            return Ok((image.size, image.grain, Vec::new()));
        }
        let len = file.size().min(descriptor::MAX_LEN + 1);
        let descriptor = Descriptor::parse(&read_bytes(&*file, 0, len as usize).await?)?;
        let mut size = 0u64;
        let mut files = Vec::new();
        for piece in descriptor.pieces {
            size = size.saturating_add(piece.len);
            match piece.place {
                Place::Flat { file, .. } | Place::Sparse { file } => files.push(file),
                Place::Zero => {}
            }
        }
        Ok((size, None, files))
    }

    fn empty() -> Self {
        Self {
            parts: Vec::new(),
            size: 0,
            grain: None,
            descriptor: None,
        }
    }

    fn add(&mut self, len: u64, source: Source) -> Result<(), FormatError> {
        let end = self.size.checked_add(len).filter(|&end| end <= 1 << 62);
        self.size = end.ok_or_else(|| refused("its disk is too large"))?;
        if len > 0 {
            self.parts.push((self.size, source));
        }
        Ok(())
    }

    /// What the image says about itself.
    pub fn descriptor(&self) -> Option<&Descriptor> {
        self.descriptor.as_ref()
    }

    /// The part that `at` is in, where in it, and how many bytes are left of it.
    fn part(&self, at: u64) -> Option<(&Source, u64, u64)> {
        let index = self.parts.partition_point(|(end, _)| *end <= at);
        let (end, source) = self.parts.get(index)?;
        let start = match index {
            0 => 0,
            n => self.parts.get(n - 1)?.0,
        };
        Some((source, at - start, end - at))
    }
}

impl Layer for Vmdk {
    fn size(&self) -> u64 {
        self.size
    }

    fn traits(&self) -> Traits {
        Traits {
            granularity: self
                .grain
                .and_then(|grain| u32::try_from(grain).ok())
                .unwrap_or(4096),
            read_only: true,
            discards: false,
            write_cache: false,
        }
    }

    fn read<'a>(&'a self, at: u64, into: Pinned) -> Answer<'a> {
        Box::pin(async move {
            let len = into.len() as u64;
            let mut done = 0;
            while done < len {
                let rest = (len - done) as usize;
                let Some((source, within, left)) = self.part(at + done) else {
                    into.fill(done as usize, rest, 0);
                    return Ok(());
                };
                let run = left.min(len - done);
                let part = into.slice(done as usize, run as usize);
                match source {
                    Source::Zero => part.fill(0, part.len(), 0),
                    Source::Flat(file, offset) => {
                        read_or_zeroes(&**file, offset + within, part).await?;
                    }
                    Source::Sparse(sparse) => sparse.read(within, part).await?,
                }
                done += run;
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, _: u64, _: Pinned, _: bool) -> Answer<'a> {
        Box::pin(async { Err(read_only_error()) })
    }

    fn flush<'a>(&'a self) -> Answer<'a> {
        Box::pin(async { Ok(()) })
    }

    fn discard<'a>(&'a self, _: u64, _: u64) -> Answer<'a> {
        Box::pin(async { Err(read_only_error()) })
    }

    fn write_zeroes<'a>(&'a self, _: u64, _: u64, _: bool) -> Answer<'a> {
        Box::pin(async { Err(read_only_error()) })
    }

    fn extent<'a>(&'a self, at: u64, len: u64) -> Answer<'a, Extent> {
        Box::pin(async move {
            let zero = |len| {
                let content = Content::Zero;
                Ok(Extent { len, content })
            };
            let Some((source, within, left)) = self.part(at) else {
                return zero(len);
            };
            let len = len.min(left);
            match source {
                Source::Zero => zero(len),
                Source::Flat(file, offset) => {
                    let stored = file.extent(offset + within, len).await?;
                    Ok(Extent {
                        len: stored.len.min(len),
                        ..stored
                    })
                }
                Source::Sparse(sparse) => {
                    let (data, len) = sparse.extent(within, len).await?;
                    let content = if data { Content::Data } else { Content::Zero };
                    Ok(Extent { len, content })
                }
            }
        })
    }

    fn resize<'a>(&'a self, _: u64) -> Answer<'a> {
        Box::pin(async { Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem)) })
    }
}
