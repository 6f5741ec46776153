//! The mouse: a two-button PS/2 mouse (IBM PS/2 Hardware Interface Technical Reference, "Auxiliary Device") that lies
//! still.

use serde::{Deserialize, Serialize};

use super::Queue;

const ACKNOWLEDGE: u8 = 0xFA;
const RESEND: u8 = 0xFE;
/// Bit 3 is set in the first byte of each report.
const NO_MOVEMENT: [u8; 3] = [0x08, 0, 0];

/// A mouse's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Mouse {
    pub(super) queue: Queue,
    reporting: bool,
    /// It reports when asked, not when it moves.
    remote: bool,
    /// It sends back what it gets.
    wrap: bool,
    scaling: bool,
    resolution: u8,
    rate: u8,
    /// The command that waits for its byte.
    command: Option<u8>,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            queue: Queue::default(),
            reporting: false,
            remote: false,
            wrap: false,
            scaling: false,
            resolution: 2,
            rate: 100,
            command: None,
        }
    }
}

impl Mouse {
    /// Whether it would report movements.
    pub(super) fn is_reporting(&self) -> bool {
        self.reporting
    }

    /// A byte from the controller.
    pub(super) fn write(&mut self, value: u8) {
        if self.wrap && value != 0xEC && value != 0xFF {
            self.queue.push(value);
            return;
        }
        match self.command.take() {
            Some(0xE8) => self.resolution = value & 3,
            Some(_) => self.rate = value,
            None => {
                self.command(value);
                return;
            }
        }
        self.queue.push(ACKNOWLEDGE);
    }

    fn command(&mut self, command: u8) {
        let known = matches!(command, 0xE6..=0xEC | 0xEE | 0xF0 | 0xF2..=0xF6 | 0xFF);
        self.queue.push(if known { ACKNOWLEDGE } else { RESEND });
        match command {
            0xE6 | 0xE7 => self.scaling = command == 0xE7,
            0xE8 | 0xF3 => self.command = Some(command),
            0xE9 => {
                let flags = u8::from(self.remote) << 6
                    | u8::from(self.reporting) << 5
                    | u8::from(self.scaling) << 4;
                self.queue.push_all(&[flags, self.resolution, self.rate]);
            }
            0xEA => self.remote = false,
            0xEB => self.queue.push_all(&NO_MOVEMENT),
            0xEC | 0xEE => self.wrap = command == 0xEE,
            0xF0 => self.remote = true,
            0xF2 => self.queue.push(0x00),
            0xF4 | 0xF5 => self.reporting = command == 0xF4,
            0xF6 => self.set_defaults(),
            0xFF => {
                self.queue.clear();
                self.set_defaults();
                self.queue.push_all(&[ACKNOWLEDGE, 0xAA, 0x00]);
            }
            _ => {}
        }
    }

    fn set_defaults(&mut self) {
        let queue = core::mem::take(&mut self.queue);
        *self = Self {
            queue,
            ..Self::default()
        };
    }
}
