//! A disk for tests of devices.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    vec,
    vec::Vec,
};

use core::task::{Context, Poll};

use atomic_waker::AtomicWaker;

use crate::{BlockBackend, BlockError, BlockInfo, GuestBuffer, Operation, Request};

/// A disk in memory. Answers within [`BlockBackend::kick`] (not in `submit`, so that a device that forgets to kick is
/// noticed), unless it is told to hold requests back or to fail them.
pub struct RamDisk {
    info: BlockInfo,
    size: AtomicU64,
    resized: AtomicWaker,
    state: Mutex<State>,
    held: AtomicBool,
}

#[derive(Default)]
struct State {
    content: Vec<u8>,
    queued: Vec<Request>,
    failures: Vec<BlockError>,
    flushes: u64,
}

impl RamDisk {
    /// A disk of `size` zero bytes in blocks of 512, with a write cache and discard.
    pub fn new(size: u64) -> Self {
        Self::with_info(BlockInfo {
            size,
            logical_block: 512,
            physical_block: 512,
            optimal_io: 0,
            read_only: false,
            discard_granularity: Some(512),
            write_cache: true,
        })
    }

    /// A disk as described, full of zeroes.
    pub fn with_info(info: BlockInfo) -> Self {
        Self {
            info,
            size: AtomicU64::new(info.size),
            resized: AtomicWaker::new(),
            state: Mutex::new(State {
                content: vec![0; info.size as usize],
                ..State::default()
            }),
            held: AtomicBool::new(false),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no test panicked with the lock")
    }

    /// The disk's bytes.
    pub fn content(&self) -> Vec<u8> {
        self.state().content.clone()
    }

    /// Puts `bytes` at `offset`, behind the device's back.
    pub fn put(&self, offset: usize, bytes: &[u8]) {
        self.state().content[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// How many flushes were completed.
    pub fn flushes(&self) -> u64 {
        self.state().flushes
    }

    /// How many requests wait.
    pub fn waiting(&self) -> usize {
        self.state().queued.len()
    }

    /// Whether requests are to wait for [`RamDisk::release`], also after a kick.
    pub fn hold(&self, held: bool) {
        self.held.store(held, Ordering::Release);
    }

    /// Answers the waiting request that came as number `index`, whatever `hold` says.
    pub fn release(&self, index: usize) {
        let request = self.state().queued.remove(index);
        self.answer(request);
    }

    /// The next request fails so, without effect; calls add up.
    pub fn fail_next(&self, error: BlockError) {
        self.state().failures.push(error);
    }

    /// Changes the disk's size, and tells who waits for that.
    pub fn resize(&self, size: u64) {
        self.state().content.resize(size as usize, 0);
        self.size.store(size, Ordering::Release);
        self.resized.wake();
    }

    fn answer(&self, request: Request) {
        let outcome = self.execute(request.operation());
        request.complete(outcome);
    }

    fn execute(&self, operation: &Operation) -> Result<(), BlockError> {
        self.info().check(operation)?;
        let mut state = self.state();
        if !state.failures.is_empty() {
            return Err(state.failures.remove(0));
        }
        match operation {
            Operation::Read { offset, buffer } => {
                scatter(buffer, &state.content[*offset as usize..])
            }
            Operation::Write { offset, buffer, .. } => {
                let bytes = gather(buffer)?;
                state.content[*offset as usize..][..bytes.len()].copy_from_slice(&bytes);
                Ok(())
            }
            Operation::Flush => {
                state.flushes += 1;
                Ok(())
            }
            Operation::Discard { offset, len } | Operation::WriteZeroes { offset, len, .. } => {
                state.content[*offset as usize..][..*len as usize].fill(0);
                Ok(())
            }
        }
    }
}

fn scatter(buffer: &GuestBuffer, mut bytes: &[u8]) -> Result<(), BlockError> {
    for segment in buffer.segments() {
        let (now, later) = bytes.split_at(segment.len as usize);
        let written = buffer.view().write(segment.gpa, now);
        written.map_err(|_| BlockError::Memory)?;
        bytes = later;
    }
    Ok(())
}

fn gather(buffer: &GuestBuffer) -> Result<Vec<u8>, BlockError> {
    let mut bytes = vec![0; buffer.len() as usize];
    let mut at = 0;
    for segment in buffer.segments() {
        let piece = &mut bytes[at..at + segment.len as usize];
        let read = buffer.view().read(segment.gpa, piece);
        read.map_err(|_| BlockError::Memory)?;
        at += segment.len as usize;
    }
    Ok(bytes)
}

impl BlockBackend for RamDisk {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            size: self.size.load(Ordering::Acquire),
            ..self.info
        }
    }

    fn submit(&self, request: Request) {
        self.state().queued.push(request);
    }

    fn kick(&self) {
        while !self.held.load(Ordering::Acquire) {
            let next = {
                let queued = &mut self.state().queued;
                (!queued.is_empty()).then(|| queued.remove(0))
            };
            match next {
                Some(request) => self.answer(request),
                None => return,
            }
        }
    }

    fn poll_resized(&self, cx: &mut Context<'_>, seen: u64) -> Poll<u64> {
        self.resized.register(cx.waker());
        match self.size.load(Ordering::Acquire) {
            size if size != seen => Poll::Ready(size),
            _ => Poll::Pending,
        }
    }
}
