//! Ports for people who debug kernels and firmware.
//!
//! - [`DebugCon`]: the port 0xE9 console that Bochs introduced; a read gives 0xE9, which tells that it is there.
//! - [`DebugExit`]: a port whose write ends the VM with a status of the guest's choice, at 0xF4 unless told otherwise,
//!   with the value that existing test kernels count on: (written value × 2) + 1.
//! - [`PostCode`]: port 0x80, where firmware tells how far it has come and which Linux writes to for a short delay.

use alloc::{sync::Arc, vec::Vec};

use caisson_device::{
    Access, AddressRange, ByteSink, Claim, Device, Inspector, Outcome, PowerRequest, PowerSink,
    ResetKind, SaveState, StateError, StateRecord, le_value,
};
use serde::{Deserialize, Serialize};

/// A console at one port. Bytes that its sink has no room for are dropped and counted: it has no flow control.
pub struct DebugCon {
    port: u16,
    output: Arc<dyn ByteSink>,
    state: DebugConState,
}

#[derive(Clone, Serialize, Deserialize)]
struct DebugConState {
    dropped: u64,
}

impl SaveState for DebugConState {
    const ID: &'static str = "debugcon";
    const VERSION: u16 = 1;
}

impl DebugCon {
    /// The usual port.
    pub const PORT: u16 = 0xE9;

    /// A console at `port` that writes to `output`.
    pub fn new(port: u16, output: Arc<dyn ByteSink>) -> Self {
        Self {
            port,
            output,
            state: DebugConState { dropped: 0 },
        }
    }
}

impl Device for DebugCon {
    fn name(&self) -> &str {
        "debugcon"
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![Claim::new(AddressRange::pio(self.port, 1), "console")]
    }

    fn read(&mut self, _: Access, data: &mut [u8]) -> Outcome {
        data.fill(0xE9);
        Outcome::Done
    }

    fn write(&mut self, _: Access, data: &[u8]) -> Outcome {
        let taken = self.output.write(data).min(data.len());
        self.state.dropped = self
            .state
            .dropped
            .saturating_add((data.len() - taken) as u64);
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {}

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        self.state = DebugConState::from_record(record)?;
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector.u64("dropped bytes", self.state.dropped);
    }
}

/// A port that ends the VM. Reads give zero.
pub struct DebugExit {
    port: u16,
    power: Arc<dyn PowerSink>,
}

#[derive(Serialize, Deserialize)]
struct DebugExitState {}

impl SaveState for DebugExitState {
    const ID: &'static str = "debug-exit";
    const VERSION: u16 = 1;
}

impl DebugExit {
    /// The usual port.
    pub const PORT: u16 = 0xF4;

    /// Four ports from `port` on.
    pub fn new(port: u16, power: Arc<dyn PowerSink>) -> Self {
        Self { port, power }
    }
}

impl Device for DebugExit {
    fn name(&self) -> &str {
        "debug-exit"
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![Claim::new(AddressRange::pio(self.port, 4), "exit")]
    }

    fn read(&mut self, _: Access, data: &mut [u8]) -> Outcome {
        data.fill(0);
        Outcome::Done
    }

    fn write(&mut self, _: Access, data: &[u8]) -> Outcome {
        self.power
            .request(PowerRequest::Exit((le_value(data) as u32) << 1 | 1));
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {}

    fn save(&self) -> Result<StateRecord, StateError> {
        DebugExitState {}.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        DebugExitState::from_record(record).map(|_| ())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector.hex("port", self.port);
    }
}

/// Port 0x80: keeps the last code written.
#[derive(Default)]
pub struct PostCode {
    state: PostCodeState,
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct PostCodeState {
    code: u8,
}

impl SaveState for PostCodeState {
    const ID: &'static str = "post-code";
    const VERSION: u16 = 1;
}

impl PostCode {
    /// The port.
    pub const PORT: u16 = 0x80;

    /// A port with code 0.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Device for PostCode {
    fn name(&self) -> &str {
        "post-code"
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![Claim::new(AddressRange::pio(Self::PORT, 1), "code")]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        at.read_each(data, |_| self.state.code);
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        at.write_each(data, |_, value| self.state.code = value);
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {
        self.state = PostCodeState::default();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        self.state = PostCodeState::from_record(record)?;
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector.hex("code", self.state.code);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_device::{
        Value,
        testing::{RecordedBytes, RecordedPower, port_read, port_write},
    };

    #[test]
    fn the_console_passes_bytes_and_announces_itself() {
        let output = RecordedBytes::new();
        let mut console = DebugCon::new(DebugCon::PORT, output.clone());
        port_write(&mut console, 0xE9, 1, b'o'.into());
        port_write(&mut console, 0xE9, 1, b'k'.into());
        assert_eq!(output.take(), b"ok");
        assert_eq!(port_read(&mut console, 0xE9, 1), 0xE9);
        output.set_full(true);
        port_write(&mut console, 0xE9, 1, 0);
        let mut shown = Inspector::new();
        console.inspect(&mut shown);
        assert_eq!(shown.get("dropped bytes"), Some(&Value::U64(1)));
    }

    #[test]
    fn the_exit_status_is_odd() {
        let power = RecordedPower::new();
        let mut exit = DebugExit::new(DebugExit::PORT, power.clone());
        port_write(&mut exit, 0xF4, 1, 0);
        port_write(&mut exit, 0xF4, 4, 0x10);
        port_write(&mut exit, 0xF4, 4, 0xFFFF_FFFF);
        assert_eq!(
            power.take(),
            [
                PowerRequest::Exit(1),
                PowerRequest::Exit(0x21),
                PowerRequest::Exit(u32::MAX)
            ]
        );
        assert_eq!(port_read(&mut exit, 0xF4, 4), 0);
    }

    #[test]
    fn the_post_code_reads_back() {
        let mut post = PostCode::new();
        port_write(&mut post, 0x80, 1, 0xA5);
        assert_eq!(port_read(&mut post, 0x80, 1), 0xA5);
        let record = post.save().unwrap();
        post.reset(ResetKind::System);
        assert_eq!(port_read(&mut post, 0x80, 1), 0);
        post.restore(&record).unwrap();
        assert_eq!(port_read(&mut post, 0x80, 1), 0xA5);
    }
}
