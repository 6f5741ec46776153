//! What the driver sees of the disk: features and configuration (§5.2.3, §5.2.4).

use super::{Blk, QUEUE_SIZE, SECTOR};

const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
pub(super) const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const CONFIG_WCE: u64 = 1 << 11;
const MQ: u64 = 1 << 12;
pub(super) const DISCARD: u64 = 1 << 13;
pub(super) const WRITE_ZEROES: u64 = 1 << 14;

/// Bytes of the configuration up to write-zeroes.
const LEN: usize = 60;
/// Where the switch of the write cache is.
const WRITEBACK: u64 = 32;
/// The most sectors of one discard or write-zeroes: 2 GiB.
pub(super) const MOST_SECTORS: u32 = 1 << 22;

impl Blk {
    pub(super) fn offered(&self) -> u64 {
        let mut features = SEG_MAX | BLK_SIZE | TOPOLOGY;
        if self.config.queues > 1 {
            features |= MQ;
        }
        if self.info.write_cache {
            features |= FLUSH | CONFIG_WCE;
        }
        if self.info.read_only {
            return features | RO;
        }
        if self.info.discard_granularity.is_some() {
            features |= DISCARD;
        }
        features | WRITE_ZEROES
    }

    pub(super) fn config_image(&self) -> [u8; LEN] {
        let info = &self.info;
        let mut image = [0; LEN];
        let mut put = |at: usize, value: &[u8]| {
            if let Some(field) = image.get_mut(at..at + value.len()) {
                field.copy_from_slice(value);
            }
        };
        let block = info.logical_block.max(1);
        let physical = info.physical_block.max(block) / block;
        put(0, &(self.state.size / SECTOR).to_le_bytes());
        // Two descriptors are for header and status.
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &block.to_le_bytes());
        // Physical block in logical blocks, as an exponent; no offset; best sizes.
        put(24, &[physical.ilog2() as u8, 0]);
        put(26, &(physical as u16).to_le_bytes());
        put(28, &(info.optimal_io / block).to_le_bytes());
        put(WRITEBACK as usize, &[u8::from(self.state.write_back)]);
        put(34, &self.config.queues.to_le_bytes());
        let granularity = info.discard_granularity.unwrap_or(0);
        put(36, &MOST_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(
            44,
            &(u64::from(granularity.max(block)) / SECTOR).to_le_bytes()[..4],
        );
        put(48, &MOST_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[u8::from(info.discard_granularity.is_some())]);
        image
    }

    pub(super) fn set_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK, [value]) = (offset, data)
            && self.info.write_cache
        {
            self.state.write_back = *value != 0;
        }
    }
}
