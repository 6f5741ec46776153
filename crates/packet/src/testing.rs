//! A network for tests of devices.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    vec::Vec,
};

use core::task::{Context, Poll, Waker};

use crate::{Frame, Offloads, PacketBackend, PacketInfo};

/// Records the frames that a device sends and gives it those that a test puts in.
#[derive(Default)]
pub struct RecordedNetwork(Mutex<State>);

#[derive(Default)]
struct State {
    sent: Vec<Frame>,
    kicked: usize,
    incoming: VecDeque<Frame>,
    full: bool,
    offloads: Offloads,
    resets: usize,
    restored: Vec<u8>,
    waiters: Vec<Waker>,
}

/// What [`RecordedNetwork`] saves.
pub const SAVED: &[u8] = b"connections";

impl RecordedNetwork {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let waiters = core::mem::take(&mut self.state().waiters);
        waiters.into_iter().for_each(Waker::wake);
    }

    /// The frames that were sent and kicked since this was asked last.
    pub fn take_sent(&self) -> Vec<Frame> {
        let mut state = self.state();
        let kicked = core::mem::take(&mut state.kicked);
        state.sent.drain(..kicked).collect()
    }

    /// Puts a frame in for the guest.
    pub fn give(&self, frame: Frame) {
        self.state().incoming.push_back(frame);
        self.wake();
    }

    /// How many frames wait for the guest.
    pub fn waiting(&self) -> usize {
        self.state().incoming.len()
    }

    /// Whether it takes no frames.
    pub fn set_full(&self, full: bool) {
        self.state().full = full;
        self.wake();
    }

    /// What the guest was last said to accept.
    pub fn offloads(&self) -> Offloads {
        self.state().offloads
    }

    /// How often the guest started anew.
    pub fn resets(&self) -> usize {
        self.state().resets
    }

    /// What was restored last.
    pub fn restored(&self) -> Vec<u8> {
        self.state().restored.clone()
    }
}

impl PacketBackend for RecordedNetwork {
    fn info(&self) -> PacketInfo {
        PacketInfo {
            mtu: 1500,
            offloads: true,
        }
    }

    fn set_receive_offloads(&self, offloads: Offloads) {
        self.state().offloads = offloads;
    }

    fn poll_send(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.full {
            state.waiters.push(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    fn send(&self, frame: Frame) {
        self.state().sent.push(frame);
    }

    fn kick(&self) {
        let mut state = self.state();
        state.kicked = state.sent.len();
    }

    fn poll_receive(&self, cx: &mut Context<'_>) -> Poll<Frame> {
        let mut state = self.state();
        match state.incoming.pop_front() {
            Some(frame) => Poll::Ready(frame),
            None => {
                state.waiters.push(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn reset(&self) {
        self.state().resets += 1;
    }

    fn save(&self) -> Vec<u8> {
        SAVED.to_vec()
    }

    fn restore(&self, saved: &[u8]) {
        self.state().restored = saved.to_vec();
    }
}
