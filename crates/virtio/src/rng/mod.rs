//! The entropy device (§5.4): fills buffers with bytes that nobody can guess.
//!
//! One queue, no features and no configuration. A buffer gets at most [`MOST`] bytes, which the specification allows; a
//! driver that wants more asks again.

mod state;

use alloc::{boxed::Box, vec::Vec};
use core::task::{Context, Poll};

use caisson_device::{Inspector, SaveState, StateError, StateRecord};

use self::state::RngState;
use crate::{DeviceKind, Fault, Queues, VirtioDevice};

/// Where entropy comes from.
pub trait EntropySource: Send {
    /// Fills all of `buffer`, or wakes `cx` when it may be able to. It need not remember the request: the same is asked
    /// again.
    ///
    /// # Errors
    /// There is no entropy to be had any more.
    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<Result<(), EntropyError>>;
}

/// A source that has run dry for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the source of entropy has failed")]
pub struct EntropyError;

/// The most bytes that one buffer gets.
pub const MOST: usize = 4096;
const QUEUE: u16 = 0;
const QUEUE_SIZE: u16 = 256;
/// How many buffers are filled per call.
const BUDGET: usize = 64;

/// The device.
pub struct Rng {
    source: Box<dyn EntropySource>,
    state: RngState,
    buffer: Box<[u8; MOST]>,
}

impl Rng {
    /// A device that gives out what `source` gives it.
    pub fn new(source: Box<dyn EntropySource>) -> Self {
        Self {
            source,
            state: RngState::default(),
            buffer: Box::new([0; MOST]),
        }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        // Class: a device that fits no other.
        DeviceKind {
            id: 4,
            class: 0xff_00_00,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn poll(&mut self, cx: &mut Context<'_>, queues: &mut Queues<'_>) -> Result<(), Fault> {
        for _ in 0..BUDGET {
            if !self.state.waiting && !queues.pop(QUEUE, &mut self.state.chain)? {
                return Ok(());
            }
            self.state.waiting = true;
            let wanted = self.state.chain.writable_len().min(MOST as u64) as usize;
            let bytes = self.buffer.get_mut(..wanted).unwrap_or_default();
            match self.source.poll_fill(cx, bytes) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Err(_)) => {
                    return Err(Fault::Device("the source of entropy has failed"));
                }
                Poll::Ready(Ok(())) => {}
            }
            let memory = |error| Fault::Memory {
                queue: QUEUE,
                error,
            };
            self.state
                .chain
                .write(queues.memory(), 0, bytes)
                .map_err(memory)?;
            bytes.fill(0);
            self.state.waiting = false;
            self.state.given = self.state.given.saturating_add(wanted as u64);
            queues.complete(QUEUE, &self.state.chain, wanted as u32)?;
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    fn reset_queue(&mut self, _: u16) {
        self.state.waiting = false;
    }

    fn reset(&mut self) {
        self.state.waiting = false;
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        self.state = RngState::from_record(record)?.checked(QUEUE_SIZE)?;
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .u64("bytes given", self.state.given)
            .bool("waits for its source", self.state.waiting);
    }
}
