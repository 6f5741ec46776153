//! The block device (§5.2): a disk in front of a [`BlockBackend`].
//!
//! A request takes one [`Operation`](caisson_block::Operation); the
//! backend reads and writes guest memory itself. Requests of all queues are
//! completed in the order in which the backend answers. A disk that grows or shrinks tells the driver by a change of
//! configuration.
//!
//! Left out: secure erase, zones, lifetime, and more than one range per discard or write-zeroes (`max_discard_seg` says
//! so).

mod config;
mod request;
mod state;

use alloc::{sync::Arc, vec::Vec};
use core::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use caisson_block::{BlockBackend, BlockInfo, Completion};
use caisson_device::{Inspector, SaveState, StateError, StateRecord};

use self::{
    request::{Start, status_of},
    state::{BlkState, Done},
};
use crate::{DeviceKind, Fault, Queues, VirtioDevice, queue::Chain};

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// How many buffers are taken from a queue per call.
const BUDGET: usize = 64;
/// Bytes of a sector, the unit of the interface whatever the disk's blocks are (§5.2.4).
const SECTOR: u64 = 512;

/// What a disk is to its driver, besides what its backend says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkConfig {
    /// How many queues, at least 1: best as many as there are vCPUs.
    pub queues: u16,
    /// What `VIRTIO_BLK_T_GET_ID` gives: at most 20 bytes of it.
    pub id: alloc::string::String,
}

/// A request that was taken and is not given back.
struct Flight {
    queue: u16,
    chain: Chain,
    /// How many bytes the driver finds written if it succeeds, the status not counted.
    written: u32,
    progress: Progress,
}

enum Progress {
    /// The backend has it.
    Under(Completion),
    /// It is done, and only the driver does not know it: the status.
    Done(u8),
}

/// The device.
pub struct Blk {
    backend: Arc<dyn BlockBackend>,
    config: BlkConfig,
    /// What the backend said when the device was made. The size is in the state.
    info: BlockInfo,
    state: BlkState,
    flights: Vec<Flight>,
    resized: bool,
    spare: Vec<Chain>,
}

impl Blk {
    /// A disk in front of `backend`.
    pub fn new(backend: Arc<dyn BlockBackend>, config: BlkConfig) -> Self {
        let info = backend.info();
        let config = BlkConfig {
            queues: config.queues.max(1),
            ..config
        };
        Self {
            backend,
            config,
            info,
            state: BlkState::new(info.size, info.write_cache),
            flights: Vec::new(),
            resized: false,
            spare: Vec::new(),
        }
    }

    /// Whether a completed write has to be durable: the driver cannot flush, or has switched the cache off.
    fn writes_through(&self) -> bool {
        !self.state.can_flush || !self.state.write_back
    }

    /// Gives back what is done.
    fn reap(&mut self, cx: &mut Context<'_>, queues: &mut Queues<'_>) -> Result<(), Fault> {
        let mut index = 0;
        while let Some(flight) = self.flights.get_mut(index) {
            let status = match &mut flight.progress {
                Progress::Done(status) => *status,
                Progress::Under(completion) => match Pin::new(completion).poll(cx) {
                    Poll::Pending => {
                        index += 1;
                        continue;
                    }
                    Poll::Ready(outcome) => status_of(outcome),
                },
            };
            let flight = self.flights.swap_remove(index);
            self.give_back(flight, status, queues)?;
        }
        Ok(())
    }

    fn give_back(
        &mut self,
        flight: Flight,
        status: u8,
        queues: &mut Queues<'_>,
    ) -> Result<(), Fault> {
        let Flight {
            queue,
            chain,
            written,
            ..
        } = flight;
        let memory = |error| Fault::Memory { queue, error };
        // The last byte of the buffer (§5.2.6).
        let at = chain.writable_len().saturating_sub(1);
        chain
            .write(queues.memory(), at, &[status])
            .map_err(memory)?;
        self.state.count(status);
        let written = if status == request::OK { written } else { 0 };
        queues.complete(queue, &chain, written.saturating_add(1))?;
        self.spare.push(chain);
        Ok(())
    }

    /// Takes buffers from `queue` and starts what they ask for. Returns whether there may be more of them.
    fn take(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<bool, Fault> {
        for _ in 0..BUDGET {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queues.pop(queue, &mut chain)? {
                self.spare.push(chain);
                return Ok(false);
            }
            let start = self.start(queue, &chain, queues.memory())?;
            let (progress, written) = match start {
                Start::Request { request, written } => {
                    let (request, completion) = caisson_block::Request::new(request);
                    self.backend.submit(request);
                    (Progress::Under(completion), written)
                }
                Start::Answer { status, written } => (Progress::Done(status), written),
            };
            self.flights.push(Flight {
                queue,
                chain,
                written,
                progress,
            });
        }
        Ok(true)
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> DeviceKind {
        // Class: a mass storage controller that is no other.
        DeviceKind {
            id: 2,
            class: 0x01_80_00,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![QUEUE_SIZE; usize::from(self.config.queues)]
    }

    fn features(&self) -> u64 {
        self.offered()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let image = self.config_image();
        for (at, byte) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.set_config(offset, data);
    }

    fn take_config_change(&mut self) -> bool {
        core::mem::take(&mut self.resized)
    }

    fn activate(&mut self, features: u64) {
        self.state.can_flush = features & config::FLUSH != 0;
    }

    fn poll(&mut self, cx: &mut Context<'_>, queues: &mut Queues<'_>) -> Result<(), Fault> {
        if let Poll::Ready(size) = self.backend.poll_resized(cx, self.state.size) {
            self.state.size = size;
            self.resized = true;
        }
        let before = self.flights.len();
        let taken = (0..self.config.queues)
            .try_fold(false, |more, queue| Ok(more | self.take(queue, queues)?));
        // Also before a fault: what was submitted is waited for before the device is reset.
        if self.flights.len() > before {
            self.backend.kick();
        }
        let more = taken?;
        self.reap(cx, queues)?;
        if more {
            cx.waker().wake_by_ref();
        }
        Ok(())
    }

    fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut quiet = Poll::Ready(());
        for flight in &mut self.flights {
            if let Progress::Under(completion) = &mut flight.progress {
                match Pin::new(completion).poll(cx) {
                    Poll::Ready(outcome) => flight.progress = Progress::Done(status_of(outcome)),
                    Poll::Pending => quiet = Poll::Pending,
                }
            }
        }
        quiet
    }

    fn reset_queue(&mut self, queue: u16) {
        self.flights.retain(|flight| flight.queue != queue);
    }

    fn reset(&mut self) {
        self.flights.clear();
        self.state.can_flush = false;
        self.state.write_back = self.info.write_cache;
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        let mut state = self.state.clone();
        for flight in &self.flights {
            let Progress::Done(status) = flight.progress else {
                return Err(StateError::Encode {
                    id: BlkState::ID.into(),
                    what: "the storage has not answered all requests",
                });
            };
            state.done.push(Done {
                queue: flight.queue,
                chain: flight.chain.clone(),
                written: flight.written,
                status,
            });
        }
        state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let mut state = BlkState::from_record(record)?.checked(self.config.queues)?;
        self.flights = core::mem::take(&mut state.done)
            .into_iter()
            .map(|done| Flight {
                queue: done.queue,
                chain: done.chain,
                written: done.written,
                progress: Progress::Done(done.status),
            })
            .collect();
        self.state = state;
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .u64("bytes", self.state.size)
            .bool("read-only", self.info.read_only)
            .bool("write-back", !self.writes_through())
            .u64("requests", self.state.requests)
            .u64("errors", self.state.errors)
            .u64("in flight", self.flights.len() as u64);
    }
}
