//! Log pages (§5.14).

use alloc::{vec, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::{
    command::{Command, Status},
    controller::{NAMESPACE, Nvme},
    events::{CHANGED_NAMESPACES, ERROR_LOG, MAX_ERRORS},
};

const HEALTH: u8 = 2;
const FIRMWARE: u8 = 3;
/// Bytes of an entry of the error log.
const ERROR_ENTRY: usize = 64;
/// A temperature in Kelvin, for a disk that has none.
const TEMPERATURE: u16 = 300;
const HOUR: u64 = 3_600_000_000_000;

/// What the health log counts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Counters {
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) media_errors: u64,
    pub(crate) power_cycles: u64,
}

impl Nvme {
    /// Get Log Page: the part of the page that `command` asks for, no longer than the page.
    pub(crate) fn log_page(&mut self, command: &Command) -> Result<Vec<u8>, Status> {
        let page = command.dword(10) as u8;
        let image = match page {
            ERROR_LOG => self.error_log(),
            HEALTH => match command.namespace() {
                // The whole controller's: there is none for a namespace alone.
                0 | u32::MAX => self.health_log(),
                _ => return Err(Status::INVALID_NAMESPACE),
            },
            FIRMWARE => {
                let mut image = vec![0; 512];
                // Slot 1 is in use.
                image[0] = 1;
                let revision = env!("CARGO_PKG_VERSION").bytes();
                let revision = revision.chain(core::iter::repeat(b' '));
                for (byte, letter) in image.iter_mut().skip(8).zip(revision.take(8)) {
                    *byte = letter;
                }
                image
            }
            CHANGED_NAMESPACES => {
                let mut image = vec![0; 4096];
                if self.state.events.in_log {
                    put(&mut image, 0, &NAMESPACE.to_le_bytes());
                }
                image
            }
            _ => return Err(Status::LOG_PAGE),
        };
        let dwords =
            u64::from(command.dword(10) >> 16) | u64::from(command.dword(11) & 0xffff) << 16;
        let len = (dwords + 1) * 4;
        let offset = command.quad(12);
        if !offset.is_multiple_of(4) || offset > image.len() as u64 {
            return Err(Status::INVALID_FIELD);
        }
        // *Retain Asynchronous Event*.
        if command.dword(10) & 1 << 15 == 0 {
            self.state.events.log_was_read(page);
        }
        let rest = image.get(offset as usize..).unwrap_or_default();
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
        Ok(rest.get(..len).unwrap_or_default().to_vec())
    }

    fn error_log(&self) -> Vec<u8> {
        let mut image = vec![0; MAX_ERRORS * ERROR_ENTRY];
        let newest_first = self.state.events.errors.iter().rev();
        for (entry, error) in image.chunks_exact_mut(ERROR_ENTRY).zip(newest_first) {
            put(entry, 0, &error.number.to_le_bytes());
            put(entry, 8, &error.queue.to_le_bytes());
            put(entry, 10, &error.command.to_le_bytes());
            put(entry, 12, &error.status.to_le_bytes());
            // Which field it was is not said.
            put(entry, 14, &u16::MAX.to_le_bytes());
            put(entry, 16, &error.lba.to_le_bytes());
            put(entry, 24, &NAMESPACE.to_le_bytes());
        }
        image
    }

    fn health_log(&self) -> Vec<u8> {
        let counters = &self.state.counters;
        let mut image = vec![0; 512];
        put(&mut image, 1, &TEMPERATURE.to_le_bytes());
        // All of the spare blocks, and the threshold for a warning.
        put(&mut image, 3, &[100, 10]);
        // Units of a thousand times 512 bytes, rounded up.
        let units = |bytes: u64| bytes.div_ceil(512_000);
        let hours = self.clock.now() / HOUR;
        let values = [
            (32, units(counters.bytes_read)),
            (48, units(counters.bytes_written)),
            (64, counters.reads),
            (80, counters.writes),
            (112, counters.power_cycles),
            (128, hours),
            (160, counters.media_errors),
            (176, self.state.events.error_count),
        ];
        for (at, value) in values {
            put(&mut image, at, &value.to_le_bytes());
        }
        image
    }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = image.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}
