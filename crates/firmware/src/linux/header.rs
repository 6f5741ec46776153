//! The setup header of a bzImage.

use alloc::format;

use crate::{
    KernelKind, LoadError,
    bytes::{slice, u8_at, u16_at, u32_at, u64_at},
};

/// Where the header starts, in the file and in the zero page.
pub(super) const START: usize = 0x1f1;
/// Where it may end at most: the next field of the zero page.
pub(super) const LIMIT: usize = 0x290;

/// `xloadflags`: has a 64-bit entry point at +0x200.
pub(super) const XLF_KERNEL_64: u16 = 1 << 0;
/// `xloadflags`: kernel, zero page, command line and initrd may be above 4 GiB.
pub(super) const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
const LOADED_HIGH: u8 = 1 << 0;
/// 2.12: `xloadflags`, Linux 3.8.
const OLDEST_VERSION: u16 = 0x020c;

/// The fields of the setup header that a loader reads.
#[derive(Debug)]
pub(super) struct SetupHeader<'a> {
    /// The header itself, from [`START`] to its end.
    pub bytes: &'a [u8],
    /// Length of the real-mode part of the file in bytes.
    pub setup_len: u64,
    /// Length of the protected-mode part in bytes.
    pub kernel_len: u64,
    /// Address that the kernel wants to run at.
    pub pref_address: u64,
    /// Bytes from there that it needs to unpack itself.
    pub init_size: u64,
    /// Longest command line in bytes, without its NUL.
    pub cmdline_size: u64,
    /// Highest address that a byte of the initrd may have.
    pub initrd_addr_max: u64,
    /// See the `XLF_` constants.
    pub xloadflags: u16,
}

impl<'a> SetupHeader<'a> {
    /// Reads and checks the header of a file that has its magic.
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, LoadError> {
        const KIND: KernelKind = KernelKind::LinuxBzImage;
        let have = file.len() as u64;
        let truncated = |what, needed| LoadError::Truncated {
            kind: KIND,
            what,
            needed,
            have,
        };
        let corrupt = |reason| LoadError::Corrupt { kind: KIND, reason };
        let unsupported = |reason| LoadError::Unsupported { kind: KIND, reason };

        let short = || truncated("the setup header", 0x268);
        let version = u16_at(file, 0x206).ok_or_else(short)?;
        if version < OLDEST_VERSION {
            return Err(unsupported(format!(
                "it has boot protocol {}.{:02}, but the 64-bit entry point needs 2.12 (Linux 3.8) or newer",
                version >> 8,
                version & 0xff
            )));
        }
        let end = 0x202 + usize::from(u8_at(file, 0x201).ok_or_else(short)?);
        if !(0x268..=LIMIT).contains(&end) {
            return Err(corrupt(format!(
                "its setup header ends at {end:#x}, not between 0x268 and {LIMIT:#x}"
            )));
        }
        let bytes = file.get(START..end).ok_or_else(short)?;
        let u32_field = |off| u32_at(file, off).map(u64::from).ok_or_else(short);

        let xloadflags = u16_at(file, 0x236).ok_or_else(short)?;
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Err(unsupported(
                "it is a 32-bit kernel, without a 64-bit entry point".into(),
            ));
        }
        if u8_at(file, 0x211).ok_or_else(short)? & LOADED_HIGH == 0 {
            return Err(unsupported(
                "it is a zImage, which loads below 1 MiB; build a bzImage".into(),
            ));
        }

        // Zero means four, for very old boot loaders.
        let sectors = match u8_at(file, START as u64).ok_or_else(short)? {
            0 => 4,
            n => u64::from(n),
        };
        let setup_len = (sectors + 1) * 512;
        let paragraphs = u32_field(0x1f4)? * 16;
        // The last paragraph may be cut short.
        if have + 15 < setup_len + paragraphs {
            return Err(truncated(
                "the compressed kernel",
                setup_len + paragraphs - 15,
            ));
        }
        let kernel_len = paragraphs.min(have - setup_len.min(have));
        if kernel_len <= 0x200 {
            return Err(corrupt(format!(
                "its protected-mode part is {kernel_len} bytes long, which leaves no room for the entry point at 0x200"
            )));
        }
        let (payload_at, payload_len) = (u32_field(0x248)?, u32_field(0x24c)?);
        if payload_at + payload_len > kernel_len {
            return Err(corrupt(format!(
                "its payload ends at {:#x}, past the {kernel_len:#x} bytes of its protected-mode part",
                payload_at + payload_len
            )));
        }
        let init_size = u32_field(0x260)?;
        if init_size < kernel_len {
            return Err(corrupt(format!(
                "it asks for {init_size} bytes to unpack {kernel_len} bytes of compressed kernel"
            )));
        }
        Ok(Self {
            bytes,
            setup_len,
            kernel_len,
            pref_address: u64_at(file, 0x258).ok_or_else(short)?,
            init_size,
            cmdline_size: match u32_field(0x238)? {
                0 => 255,
                n => n,
            },
            initrd_addr_max: u32_field(0x22c)?,
            xloadflags,
        })
    }

    /// The protected-mode part of the file.
    pub(super) fn kernel(&self, file: &'a [u8]) -> &'a [u8] {
        slice(file, self.setup_len, self.kernel_len).unwrap_or(&[])
    }
}
