//! The console device (§5.3): one port, a size that may change, and output in an emergency.
//!
//! Output goes to a [`ByteSink`], which may be full: then the buffer stays where it is until the sink has room.
//! Input comes through [`Console::receive`] and waits in the device, at most [`INPUT`] bytes, until the driver gives it
//! buffers.
//!
//! Left out: several ports (`VIRTIO_CONSOLE_F_MULTIPORT`). A machine with several consoles has several devices.

mod state;

use alloc::{sync::Arc, vec::Vec};
use core::task::{Context, Waker};

use caisson_device::{ByteSink, Inspector, SaveState, StateError, StateRecord};

use self::state::ConsoleState;
use crate::{DeviceKind, Fault, Queues, VirtioDevice, queue::Chain};

/// How much input waits in the device.
pub const INPUT: usize = 4096;
const QUEUE_SIZE: u16 = 128;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// The size of the console is in its configuration (`VIRTIO_CONSOLE_F_SIZE`).
const SIZE: u64 = 1;
/// Output by a write to the configuration (`VIRTIO_CONSOLE_F_EMERG_WRITE`).
const EMERGENCY: u64 = 1 << 2;
/// Where in the configuration that write goes to.
const EMERGENCY_OFFSET: u64 = 8;
/// Bytes moved at once.
const PIECE: usize = 4096;
/// How many pieces are moved per call and direction.
const BUDGET: usize = 32;

/// The device.
pub struct Console {
    output: Arc<dyn ByteSink>,
    /// Woken when there is room for input again.
    room: Option<Waker>,
    state: ConsoleState,
    /// Somebody was refused.
    refused: bool,
    resized: bool,
    buffer: Vec<u8>,
    chain: Chain,
}

impl Console {
    /// A console that writes to `output` and wakes `room` when it takes input again after it took less than it was
    /// offered.
    pub fn new(output: Arc<dyn ByteSink>, room: Option<Waker>) -> Self {
        Self {
            output,
            room,
            state: ConsoleState::default(),
            refused: false,
            resized: false,
            buffer: alloc::vec![0; PIECE],
            chain: Chain::default(),
        }
    }

    /// Takes input from the front of `bytes` and returns how many there was room for. The device is to be polled then.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let room = INPUT.saturating_sub(self.state.input.len());
        let taken = bytes.len().min(room);
        self.state.input.extend(bytes.iter().take(taken));
        self.refused |= taken < bytes.len();
        taken
    }

    /// Changes the size that the driver is told, in characters; 0 by 0 is not known.
    pub fn set_size(&mut self, columns: u16, rows: u16) {
        if (columns, rows) != (self.state.columns, self.state.rows) {
            (self.state.columns, self.state.rows) = (columns, rows);
            self.resized = true;
        }
    }

    /// Moves what the driver sends to the output. Returns whether there is more.
    fn transmit(&mut self, queues: &mut Queues<'_>) -> Result<bool, Fault> {
        let memory = |error| Fault::Memory {
            queue: TRANSMIT,
            error,
        };
        for _ in 0..BUDGET {
            let state = &mut self.state;
            if !state.sending {
                if !queues.pop(TRANSMIT, &mut state.chain)? {
                    return Ok(false);
                }
                (state.sending, state.sent) = (true, 0);
            }
            let read = state
                .chain
                .read(queues.memory(), state.sent, &mut self.buffer)
                .map_err(memory)?;
            let bytes = self.buffer.get(..read).unwrap_or_default();
            let taken = match bytes {
                [] => 0,
                bytes => self.output.write(bytes).min(read),
            };
            state.sent += taken as u64;
            state.transmitted = state.transmitted.saturating_add(taken as u64);
            if taken < read {
                return Ok(false);
            }
            if state.sent >= state.chain.readable_len() {
                state.sending = false;
                queues.complete(TRANSMIT, &state.chain, 0)?;
            }
        }
        Ok(true)
    }

    /// Moves input into the driver's buffers. Returns whether there is more that could be moved.
    fn deliver(&mut self, queues: &mut Queues<'_>) -> Result<bool, Fault> {
        let memory = |error| Fault::Memory {
            queue: RECEIVE,
            error,
        };
        for _ in 0..BUDGET {
            if self.state.input.is_empty() || !queues.pop(RECEIVE, &mut self.chain)? {
                return Ok(false);
            }
            let bytes = self.state.input.make_contiguous();
            let written = self
                .chain
                .write(queues.memory(), 0, bytes)
                .map_err(memory)?;
            self.state.input.drain(..written);
            self.state.received = self.state.received.saturating_add(written as u64);
            queues.complete(RECEIVE, &self.chain, written as u32)?;
        }
        Ok(true)
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        // Class: a communication device that is no other.
        DeviceKind {
            id: 3,
            class: 0x07_80_00,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        SIZE | EMERGENCY
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..2].copy_from_slice(&self.state.columns.to_le_bytes());
        config[2..4].copy_from_slice(&self.state.rows.to_le_bytes());
        // One port, where a driver asks.
        config[4] = 1;
        for (at, byte) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == EMERGENCY_OFFSET
            && let [byte, ..] = data
        {
            // There is no way to make the guest wait.
            let _ = self.output.write(&[*byte]);
        }
    }

    fn take_config_change(&mut self) -> bool {
        core::mem::take(&mut self.resized)
    }

    fn poll(&mut self, cx: &mut Context<'_>, queues: &mut Queues<'_>) -> Result<(), Fault> {
        let more_out = self.transmit(queues)?;
        let more_in = self.deliver(queues)?;
        if more_out || more_in {
            cx.waker().wake_by_ref();
        }
        if self.refused && self.state.input.len() < INPUT {
            self.refused = false;
            if let Some(room) = &self.room {
                room.wake_by_ref();
            }
        }
        Ok(())
    }

    fn reset_queue(&mut self, queue: u16) {
        if queue == TRANSMIT {
            self.state.sending = false;
        }
    }

    fn reset(&mut self) {
        // What was typed survives, as at a serial port: a person typed it at the machine.
        self.state.sending = false;
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        self.state = ConsoleState::from_record(record)?.checked(QUEUE_SIZE)?;
        // Whoever offers input offers it again.
        self.refused = true;
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .u64("bytes sent", self.state.transmitted)
            .u64("bytes received", self.state.received)
            .u64("input waiting", self.state.input.len() as u64)
            .bool("output waits", self.state.sending)
            .u64("columns", self.state.columns)
            .u64("rows", self.state.rows);
    }
}
