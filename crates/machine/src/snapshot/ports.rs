//! What a serial port's host side holds of the guest's.

use caisson_device::{SaveState, StateError, StateRecord};
use serde::{Deserialize, Serialize};

use crate::machine::Port;

/// More than [`SerialInput`](crate::SerialInput) holds of one sender, in bytes.
const LIMIT: usize = 16 << 20;

/// What was typed at the port and has not reached the device. What the device sent has left the machine and is not
/// among it: the process that saved it delivers it.
#[derive(Debug, Serialize, Deserialize)]
struct PortState {
    input: Vec<u8>,
    /// The kernel's last words, if it panicked and the reset that follows has not come.
    panic: Option<String>,
}

impl SaveState for PortState {
    const ID: &'static str = "port";
    const VERSION: u16 = 1;
}

/// The name of the part.
pub(super) fn part(port: &Port) -> String {
    format!("{}-host", port.name)
}

pub(super) fn save(port: &Port) -> Result<StateRecord, StateError> {
    PortState {
        input: port.input.waiting(),
        panic: port.output.panic_message(),
    }
    .to_record()
}

pub(super) fn restore(port: &Port, record: &StateRecord) -> Result<(), StateError> {
    let state = PortState::from_record(record)?;
    if state.input.len() > LIMIT {
        return Err(PortState::invalid("more input than a port holds"));
    }
    port.input.push_now(&state.input);
    if let Some(message) = &state.panic {
        port.output.restore_panic(message);
    }
    Ok(())
}
