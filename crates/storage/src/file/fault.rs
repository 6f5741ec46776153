//! What goes wrong in tests.

use std::{cell::RefCell, time::Duration};

use crate::runtime::Call;

/// A call that is about to be made.
#[derive(Clone, Copy, Debug)]
pub struct FaultPoint {
    /// The call.
    pub call: Call,
    /// Bytes of memory that it transfers.
    pub len: usize,
}

/// What is to become of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is made.
    None,
    /// It fails with this error number and has no effect.
    Fail(i32),
    /// Only so many bytes are transferred.
    Short(usize),
    /// Only so many bytes are transferred, and it fails with this error number.
    Torn(usize, i32),
    /// It is made after a while.
    Delay(Duration),
}

/// Decides what goes wrong. Asked before each call.
pub trait FaultHook {
    /// What is to become of this call.
    fn before(&self, point: &FaultPoint) -> Fault;
}

/// Faults by chance, the same for the same seed.
pub struct SeededFaults {
    state: RefCell<State>,
    /// Of a million calls, how many end early.
    pub short: u32,
    /// Of a million calls, how many are interrupted (EINTR).
    pub interrupted: u32,
    /// Of a million calls, how many fail, and with which error number.
    pub failing: (u32, i32),
    /// From which call on, counted from 0, everything fails as without power. That one is torn at a multiple of 512
    /// bytes.
    pub power_cut: Option<u64>,
}

struct State {
    random: u64,
    calls: u64,
}

impl SeededFaults {
    /// Nothing goes wrong yet.
    pub fn new(seed: u64) -> Self {
        Self {
            state: RefCell::new(State {
                random: seed,
                calls: 0,
            }),
            short: 0,
            interrupted: 0,
            failing: (0, libc::EIO),
            power_cut: None,
        }
    }

    /// How many calls there were.
    pub fn calls(&self) -> u64 {
        self.state.borrow().calls
    }
}

/// SplitMix64: good enough for tests, and the same everywhere.
pub(super) fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl FaultHook for SeededFaults {
    fn before(&self, point: &FaultPoint) -> Fault {
        let mut state = self.state.borrow_mut();
        let number = state.calls;
        state.calls += 1;
        if let Some(cut) = self.power_cut {
            if number == cut && matches!(point.call, Call::Write { .. }) {
                let sectors = (point.len / 512) as u64 + 1;
                let written = random(&mut state.random) % sectors;
                return Fault::Torn(written as usize * 512, libc::EIO);
            }
            if number >= cut {
                return Fault::Fail(libc::EIO);
            }
        }
        let mut chance = (random(&mut state.random) % 1_000_000) as u32;
        let mut hit = |share: u32| match chance.checked_sub(share) {
            None => true,
            Some(rest) => {
                chance = rest;
                false
            }
        };
        if hit(self.interrupted) {
            return Fault::Fail(libc::EINTR);
        }
        if hit(self.failing.0) {
            return Fault::Fail(self.failing.1);
        }
        if hit(self.short) && point.len > 1 {
            let len = 1 + random(&mut state.random) as usize % (point.len - 1);
            return Fault::Short(len);
        }
        Fault::None
    }
}
