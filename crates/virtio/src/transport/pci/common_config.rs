//! The common configuration structure (§4.1.4.3).

use caisson_device::{le_value, put_le};

use super::{NO_VECTOR, VirtioPci};
use crate::VirtioDevice;

/// Its bytes.
pub(super) const LEN: u64 = 0x3c;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESCRIPTORS: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_RESET: u64 = 0x3a;

impl<D: VirtioDevice> VirtioPci<D> {
    /// A read at `offset`. No field changes by being read, so all of them are laid out and the bytes taken from there.
    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; LEN as usize];
        let mut put = |at: u64, len: usize, value: u64| {
            if let Some(field) = image.get_mut(at as usize..at as usize + len) {
                put_le(field, value);
            }
        };
        let half = |bits: u64, select: u32| match select {
            0 | 1 => bits >> (32 * select) & 0xffff_ffff,
            _ => 0,
        };
        let facilities = &self.facilities;
        let queue = self.queue_select;
        put(DEVICE_FEATURE_SELECT, 4, self.device_feature_select.into());
        put(
            DEVICE_FEATURE,
            4,
            half(facilities.offered(), self.device_feature_select),
        );
        put(DRIVER_FEATURE_SELECT, 4, self.driver_feature_select.into());
        put(
            DRIVER_FEATURE,
            4,
            half(facilities.accepted(), self.driver_feature_select),
        );
        put(CONFIG_VECTOR, 2, self.config_vector.into());
        put(NUM_QUEUES, 2, facilities.queue_count().into());
        put(STATUS, 1, facilities.status().into());
        put(GENERATION, 1, facilities.generation().into());
        put(QUEUE_SELECT, 2, queue.into());
        // A queue that is not there has size 0 (§4.1.4.3.1).
        if let Some(place) = facilities.queue_place(queue) {
            let vector = self.queue_vectors.get(usize::from(queue));
            put(QUEUE_SIZE, 2, place.size.into());
            put(QUEUE_VECTOR, 2, vector.copied().unwrap_or(NO_VECTOR).into());
            put(QUEUE_ENABLE, 2, facilities.is_queue_enabled(queue).into());
            put(QUEUE_NOTIFY_OFF, 2, queue.into());
            put(QUEUE_DESCRIPTORS, 8, place.descriptors);
            put(QUEUE_DRIVER, 8, place.driver);
            put(QUEUE_DEVICE, 8, place.device);
            put(QUEUE_RESET, 2, facilities.is_queue_resetting(queue).into());
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = image.get(at as usize).copied().unwrap_or(0);
        }
    }

    /// A write of one field, or of a half of one that has 64 bits. Others are ignored (§4.1.3.1).
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8]) {
        let value = le_value(data);
        let (low, word) = (value as u32, value as u16);
        let queue = self.queue_select;
        match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = low,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = low,
            (DRIVER_FEATURE, 4) => self.facilities.accept(self.driver_feature_select, low),
            (CONFIG_VECTOR, 2) => self.config_vector = self.known_vector(word),
            (STATUS, 1) => {
                if self.facilities.set_status(value as u8) {
                    self.reset_registers();
                }
                self.wake();
            }
            (QUEUE_SELECT, 2) => self.queue_select = word,
            (QUEUE_SIZE, 2) => self
                .facilities
                .place_queue(queue, |place| place.size = word),
            (QUEUE_VECTOR, 2) => {
                let vector = self.known_vector(word);
                if let Some(entry) = self.queue_vectors.get_mut(usize::from(queue)) {
                    *entry = vector;
                }
            }
            (QUEUE_ENABLE, 2) if word == 1 => {
                self.facilities.enable_queue(queue);
                self.wake();
            }
            (QUEUE_RESET, 2) if word == 1 => {
                self.facilities.reset_queue(queue);
                self.wake();
            }
            (QUEUE_DESCRIPTORS..QUEUE_RESET, 4 | 8) if offset.is_multiple_of(4) => {
                self.place_ring(offset, data);
            }
            _ => {}
        }
    }

    /// A write of all or half of one of the queue's addresses.
    fn place_ring(&mut self, offset: u64, data: &[u8]) {
        let within = offset & 7;
        if within + data.len() as u64 > 8 {
            return;
        }
        self.facilities.place_queue(self.queue_select, |place| {
            let field = match offset & !7 {
                QUEUE_DESCRIPTORS => &mut place.descriptors,
                QUEUE_DRIVER => &mut place.driver,
                QUEUE_DEVICE => &mut place.device,
                _ => return,
            };
            let mut bytes = field.to_le_bytes();
            for (byte, value) in bytes.iter_mut().skip(within as usize).zip(data) {
                *byte = *value;
            }
            *field = u64::from_le_bytes(bytes);
        });
    }

    /// The vector, if the table has it: a driver reads back whether it was taken (§4.1.5.1.2).
    fn known_vector(&self, vector: u16) -> u16 {
        match vector < self.function.msix_vectors() {
            true => vector,
            false => NO_VECTOR,
        }
    }
}
