//! The PCI configuration mechanism of I/O ports (PCI Local Bus 3.0 §3.2.2.3.2): an address register at 0xCF8, data at
//! 0xCFC.
//!
//! The reset control register at 0xCF9 lies within the address register: an access to the address has four bytes, any
//! other goes to the single ports. So this device has both, and [`crate::power::ResetPorts`] leaves its own out on a
//! machine with PCI.

use alloc::{sync::Arc, vec::Vec};

use caisson_device::{
    Access, AddressRange, Claim, Device, Inspector, Outcome, PowerSink, ResetKind, SaveState,
    StateError, StateRecord, le_value, put_le,
};
use serde::{Deserialize, Serialize};

use crate::power::{RESET_CONTROL_PORT, ResetControl};

/// The first of the eight ports.
pub const BASE: u16 = 0xCF8;
const DATA: u64 = 4;
const RESET: u64 = (RESET_CONTROL_PORT - BASE) as u64;
const ENABLE: u32 = 1 << 31;
/// Bus, device, function and register; the other bits read as zeros.
const ADDRESS: u32 = ENABLE | 0x00ff_fffc;

/// Finds the configuration page of a function: the machine's ECAM window.
///
/// Called while the lock of the ports is held; an implementation may call the device that owns the page, which never
/// calls back.
pub trait ConfigAccess: Send + Sync {
    /// Reads at `offset` of the ECAM window. Where there is no function, `data` is left as it is.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes at `offset` of the ECAM window.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The configuration ports, and the reset control register among them.
pub struct ConfigPorts {
    functions: Arc<dyn ConfigAccess>,
    power: Arc<dyn PowerSink>,
    state: ConfigPortsState,
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct ConfigPortsState {
    address: u32,
    reset_control: ResetControl,
}

impl SaveState for ConfigPortsState {
    const ID: &'static str = "pci-config-ports";
    const VERSION: u16 = 1;
}

impl ConfigPorts {
    /// Ports that lead to `functions`, and whose reset requests go to `power`.
    pub fn new(functions: Arc<dyn ConfigAccess>, power: Arc<dyn PowerSink>) -> Self {
        Self {
            functions,
            power,
            state: ConfigPortsState::default(),
        }
    }

    /// Where in the ECAM window an access of `len` bytes at `offset` of the ports goes.
    fn target(&self, offset: u64, len: usize) -> Option<u64> {
        let address = self.state.address;
        let within = offset.checked_sub(DATA)?;
        if address & ENABLE == 0 || within + len as u64 > 4 {
            return None;
        }
        let function = u64::from(address >> 8 & 0xffff);
        Some(function << 12 | u64::from(address & 0xfc) | within)
    }
}

impl Device for ConfigPorts {
    fn name(&self) -> &str {
        "pci-config-ports"
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![Claim::new(AddressRange::pio(BASE, 8), "configuration")]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        match (at.offset, data.len()) {
            (0, 4) => put_le(data, self.state.address.into()),
            (RESET, 1) => data.fill(self.state.reset_control.value()),
            (offset, len) => {
                if let Some(target) = self.target(offset, len) {
                    self.functions.read(target, data);
                }
            }
        }
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        match (at.offset, data) {
            (0, [_, _, _, _]) => self.state.address = le_value(data) as u32 & ADDRESS,
            (RESET, [value]) => self.state.reset_control.write(*value, &*self.power),
            (offset, data) => {
                if let Some(target) = self.target(offset, data.len()) {
                    self.functions.write(target, data);
                }
            }
        }
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {
        self.state = ConfigPortsState::default();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        self.state.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = ConfigPortsState::from_record(record)?;
        self.state = ConfigPortsState {
            address: state.address & ADDRESS,
            ..state
        };
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector.hex("address", self.state.address);
    }
}

#[cfg(test)]
mod tests {
    use caisson_device::{
        PowerRequest,
        testing::{RecordedPower, check_state, port_read, port_write},
    };
    use std::sync::Mutex;
    use std::vec::Vec;

    use super::*;

    /// Remembers accesses: offset and length, negative for a write.
    #[derive(Default)]
    struct Pages(Mutex<Vec<(u64, i64)>>);

    impl ConfigAccess for Pages {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().unwrap().push((offset, data.len() as i64));
            data.fill(0x5a);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, -(data.len() as i64)));
        }
    }

    fn ports() -> (ConfigPorts, Arc<Pages>, Arc<RecordedPower>) {
        let (pages, power) = (Arc::<Pages>::default(), RecordedPower::new());
        (ConfigPorts::new(pages.clone(), power.clone()), pages, power)
    }

    #[test]
    fn the_address_selects_what_the_data_ports_reach() {
        let (mut ports, pages, _) = ports();
        assert_eq!(port_read(&mut ports, 0xcfc, 4), 0xffff_ffff, "not enabled");
        port_write(&mut ports, 0xcf8, 4, 0xff02_1b37);
        assert_eq!(port_read(&mut ports, 0xcf8, 4), 0x8002_1b34);
        assert_eq!(port_read(&mut ports, 0xcfe, 2), 0x5a5a);
        port_write(&mut ports, 0xcff, 1, 0);
        assert_eq!(
            port_read(&mut ports, 0xcff, 2),
            0xffff,
            "leaves the register"
        );
        let page = 0x21b << 12 | 0x34;
        assert_eq!(*pages.0.lock().unwrap(), [(page + 2, 2), (page + 3, -1)]);
        let (mut fresh, ..) = self::ports();
        check_state(&ports, &mut fresh);
        assert_eq!(port_read(&mut fresh, 0xcf8, 4), 0x8002_1b34);
    }

    #[test]
    fn one_byte_in_the_address_is_the_reset_register() {
        let (mut ports, _, power) = ports();
        port_write(&mut ports, 0xcf8, 4, 0x8000_0600);
        port_write(&mut ports, 0xcf8, 2, 0x0600);
        assert_eq!(power.take(), []);
        port_write(&mut ports, 0xcf9, 1, 2);
        assert_eq!(power.take(), []);
        port_write(&mut ports, 0xcf9, 1, 6);
        assert_eq!(power.take(), [PowerRequest::Reset]);
        assert_eq!(port_read(&mut ports, 0xcf9, 1), 6);
        assert_eq!(port_read(&mut ports, 0xcf8, 4), 0x8000_0600);
    }
}
