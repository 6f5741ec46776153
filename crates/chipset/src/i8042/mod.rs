//! The keyboard controller: Intel 8042 as in the PS/2 (IBM PS/2 Hardware Interface Technical Reference, "Keyboard and
//! Auxiliary Device Controller") at ports 0x60 and 0x64, with a keyboard and a mouse that answer commands.
//!
//! Both devices are complete enough to be detected and configured at once; keys come from [`I8042::type_scan_codes`],
//! the mouse never moves. The controller can reset the machine (command 0xFE, or bit 0 of the output port).
//!
//! Left out: scan-code translation of what is typed (the caller gives the codes of the set that the guest will see)
//! and the security commands. Address line 20 is always on; its bit reads back as it was written.

mod keyboard;
mod mouse;

use alloc::{sync::Arc, vec, vec::Vec};

use caisson_device::{
    Access, AddressRange, Claim, Device, Inspector, Line, Outcome, PowerRequest, PowerSink,
    ResetKind, SaveState, StateError, StateRecord,
};
use serde::{Deserialize, Serialize};

use keyboard::Keyboard;
use mouse::Mouse;

/// The interrupt line of the keyboard.
pub const KEYBOARD_LINE: u32 = 1;
/// The interrupt line of the mouse.
pub const MOUSE_LINE: u32 = 12;

/// How many bytes wait in a device for the controller to take them.
const QUEUE_LEN: usize = 16;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_FROM_MOUSE: u8 = 1 << 5;

const KEYBOARD_INTERRUPT: u8 = 1 << 0;
const MOUSE_INTERRUPT: u8 = 1 << 1;
const SYSTEM_FLAG: u8 = 1 << 2;
const KEYBOARD_OFF: u8 = 1 << 4;
const MOUSE_OFF: u8 = 1 << 5;
const TRANSLATE: u8 = 1 << 6;
/// What firmware leaves behind: keyboard interrupt and translation on, mouse off.
const CONFIG_RESET: u8 = KEYBOARD_INTERRUPT | SYSTEM_FLAG | MOUSE_OFF | TRANSLATE;

const OUTPUT_NO_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;
/// The output port after reset: no reset, A20 on, clock and data lines idle.
const OUTPUT_PORT_RESET: u8 = 0xC0 | OUTPUT_A20 | OUTPUT_NO_RESET;

/// Bytes on their way out of a device, oldest first, at most [`QUEUE_LEN`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Queue {
    bytes: Vec<u8>,
}

impl Queue {
    fn push(&mut self, byte: u8) {
        if self.bytes.len() < QUEUE_LEN {
            self.bytes.push(byte);
        }
    }

    fn push_all(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.push(*byte));
    }

    fn pop(&mut self) -> Option<u8> {
        (!self.bytes.is_empty()).then(|| self.bytes.remove(0))
    }

    fn clear(&mut self) {
        self.bytes.clear();
    }

    fn is_valid(&self) -> bool {
        self.bytes.len() <= QUEUE_LEN
    }
}

/// Where a byte in the output buffer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Source {
    Controller,
    Keyboard,
    Mouse,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct I8042State {
    config: u8,
    output_port: u8,
    /// The byte that port 0x60 gives next.
    output: Option<(u8, Source)>,
    /// The byte that port 0x60 gave last: it gives it again when there is no new one.
    last: u8,
    /// Answers of the controller itself.
    answers: Queue,
    /// The controller command that waits for its byte.
    command: Option<u8>,
    /// The last write was to port 0x64.
    last_was_command: bool,
    keyboard: Keyboard,
    mouse: Mouse,
}

impl SaveState for I8042State {
    const ID: &'static str = "i8042";
    const VERSION: u16 = 1;
}

impl I8042State {
    fn reset() -> Self {
        Self {
            config: CONFIG_RESET,
            output_port: OUTPUT_PORT_RESET,
            output: None,
            last: 0,
            answers: Queue::default(),
            command: None,
            last_was_command: false,
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
        }
    }

    /// Moves the next waiting byte into the output buffer, if that is free.
    fn fill_output(&mut self) {
        if self.output.is_some() {
            return;
        }
        self.output = if let Some(byte) = self.answers.pop() {
            Some((byte, Source::Controller))
        } else if let Some(byte) = self.next_key() {
            Some((byte, Source::Keyboard))
        } else if self.config & MOUSE_OFF == 0 {
            self.mouse.queue.pop().map(|byte| (byte, Source::Mouse))
        } else {
            None
        };
    }

    fn next_key(&mut self) -> Option<u8> {
        if self.config & KEYBOARD_OFF != 0 {
            return None;
        }
        let byte = self.keyboard.queue.pop()?;
        // Answers pass the translation too; of the bytes that a keyboard answers with it changes only the second one
        // of its identification.
        Some(match byte {
            0x83 if self.config & TRANSLATE != 0 => 0x41,
            byte => byte,
        })
    }
}

/// The keyboard controller with keyboard and mouse.
pub struct I8042 {
    keyboard_line: Line,
    mouse_line: Line,
    power: Arc<dyn PowerSink>,
    state: I8042State,
}

impl I8042 {
    /// A controller as firmware leaves it.
    pub fn new(keyboard_line: Line, mouse_line: Line, power: Arc<dyn PowerSink>) -> Self {
        Self {
            keyboard_line,
            mouse_line,
            power,
            state: I8042State::reset(),
        }
    }

    /// Makes the keyboard send `codes`, unless the guest has it switched off. Returns how many fitted into its queue.
    pub fn type_scan_codes(&mut self, codes: &[u8]) -> usize {
        let taken = if self.state.keyboard.is_scanning() {
            let room = QUEUE_LEN - self.state.keyboard.queue.bytes.len().min(QUEUE_LEN);
            let taken = codes.len().min(room);
            self.state.keyboard.queue.push_all(&codes[..taken]);
            taken
        } else {
            codes.len()
        };
        self.update();
        taken
    }

    fn update(&mut self) {
        self.state.fill_output();
        let source = self.state.output.map(|(_, source)| source);
        let config = self.state.config;
        self.keyboard_line
            .set(source == Some(Source::Keyboard) && config & KEYBOARD_INTERRUPT != 0);
        self.mouse_line
            .set(source == Some(Source::Mouse) && config & MOUSE_INTERRUPT != 0);
    }

    fn read_data(&mut self) -> u8 {
        if let Some((byte, _)) = self.state.output.take() {
            self.state.last = byte;
            // The line falls before the next byte raises it again: each byte is an edge.
            self.keyboard_line.set(false);
            self.mouse_line.set(false);
        }
        self.state.last
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        if self.state.config & SYSTEM_FLAG != 0 {
            status |= STATUS_SYSTEM;
        }
        if self.state.last_was_command {
            status |= STATUS_COMMAND;
        }
        match self.state.output {
            Some((_, Source::Mouse)) => status | STATUS_OUTPUT_FULL | STATUS_FROM_MOUSE,
            Some(_) => status | STATUS_OUTPUT_FULL,
            None => status,
        }
    }

    fn write_command(&mut self, command: u8) {
        self.state.last_was_command = true;
        self.state.command = None;
        match command {
            0x20 => self.state.answers.push(self.state.config),
            0x60 | 0xD1..=0xD4 => self.state.command = Some(command),
            0xA7 => self.state.config |= MOUSE_OFF,
            0xA8 => self.state.config &= !MOUSE_OFF,
            // Self-test of the mouse's and the keyboard's interface: no fault found.
            0xA9 | 0xAB => self.state.answers.push(0x00),
            0xAA => {
                let keyboard = core::mem::take(&mut self.state.keyboard);
                let mouse = core::mem::take(&mut self.state.mouse);
                self.state = I8042State {
                    keyboard,
                    mouse,
                    ..I8042State::reset()
                };
                self.state.last_was_command = true;
                self.state.answers.push(0x55);
            }
            0xAD => self.state.config |= KEYBOARD_OFF,
            0xAE => self.state.config &= !KEYBOARD_OFF,
            // The input port: keyboard not locked, no jumpers.
            0xC0 => self.state.answers.push(0x80),
            0xD0 => {
                let full = u8::from(self.state.output.is_some());
                self.state.answers.push(self.state.output_port | full << 4);
            }
            0xDD => self.state.output_port &= !OUTPUT_A20,
            0xDF => self.state.output_port |= OUTPUT_A20,
            // The test inputs: both clock lines are idle.
            0xE0 => self.state.answers.push(0x00),
            // Pulses the output-port bits that are 0 in the command: bit 0 is the reset line.
            0xF0..=0xFF if command & 1 == 0 => self.power.request(PowerRequest::Reset),
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        self.state.last_was_command = false;
        match self.state.command.take() {
            Some(0x60) => self.state.config = value,
            Some(0xD1) => {
                self.state.output_port = value;
                if value & OUTPUT_NO_RESET == 0 {
                    self.power.request(PowerRequest::Reset);
                }
            }
            Some(0xD2) => self.loop_back(value, Source::Keyboard),
            Some(0xD3) => self.loop_back(value, Source::Mouse),
            Some(_) => {
                self.state.config &= !MOUSE_OFF;
                self.state.mouse.write(value);
            }
            None => {
                self.state.config &= !KEYBOARD_OFF;
                self.state.keyboard.write(value);
            }
        }
    }

    /// Puts a byte into the output buffer as if a device had sent it, in place of what is there.
    fn loop_back(&mut self, value: u8, source: Source) {
        self.keyboard_line.set(false);
        self.mouse_line.set(false);
        self.state.output = Some((value, source));
    }
}

impl Device for I8042 {
    fn name(&self) -> &str {
        "i8042"
    }

    fn claims(&self) -> Vec<Claim> {
        vec![
            Claim::new(AddressRange::pio(0x60, 1), "data"),
            Claim::new(AddressRange::pio(0x64, 1), "command and status"),
        ]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        at.read_each(data, |_| {
            if at.region == 0 {
                self.read_data()
            } else {
                self.status()
            }
        });
        self.update();
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        at.write_each(data, |_, value| {
            if at.region == 0 {
                self.write_data(value)
            } else {
                self.write_command(value)
            }
        });
        self.update();
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {
        self.state = I8042State::reset();
        self.update();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = I8042State::from_record(record)?;
        let queues = [&state.answers, &state.keyboard.queue, &state.mouse.queue];
        if !queues.iter().all(|queue| queue.is_valid()) {
            return Err(I8042State::invalid("a queue holds more than 16 bytes"));
        }
        self.state = state;
        self.update();
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .hex("configuration", self.state.config)
            .hex("output port", self.state.output_port)
            .hex("status", self.status())
            .bool("keyboard scans", self.state.keyboard.is_scanning())
            .bool("mouse reports", self.state.mouse.is_reporting());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_device::{
        Lines,
        testing::{RecordedLines, RecordedPower, port_read, port_write},
    };

    struct Bench {
        controller: I8042,
        lines: Arc<RecordedLines>,
        power: Arc<RecordedPower>,
    }

    impl Bench {
        fn new() -> Self {
            let (lines, power) = (RecordedLines::new(), RecordedPower::new());
            let mut numbers = Lines::new(lines.clone());
            let (keyboard, mouse) = (
                numbers.line(KEYBOARD_LINE).unwrap(),
                numbers.line(MOUSE_LINE).unwrap(),
            );
            let mut controller = I8042::new(keyboard, mouse, power.clone());
            controller.reset(ResetKind::PowerOn);
            Self {
                controller,
                lines,
                power,
            }
        }

        fn command(&mut self, command: u8) {
            port_write(&mut self.controller, 0x64, 1, command.into());
        }

        fn data(&mut self, value: u8) {
            port_write(&mut self.controller, 0x60, 1, value.into());
        }

        fn status(&mut self) -> u8 {
            port_read(&mut self.controller, 0x64, 1) as u8
        }

        /// All bytes that wait, with whether they came from the mouse.
        fn drain(&mut self) -> Vec<(u8, bool)> {
            let mut bytes = vec![];
            loop {
                let status = self.status();
                if status & STATUS_OUTPUT_FULL == 0 {
                    return bytes;
                }
                let byte = port_read(&mut self.controller, 0x60, 1) as u8;
                bytes.push((byte, status & STATUS_FROM_MOUSE != 0));
            }
        }

        fn keyboard(&mut self, bytes: &[u8]) -> Vec<u8> {
            bytes.iter().for_each(|byte| self.data(*byte));
            self.drain()
                .into_iter()
                .map(|(byte, mouse)| if mouse { 0 } else { byte })
                .collect()
        }

        fn mouse(&mut self, bytes: &[u8]) -> Vec<u8> {
            for byte in bytes {
                self.command(0xD4);
                self.data(*byte);
            }
            self.drain()
                .into_iter()
                .map(|(byte, mouse)| if mouse { byte } else { 0 })
                .collect()
        }
    }

    #[test]
    fn controller_tests_pass() {
        let mut bench = Bench::new();
        for (command, answer) in [(0xAA, 0x55), (0xAB, 0), (0xA9, 0), (0xC0, 0x80)] {
            bench.command(command);
            assert_eq!(
                bench.status() & 0x29,
                0x09,
                "{command:#x}: command, data, not the mouse"
            );
            assert_eq!(bench.drain(), [(answer, false)], "{command:#x}");
        }
    }

    #[test]
    fn the_configuration_byte_reads_back() {
        let mut bench = Bench::new();
        bench.command(0x60);
        bench.data(0x30);
        bench.command(0x20);
        assert_eq!(bench.drain(), [(0x30, false)]);
        assert_eq!(bench.status() & STATUS_SYSTEM, 0);
        bench.command(0xA8);
        bench.command(0xAE);
        bench.command(0x20);
        assert_eq!(bench.drain(), [(0x00, false)]);
        bench.command(0xA7);
        bench.command(0xAD);
        bench.command(0x20);
        assert_eq!(bench.drain(), [(0x30, false)]);
    }

    #[test]
    fn linux_finds_the_mouse_port() {
        let mut bench = Bench::new();
        bench.command(0xD3);
        bench.data(0x5A);
        assert_eq!(bench.drain(), [(0x5A, true)]);
        // The interrupt test: line 12 must rise for a looped byte.
        bench.command(0x60);
        bench.data(0x02);
        bench.command(0xD3);
        bench.data(0xA5);
        assert!(bench.lines.level(MOUSE_LINE));
        assert_eq!(bench.drain(), [(0xA5, true)]);
        assert!(!bench.lines.level(MOUSE_LINE));
    }

    #[test]
    fn the_keyboard_answers() {
        let mut bench = Bench::new();
        assert_eq!(bench.keyboard(&[0xFF]), [0xFA, 0xAA]);
        assert_eq!(bench.keyboard(&[0xF2]), [0xFA, 0xAB, 0x41], "translated");
        bench.command(0x60);
        bench.data(0x05);
        assert_eq!(bench.keyboard(&[0xF2]), [0xFA, 0xAB, 0x83]);
        assert_eq!(bench.keyboard(&[0xED, 0x07]), [0xFA, 0xFA]);
        assert_eq!(bench.keyboard(&[0xEE]), [0xEE]);
        assert_eq!(bench.keyboard(&[0xF0, 0x00]), [0xFA, 0xFA, 0x02]);
        assert_eq!(
            bench.keyboard(&[0xF0, 0x01, 0xF0, 0x00]),
            [0xFA, 0xFA, 0xFA, 0xFA, 0x01]
        );
        assert_eq!(bench.keyboard(&[0xF3, 0x2B]), [0xFA, 0xFA]);
        assert_eq!(bench.keyboard(&[0xF4]), [0xFA]);
        assert_eq!(bench.keyboard(&[0x99]), [0xFE]);
    }

    #[test]
    fn the_mouse_answers() {
        let mut bench = Bench::new();
        assert_eq!(bench.mouse(&[0xFF]), [0xFA, 0xAA, 0x00]);
        assert_eq!(bench.mouse(&[0xF2]), [0xFA, 0x00]);
        assert_eq!(
            bench.mouse(&[0xF3, 200, 0xF3, 100, 0xF3, 80, 0xF2]).last(),
            Some(&0)
        );
        assert_eq!(bench.mouse(&[0xE8, 3, 0xE7, 0xF4]), [0xFA; 4]);
        assert_eq!(bench.mouse(&[0xE9]), [0xFA, 0x30, 3, 80]);
        assert_eq!(bench.mouse(&[0xEB]), [0xFA, 0x08, 0, 0]);
        assert_eq!(bench.mouse(&[0x42]), [0xFE]);
    }

    #[test]
    fn each_key_is_an_edge() {
        let mut bench = Bench::new();
        assert_eq!(bench.controller.type_scan_codes(&[0x1E, 0x9E]), 2);
        assert!(bench.lines.level(KEYBOARD_LINE));
        assert_eq!(bench.drain().len(), 2);
        assert_eq!(bench.lines.edges(KEYBOARD_LINE), 2);
        assert!(!bench.lines.level(KEYBOARD_LINE));
        assert_eq!(
            bench.controller.type_scan_codes(&[1; 30]),
            16,
            "with one byte in the buffer"
        );
        bench.keyboard(&[0xF5]);
        assert_eq!(
            bench.controller.type_scan_codes(&[1; 30]),
            30,
            "lost while switched off"
        );
        assert_eq!(bench.drain(), []);
    }

    #[test]
    fn disabled_devices_hold_their_bytes() {
        let mut bench = Bench::new();
        bench.command(0xAD);
        bench.controller.type_scan_codes(&[0x1E]);
        assert_eq!(bench.drain(), []);
        bench.command(0xAE);
        assert_eq!(bench.drain(), [(0x1E, false)]);
    }

    #[test]
    fn the_guest_can_reset_the_machine() {
        let mut bench = Bench::new();
        bench.command(0xFF);
        bench.command(0xF1);
        assert_eq!(bench.power.take(), []);
        bench.command(0xFE);
        assert_eq!(bench.power.take(), [PowerRequest::Reset]);
        bench.command(0xD1);
        bench.data(0xDF);
        assert_eq!(bench.power.take(), []);
        bench.command(0xD1);
        bench.data(0xDE);
        assert_eq!(bench.power.take(), [PowerRequest::Reset]);
    }

    #[test]
    fn the_a20_bit_reads_back() {
        let mut bench = Bench::new();
        for (command, bit) in [(0xDD, 0), (0xDF, 2)] {
            bench.command(command);
            bench.command(0xD0);
            assert_eq!(bench.drain()[0].0 & 2, bit);
        }
    }

    #[test]
    fn state_survives_save_and_restore() {
        let mut bench = Bench::new();
        bench.controller.type_scan_codes(&[0x1E, 0x9E]);
        bench.command(0xD4);
        let record = bench.controller.save().unwrap();
        let mut other = Bench::new();
        other.controller.restore(&record).unwrap();
        assert!(other.lines.level(KEYBOARD_LINE));
        other.data(0xF2);
        assert_eq!(
            other.drain(),
            [(0x1E, false), (0x9E, false), (0xFA, true), (0x00, true)]
        );
    }

    #[test]
    fn overfull_states_are_refused() {
        let mut state = I8042State::reset();
        state.mouse.queue.bytes = vec![0; 17];
        let record = state.to_record().unwrap();
        assert!(Bench::new().controller.restore(&record).is_err());
    }
}
