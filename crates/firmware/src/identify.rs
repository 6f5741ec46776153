//! Saying what a file is that cannot be started.

use alloc::string::{String, ToString};
use core::fmt;

use crate::{
    bytes::{array, slice, u16_at, u32_at},
    elf,
};

/// What a file that is no startable kernel turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// No bytes at all.
    Empty,
    /// Something with a well-known signature; a noun phrase with its article.
    Known(&'static str),
    /// A compressed file; the name of the program that unpacks it.
    Compressed {
        /// A noun phrase with its article.
        what: &'static str,
        /// The program that unpacks it.
        tool: &'static str,
    },
    /// An ELF file that cannot be started, in words.
    Elf(String),
    /// A Linux kernel in a form that cannot be started, in words.
    Linux(String),
    /// Text or a script; its first line, shortened.
    Text(String),
    /// Nothing known; its first bytes in hexadecimal.
    Unknown(String),
}

impl FileKind {
    /// What to do about it, as a clause to append, or nothing.
    pub(crate) fn hint(&self) -> String {
        match self {
            Self::Compressed { tool, .. } => alloc::format!(" (unpack it with {tool} first)"),
            Self::Known(what) if what.contains("disk") || what.contains("CD") => {
                " (boot a kernel from inside it, and attach it as a disk)".into()
            }
            Self::Known(what) if what.contains("initramfs") => " (it belongs in --initrd)".into(),
            Self::Known(what) if what.contains("package") => {
                " (unpack it and give the kernel inside)".into()
            }
            _ => String::new(),
        }
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("an empty file"),
            Self::Known(what) | Self::Compressed { what, .. } => f.write_str(what),
            Self::Elf(what) | Self::Linux(what) => f.write_str(what),
            Self::Text(line) => write!(f, "a text file that begins with \"{line}\""),
            Self::Unknown(hex) => write!(f, "of unknown kind (it begins with the bytes {hex})"),
        }
    }
}

/// Signatures at fixed offsets, most telling first.
const SIGNATURES: &[(u64, &[u8], &str)] = &[
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"vhdxfile", "a VHDX disk image"),
    (0, b"conectix", "a VHD disk image"),
    (0, b"<<< Oracle VM VirtualBox", "a VirtualBox disk image"),
    (0x8001, b"CD001", "a CD or DVD image (ISO 9660)"),
    (
        0x200,
        b"EFI PART",
        "a raw disk image with a GPT partition table",
    ),
    (0, b"070701", "a cpio archive (an initramfs)"),
    (0, b"070702", "a cpio archive (an initramfs)"),
    (0, b"070707", "a cpio archive (an initramfs)"),
    (0, b"\xc7\x71", "a cpio archive (an initramfs)"),
    (0, b"!<arch>\ndebian-binary", "a Debian package"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
    (0, b"!<arch>\n", "a static library"),
    (257, b"ustar", "a tar archive"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
    (0, b"ANDROID!", "an Android boot image"),
    (0, b"IGVM", "an IGVM file"),
    (0x28, b"_FVH", "a UEFI firmware volume"),
    (0, b"\xcf\xfa\xed\xfe", "a Mach-O program for macOS"),
    (
        0,
        b"\xca\xfe\xba\xbe",
        "a Java class or macOS universal program",
    ),
    (0, b"\0asm", "a WebAssembly module"),
    (0, b"MDMP", "a crash dump"),
    (0, b"KDUMP   ", "a kernel crash dump"),
];

/// Compression formats: signature, what it is, what unpacks it.
const COMPRESSED: &[(&[u8], &str, &str)] = &[
    (b"\x1f\x8b", "a gzip-compressed file", "gunzip"),
    (b"\xfd7zXZ\0", "an xz-compressed file", "unxz"),
    (b"\x28\xb5\x2f\xfd", "a zstd-compressed file", "unzstd"),
    (b"\x04\x22\x4d\x18", "an LZ4-compressed file", "unlz4"),
    (b"\x02\x21\x4c\x18", "an LZ4-compressed file", "unlz4"),
    (b"BZh", "a bzip2-compressed file", "bunzip2"),
    (b"\x5d\x00\x00", "an LZMA-compressed file", "unlzma"),
    (b"\x89LZO", "an LZO-compressed file", "lzop -d"),
];

/// Describes a file that no loader has claimed.
pub(crate) fn identify(file: &[u8]) -> FileKind {
    if file.is_empty() {
        return FileKind::Empty;
    }
    if file.starts_with(elf::MAGIC) {
        return FileKind::Elf(elf::describe_refused(file));
    }
    for &(magic, what, tool) in COMPRESSED {
        if file.starts_with(magic) {
            return FileKind::Compressed { what, tool };
        }
    }
    for &(offset, magic, what) in SIGNATURES {
        if slice(file, offset, magic.len() as u64) == Some(magic) {
            return FileKind::Known(what);
        }
    }
    if array(file, 0x38) == Some(*b"ARM\x64") {
        return FileKind::Linux("a Linux kernel for 64-bit ARM".into());
    }
    if array(file, 0x38) == Some(*b"RSC\x05") {
        return FileKind::Linux("a Linux kernel for RISC-V".into());
    }
    if u32_at(file, 0x24) == Some(0x016f_2818) {
        return FileKind::Linux("a Linux kernel for 32-bit ARM (zImage)".into());
    }
    if file.starts_with(b"MZ") {
        return FileKind::Known(match array(file, 4) {
            Some(magic) if magic == *b"zimg" => {
                "a Linux kernel inside an EFI decompressor (EFI zboot)"
            }
            _ if is_pe(file) => "an EFI or Windows program (PE) without a Linux boot header",
            _ => "a DOS program",
        });
    }
    if has_multiboot2(file) {
        return FileKind::Known("a Multiboot 2 kernel without a Multiboot 1 header");
    }
    if u16_at(file, 0x438) == Some(0xef53) {
        return FileKind::Known("a raw disk image with an ext2, ext3 or ext4 file system");
    }
    if let Some(line) = first_line(file) {
        return FileKind::Text(line);
    }
    if u16_at(file, 0x1fe) == Some(0xaa55) {
        return FileKind::Known("a raw disk image with a boot sector (MBR)");
    }
    if file.iter().all(|b| *b == 0) {
        return FileKind::Known("a file of zero bytes only");
    }
    let shown = file.get(..8).unwrap_or(file);
    let mut hex = String::new();
    for (i, b) in shown.iter().enumerate() {
        if i > 0 {
            hex.push(' ');
        }
        hex.push_str(&alloc::format!("{b:02x}"));
    }
    FileKind::Unknown(hex)
}

/// Whether a PE signature is where the DOS header says.
fn is_pe(file: &[u8]) -> bool {
    u32_at(file, 0x3c).and_then(|at| array(file, at.into())) == Some(*b"PE\0\0")
}

/// Whether there is a Multiboot 2 header (Multiboot2 1.6, 3.1.1: 8-byte
/// aligned in the first 32 KiB, checksummed).
pub(crate) fn has_multiboot2(file: &[u8]) -> bool {
    let head = &file[..file.len().min(32768)];
    head.chunks_exact(8).enumerate().any(|(i, chunk)| {
        chunk.starts_with(&0xe852_50d6u32.to_le_bytes())
            && array::<16>(head, i as u64 * 8).is_some_and(|h| {
                let word = |n: usize| u32::from_le_bytes([h[n], h[n + 1], h[n + 2], h[n + 3]]);
                word(0)
                    .wrapping_add(word(4))
                    .wrapping_add(word(8))
                    .wrapping_add(word(12))
                    == 0
            })
    })
}

/// The first line of a file whose beginning is all text.
fn first_line(file: &[u8]) -> Option<String> {
    let head = &file[..file.len().min(512)];
    let text = match core::str::from_utf8(head) {
        Ok(t) => t,
        // A character cut by the end of the sample.
        Err(e) if e.error_len().is_none() => core::str::from_utf8(&head[..e.valid_up_to()]).ok()?,
        Err(_) => return None,
    };
    if text
        .chars()
        .any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t' | '\x0c'))
    {
        return None;
    }
    let line: String = text
        .lines()
        .next()
        .unwrap_or("")
        .trim_end()
        .chars()
        .take(40)
        .collect();
    Some(line.to_string())
}

#[cfg(test)]
mod tests {
    use alloc::{string::ToString, vec, vec::Vec};

    use super::*;

    fn at(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut v = vec![0x80u8; offset + magic.len() + 64];
        v[offset..offset + magic.len()].copy_from_slice(magic);
        v
    }

    #[test]
    fn every_signature_is_reached() {
        for &(offset, magic, what) in SIGNATURES {
            assert_eq!(identify(&at(offset as usize, magic)), FileKind::Known(what));
        }
        for &(magic, what, tool) in COMPRESSED {
            assert_eq!(identify(&at(0, magic)), FileKind::Compressed { what, tool });
        }
    }

    #[test]
    fn names_what_has_no_simple_signature() {
        assert_eq!(identify(&[]), FileKind::Empty);
        assert_eq!(
            identify(b"#!/bin/sh\necho hi\n").to_string(),
            "a text file that begins with \"#!/bin/sh\""
        );
        assert_eq!(
            identify("Grüße\n".as_bytes()).to_string(),
            "a text file that begins with \"Grüße\""
        );
        assert!(
            identify(&at(0x1fe, &[0x55, 0xaa]))
                .to_string()
                .contains("MBR")
        );
        assert!(
            identify(&at(0x438, &[0x53, 0xef]))
                .to_string()
                .contains("ext4")
        );
        assert!(identify(&[0; 4096]).to_string().contains("zero bytes"));
        assert!(
            identify(&at(0x38, b"ARM\x64"))
                .to_string()
                .contains("64-bit ARM")
        );
        assert_eq!(
            identify(&[0xff, 0xfe]).to_string(),
            "of unknown kind (it begins with the bytes ff fe)"
        );
        let mut pe = at(0x80, b"PE\0\0");
        pe[..2].copy_from_slice(b"MZ");
        pe[0x3c..0x40].copy_from_slice(&0x80u32.to_le_bytes());
        assert!(identify(&pe).to_string().contains("EFI"));
        let header = [0xe852_50d6u32, 0, 16, 0u32.wrapping_sub(0xe852_50d6 + 16)];
        let bytes: Vec<u8> = header.iter().flat_map(|w| w.to_le_bytes()).collect();
        assert!(
            identify(&at(64, &bytes))
                .to_string()
                .contains("Multiboot 2")
        );
    }

    proptest::proptest! {
        #[test]
        fn says_something_about_anything(file: Vec<u8>) {
            assert!(!identify(&file).to_string().is_empty());
        }
    }
}
