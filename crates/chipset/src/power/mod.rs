//! Two ports that reset the machine: system control port A (0x92) of the PS/2, and the reset control register (0xCF9)
//! of Intel's south bridges (82371AB PIIX4 data sheet, "RC—Reset Control Register"), which ACPI's FADT can name.

use alloc::{sync::Arc, vec::Vec};

use caisson_device::{
    Access, AddressRange, Claim, Device, Inspector, Outcome, PowerRequest, PowerSink, ResetKind,
    SaveState, StateError, StateRecord,
};
use serde::{Deserialize, Serialize};

/// The port of the reset control register.
pub const RESET_CONTROL_PORT: u16 = 0xCF9;
/// What to write to it for a reset (ACPI FADT, RESET_VALUE).
pub const RESET_CONTROL_VALUE: u8 = 0x06;

const PORT_A: u16 = 0x92;
const FAST_RESET: u8 = 1;
const A20: u8 = 2;
const RESET_CPU: u8 = 4;

/// Port 0x92 and port 0xCF9. The A20 bit of the former is kept and has no effect: address line 20 is always on.
pub struct ResetPorts {
    power: Arc<dyn PowerSink>,
    state: ResetPortsState,
}

#[derive(Clone, Serialize, Deserialize)]
struct ResetPortsState {
    port_a: u8,
    control: u8,
}

impl SaveState for ResetPortsState {
    const ID: &'static str = "reset-ports";
    const VERSION: u16 = 1;
}

impl ResetPortsState {
    const RESET: Self = Self {
        port_a: A20,
        control: 0,
    };
}

impl ResetPorts {
    /// Ports that send their requests to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        Self {
            power,
            state: ResetPortsState::RESET,
        }
    }
}

impl Device for ResetPorts {
    fn name(&self) -> &str {
        "reset-ports"
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![
            Claim::new(AddressRange::pio(PORT_A, 1), "port A"),
            Claim::new(AddressRange::pio(RESET_CONTROL_PORT, 1), "reset control"),
        ]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        let value = if at.region == 0 {
            self.state.port_a
        } else {
            self.state.control
        };
        at.read_each(data, |_| value);
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        at.write_each(data, |_, value| {
            let (register, kept, trigger) = if at.region == 0 {
                (&mut self.state.port_a, FAST_RESET | A20, FAST_RESET)
            } else {
                (&mut self.state.control, 0x0E, RESET_CPU)
            };
            let rises = value & trigger != 0 && *register & trigger == 0;
            *register = value & kept;
            if rises {
                self.power.request(PowerRequest::Reset);
            }
        });
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {
        self.state = ResetPortsState::RESET;
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        self.state = ResetPortsState::from_record(record)?;
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .hex("port A", self.state.port_a)
            .hex("reset control", self.state.control);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_device::testing::{RecordedPower, port_read, port_write};

    #[test]
    fn each_port_resets_on_the_rise_of_its_bit() {
        for (port, harmless, trigger) in [(0x92, 0x02, 0x03), (0xCF9, 0x02, 0x06)] {
            let power = RecordedPower::new();
            let mut ports = ResetPorts::new(power.clone());
            port_write(&mut ports, port, 1, harmless);
            assert_eq!(power.take(), []);
            port_write(&mut ports, port, 1, trigger);
            port_write(&mut ports, port, 1, trigger);
            assert_eq!(power.take(), [PowerRequest::Reset], "{port:#x}");
            let record = ports.save().unwrap();
            ports.reset(ResetKind::System);
            assert_ne!(port_read(&mut ports, port, 1), trigger);
            ports.restore(&record).unwrap();
            assert_eq!(port_read(&mut ports, port, 1), trigger);
        }
    }

    #[test]
    fn the_a20_bit_reads_back() {
        let mut ports = ResetPorts::new(RecordedPower::new());
        assert_eq!(port_read(&mut ports, 0x92, 1), 2);
        port_write(&mut ports, 0x92, 1, 0);
        assert_eq!(port_read(&mut ports, 0x92, 1), 0);
    }
}
