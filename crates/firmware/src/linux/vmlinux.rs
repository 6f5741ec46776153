//! Loading an uncompressed Linux kernel, the ELF file `vmlinux`.

use super::{Handover, hand_over, header};
use crate::{BootState, KernelKind, LoadError, LoadRequest, elf::Elf, stage::Stage};

/// Type of the Xen note that names the operating system.
const XEN_ELFNOTE_GUEST_OS: u32 = 6;
/// How every kernel's banner begins.
const BANNER: &[u8] = b"Linux version ";
/// `COMMAND_LINE_SIZE` on x86 is 2048, with the NUL.
const CMDLINE_MAX: u32 = 2047;
/// No kernel of this age has a lower limit.
const INITRD_ADDR_MAX: u32 = 0x7fff_ffff;

/// Whether an executable is a 64-bit Linux kernel.
pub(crate) fn is_linux(elf: &Elf<'_>) -> bool {
    if !elf.is_64 || elf.physical_entry().is_none() {
        return false;
    }
    // Build salt and LTO notes are Linux' own.
    let by_note = elf.notes().any(|n| {
        n.owner == b"Linux"
            || (n.owner == b"Xen"
                && n.kind == XEN_ELFNOTE_GUEST_OS
                && n.desc.strip_suffix(b"\0").unwrap_or(n.desc) == b"linux")
    });
    by_note || elf.segments.iter().any(|s| find(s.data, BANNER))
}

fn find(haystack: &[u8], needle: &[u8]) -> bool {
    let mut rest = haystack;
    while let Some(i) = rest.iter().position(|b| *b == needle[0]) {
        rest = &rest[i..];
        if rest.starts_with(needle) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

pub(crate) fn load<'a>(
    file: &'a [u8],
    request: &LoadRequest<'a>,
    stage: &mut Stage<'a, '_>,
) -> Result<BootState, LoadError> {
    const KIND: KernelKind = KernelKind::LinuxElf;
    let elf = Elf::parse(file).map_err(|e| e.for_kind(KIND, file))?;
    let entry = match elf.physical_entry() {
        Some(entry) if elf.is_64 => entry,
        Some(_) => {
            return Err(LoadError::WrongProtocol {
                wanted: KIND,
                reason: "it is a 32-bit program".into(),
            });
        }
        None => return Err(elf.entry_outside(KIND)),
    };
    stage.elf(&elf)?;
    let setup_header = setup_header();
    let handover = Handover {
        kind: KIND,
        entry,
        setup_header: &setup_header,
        cmdline_max: CMDLINE_MAX.into(),
        initrd_addr_max: INITRD_ADDR_MAX.into(),
        above_4g: true,
    };
    hand_over(&handover, request, stage)
}

/// The header that a bzImage of the same kernel would have, as far as the
/// kernel proper reads it. A `vmlinux` carries none.
fn setup_header() -> [u8; 0x268 - header::START] {
    let mut h = [0; 0x268 - header::START];
    let mut put = |at: usize, bytes: &[u8]| {
        h[at - header::START..at - header::START + bytes.len()].copy_from_slice(bytes);
    };
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    // Loaded high.
    put(0x211, &[1]);
    put(0x22c, &INITRD_ADDR_MAX.to_le_bytes());
    put(
        0x236,
        &(header::XLF_KERNEL_64 | header::XLF_CAN_BE_LOADED_ABOVE_4G).to_le_bytes(),
    );
    put(0x238, &CMDLINE_MAX.to_le_bytes());
    h
}

#[cfg(test)]
mod tests {
    use alloc::{string::ToString, vec::Vec};

    use super::*;
    use crate::{
        MemoryMap,
        elf::tests::{Part, build, load as segment, note},
        load,
    };

    fn kernel(mark: Option<Part>) -> Vec<u8> {
        let mut text = segment(0x100_0000, &[0x90; 64], 0x1000);
        text.vaddr = 0xffff_ffff_8100_0000;
        let mut parts = alloc::vec![text];
        parts.extend(mark);
        build(true, 0x100_0000, &parts)
    }

    #[test]
    fn is_recognised_by_notes_or_banner() {
        let kinds = [
            note("Linux", 0x100, b"salt"),
            note("Xen", 6, b"linux\0"),
            segment(0x200_0000, b"..Linux Linux version 6.1.0 (x@y)", 0),
        ];
        let map = MemoryMap::new(64 << 20, 40).unwrap();
        for mark in kinds {
            let file = kernel(Some(mark));
            let l = load(&file, &LoadRequest::new(&map)).unwrap();
            assert_eq!((l.kind, l.boot.rip), (KernelKind::LinuxElf, 0x100_0000));
            let mut magic = [0; 4];
            l.imports.read(l.boot.rsi + 0x202, &mut magic);
            assert_eq!(&magic, b"HdrS");
        }
        let file = kernel(Some(note("Xen", 6, b"NetBSD")));
        let e = load(&file, &LoadRequest::new(&map))
            .unwrap_err()
            .to_string();
        assert!(e.contains("not Linux and has neither a PVH note"), "{e}");
    }

    #[test]
    fn prefers_the_64_bit_entry_to_pvh() {
        let mut parts = alloc::vec![segment(0x100_0000, &[0x90; 64], 0)];
        parts.push(note("Linux", 0x100, b"salt"));
        parts.push(note("Xen", 18, &0x100_0010u64.to_le_bytes()));
        let file = build(true, 0x100_0000, &parts);
        let map = MemoryMap::new(64 << 20, 40).unwrap();
        assert_eq!(
            load(&file, &LoadRequest::new(&map)).unwrap().kind,
            KernelKind::LinuxElf
        );
        let request = LoadRequest {
            protocol: Some(KernelKind::Pvh),
            ..LoadRequest::new(&map)
        };
        let l = load(&file, &request).unwrap();
        assert_eq!((l.kind, l.boot.rip), (KernelKind::Pvh, 0x100_0010));
    }

    #[test]
    fn segments_outside_ram_are_named() {
        let map = MemoryMap::new(16 << 20, 40).unwrap();
        let file = kernel(Some(note("Linux", 0x100, b"salt")));
        let e = load(&file, &LoadRequest::new(&map))
            .unwrap_err()
            .to_string();
        assert!(
            e.contains("0x1000000-0x1001040") && e.contains("16 MiB"),
            "{e}"
        );
    }
}
