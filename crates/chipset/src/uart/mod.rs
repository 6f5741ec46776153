//! A serial port: National Semiconductor PC16550D (data sheet "Universal Asynchronous Receiver/Transmitter with
//! FIFOs"), eight ports.
//!
//! Bytes take no time on the line: what is written leaves at once if the host takes it, and otherwise waits in the
//! transmit FIFO, which the guest sees as not empty. Received bytes come from [`Uart::receive`] as far as there is
//! room. A character timeout, which on hardware passes after four idle character times, passes at once.
//!
//! Left out: DMA mode, parity and framing errors, breaks, and anything that depends on the baud rate. The modem lines
//! show a connected, ready partner, whose state never changes outside loop-back mode.

mod registers;

use alloc::{boxed::Box, collections::VecDeque, string::String, sync::Arc, vec, vec::Vec};
use core::task::Waker;

use caisson_device::{
    Access, AddressRange, ByteSink, Claim, Device, Inspector, Line, Outcome, ResetKind, SaveState,
    StateError, StateRecord,
};
use serde::{Deserialize, Serialize};

use registers::{fcr, ier, iir, lcr, lsr, mcr, msr};

/// The base ports and interrupt lines of the PC's four serial ports.
pub const PC_PORTS: [(u16, u32); 4] = [(0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3)];

/// How many bytes each FIFO holds.
pub const FIFO_LEN: usize = 16;

/// What a serial port needs of the machine.
pub struct UartHandles {
    /// The interrupt line.
    pub line: Line,
    /// Takes what the guest sends. When it did not take all, the owner calls [`Uart::output_ready`] once there is room.
    pub output: Arc<dyn ByteSink>,
    /// Woken when [`Uart::receive`] did not take all bytes and there is room again. It is woken under the lock of the
    /// device, so it only notes the event.
    pub room: Option<Waker>,
}

/// A 16550A serial port.
pub struct Uart {
    name: Box<str>,
    base: u16,
    handles: UartHandles,
    state: UartState,
    /// Bytes that the guest wrote while the transmit FIFO was full.
    overwritten: u64,
    /// [`Uart::receive`] has turned bytes away since the last wake-up.
    refused: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct UartState {
    divisor: u16,
    ier: u8,
    /// The bits of the FIFO control register that last: enable and trigger level.
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    /// The modem-status changes since the register was read.
    modem_deltas: u8,
    /// A byte arrived while the receive FIFO was full.
    overrun: bool,
    /// The transmitter-empty interrupt is pending.
    transmit_interrupt: bool,
    receive: VecDeque<u8>,
    transmit: VecDeque<u8>,
}

impl SaveState for UartState {
    const ID: &'static str = "uart16550a";
    const VERSION: u16 = 1;
}

impl UartState {
    fn reset() -> Self {
        Self {
            divisor: 0,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            modem_deltas: 0,
            overrun: false,
            transmit_interrupt: false,
            receive: VecDeque::new(),
            transmit: VecDeque::new(),
        }
    }

    fn has_fifo(&self) -> bool {
        self.fcr & fcr::ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.has_fifo() { FIFO_LEN } else { 1 }
    }

    fn trigger_level(&self) -> usize {
        match (self.has_fifo(), self.fcr >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            _ => 14,
        }
    }

    fn is_looped(&self) -> bool {
        self.mcr & mcr::LOOP != 0
    }

    /// The modem status lines: in loop-back mode our own outputs, else a partner that is there and ready.
    fn modem_lines(&self) -> u8 {
        if !self.is_looped() {
            return msr::CTS | msr::DSR | msr::DCD;
        }
        [
            (mcr::RTS, msr::CTS),
            (mcr::DTR, msr::DSR),
            (mcr::OUT1, msr::RI),
            (mcr::OUT2, msr::DCD),
        ]
        .into_iter()
        .filter(|(output, _)| self.mcr & output != 0)
        .fold(0, |lines, (_, input)| lines | input)
    }

    fn line_status(&self) -> u8 {
        let mut status = 0;
        if !self.receive.is_empty() {
            status |= lsr::DATA_READY;
        }
        if self.overrun {
            status |= lsr::OVERRUN;
        }
        if self.transmit.is_empty() {
            status |= lsr::TRANSMIT_EMPTY | lsr::IDLE;
        }
        status
    }

    /// The most urgent interrupt, as the identification register tells it.
    fn interrupt(&self) -> u8 {
        let received = self.receive.len();
        if self.ier & ier::LINE_STATUS != 0 && self.overrun {
            iir::LINE_STATUS
        } else if self.ier & ier::RECEIVE != 0 && received >= self.trigger_level() {
            iir::RECEIVE
        } else if self.ier & ier::RECEIVE != 0 && received > 0 {
            iir::TIMEOUT
        } else if self.ier & ier::TRANSMIT != 0 && self.transmit_interrupt {
            iir::TRANSMIT
        } else if self.ier & ier::MODEM != 0 && self.modem_deltas != 0 {
            iir::MODEM
        } else {
            iir::NONE
        }
    }
}

impl Uart {
    /// A port called `name` at `base`.
    pub fn new(name: impl Into<String>, base: u16, handles: UartHandles) -> Self {
        Self {
            name: name.into().into_boxed_str(),
            base,
            handles,
            state: UartState::reset(),
            overwritten: 0,
            refused: false,
        }
    }

    /// Bytes from outside: takes as many from the front as there is room for and returns how many. In loop-back mode
    /// the receiver is cut off and none are taken.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let room = if self.state.is_looped() {
            0
        } else {
            self.state
                .capacity()
                .saturating_sub(self.state.receive.len())
        };
        let taken = bytes.len().min(room);
        self.state.receive.extend(bytes.iter().take(taken));
        self.refused |= taken < bytes.len();
        self.update_line();
        taken
    }

    /// The output has room again: sends what waits in the transmit FIFO.
    pub fn output_ready(&mut self) {
        self.flush();
        self.update_line();
    }

    fn flush(&mut self) {
        if self.state.transmit.is_empty() {
            return;
        }
        let waiting = self.state.transmit.make_contiguous();
        let taken = self.handles.output.write(waiting).min(waiting.len());
        self.state.transmit.drain(..taken);
        if self.state.transmit.is_empty() {
            self.state.transmit_interrupt = true;
        }
    }

    fn update_line(&mut self) {
        // On a PC, OUT2 switches the interrupt onto the bus; in loop-back mode it is forced inactive.
        let connected = self.state.mcr & mcr::OUT2 != 0 && !self.state.is_looped();
        self.handles
            .line
            .set(connected && self.state.interrupt() != iir::NONE);
    }

    fn notify_room(&mut self) {
        let room = !self.state.is_looped() && self.state.receive.len() < self.state.capacity();
        if room
            && core::mem::take(&mut self.refused)
            && let Some(waker) = &self.handles.room
        {
            waker.wake_by_ref();
        }
    }

    fn transmit(&mut self, byte: u8) {
        self.state.transmit_interrupt = false;
        if self.state.is_looped() {
            if self.state.receive.len() < self.state.capacity() {
                self.state.receive.push_back(byte);
            } else {
                self.state.overrun = true;
            }
            self.state.transmit_interrupt = true;
            return;
        }
        if self.state.transmit.len() >= self.state.capacity() {
            self.overwritten = self.overwritten.saturating_add(1);
            return;
        }
        self.state.transmit.push_back(byte);
        self.flush();
    }

    fn read_register(&mut self, register: u64) -> u8 {
        let latch = self.state.lcr & lcr::DIVISOR_LATCH != 0;
        match register {
            0 if latch => self.state.divisor as u8,
            1 if latch => (self.state.divisor >> 8) as u8,
            0 => self.state.receive.pop_front().unwrap_or(0),
            1 => self.state.ier,
            2 => {
                let interrupt = self.state.interrupt();
                if interrupt == iir::TRANSMIT {
                    self.state.transmit_interrupt = false;
                }
                interrupt | if self.state.has_fifo() { iir::FIFO } else { 0 }
            }
            3 => self.state.lcr,
            4 => self.state.mcr,
            5 => {
                let status = self.state.line_status();
                self.state.overrun = false;
                status
            }
            6 => self.state.modem_lines() | core::mem::take(&mut self.state.modem_deltas),
            _ => self.state.scratch,
        }
    }

    fn write_register(&mut self, register: u64, value: u8) {
        let latch = self.state.lcr & lcr::DIVISOR_LATCH != 0;
        match register {
            0 if latch => self.state.divisor = self.state.divisor & 0xFF00 | u16::from(value),
            1 if latch => self.state.divisor = self.state.divisor & 0x00FF | u16::from(value) << 8,
            0 => self.transmit(value),
            1 => {
                let enabled = value & ier::ALL & !self.state.ier;
                self.state.ier = value & ier::ALL;
                // Enabling the interrupt while the transmitter is empty raises it.
                if enabled & ier::TRANSMIT != 0 && self.state.transmit.is_empty() {
                    self.state.transmit_interrupt = true;
                }
            }
            2 => self.write_fifo_control(value),
            3 => self.state.lcr = value,
            4 => {
                let before = self.state.modem_lines();
                self.state.mcr = value & mcr::ALL;
                let after = self.state.modem_lines();
                self.state.modem_deltas |= msr::deltas(before, after);
            }
            5 | 6 => {}
            _ => self.state.scratch = value,
        }
    }

    fn write_fifo_control(&mut self, value: u8) {
        let switched = (self.state.fcr ^ value) & fcr::ENABLE != 0;
        if switched || value & fcr::CLEAR_RECEIVE != 0 {
            self.state.receive.clear();
            self.state.overrun = false;
        }
        if switched || value & fcr::CLEAR_TRANSMIT != 0 {
            let was_empty = self.state.transmit.is_empty();
            self.state.transmit.clear();
            self.state.transmit_interrupt |= !was_empty;
        }
        self.state.fcr = if value & fcr::ENABLE != 0 {
            value & (fcr::ENABLE | fcr::TRIGGER)
        } else {
            0
        };
    }
}

impl Device for Uart {
    fn name(&self) -> &str {
        &self.name
    }

    fn claims(&self) -> Vec<Claim> {
        vec![Claim::new(AddressRange::pio(self.base, 8), "registers")]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        at.read_each(data, |register| self.read_register(register));
        self.update_line();
        self.notify_room();
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        at.write_each(data, |register, value| self.write_register(register, value));
        self.update_line();
        self.notify_room();
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {
        self.state = UartState::reset();
        self.update_line();
        self.notify_room();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = UartState::from_record(record)?;
        let valid = state.receive.len() <= FIFO_LEN
            && state.transmit.len() <= FIFO_LEN
            && state.ier & !ier::ALL == 0
            && state.mcr & !mcr::ALL == 0
            && state.fcr & !(fcr::ENABLE | fcr::TRIGGER) == 0;
        if !valid {
            return Err(UartState::invalid(
                "a register or FIFO holds more than it can",
            ));
        }
        self.state = state;
        // Whoever feeds the port may have waited for room in the port that was saved.
        self.refused = true;
        self.update_line();
        self.notify_room();
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .bool("FIFO enabled", self.state.has_fifo())
            .u64("receive FIFO", self.state.receive.len() as u64)
            .u64("transmit FIFO", self.state.transmit.len() as u64)
            .u64("overwritten bytes", self.overwritten)
            .hex("IER", self.state.ier)
            .hex("LCR", self.state.lcr)
            .hex("MCR", self.state.mcr)
            .u64("divisor", self.state.divisor);
    }
}

#[cfg(test)]
mod tests;
