//! PVH: direct boot of an ELF kernel in 32-bit protected mode.
//!
//! Source: Xen's `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`
//! (version 1). The relocation note (`PHYS32_RELOC`) is not used: the kernel is
//! loaded where it is linked.

use alloc::vec::Vec;

use zerocopy::{Immutable, IntoBytes, little_endian::U32, little_endian::U64};

use crate::{
    BootMode, BootState, KernelKind, LoadError, LoadRequest, Module,
    bytes::{u32_at, u64_at},
    elf::Elf,
    layout,
    stage::{BELOW_4G, Search, Stage},
};

/// Type of the note that holds the entry point.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// `xEn3` with the top bit set.
const START_MAGIC: u32 = 0x336e_c578;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: U32,
    version: U32,
    flags: U32,
    nr_modules: U32,
    modlist_paddr: U64,
    cmdline_paddr: U64,
    rsdp_paddr: U64,
    memmap_paddr: U64,
    memmap_entries: U32,
    reserved: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ModuleEntry {
    paddr: U64,
    size: U64,
    cmdline_paddr: U64,
    reserved: U64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemmapEntry {
    addr: U64,
    size: U64,
    kind: U32,
    reserved: U32,
}

/// The entry point in the note, if there is one: 4 or 8 bytes.
pub(crate) fn entry_note(elf: &Elf<'_>) -> Option<u64> {
    let desc = elf.note(b"Xen", XEN_ELFNOTE_PHYS32_ENTRY)?;
    if desc.len() >= 8 {
        u64_at(desc, 0)
    } else {
        u32_at(desc, 0).map(u64::from)
    }
}

pub(crate) fn load<'a>(
    file: &'a [u8],
    request: &LoadRequest<'a>,
    stage: &mut Stage<'a, '_>,
) -> Result<BootState, LoadError> {
    const KIND: KernelKind = KernelKind::Pvh;
    let elf = Elf::parse(file).map_err(|e| e.for_kind(KIND, file))?;
    let Some(entry) = entry_note(&elf) else {
        return Err(LoadError::WrongProtocol {
            wanted: KIND,
            reason: "it has no Xen PHYS32_ENTRY note".into(),
        });
    };
    let inside = elf
        .segments
        .iter()
        .any(|s| entry >= s.paddr && entry - s.paddr < s.memsz);
    if !inside || entry >= layout::HIGH_RAM {
        return Err(LoadError::Corrupt {
            kind: KIND,
            reason: alloc::format!("its PVH entry point {entry:#x} is in no segment below 4 GiB"),
        });
    }
    stage.elf(&elf)?;

    let cmdline = stage.string("command line", request.cmdline)?;
    let initrd = request.initrd.map(|data| Module { data, cmdline: "" });
    let mut modules = Vec::new();
    for m in initrd.iter().chain(request.modules) {
        // Linux reads 32 bits of the address.
        let name = if modules.is_empty() && initrd.is_some() {
            "initrd"
        } else {
            "module"
        };
        let len = m.data.len() as u64;
        let within = crate::GpaRange {
            start: layout::EXTENDED_MEMORY,
            ..BELOW_4G
        };
        let gpa = stage.find(
            name,
            len,
            caisson_memory::PAGE_SIZE,
            within,
            Search::Highest,
        )?;
        stage.image(name, gpa, m.data)?;
        let cmdline = match m.cmdline {
            "" => 0,
            text => stage.string("module command line", text)?,
        };
        modules.push(ModuleEntry {
            paddr: gpa.into(),
            size: len.into(),
            cmdline_paddr: cmdline.into(),
            reserved: 0.into(),
        });
    }
    let memmap: Vec<_> = stage
        .map()
        .e820()
        .iter()
        .map(|e| MemmapEntry {
            addr: e.range.start.into(),
            size: e.range.len().into(),
            kind: (e.kind as u32).into(),
            reserved: 0.into(),
        })
        .collect();
    let modlist = match modules.as_slice() {
        [] => 0,
        list => stage.structure("PVH module list", 8, false, list.as_bytes().to_vec())?,
    };
    let memmap_paddr = stage.structure(
        "PVH memory map",
        8,
        false,
        memmap.as_slice().as_bytes().to_vec(),
    )?;
    let info = StartInfo {
        magic: START_MAGIC.into(),
        version: 1.into(),
        flags: 0.into(),
        nr_modules: (modules.len() as u32).into(),
        modlist_paddr: modlist.into(),
        cmdline_paddr: cmdline.into(),
        rsdp_paddr: request.acpi_rsdp.unwrap_or(0).into(),
        memmap_paddr: memmap_paddr.into(),
        memmap_entries: (memmap.len() as u32).into(),
        reserved: 0.into(),
    };
    let rbx = stage.structure("PVH start info", 8, false, info.as_bytes().to_vec())?;
    let mode = BootMode::Protected32;
    let gdt = stage.gdt(mode)?;
    Ok(BootState {
        mode,
        rip: entry,
        rax: 0,
        rbx,
        rsi: 0,
        rsp: 0,
        gdt,
    })
}

#[cfg(test)]
mod tests {
    use alloc::{string::ToString, vec};

    use super::*;
    use crate::{
        ImportList, MemoryMap,
        elf::tests::{build, load as segment, note},
        load,
    };

    fn read<const N: usize>(list: &ImportList<'_>, gpa: u64) -> [u8; N] {
        let mut b = [0; N];
        list.read(gpa, &mut b);
        b
    }

    fn word(list: &ImportList<'_>, gpa: u64) -> u64 {
        u64::from_le_bytes(read(list, gpa))
    }

    #[test]
    fn start_info_says_where_everything_is() {
        let map = MemoryMap::new(64 << 20, 40).unwrap();
        for (is_64, desc) in [
            (false, &0x10_0008u32.to_le_bytes()[..]),
            (true, &0x10_0008u64.to_le_bytes()[..]),
        ] {
            let file = build(
                is_64,
                0,
                &[segment(0x10_0000, &[0x90; 32], 8), note("Xen", 18, desc)],
            );
            let initrd = vec![5; 100];
            let modules = [Module {
                data: b"second",
                cmdline: "two",
            }];
            let request = LoadRequest {
                cmdline: "hello",
                initrd: Some(&initrd),
                modules: &modules,
                acpi_rsdp: Some(0xe_0000),
                ..LoadRequest::new(&map)
            };
            let l = load(&file, &request).unwrap();
            assert_eq!(
                (l.kind, l.boot.rip, l.boot.mode),
                (KernelKind::Pvh, 0x10_0008, BootMode::Protected32)
            );
            let info = l.boot.rbx;
            assert_eq!(word(&l.imports, info) as u32, START_MAGIC);
            assert_eq!(read(&l.imports, info + 12), 2u32.to_le_bytes());
            let list = word(&l.imports, info + 16);
            assert_eq!(read(&l.imports, word(&l.imports, list)), [5; 4]);
            assert_eq!(word(&l.imports, list + 8), 100);
            assert_eq!(
                &read::<6>(&l.imports, word(&l.imports, list + 32)),
                b"second"
            );
            assert_eq!(
                &read::<4>(&l.imports, word(&l.imports, list + 48)),
                b"two\0"
            );
            assert_eq!(
                &read::<6>(&l.imports, word(&l.imports, info + 24)),
                b"hello\0"
            );
            assert_eq!(word(&l.imports, info + 32), 0xe_0000);
            let memmap = word(&l.imports, info + 40);
            assert_eq!(
                read(&l.imports, info + 48),
                (map.e820().len() as u32).to_le_bytes()
            );
            assert_eq!(word(&l.imports, memmap + 8), 0x9_fc00);
        }
    }

    #[test]
    fn entry_must_be_loaded() {
        let map = MemoryMap::new(64 << 20, 40).unwrap();
        for entry in [0x10_0020u32, 0, 0xffff_ffff] {
            let parts = [
                segment(0x10_0000, &[0x90; 32], 0),
                note("Xen", 18, &entry.to_le_bytes()),
            ];
            let e = load(&build(false, 0, &parts), &LoadRequest::new(&map))
                .unwrap_err()
                .to_string();
            assert!(e.contains("PVH entry point"), "{e}");
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let map = MemoryMap::new(64 << 20, 40).unwrap();
        let parts = [
            note("Xen", 18, &0x10_0000u32.to_le_bytes()),
            segment(0x10_0000, &[0x90; 32], 0),
        ];
        let file = build(false, 0, &parts);
        assert!(load(&file, &LoadRequest::new(&map)).is_ok());
        for n in 0..file.len() {
            assert!(load(&file[..n], &LoadRequest::new(&map)).is_err());
        }
    }
}
