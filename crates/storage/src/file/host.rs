//! A file, or a block device, of the host's.

use std::{
    cell::Cell,
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
    sync::Arc,
};

use caisson_memory::Pinned;

use super::{Attempts, holder};
use crate::{
    error::OpenError,
    layer::Traits,
    runtime::{Call, LocalFuture, Runtime},
};

/// What a completed write and a flush promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Writes go through the host's page cache and are durable after a flush.
    #[default]
    Writeback,
    /// As [`CacheMode::Writeback`], but past the page cache (O_DIRECT) where the alignment allows it.
    Direct,
    /// Each write is durable when it is completed.
    Writethrough,
    /// Flushes are ignored: a power cut of the host may destroy the whole image. For what is thrown away anyway.
    Unsafe,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// What writes and flushes promise.
    pub cache: CacheMode,
    /// Whether it is written to.
    pub write: bool,
    /// Whether others are to be kept away: for writing, everybody; for reading, those who write.
    pub lock: bool,
}

/// A file of the host's.
pub struct HostFile {
    runtime: Runtime,
    buffered: Arc<File>,
    /// The same file past the page cache.
    direct: Option<Arc<File>>,
    /// The alignment that direct calls need, as learned.
    alignment: Cell<usize>,
    options: FileOptions,
    is_device: bool,
    inline: Inline,
}

impl Drop for HostFile {
    fn drop(&mut self) {
        // A request that nobody waits for any more may still write; then the lock stays until it has ended.
        if self.options.lock && Arc::strong_count(&self.buffered) == 1 {
            holder::unlock(&self.buffered);
        }
    }
}

/// Whether cached data is read at once, without a round through the engine: worth it as long as it is there.
#[derive(Default)]
struct Inline {
    /// How many reads are not tried.
    skip: Cell<u32>,
    /// How many were skipped after the last miss.
    penalty: Cell<u32>,
}

/// The most reads that are not tried inline after one that missed.
const MAX_PENALTY: u32 = 256;

/// The longest read that is copied inline, in bytes; longer ones would keep other tasks waiting.
const MAX_INLINE: usize = 64 << 10;

impl Inline {
    fn worth_it(&self) -> bool {
        match self.skip.get() {
            0 => true,
            n => {
                self.skip.set(n - 1);
                false
            }
        }
    }

    fn hit(&self) {
        self.penalty.set(0);
    }

    fn missed(&self) {
        let penalty = (self.penalty.get() * 2).clamp(1, MAX_PENALTY);
        self.penalty.set(penalty);
        self.skip.set(penalty);
    }
}

impl HostFile {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// It cannot be opened, is neither a regular file nor a block device, or is locked by somebody else.
    pub fn open(runtime: &Runtime, path: &Path, options: FileOptions) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(options.write)
            // A FIFO would wait for its other end.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::NotAFile {
                path: path.to_owned(),
            });
        }
        if options.lock
            && let Err(error) = holder::lock(&file, options.write)
        {
            if !holder::is_held(&error) {
                return Err(failed(error));
            }
            return Err(OpenError::Locked {
                path: path.to_owned(),
                write: options.write,
                holder: holder::holder(&file).unwrap_or_else(|| "another process".into()),
            });
        }
        let direct = (options.cache == CacheMode::Direct)
            .then(|| {
                OpenOptions::new()
                    .read(true)
                    .write(options.write)
                    .custom_flags(libc::O_DIRECT | libc::O_NONBLOCK)
                    .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            })
            // File systems without direct I/O (tmpfs) refuse to open: the page cache it is.
            .and_then(Result::ok)
            .map(Arc::new);
        Ok(Self {
            runtime: runtime.clone(),
            buffered: Arc::new(file),
            direct,
            alignment: Cell::new(512),
            options,
            is_device: kind.is_block_device(),
            inline: Inline::default(),
        })
    }

    /// A file without a name in `folder`, which is gone when it is closed.
    ///
    /// # Errors
    /// The host's.
    pub fn unnamed(runtime: &Runtime, folder: &Path) -> Result<Self, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(folder)
            .map_err(|source| OpenError::Open {
                path: folder.to_owned(),
                source,
            })?;
        Ok(Self {
            runtime: runtime.clone(),
            buffered: Arc::new(file),
            direct: None,
            alignment: Cell::new(512),
            options: FileOptions {
                cache: CacheMode::Unsafe,
                write: true,
                lock: false,
            },
            is_device: false,
            inline: Inline::default(),
        })
    }

    /// Reads what is in the page cache, without waiting for a disk.
    fn read_cached(&self, at: u64, memory: &Pinned) -> Option<usize> {
        if memory.len() > MAX_INLINE || !self.inline.worth_it() {
            return None;
        }
        let vectors: Vec<libc::iovec> = memory
            .runs()
            .map(|(base, len)| libc::iovec {
                iov_base: base.as_ptr().cast(),
                iov_len: len,
            })
            .collect();
        // SAFETY: the vectors name pinned memory, which lives during the call.
        let read = unsafe {
            libc::preadv2(
                self.buffered.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as libc::c_int,
                at as libc::off_t,
                libc::RWF_NOWAIT,
            )
        };
        if read == memory.len() as isize {
            self.inline.hit();
            Some(memory.len())
        } else {
            self.inline.missed();
            None
        }
    }

    /// The descriptor for a transfer.
    fn file_for(&self, at: u64, memory: &Pinned) -> &Arc<File> {
        let alignment = self.alignment.get();
        match &self.direct {
            Some(direct) if at.is_multiple_of(alignment as u64) && memory.is_aligned(alignment) => {
                direct
            }
            _ => &self.buffered,
        }
    }
}

impl Attempts for HostFile {
    fn attempt<'a>(&'a self, call: Call, memory: Pinned) -> LocalFuture<'a, io::Result<usize>> {
        Box::pin(async move {
            let at = match call {
                Call::Read { at } | Call::Write { at, .. } => at,
                Call::Sync if self.options.cache == CacheMode::Unsafe => return Ok(0),
                _ => return self.runtime.call(&self.buffered, call, memory).await,
            };
            let file = self.file_for(at, &memory);
            let is_direct = !Arc::ptr_eq(file, &self.buffered);
            if !is_direct
                && matches!(call, Call::Read { .. })
                && let Some(n) = self.read_cached(at, &memory)
            {
                return Ok(n);
            }
            let done = self.runtime.call(file, call, memory.clone()).await;
            match done {
                // Direct I/O has rules that only the file system knows.
                Err(error) if is_direct && error.raw_os_error() == Some(libc::EINVAL) => {
                    self.alignment.set(4096.max(self.alignment.get()));
                    self.runtime.call(&self.buffered, call, memory).await
                }
                done => done,
            }
        })
    }

    fn len(&self) -> io::Result<u64> {
        if self.is_device {
            (&*self.buffered).seek(SeekFrom::End(0))
        } else {
            Ok(self.buffered.metadata()?.len())
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.is_device {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a block device keeps its size",
            ));
        }
        self.buffered.set_len(len)
    }

    fn stored(&self, at: u64, len: u64) -> io::Result<(u64, bool)> {
        if self.is_device {
            return Ok((len, true));
        }
        let seek = |whence| {
            // SAFETY: no memory is involved.
            let found =
                unsafe { libc::lseek(self.buffered.as_raw_fd(), at as libc::off_t, whence) };
            u64::try_from(found).map_err(|_| io::Error::last_os_error())
        };
        match seek(libc::SEEK_DATA) {
            Ok(data) if data > at => Ok(((data - at).min(len), false)),
            Ok(_) => Ok(((seek(libc::SEEK_HOLE)?.saturating_sub(at)).min(len), true)),
            // No data up to the end.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok((len, false)),
            Err(_) => Ok((len, true)),
        }
    }

    fn traits(&self) -> Traits {
        Traits {
            granularity: 4096,
            read_only: !self.options.write,
            discards: true,
            write_cache: self.options.cache != CacheMode::Writethrough,
        }
    }

    fn writes_through(&self) -> bool {
        self.options.cache == CacheMode::Writethrough
    }
}
