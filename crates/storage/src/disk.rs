//! A disk as a device sees it.

use std::{
    future::poll_fn,
    io,
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    task::{Context, Poll},
};

use atomic_waker::AtomicWaker;
use caisson_block::{BlockBackend, BlockError, BlockInfo, GuestBuffer, Operation, Request};
use caisson_memory::{Perms, Pinned};

use crate::{
    OpenError,
    layer::Layer,
    limit::RateLimit,
    open::{self, DiskOptions},
    runtime::{
        IoThread, LocalFuture, Runtime,
        local::{Gauge, yield_now},
    },
};

/// What is asked of an open disk besides its requests.
enum Command {
    Resize(u64, mpsc::SyncSender<io::Result<()>>),
    Close(mpsc::SyncSender<io::Result<()>>),
}

#[derive(Default)]
struct Inbox {
    requests: Vec<Request>,
    commands: Vec<Command>,
    closed: bool,
}

struct Shared {
    /// All but the size stays.
    info: BlockInfo,
    size: AtomicU64,
    resized: AtomicWaker,
    inbox: Mutex<Inbox>,
    /// Wakes the disk's task.
    task: AtomicWaker,
    limit: Option<RateLimit>,
    errors: AtomicU64,
    dropped: AtomicBool,
    name: String,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn info(&self) -> BlockInfo {
        BlockInfo {
            size: self.size.load(Ordering::Acquire),
            ..self.info
        }
    }
}

/// A disk that was opened on an I/O thread. Dropping it closes the image in the background; [`Disk::close`] waits for
/// that.
pub struct Disk {
    shared: Arc<Shared>,
    /// Keeps the thread.
    _thread: IoThread,
}

impl Disk {
    /// Opens an image.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(thread: &IoThread, options: DiskOptions) -> Result<Self, OpenError> {
        let (logical_block, limit) = (options.logical_block, options.limit.clone());
        let path = options.path.clone();
        let name = path.display().to_string();
        let make = move |runtime: Runtime| -> LocalFuture<'static, _> {
            Box::pin(async move { open::open_disk(&runtime, &options).await })
        };
        Self::from_layer(thread, name, logical_block, limit, make)
            .map_err(|source| OpenError::Io { path, source })?
    }

    /// A disk over a layer that `make` makes on the thread.
    ///
    /// # Errors
    /// The outer one when the thread has ended, the inner one is `make`'s.
    pub fn from_layer<E: Send + 'static>(
        thread: &IoThread,
        name: String,
        logical_block: u32,
        limit: Option<RateLimit>,
        make: impl FnOnce(Runtime) -> LocalFuture<'static, Result<Rc<dyn Layer>, E>> + Send + 'static,
    ) -> io::Result<Result<Self, E>> {
        let made = thread.ask(move |runtime| async move {
            let layer = make(runtime.clone()).await?;
            let traits = layer.traits();
            let size = layer.size().next_multiple_of(logical_block.into());
            let shared = Arc::new(Shared {
                info: BlockInfo {
                    size,
                    logical_block,
                    physical_block: logical_block.max(4096),
                    optimal_io: traits.granularity.max(logical_block),
                    read_only: traits.read_only,
                    discard_granularity: traits
                        .discards
                        .then_some(traits.granularity.max(logical_block)),
                    write_cache: traits.write_cache,
                },
                size: AtomicU64::new(size),
                resized: AtomicWaker::new(),
                inbox: Mutex::default(),
                task: AtomicWaker::new(),
                limit,
                errors: AtomicU64::new(0),
                dropped: AtomicBool::new(false),
                name,
            });
            runtime.spawn(serve(runtime.clone(), layer, shared.clone()));
            Ok(shared)
        })?;
        Ok(made.map(|shared| Self {
            shared,
            _thread: thread.clone(),
        }))
    }

    /// Changes the size, and tells the device.
    ///
    /// # Errors
    /// The format cannot, or the host's.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        self.command(|say| Command::Resize(size, say))
    }

    /// Waits for all requests, puts the image in order and makes it durable. Requests that come later fail.
    ///
    /// # Errors
    /// What was not flushed before may be lost then.
    pub fn close(&self) -> io::Result<()> {
        self.command(Command::Close)
    }

    /// How many requests failed for reasons of the host or the image.
    pub fn errors(&self) -> u64 {
        self.shared.errors.load(Ordering::Relaxed)
    }

    fn command(
        &self,
        make: impl FnOnce(mpsc::SyncSender<io::Result<()>>) -> Command,
    ) -> io::Result<()> {
        let (say, hear) = mpsc::sync_channel(1);
        self.shared.inbox().commands.push(make(say));
        self.shared.task.wake();
        hear.recv()
            .map_err(|_| io::Error::other("the disk is closed"))?
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.shared.dropped.store(true, Ordering::Release);
        self.shared.task.wake();
    }
}

impl BlockBackend for Disk {
    fn info(&self) -> BlockInfo {
        self.shared.info()
    }

    fn submit(&self, request: Request) {
        let mut inbox = self.shared.inbox();
        if inbox.closed {
            drop(inbox);
            request.complete(Err(BlockError::Io));
        } else {
            inbox.requests.push(request);
        }
    }

    fn kick(&self) {
        self.shared.task.wake();
    }

    fn poll_resized(&self, cx: &mut Context<'_>, seen: u64) -> Poll<u64> {
        self.shared.resized.register(cx.waker());
        match self.shared.size.load(Ordering::Acquire) {
            size if size != seen => Poll::Ready(size),
            _ => Poll::Pending,
        }
    }
}

/// The disk's task: starts requests and obeys commands until the disk is closed.
async fn serve(runtime: Runtime, layer: Rc<dyn Layer>, shared: Arc<Shared>) {
    let busy = Rc::new(Gauge::default());
    loop {
        let (requests, commands, dropped) = poll_fn(|cx| {
            shared.task.register(cx.waker());
            let dropped = shared.dropped.load(Ordering::Acquire);
            let mut inbox = shared.inbox();
            if inbox.requests.is_empty() && inbox.commands.is_empty() && !dropped {
                return Poll::Pending;
            }
            let requests = std::mem::take(&mut inbox.requests);
            Poll::Ready((requests, std::mem::take(&mut inbox.commands), dropped))
        })
        .await;
        for request in requests {
            let (runtime, layer) = (runtime.clone(), layer.clone());
            let (shared, busy) = (shared.clone(), busy.clone());
            runtime.clone().spawn(async move {
                let _one = busy.enter();
                handle(&runtime, &*layer, &shared, request).await;
            });
        }
        for command in commands {
            match command {
                Command::Resize(size, say) => {
                    let outcome = resize(&*layer, &shared, size).await;
                    let _ = say.send(outcome);
                }
                Command::Close(say) => {
                    let outcome = close(&*layer, &shared, &busy).await;
                    let _ = say.send(outcome);
                    return;
                }
            }
        }
        if dropped {
            if let Err(error) = close(&*layer, &shared, &busy).await {
                tracing::error!("cannot close \"{}\": {error}", shared.name);
            }
            return;
        }
    }
}

async fn resize(layer: &dyn Layer, shared: &Shared, size: u64) -> io::Result<()> {
    if !size.is_multiple_of(shared.info.logical_block.into()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a size is a multiple of {}", shared.info.logical_block),
        ));
    }
    layer.resize(size).await?;
    shared.size.store(size, Ordering::Release);
    shared.resized.wake();
    Ok(())
}

async fn close(layer: &dyn Layer, shared: &Shared, busy: &Gauge) -> io::Result<()> {
    let late = {
        let mut inbox = shared.inbox();
        inbox.closed = true;
        std::mem::take(&mut inbox.requests)
    };
    for request in late {
        request.complete(Err(BlockError::Io));
    }
    // Tasks that were only just started count themselves first.
    yield_now().await;
    busy.empty().await;
    layer.close().await
}

async fn handle(runtime: &Runtime, layer: &dyn Layer, shared: &Shared, request: Request) {
    let (operation, completer) = request.into_parts();
    if let Err(error) = shared.info().check(&operation) {
        completer.complete(Err(error));
        return;
    }
    if let (Some(limit), Some((_, len))) = (&shared.limit, operation.range()) {
        // To discard a whole disk moves no byte.
        let moves = matches!(operation, Operation::Read { .. } | Operation::Write { .. });
        limit.pass(runtime, if moves { len } else { 0 }).await;
    }
    let outcome = perform(layer, &operation).await;
    completer.complete(outcome.map_err(|failure| match failure {
        Failure::Block(error) => error,
        Failure::Host(error) => {
            let count = shared.errors.fetch_add(1, Ordering::Relaxed) + 1;
            // A guest that goes on trying does not fill the log.
            if count.is_power_of_two() {
                let name = &shared.name;
                tracing::warn!("disk \"{name}\": {error} ({count} failed requests so far)");
            }
            block_error(&error)
        }
    }));
}

enum Failure {
    Block(BlockError),
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// What a device may know of the host's error.
fn block_error(error: &io::Error) -> BlockError {
    match error.kind() {
        io::ErrorKind::InvalidData => BlockError::Corrupt,
        io::ErrorKind::Unsupported => BlockError::Unsupported,
        io::ErrorKind::ReadOnlyFilesystem => BlockError::ReadOnly,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            BlockError::NoSpace
        }
        _ => BlockError::Io,
    }
}

fn pin(buffer: &GuestBuffer, wanted: Perms) -> Result<Pinned, Failure> {
    let ranges = buffer.segments().iter();
    let ranges = ranges.map(|segment| (segment.gpa, u64::from(segment.len)));
    let pinned = buffer.view().pin(ranges, wanted);
    pinned.map_err(|_| Failure::Block(BlockError::Memory))
}

async fn perform(layer: &dyn Layer, operation: &Operation) -> Result<(), Failure> {
    match operation {
        Operation::Read { offset, buffer } => {
            let memory = pin(buffer, Perms::WRITE)?;
            if !memory.is_empty() {
                layer.read(*offset, memory).await?;
            }
        }
        Operation::Write {
            offset,
            buffer,
            durable,
        } => {
            let memory = pin(buffer, Perms::READ)?;
            if !memory.is_empty() {
                layer.write(*offset, memory, *durable).await?;
            }
        }
        Operation::Flush => layer.flush().await?,
        Operation::Discard { offset, len } => layer.discard(*offset, *len).await?,
        Operation::WriteZeroes {
            offset,
            len,
            unmap,
            durable,
        } => {
            layer.write_zeroes(*offset, *len, *unmap).await?;
            if *durable {
                layer.flush().await?;
            }
        }
        _ => return Err(Failure::Block(BlockError::Unsupported)),
    }
    Ok(())
}
