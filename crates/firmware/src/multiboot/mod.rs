//! Multiboot 1, version 0.6.96 of the specification.
//!
//! Kernels may be 32- or 64-bit ELF, or anything with the header's address
//! fields. Handed over: memory sizes and map, command line, modules, boot
//! loader name. Left out: boot device, symbol tables (`syms`), drives, ROM
//! configuration, APM, and video modes (there is no screen; a kernel that asks
//! for one finds the VBE and framebuffer flags clear).

pub(crate) mod header;
mod info;

use alloc::{format, string::String, vec::Vec};

use crate::{
    BootMode, BootState, GpaRange, KernelKind, LoadError, LoadRequest, Module,
    bytes::slice,
    elf::Elf,
    import::{ImportData, PageKind},
    layout,
    stage::{BELOW_4G, Search, Stage},
};

/// What EAX holds at entry.
const BOOTLOADER_MAGIC: u64 = 0x2bad_b002;
const KIND: KernelKind = KernelKind::Multiboot;

fn corrupt(reason: String) -> LoadError {
    LoadError::Corrupt { kind: KIND, reason }
}

pub(crate) fn load<'a>(
    file: &'a [u8],
    request: &LoadRequest<'a>,
    stage: &mut Stage<'a, '_>,
) -> Result<BootState, LoadError> {
    let Some(header) = header::find(file) else {
        return Err(LoadError::WrongProtocol {
            wanted: KIND,
            reason: "it has no Multiboot 1 header in its first 8192 bytes".into(),
        });
    };
    if let Some(bit) = header.unknown_requirement() {
        return Err(LoadError::Unsupported {
            kind: KIND,
            reason: format!(
                "its Multiboot header requires feature {bit}, which Multiboot 0.6.96 does not define"
            ),
        });
    }
    let (entry, end) = match header.addresses(file)? {
        Some(a) => by_addresses(file, &a, stage)?,
        None => by_elf(file, stage)?,
    };

    let modules = place_modules(request, end, stage)?;
    let cmdline = match (request.name, request.cmdline) {
        ("", args) => String::from(args),
        (name, "") => String::from(name),
        (name, args) => format!("{name} {args}"),
    };
    let rbx = info::place(&cmdline, &modules, stage)?;
    let mode = BootMode::Protected32;
    let gdt = stage.gdt(mode)?;
    Ok(BootState {
        mode,
        rip: entry,
        rax: BOOTLOADER_MAGIC,
        rbx,
        rsi: 0,
        rsp: 0,
        gdt,
    })
}

/// Loads what the header's address fields describe: entry point and end.
fn by_addresses<'a>(
    file: &'a [u8],
    a: &header::Addresses,
    stage: &mut Stage<'a, '_>,
) -> Result<(u64, u64), LoadError> {
    let data = slice(file, a.file_offset, a.load_len).ok_or(LoadError::Truncated {
        kind: KIND,
        what: "the part that its Multiboot header says to load",
        needed: a.file_offset.saturating_add(a.load_len),
        have: file.len() as u64,
    })?;
    let len = a.load_len + a.bss_len;
    if a.entry < a.load_addr || a.entry - a.load_addr >= len {
        return Err(corrupt(format!(
            "its entry point {:#x} is outside what is loaded, {:#x}-{:#x}",
            a.entry,
            a.load_addr,
            a.load_addr + len
        )));
    }
    stage.claim("kernel", a.load_addr, len)?;
    stage.image("kernel", a.load_addr, data)?;
    let bss = a.load_addr + a.load_len;
    stage.import(
        "kernel bss",
        bss,
        PageKind::Image,
        true,
        ImportData::Zero(a.bss_len),
    )?;
    Ok((a.entry, bss + a.bss_len))
}

/// Loads the segments of an ELF kernel: entry point and end.
fn by_elf<'a>(file: &'a [u8], stage: &mut Stage<'a, '_>) -> Result<(u64, u64), LoadError> {
    if !file.starts_with(crate::elf::MAGIC) {
        return Err(corrupt(
            "it is not an ELF file, and its Multiboot header has no load addresses".into(),
        ));
    }
    let elf = Elf::parse(file).map_err(|e| e.for_kind(KIND, file))?;
    let entry = match elf.physical_entry() {
        Some(e) if e < layout::HIGH_RAM => e,
        _ => return Err(elf.entry_outside(KIND)),
    };
    stage.elf(&elf)?;
    // Sums were checked when the file was read.
    let end = elf
        .segments
        .iter()
        .map(|s| s.paddr + s.memsz)
        .max()
        .unwrap_or(0);
    Ok((entry, end))
}

/// A module in memory.
struct Placed {
    range: GpaRange,
    /// Guest physical address of its string.
    string: u64,
}

/// Modules follow the kernel on page boundaries: many kernels take the end of
/// the last one for the start of free memory.
fn place_modules<'a>(
    request: &LoadRequest<'a>,
    kernel_end: u64,
    stage: &mut Stage<'a, '_>,
) -> Result<Vec<Placed>, LoadError> {
    let initrd = request.initrd.map(|data| Module {
        data,
        cmdline: "initrd",
    });
    let mut placed = Vec::new();
    let start = kernel_end.max(layout::EXTENDED_MEMORY);
    let after_kernel = GpaRange { start, ..BELOW_4G };
    for m in initrd.iter().chain(request.modules) {
        let len = m.data.len() as u64;
        let page = caisson_memory::PAGE_SIZE;
        let gpa = match stage.find("module", len, page, after_kernel, Search::Lowest) {
            Err(LoadError::NoRoom { .. }) => {
                stage.find("module", len, page, BELOW_4G, Search::Highest)?
            }
            other => other?,
        };
        stage.image("module", gpa, m.data)?;
        let string = stage.string("module command line", m.cmdline)?;
        placed.push(Placed {
            range: GpaRange {
                start: gpa,
                end: gpa + len,
            },
            string,
        });
    }
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use alloc::{string::ToString, vec};

    use super::*;
    use crate::{
        ImportList, MemoryMap,
        elf::tests::{build, load as segment},
        load,
    };

    fn header(flags: u32, addresses: &[u32]) -> Vec<u8> {
        let magic = 0x1bad_b002u32;
        let sum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
        let words = [magic, flags, sum];
        words
            .iter()
            .chain(addresses)
            .flat_map(|w| w.to_le_bytes())
            .collect()
    }

    /// Sixteen bytes of padding, the header, 64 bytes of code.
    fn flat(header_addr: u32, load: u32, load_end: u32, bss_end: u32, entry: u32) -> Vec<u8> {
        let mut f = vec![0x90; 16];
        f.extend(header(
            1 << 16,
            &[header_addr, load, load_end, bss_end, entry],
        ));
        f.extend([0xcc; 64]);
        f
    }

    fn read<const N: usize>(list: &ImportList<'_>, gpa: u64) -> [u8; N] {
        let mut b = [0; N];
        list.read(gpa, &mut b);
        b
    }

    fn word(list: &ImportList<'_>, gpa: u64) -> u64 {
        u32::from_le_bytes(read(list, gpa)).into()
    }

    fn text(list: &ImportList<'_>, gpa: u64) -> String {
        let b: [u8; 64] = read(list, gpa);
        let end = b.iter().position(|c| *c == 0).unwrap();
        String::from_utf8(b[..end].to_vec()).unwrap()
    }

    #[test]
    fn address_fields_place_a_flat_kernel() {
        let map = MemoryMap::new(8 << 20, 40).unwrap();
        let file = flat(0x10_0010, 0x10_0000, 0, 0x10_1000, 0x10_0030);
        let l = load(&file, &LoadRequest::new(&map)).unwrap();
        assert_eq!(
            (l.kind, l.boot.rip, l.boot.rax),
            (KernelKind::Multiboot, 0x10_0030, 0x2bad_b002)
        );
        assert_eq!(read(&l.imports, 0x10_0000), [0x90; 16]);
        assert_eq!(word(&l.imports, 0x10_0010), 0x1bad_b002);
        let bss = l.imports.find("kernel bss").unwrap();
        assert_eq!(
            bss.range(),
            GpaRange {
                start: 0x10_0000 + file.len() as u64,
                end: 0x10_1000
            }
        );
        // Only part of the file, starting in its middle.
        let file = flat(0x10_0000, 0x10_0000, 0x10_0040, 0, 0x10_0020);
        let l = load(&file, &LoadRequest::new(&map)).unwrap();
        assert_eq!(word(&l.imports, 0x10_0000), 0x1bad_b002);
        assert_eq!(l.imports.find("kernel").unwrap().data.len(), 0x40);
    }

    #[test]
    fn address_fields_that_cannot_be_are_errors() {
        let map = MemoryMap::new(8 << 20, 40).unwrap();
        for (file, says) in [
            (flat(0x0f_fff0, 0x10_0000, 0, 0, 0x10_0000), "above"),
            (
                flat(0x10_0020, 0x10_0000, 0, 0, 0x10_0000),
                "before the file",
            ),
            (flat(0x10_0010, 0x10_0000, 0x0f_0000, 0, 0x10_0000), "ends"),
            (
                flat(0x10_0010, 0x10_0000, 0x20_0000, 0, 0x10_0000),
                "truncated",
            ),
            (
                flat(0x10_0010, 0x10_0000, 0x10_0050, 0x10_0040, 0x10_0000),
                "bss",
            ),
            (flat(0x10_0010, 0x10_0000, 0, 0, 0x20_0000), "entry point"),
            (
                flat(0x10_0010, 0x10_0000, 0, 0xffff_f000, 0x10_0000),
                "8 MiB",
            ),
            (flat(0xa_0010, 0xa_0000, 0, 0, 0xa_0000), "0xa0000"),
        ] {
            let e = load(&file, &LoadRequest::new(&map))
                .unwrap_err()
                .to_string();
            assert!(e.contains(says), "{says}: {e}");
        }
    }

    #[test]
    fn elf_kernels_get_information_and_modules() {
        let map = MemoryMap::new(8 << 20, 40).unwrap();
        for is_64 in [false, true] {
            let mut code = header(3, &[]);
            code.extend([0x90; 20]);
            let mut part = segment(0x10_0000, &code, 0x3000);
            // Linked high: the entry point is virtual.
            part.vaddr = 0xc010_0000;
            let file = build(is_64, 0xc010_000c, &[part]);
            let modules = [
                Module {
                    data: b"one",
                    cmdline: "/one arg",
                },
                Module {
                    data: b"two",
                    cmdline: "",
                },
            ];
            let request = LoadRequest {
                name: "kernel.elf",
                cmdline: "a b",
                initrd: Some(b"rd"),
                modules: &modules,
                ..LoadRequest::new(&map)
            };
            let l = load(&file, &request).unwrap();
            assert_eq!(
                (l.boot.rip, l.boot.mode),
                (0x10_000c, BootMode::Protected32)
            );
            let info = l.boot.rbx;
            assert_eq!(word(&l.imports, info), 0b10_0100_1101);
            assert_eq!(word(&l.imports, info + 4), 639);
            assert_eq!(word(&l.imports, info + 8), 7 * 1024);
            assert_eq!(
                text(&l.imports, word(&l.imports, info + 16)),
                "kernel.elf a b"
            );
            assert_eq!(word(&l.imports, info + 20), 3);
            let mods = word(&l.imports, info + 24);
            let expect = [(&b"rd"[..], "initrd"), (b"one", "/one arg"), (b"two", "")];
            for (i, (data, string)) in expect.iter().enumerate() {
                let m = mods + i as u64 * 16;
                let start = word(&l.imports, m);
                assert_eq!(start, 0x10_4000 + i as u64 * 0x1000);
                assert_eq!(word(&l.imports, m + 4) - start, data.len() as u64);
                let mut b = vec![0; data.len()];
                l.imports.read(start, &mut b);
                assert_eq!(&b, data);
                assert_eq!(text(&l.imports, word(&l.imports, m + 8)), *string);
            }
            let (len, mmap) = (word(&l.imports, info + 44), word(&l.imports, info + 48));
            assert_eq!(len, map.e820().len() as u64 * 24);
            assert_eq!(word(&l.imports, mmap), 20);
            assert_eq!(word(&l.imports, mmap + 12), 0x9_fc00);
            assert_eq!(word(&l.imports, mmap + 20), 1);
            assert_eq!(text(&l.imports, word(&l.imports, info + 64)), "Caisson");
        }
    }

    #[test]
    fn unknown_requirements_are_refused() {
        let map = MemoryMap::new(8 << 20, 40).unwrap();
        let file = build(
            false,
            0x10_0000,
            &[segment(0x10_0000, &header(1 << 3, &[]), 0)],
        );
        let e = load(&file, &LoadRequest::new(&map))
            .unwrap_err()
            .to_string();
        assert!(e.contains("feature 3"), "{e}");
        // Optional ones are not.
        let file = build(
            false,
            0x10_0000,
            &[segment(0x10_0000, &header(1 << 20 | 4, &[]), 0)],
        );
        assert!(load(&file, &LoadRequest::new(&map)).is_ok());
    }

    #[test]
    fn a_header_without_elf_or_addresses_is_refused() {
        let map = MemoryMap::new(8 << 20, 40).unwrap();
        let e = load(&header(0, &[]), &LoadRequest::new(&map))
            .unwrap_err()
            .to_string();
        assert!(e.contains("no load addresses"), "{e}");
    }

    #[test]
    fn a_checksum_that_is_off_is_no_header() {
        let mut h = header(0, &[]);
        h[8] ^= 1;
        assert!(header::find(&h).is_none());
        let mut far = vec![0; 8192 - 12];
        far.extend(header(0, &[]));
        assert!(header::find(&far).is_some());
        far.insert(0, 0);
        far.splice(0..0, [0; 3]);
        assert!(header::find(&far).is_none());
    }

    #[test]
    fn every_truncation_is_an_error() {
        let map = MemoryMap::new(8 << 20, 40).unwrap();
        let end = 0x10_0000 + 16 + 32 + 64;
        for file in [
            flat(0x10_0010, 0x10_0000, end, 0, 0x10_0030),
            build(false, 0x10_0000, &[segment(0x10_0000, &header(0, &[]), 0)]),
        ] {
            assert!(load(&file, &LoadRequest::new(&map)).is_ok());
            for n in 0..file.len() {
                assert!(load(&file[..n], &LoadRequest::new(&map)).is_err(), "{n}");
            }
        }
    }

    proptest::proptest! {
        /// Any addresses: no panic, and what is accepted is in usable RAM.
        #[test]
        fn hostile_addresses(a: [u32; 5], near: proptest::sample::Index) {
            let map = MemoryMap::new(8 << 20, 40).unwrap();
            // Half of the time, addresses that have a chance.
            let a = if near.index(2) == 0 { a.map(|w| 0xf_f000 + w % 0x2000) } else { a };
            let file = flat(a[0], a[1], a[2], a[3], a[4]);
            if let Ok(l) = load(&file, &LoadRequest::new(&map)) {
                assert!(l.imports.iter().filter(|i| i.name.starts_with("kernel")).all(|i| map.is_usable(&i.range())));
            }
        }
    }
}
