//! The keyboard: an enhanced PS/2 keyboard (IBM PS/2 Hardware Interface Technical Reference, "Keyboard").

use serde::{Deserialize, Serialize};

use super::Queue;

const ACKNOWLEDGE: u8 = 0xFA;
const RESEND: u8 = 0xFE;
const SELF_TEST_PASSED: u8 = 0xAA;

/// A keyboard's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Keyboard {
    pub(super) queue: Queue,
    scanning: bool,
    scan_code_set: u8,
    /// The command that waits for its byte.
    command: Option<u8>,
    last_sent: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self {
            queue: Queue::default(),
            scanning: true,
            scan_code_set: 2,
            command: None,
            last_sent: 0,
        }
    }
}

impl Keyboard {
    /// Whether keys are sent.
    pub(super) fn is_scanning(&self) -> bool {
        self.scanning
    }

    fn answer(&mut self, bytes: &[u8]) {
        self.queue.push_all(bytes);
        self.last_sent = bytes.last().copied().unwrap_or(self.last_sent);
    }

    /// A byte from the controller.
    pub(super) fn write(&mut self, value: u8) {
        match self.command.take() {
            Some(0xF0) => match value {
                0 => {
                    let set = self.scan_code_set;
                    self.answer(&[ACKNOWLEDGE, set]);
                }
                1..=3 => {
                    self.scan_code_set = value;
                    self.answer(&[ACKNOWLEDGE]);
                }
                _ => self.answer(&[RESEND]),
            },
            // Lights, repeat rate and key types have no effect here.
            Some(_) => self.answer(&[ACKNOWLEDGE]),
            None => self.command(value),
        }
    }

    fn command(&mut self, command: u8) {
        match command {
            0xED | 0xF0 | 0xF3 | 0xFB..=0xFD => {
                self.command = Some(command);
                self.answer(&[ACKNOWLEDGE]);
            }
            0xEE => self.answer(&[0xEE]),
            0xF2 => self.answer(&[ACKNOWLEDGE, 0xAB, 0x83]),
            0xF4 => {
                self.scanning = true;
                self.queue.clear();
                self.answer(&[ACKNOWLEDGE]);
            }
            0xF5 | 0xF6 => {
                *self = Self {
                    scanning: command == 0xF6,
                    ..Self::default()
                };
                self.answer(&[ACKNOWLEDGE]);
            }
            0xF7..=0xFA => self.answer(&[ACKNOWLEDGE]),
            0xFE => {
                let last = self.last_sent;
                self.answer(&[last]);
            }
            0xFF => {
                *self = Self::default();
                self.answer(&[ACKNOWLEDGE, SELF_TEST_PASSED]);
            }
            _ => self.answer(&[RESEND]),
        }
    }
}
