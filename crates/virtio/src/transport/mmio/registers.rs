//! The registers (§4.2.2). All are 32 bits wide, and only whole ones are read or written.

use caisson_device::{le_value, put_le};

use super::VirtioMmio;
use crate::VirtioDevice;

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
pub(super) const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
/// First and last register about shared memory, which reads as all-ones: there is none.
const SHARED_MEMORY: u64 = 0x0b0;
const SHARED_MEMORY_LAST: u64 = 0x0bc;
const QUEUE_RESET: u64 = 0x0c0;
const GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

/// "virt".
const MAGIC_VALUE: u32 = 0x7472_6976;
/// The vendor: whoever sets this field may choose; this is what PCI's is.
const VENDOR: u32 = 0x1af4;

impl<D: VirtioDevice> VirtioMmio<D> {
    pub(super) fn read_register(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            self.facilities.device().read_config(offset - CONFIG, data);
            return;
        }
        if data.len() != 4 {
            return;
        }
        let facilities = &self.facilities;
        let queue = u16::try_from(self.queue_select).unwrap_or(u16::MAX);
        let value = match offset {
            MAGIC => MAGIC_VALUE,
            VERSION => 2,
            DEVICE_ID => facilities.device().kind().id.into(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => match self.device_feature_select {
                0 => facilities.offered() as u32,
                1 => (facilities.offered() >> 32) as u32,
                _ => 0,
            },
            QUEUE_SIZE_MAX => facilities.max_queue_size(queue).into(),
            QUEUE_READY => facilities.is_queue_enabled(queue).into(),
            INTERRUPT_STATUS => self.interrupt_status,
            STATUS => facilities.status().into(),
            SHARED_MEMORY..=SHARED_MEMORY_LAST => u32::MAX,
            QUEUE_RESET => facilities.is_queue_resetting(queue).into(),
            GENERATION => facilities.generation().into(),
            _ => 0,
        };
        put_le(data, value.into());
    }

    pub(super) fn write_register(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            self.facilities
                .device_mut()
                .write_config(offset - CONFIG, data);
            self.facilities.notice_config();
            return;
        }
        // A notification may be of another width, as a doorbell for it is.
        if offset == QUEUE_NOTIFY {
            self.wake();
        }
        if data.len() != 4 {
            return;
        }
        let value = le_value(data) as u32;
        let queue = u16::try_from(self.queue_select).unwrap_or(u16::MAX);
        match offset {
            DEVICE_FEATURES_SELECT => self.device_feature_select = value,
            DRIVER_FEATURES_SELECT => self.driver_feature_select = value,
            DRIVER_FEATURES => self.facilities.accept(self.driver_feature_select, value),
            QUEUE_SELECT => self.queue_select = value,
            QUEUE_SIZE => {
                let size = u16::try_from(value).unwrap_or(u16::MAX);
                self.facilities
                    .place_queue(queue, |place| place.size = size);
            }
            QUEUE_READY if value == 1 => {
                self.facilities.enable_queue(queue);
                self.wake();
            }
            QUEUE_READY if value == 0 && self.facilities.is_queue_enabled(queue) => {
                self.facilities.disable_queue(queue);
                self.wake();
            }
            QUEUE_RESET if value == 1 => {
                self.facilities.reset_queue(queue);
                self.wake();
            }
            INTERRUPT_ACK => self.interrupt_status &= !value,
            STATUS => {
                if self.facilities.set_status(value as u8) {
                    self.reset_registers();
                }
                self.wake();
            }
            QUEUE_DESCRIPTORS..SHARED_MEMORY => self.place_ring(queue, offset, value),
            _ => {}
        }
    }

    /// A write of half of one of the queue's addresses.
    fn place_ring(&mut self, queue: u16, offset: u64, value: u32) {
        self.facilities.place_queue(queue, |place| {
            let field = match offset & !4 {
                QUEUE_DESCRIPTORS => &mut place.descriptors,
                QUEUE_DRIVER => &mut place.driver,
                QUEUE_DEVICE => &mut place.device,
                _ => return,
            };
            let shift = if offset & 4 == 0 { 0 } else { 32 };
            *field = *field & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
        });
    }
}
