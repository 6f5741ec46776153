//! Raw images: the disk's bytes as they are.

use std::rc::Rc;

use caisson_memory::Pinned;

use crate::{
    layer::{Answer, Extent, Layer, Traits},
    open::{read_only_error, read_or_zeroes},
};

/// A raw image: its file, of a size that only [`Layer::resize`] changes.
pub struct Raw {
    file: Rc<dyn Layer>,
    write: bool,
}

impl Raw {
    /// The image in `file`.
    pub fn new(file: Rc<dyn Layer>, write: bool) -> Self {
        Self { file, write }
    }

    fn guard<'a>(&self, answer: Answer<'a>) -> Answer<'a> {
        if self.write {
            answer
        } else {
            Box::pin(async { Err(read_only_error()) })
        }
    }
}

impl Layer for Raw {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn traits(&self) -> Traits {
        let below = self.file.traits();
        Traits {
            read_only: below.read_only || !self.write,
            ..below
        }
    }

    fn read<'a>(&'a self, at: u64, into: Pinned) -> Answer<'a> {
        // The last sector of a file that does not end with one is read beyond it.
        if at.saturating_add(into.len() as u64) <= self.file.size() {
            self.file.read(at, into)
        } else {
            read_or_zeroes(&*self.file, at, into)
        }
    }

    fn write<'a>(&'a self, at: u64, from: Pinned, durable: bool) -> Answer<'a> {
        self.guard(self.file.write(at, from, durable))
    }

    fn flush<'a>(&'a self) -> Answer<'a> {
        if self.write {
            self.file.flush()
        } else {
            Box::pin(async { Ok(()) })
        }
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> Answer<'a> {
        self.guard(self.file.discard(at, len))
    }

    fn write_zeroes<'a>(&'a self, at: u64, len: u64, unmap: bool) -> Answer<'a> {
        self.guard(self.file.write_zeroes(at, len, unmap))
    }

    fn extent<'a>(&'a self, at: u64, len: u64) -> Answer<'a, Extent> {
        self.file.extent(at, len)
    }

    fn resize<'a>(&'a self, size: u64) -> Answer<'a> {
        self.guard(self.file.resize(size))
    }
}
