//! Features (§5.21).

use serde::{Deserialize, Serialize};

use crate::{
    command::{Command, Status},
    controller::Nvme,
};

const ARBITRATION: u8 = 0x01;
const POWER: u8 = 0x02;
const TEMPERATURE: u8 = 0x04;
const ERROR_RECOVERY: u8 = 0x05;
const WRITE_CACHE: u8 = 0x06;
const QUEUES: u8 = 0x07;
const COALESCING: u8 = 0x08;
const VECTOR: u8 = 0x09;
const ATOMICITY: u8 = 0x0a;
const EVENTS: u8 = 0x0b;
/// *Save*: the value outlives a reset.
const SAVE: u32 = 1 << 31;
/// Kelvin at which a warning would be due.
pub(crate) const WARNING_TEMPERATURE: u16 = 353;

/// What the host has set.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Features {
    arbitration: u32,
    over_temperature: u16,
    under_temperature: u16,
    error_recovery: u32,
    pub(crate) write_cache: bool,
    coalescing: u32,
    atomicity: u32,
    pub(crate) events: u32,
}

impl Features {
    /// As a reset leaves them.
    pub(crate) fn new(write_cache: bool) -> Self {
        Self {
            over_temperature: WARNING_TEMPERATURE,
            write_cache,
            ..Self::default()
        }
    }

    pub(crate) fn reset(&mut self, write_cache: bool) {
        *self = Self::new(write_cache);
    }
}

impl Nvme {
    /// Get Features (§5.15): the current value. Whether it can be saved is no matter: `ONCS` says no.
    pub(crate) fn get_feature(&self, command: &Command) -> Result<u32, Status> {
        let features = &self.state.features;
        Ok(match command.dword(10) as u8 {
            ARBITRATION => features.arbitration,
            POWER => 0,
            TEMPERATURE => {
                let select = command.dword(11) >> 16;
                match (select >> 4 & 0b11, select & 0xf) {
                    (0, 0) => features.over_temperature.into(),
                    (1, 0) => features.under_temperature.into(),
                    // Sensors that are not there.
                    (0 | 1, _) => 0,
                    _ => return Err(Status::INVALID_FIELD),
                }
            }
            ERROR_RECOVERY => features.error_recovery,
            WRITE_CACHE if self.backend.info().write_cache => features.write_cache.into(),
            QUEUES => self.queue_word(),
            COALESCING => features.coalescing,
            VECTOR => {
                let vector = command.dword(11) & 0xffff;
                if vector > u32::from(self.config.queues) {
                    return Err(Status::INVALID_FIELD);
                }
                // Interrupts are never held back, whatever is set.
                vector | 1 << 16
            }
            ATOMICITY => features.atomicity,
            EVENTS => features.events,
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    /// Set Features.
    pub(crate) fn set_feature(&mut self, command: &Command) -> Result<u32, Status> {
        if command.dword(10) & SAVE != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        let has_cache = self.backend.info().write_cache;
        let has_queues = self.state.has_io_queues();
        let value = command.dword(11);
        let features = &mut self.state.features;
        match command.dword(10) as u8 {
            ARBITRATION => features.arbitration = value,
            // There is one power state.
            POWER if value & 0x1f == 0 => {}
            TEMPERATURE => {
                let select = value >> 16;
                match (select >> 4 & 0b11, select & 0xf) {
                    (0, 0 | 0xf) => features.over_temperature = value as u16,
                    (1, 0 | 0xf) => features.under_temperature = value as u16,
                    (0 | 1, _) => {}
                    _ => return Err(Status::INVALID_FIELD),
                }
            }
            ERROR_RECOVERY => features.error_recovery = value & 0xffff,
            WRITE_CACHE if has_cache => features.write_cache = value & 1 != 0,
            QUEUES => {
                if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                    return Err(Status::INVALID_FIELD);
                }
                if has_queues {
                    return Err(Status::SEQUENCE);
                }
                return Ok(self.queue_word());
            }
            COALESCING => features.coalescing = value & 0xffff,
            VECTOR if value & 0xffff <= u32::from(self.config.queues) => {}
            ATOMICITY => features.atomicity = value & 1,
            EVENTS => features.events = value,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }

    /// How many queues there are of either kind, less one each.
    fn queue_word(&self) -> u32 {
        let most = u32::from(self.config.queues.saturating_sub(1));
        most << 16 | most
    }
}
