//! Identify (§5.15 of 1.4: data structures of the controller and the namespace).

use alloc::{vec, vec::Vec};

use caisson_block::BlockInfo;

use crate::{
    command::{Command, Status},
    controller::{NAMESPACE, Nvme, PCI_VENDOR},
    events::{MAX_ERRORS, MAX_REQUESTS},
    features::WARNING_TEMPERATURE,
    registers::VERSION,
};

/// Bytes of each structure.
const LEN: usize = 4096;
/// The longest transfer as a power of two of pages: 1 MiB.
const TRANSFER: u8 = 8;
/// The longest transfer of a read or write, in bytes.
pub(crate) const MAX_TRANSFER: u64 = 4096 << TRANSFER;
const MODEL: &str = "Caisson NVMe disk";

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = image.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// ASCII, padded with spaces.
fn put_text(image: &mut [u8], at: usize, len: usize, text: &str) {
    let padded = text.bytes().chain(core::iter::repeat(b' '));
    let bytes: Vec<u8> = padded.take(len).collect();
    put(image, at, &bytes);
}

impl Nvme {
    /// The structure that `command` asks for.
    pub(crate) fn identify(&self, command: &Command) -> Result<Vec<u8>, Status> {
        let namespace = command.namespace();
        match command.dword(10) as u8 {
            0 => match namespace {
                NAMESPACE => Ok(self.identify_namespace()),
                _ => Err(Status::INVALID_NAMESPACE),
            },
            1 => Ok(self.identify_controller()),
            // Namespaces with a greater number than the one given.
            2 => match namespace {
                0xffff_fffe.. => Err(Status::INVALID_NAMESPACE),
                _ => {
                    let mut list = vec![0; LEN];
                    if namespace < NAMESPACE {
                        put(&mut list, 0, &NAMESPACE.to_le_bytes());
                    }
                    Ok(list)
                }
            },
            3 => match namespace {
                NAMESPACE => {
                    let mut list = vec![0; LEN];
                    // A UUID.
                    put(&mut list, 0, &[3, 16, 0, 0]);
                    put(&mut list, 4, &self.uuid());
                    Ok(list)
                }
                _ => Err(Status::INVALID_NAMESPACE),
            },
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn identify_controller(&self) -> Vec<u8> {
        let info = self.backend.info();
        let mut image = vec![0; LEN];
        put(&mut image, 0, &PCI_VENDOR.to_le_bytes());
        put(&mut image, 2, &PCI_VENDOR.to_le_bytes());
        put_text(&mut image, 4, 20, &self.config.serial);
        put_text(&mut image, 24, 40, MODEL);
        put_text(&mut image, 64, 8, env!("CARGO_PKG_VERSION"));
        put(&mut image, 77, &[TRANSFER]);
        put(&mut image, 80, &VERSION.to_le_bytes());
        // Changes of namespaces are told.
        put(&mut image, 92, &(1u32 << 8).to_le_bytes());
        // It is an I/O controller.
        put(&mut image, 111, &[1]);
        put(&mut image, 258, &[3, MAX_REQUESTS as u8 - 1]);
        // One firmware slot, which cannot be written.
        put(&mut image, 260, &[0b11]);
        // Logs can be read from an offset.
        put(&mut image, 261, &[1 << 2, MAX_ERRORS as u8 - 1]);
        put(&mut image, 266, &WARNING_TEMPERATURE.to_le_bytes());
        put(&mut image, 268, &(WARNING_TEMPERATURE + 10).to_le_bytes());
        put(&mut image, 512, &[0x66, 0x44]);
        put(&mut image, 516, &NAMESPACE.to_le_bytes());
        let deallocate = u16::from(info.discard_granularity.is_some()) << 2;
        put(&mut image, 520, &(deallocate | 1 << 3).to_le_bytes());
        // Flush takes the number of all namespaces, too.
        put(&mut image, 525, &[0b110 | u8::from(info.write_cache)]);
        // SGLs, of any alignment.
        put(&mut image, 536, &1u32.to_le_bytes());
        let name = self.qualified_name();
        put(&mut image, 768, name.as_bytes());
        // One power state, of 25 W.
        put(&mut image, 2048, &2500u16.to_le_bytes());
        image
    }

    fn identify_namespace(&self) -> Vec<u8> {
        let info = BlockInfo {
            size: self.state.size,
            ..self.backend.info()
        };
        let block = info.logical_block.max(1);
        let blocks = info.size / u64::from(block);
        let mut image = vec![0; LEN];
        for at in [0, 8, 16] {
            put(&mut image, at, &blocks.to_le_bytes());
        }
        // Preferred granularities are given.
        put(&mut image, 24, &[1 << 4]);
        // Write Zeroes can deallocate; what a deallocated block reads as is not said.
        put(&mut image, 33, &[1 << 3]);
        put(&mut image, 48, &info.size.to_le_bytes());
        // Each less one, in blocks: to write, to deallocate, the best length to write.
        let counted = |bytes: u32| {
            let count = (bytes / block).max(1) - 1;
            u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes()
        };
        let write = counted(info.physical_block);
        put(&mut image, 64, &write);
        put(&mut image, 66, &write);
        let deallocate = counted(info.discard_granularity.unwrap_or(block));
        put(&mut image, 68, &deallocate);
        put(&mut image, 70, &deallocate);
        put(&mut image, 72, &counted(info.optimal_io));
        put(&mut image, 99, &[u8::from(info.read_only)]);
        put(&mut image, 128, &[0, 0, block.trailing_zeros() as u8, 0]);
        image
    }

    fn qualified_name(&self) -> alloc::string::String {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = self.uuid();
        alloc::format!(
            "nqn.2014-08.org.nvmexpress:uuid:{a:02x}{b:02x}{c:02x}{d:02x}-{e:02x}{f:02x}-{g:02x}{h:02x}-\
             {i:02x}{j:02x}-{k:02x}{l:02x}{m:02x}{n:02x}{o:02x}{p:02x}"
        )
    }

    /// A number by which hosts tell disks apart, made from the serial number: a UUID of version 8 (RFC 9562 §5.8).
    fn uuid(&self) -> [u8; 16] {
        // FNV-1a, 128 bits.
        let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
        for byte in MODEL.bytes().chain(self.config.serial.bytes()) {
            hash =
                (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
        let version = 0xf << 76;
        let variant = 0b11 << 62;
        (hash & !version & !variant | 8 << 76 | 0b10 << 62).to_be_bytes()
    }
}
