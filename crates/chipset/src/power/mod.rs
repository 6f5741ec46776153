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

/// The reset control register: what was written, and a reset on the rise of one of its bits.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct ResetControl(u8);

impl ResetControl {
    pub(crate) fn value(self) -> u8 {
        self.0
    }

    pub(crate) fn write(&mut self, value: u8, power: &dyn PowerSink) {
        let rises = value & RESET_CPU != 0 && self.0 & RESET_CPU == 0;
        self.0 = value & 0x0E;
        if rises {
            power.request(PowerRequest::Reset);
        }
    }
}

/// Port 0x92 and port 0xCF9. The A20 bit of the former is kept and has no effect: address line 20 is always on.
pub struct ResetPorts {
    power: Arc<dyn PowerSink>,
    reset_control: bool,
    state: ResetPortsState,
}

#[derive(Clone, Serialize, Deserialize)]
struct ResetPortsState {
    port_a: u8,
    control: ResetControl,
}

impl SaveState for ResetPortsState {
    const ID: &'static str = "reset-ports";
    const VERSION: u16 = 1;
}

impl ResetPortsState {
    const RESET: Self = Self {
        port_a: A20,
        control: ResetControl(0),
    };
}

impl ResetPorts {
    /// Ports that send their requests to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        Self {
            power,
            reset_control: true,
            state: ResetPortsState::RESET,
        }
    }

    /// Only port 0x92, for a machine whose reset control register is among its
    /// [configuration ports](crate::config_ports).
    pub fn without_reset_control(power: Arc<dyn PowerSink>) -> Self {
        Self {
            reset_control: false,
            ..Self::new(power)
        }
    }
}

impl Device for ResetPorts {
    fn name(&self) -> &str {
        "reset-ports"
    }

    fn claims(&self) -> Vec<Claim> {
        let mut claims = alloc::vec![Claim::new(AddressRange::pio(PORT_A, 1), "port A")];
        if self.reset_control {
            let port = AddressRange::pio(RESET_CONTROL_PORT, 1);
            claims.push(Claim::new(port, "reset control"));
        }
        claims
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        let value = if at.region == 0 {
            self.state.port_a
        } else {
            self.state.control.value()
        };
        at.read_each(data, |_| value);
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        at.write_each(data, |_, value| {
            if at.region > 0 {
                self.state.control.write(value, &*self.power);
                return;
            }
            let rises = value & FAST_RESET != 0 && self.state.port_a & FAST_RESET == 0;
            self.state.port_a = value & (FAST_RESET | A20);
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
            .hex("reset control", self.state.control.value());
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
