//! Files: what is under every image.
//!
//! [`HostFile`] is one of the host's, [`MemoryFile`] is one in memory that can record what is done to it. Either makes
//! single calls ([`Attempts`]) that may end early, be interrupted or fail. [`FileLayer`] makes whole operations
//! of them, and asks a [`FaultHook`] before each call what is to go wrong in a test.

mod fault;
mod holder;
mod host;
mod memory;

use std::{cell::Cell, io, rc::Rc, time::Instant};

use caisson_memory::Pinned;

pub use fault::{Fault, FaultHook, FaultPoint, SeededFaults};
pub use host::{CacheMode, FileOptions, HostFile};
pub use memory::{CrashImages, LogEntry, MemoryFile, Recording};

use crate::{
    layer::{Answer, Content, Extent, Layer, Traits},
    runtime::{Call, LocalFuture, Runtime},
};

/// How often a call may be interrupted or refused for the moment before that counts as an error.
const RETRIES: u32 = 1000;

/// The most runs of memory in one call (`UIO_MAXIOV`).
const MAX_RUNS: usize = 1024;

/// The most bytes of one call, below what the kernel allows (`MAX_RW_COUNT`).
const MAX_LEN: usize = 1 << 30;

/// The zeroes that are written where the host cannot zero a range, in bytes.
const ZEROES: usize = 1 << 20;

/// A file that calls can be made on, each of which may do less than asked.
pub trait Attempts {
    /// Makes a call once.
    fn attempt<'a>(&'a self, call: Call, memory: Pinned) -> LocalFuture<'a, io::Result<usize>>;

    /// Length in bytes.
    ///
    /// # Errors
    /// The host's.
    fn len(&self) -> io::Result<u64>;

    /// Whether there is no byte in it.
    ///
    /// # Errors
    /// The host's.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Changes the length.
    ///
    /// # Errors
    /// The host's.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// How many bytes from `at` on, `len` at most, are stored, or are a hole (`false`).
    ///
    /// # Errors
    /// The host's.
    fn stored(&self, at: u64, len: u64) -> io::Result<(u64, bool)>;

    /// What it is to the layer above.
    fn traits(&self) -> Traits;

    /// Whether each write is to be durable when it ends.
    fn writes_through(&self) -> bool {
        false
    }
}

/// Whole operations on a file.
pub struct FileLayer<F> {
    file: F,
    runtime: Option<Runtime>,
    faults: Option<Rc<dyn FaultHook>>,
    /// Length as last known.
    len: Cell<u64>,
    punches: Cell<bool>,
    zeroes: Cell<bool>,
    /// A sync failed: the kernel has forgotten what it could not write, so no later one is believed.
    lost: Cell<bool>,
}

impl<F: Attempts> FileLayer<F> {
    /// A layer of `file`.
    ///
    /// # Errors
    /// The host's, when it is asked for the length.
    pub fn new(file: F, faults: Option<Rc<dyn FaultHook>>) -> io::Result<Self> {
        let len = Cell::new(file.len()?);
        Ok(Self {
            file,
            runtime: None,
            faults,
            len,
            punches: Cell::new(true),
            zeroes: Cell::new(true),
            lost: Cell::new(false),
        })
    }

    /// The same with delays, which need an executor.
    #[must_use]
    pub fn with_runtime(mut self, runtime: Runtime) -> Self {
        self.runtime = Some(runtime);
        self
    }

    /// The file itself.
    pub fn file(&self) -> &F {
        &self.file
    }

    /// One call, unless a test wants something else.
    async fn attempt(&self, call: Call, memory: Pinned) -> io::Result<usize> {
        let Some(hook) = &self.faults else {
            return self.file.attempt(call, memory).await;
        };
        match hook.before(&FaultPoint {
            call,
            len: memory.len(),
        }) {
            Fault::None => self.file.attempt(call, memory).await,
            Fault::Fail(errno) => Err(io::Error::from_raw_os_error(errno)),
            Fault::Short(len) => {
                let len = len.min(memory.len());
                self.file.attempt(call, memory.slice(0, len)).await
            }
            Fault::Torn(len, errno) => {
                let len = len.min(memory.len());
                self.file.attempt(call, memory.slice(0, len)).await?;
                Err(io::Error::from_raw_os_error(errno))
            }
            Fault::Delay(delay) => {
                if let Some(runtime) = &self.runtime {
                    runtime.sleep_until(Instant::now() + delay).await;
                }
                self.file.attempt(call, memory).await
            }
        }
    }

    /// One call, again as long as it is interrupted.
    async fn persist(&self, call: Call, memory: Pinned) -> io::Result<usize> {
        let mut refused = 0;
        loop {
            match self.attempt(call, memory.clone()).await {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) && refused < RETRIES =>
                {
                    refused += 1;
                }
                other => return other,
            }
        }
    }

    async fn transfer(&self, at: u64, memory: Pinned, write: Option<bool>) -> io::Result<()> {
        let len = memory.len();
        let mut done = 0;
        while done < len {
            let offset = at.checked_add(done as u64).ok_or_else(too_far)?;
            let call = match write {
                None => Call::Read { at: offset },
                Some(durable) => Call::Write {
                    at: offset,
                    durable,
                },
            };
            let part = if done == 0 && memory.runs().len() <= MAX_RUNS && len <= MAX_LEN {
                memory.clone()
            } else {
                next_part(&memory, done)
            };
            let n = self.persist(call, part).await?;
            if n == 0 {
                if write.is_some() {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                // Beyond the end of the file there are zeroes.
                memory.fill(done, len - done, 0);
                return Ok(());
            }
            if write.is_none() {
                memory.note_written(done, n.min(len - done));
            }
            done += n;
        }
        Ok(())
    }

    /// After a call that has no durable form.
    async fn as_durable_as_writes(&self) -> io::Result<()> {
        if self.file.writes_through() {
            self.flush().await
        } else {
            Ok(())
        }
    }

    async fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.persist(Call::Punch { at, len }, Pinned::default())
            .await
            .map(|_| ())
    }
}

/// As much of `memory` from byte `start` on as one call takes.
fn next_part(memory: &Pinned, start: usize) -> Pinned {
    let (mut skipped, mut runs, mut len) = (0, 0, 0);
    for (_, run) in memory.runs() {
        let end = skipped + run;
        if end > start {
            if runs == MAX_RUNS || len >= MAX_LEN {
                break;
            }
            runs += 1;
            len += end - skipped.max(start);
        }
        skipped = end;
    }
    memory.slice(start, len.min(MAX_LEN))
}

fn too_far() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "an offset beyond what 64 bits can count",
    )
}

fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    ) || error.kind() == io::ErrorKind::Unsupported
}

impl<F: Attempts> Layer for FileLayer<F> {
    fn size(&self) -> u64 {
        self.len.get()
    }

    fn traits(&self) -> Traits {
        self.file.traits()
    }

    fn read<'a>(&'a self, at: u64, into: Pinned) -> Answer<'a> {
        Box::pin(self.transfer(at, into, None))
    }

    fn write<'a>(&'a self, at: u64, from: Pinned, durable: bool) -> Answer<'a> {
        Box::pin(async move {
            let end = at.checked_add(from.len() as u64).ok_or_else(too_far)?;
            let durable = durable || self.file.writes_through();
            self.transfer(at, from, Some(durable)).await?;
            self.len.set(self.len.get().max(end));
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> Answer<'a> {
        Box::pin(async move {
            if self.lost.get() {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            match self.persist(Call::Sync, Pinned::default()).await {
                Ok(_) => Ok(()),
                Err(error) => {
                    self.lost.set(true);
                    Err(error)
                }
            }
        })
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> Answer<'a> {
        Box::pin(async move {
            if len == 0 || !self.punches.get() {
                return Ok(());
            }
            match self.punch(at, len).await {
                Err(error) if unsupported(&error) => {
                    self.punches.set(false);
                    Ok(())
                }
                other => other,
            }
        })
    }

    fn write_zeroes<'a>(&'a self, at: u64, len: u64, unmap: bool) -> Answer<'a> {
        Box::pin(async move {
            let end = at.checked_add(len).ok_or_else(too_far)?;
            if len == 0 {
                return Ok(());
            }
            if unmap && self.punches.get() && end <= self.len.get() {
                match self.punch(at, len).await {
                    Err(error) if unsupported(&error) => self.punches.set(false),
                    Ok(()) => return self.as_durable_as_writes().await,
                    failed => return failed,
                }
            }
            if self.zeroes.get() {
                let zeroed = self
                    .persist(Call::Zero { at, len }, Pinned::default())
                    .await;
                match zeroed {
                    Err(error) if unsupported(&error) => self.zeroes.set(false),
                    Ok(_) => {
                        self.len.set(self.len.get().max(end));
                        return self.as_durable_as_writes().await;
                    }
                    Err(error) => return Err(error),
                }
            }
            let zeroes = Pinned::zeroed(len.min(ZEROES as u64) as usize);
            let mut done = 0;
            while done < len {
                let n = (len - done).min(zeroes.len() as u64) as usize;
                self.write(at + done, zeroes.slice(0, n), false).await?;
                done += n as u64;
            }
            Ok(())
        })
    }

    fn extent<'a>(&'a self, at: u64, len: u64) -> Answer<'a, Extent> {
        Box::pin(async move {
            let size = self.len.get();
            if at >= size {
                return Ok(Extent {
                    len,
                    content: Content::Zero,
                });
            }
            let (len, stored) = self.file.stored(at, len.min(size - at))?;
            let content = if stored { Content::Data } else { Content::Zero };
            Ok(Extent {
                len: len.max(1),
                content,
            })
        })
    }

    fn resize<'a>(&'a self, size: u64) -> Answer<'a> {
        Box::pin(async move {
            self.file.set_len(size)?;
            self.len.set(size);
            Ok(())
        })
    }
}
