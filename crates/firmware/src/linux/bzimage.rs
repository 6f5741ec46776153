//! Loading a bzImage.

use super::{
    Handover, hand_over,
    header::{SetupHeader, XLF_CAN_BE_LOADED_ABOVE_4G},
};
use crate::{
    BootState, KernelKind, LoadError, LoadRequest,
    bytes::{array, u16_at},
    stage::Stage,
};

/// The 64-bit entry point, from the start of the protected-mode part.
const ENTRY_64: u64 = 0x200;

/// Whether the file has the boot sector signature and the header's magic.
pub(crate) fn is_bzimage(file: &[u8]) -> bool {
    u16_at(file, 0x1fe) == Some(0xaa55) && array(file, 0x202) == Some(*b"HdrS")
}

pub(crate) fn load<'a>(
    file: &'a [u8],
    request: &LoadRequest<'a>,
    stage: &mut Stage<'a, '_>,
) -> Result<BootState, LoadError> {
    if !is_bzimage(file) {
        return Err(LoadError::WrongProtocol {
            wanted: KernelKind::LinuxBzImage,
            reason: "it has no Linux setup header".into(),
        });
    }
    let header = SetupHeader::parse(file)?;
    stage.claim("kernel", header.pref_address, header.init_size)?;
    stage.image("kernel", header.pref_address, header.kernel(file))?;
    let handover = Handover {
        kind: KernelKind::LinuxBzImage,
        entry: header.pref_address + ENTRY_64,
        setup_header: header.bytes,
        cmdline_max: header.cmdline_size,
        initrd_addr_max: header.initrd_addr_max,
        above_4g: header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0,
    };
    hand_over(&handover, request, stage)
}

#[cfg(test)]
pub(crate) mod tests {
    use alloc::{string::ToString, vec, vec::Vec};

    use super::*;
    use crate::{BootMode, GpaRange, ImportList, Loaded, MemoryMap, load};

    /// A small file with all that the protocol asks of a bzImage.
    pub(crate) fn build() -> Vec<u8> {
        let kernel_len = 0x1000u32;
        let mut f = vec![0u8; 5 * 512];
        let mut put = |at: usize, bytes: &[u8]| f[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[4]);
        put(0x1f4, &(kernel_len / 16).to_le_bytes());
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(0x202, b"HdrS");
        put(0x206, &0x20fu16.to_le_bytes());
        put(0x211, &[1]);
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(0x230, &0x20_0000u32.to_le_bytes());
        put(0x234, &[1, 21]);
        put(0x236, &3u16.to_le_bytes());
        put(0x238, &2047u32.to_le_bytes());
        put(0x248, &0x300u32.to_le_bytes());
        put(0x24c, &0x400u32.to_le_bytes());
        put(0x258, &0x100_0000u64.to_le_bytes());
        put(0x260, &0x40_0000u32.to_le_bytes());
        f.extend((0..kernel_len).map(|i| i as u8 | 1));
        f
    }

    fn read<const N: usize>(list: &ImportList<'_>, gpa: u64) -> [u8; N] {
        let mut b = [0; N];
        list.read(gpa, &mut b);
        b
    }

    fn zero_page_u32(l: &Loaded<'_>, at: u64) -> u64 {
        u32::from_le_bytes(read(&l.imports, l.boot.rsi + at)).into()
    }

    #[test]
    fn hands_over_as_the_protocol_says() {
        let map = MemoryMap::new(64 << 20, 40).unwrap();
        let file = build();
        let initrd = vec![0xaa; 5000];
        let request = LoadRequest {
            cmdline: "console=ttyS0",
            initrd: Some(&initrd),
            acpi_rsdp: Some(0xe_0000),
            ..LoadRequest::new(&map)
        };
        let l = load(&file, &request).unwrap();
        assert_eq!(l.kind, KernelKind::LinuxBzImage);
        assert_eq!(l.boot.rip, 0x100_0200);
        assert!(matches!(l.boot.mode, BootMode::Long64 { .. }));
        // The protected-mode part, not the setup sectors, is at the preferred address.
        assert_eq!(read::<2>(&l.imports, 0x100_0000), [file[2560], file[2561]]);
        assert_eq!(read::<4>(&l.imports, l.boot.rsi + 0x202), *b"HdrS");
        assert_eq!(read::<1>(&l.imports, l.boot.rsi + 0x210), [0xff]);
        assert_eq!(read::<1>(&l.imports, l.boot.rsi + 0x1ef), [0]);
        assert_eq!(
            read::<8>(&l.imports, l.boot.rsi + 0x70),
            0xe_0000u64.to_le_bytes()
        );
        let cmdline = zero_page_u32(&l, 0x228);
        assert_eq!(&read::<14>(&l.imports, cmdline), b"console=ttyS0\0");
        let (at, len) = (zero_page_u32(&l, 0x218), zero_page_u32(&l, 0x21c));
        assert_eq!((at, len), ((64 << 20) - 0x2000, 5000));
        assert_eq!(read::<1>(&l.imports, at), [0xaa]);
        // The E820 map is the machine's.
        let n = read::<1>(&l.imports, l.boot.rsi + 0x1e8)[0];
        assert_eq!(usize::from(n), map.e820().len());
        let first: [u8; 20] = read(&l.imports, l.boot.rsi + 0x2d0);
        assert_eq!(first[8..16], 0x9_fc00u64.to_le_bytes());
    }

    #[test]
    fn a_big_initrd_goes_above_4_gib() {
        let map = MemoryMap::new(6 << 30, 40).unwrap();
        let mut file = build();
        let initrd = vec![1; 3 << 20];
        // Only 2 MiB below the kernel's limit are left.
        file[0x22c..0x230].copy_from_slice(&0x2f_ffffu32.to_le_bytes());
        let request = LoadRequest {
            initrd: Some(&initrd),
            ..LoadRequest::new(&map)
        };
        let l = load(&file, &request).unwrap();
        let low = zero_page_u32(&l, 0x218);
        let high = zero_page_u32(&l, 0xc0);
        assert_eq!(high << 32 | low, (7 << 30) - (3 << 20));
        assert_eq!(zero_page_u32(&l, 0xc4), 0);
        // A kernel that does not allow that says so.
        file[0x236] = 1;
        let e = load(&file, &request).unwrap_err().to_string();
        assert!(e.contains("initrd of 3 MiB does not fit"), "{e}");
    }

    #[test]
    fn says_which_numbers_do_not_fit() {
        let file = build();
        let small = MemoryMap::new(1 << 20, 40).unwrap();
        let e = load(&file, &LoadRequest::new(&small))
            .unwrap_err()
            .to_string();
        assert!(
            e.contains("0x1000000-0x1400000") && e.contains("has 1 MiB of memory"),
            "{e}"
        );
        let map = MemoryMap::new(32 << 20, 40).unwrap();
        let initrd = vec![0; 33 << 20];
        let request = LoadRequest {
            initrd: Some(&initrd),
            ..LoadRequest::new(&map)
        };
        let e = load(&file, &request).unwrap_err().to_string();
        assert!(
            e.contains("initrd of 33 MiB") && e.contains("32 MiB of memory"),
            "{e}"
        );
        let cmdline = "x".repeat(2048);
        let request = LoadRequest {
            cmdline: &cmdline,
            ..LoadRequest::new(&map)
        };
        let e = load(&file, &request).unwrap_err().to_string();
        assert!(e.contains("2048") && e.contains("2047"), "{e}");
        let request = LoadRequest {
            cmdline: "a\0b",
            ..LoadRequest::new(&map)
        };
        assert!(matches!(
            load(&file, &request),
            Err(LoadError::NulByte { at: 1, .. })
        ));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let map = MemoryMap::new(64 << 20, 40).unwrap();
        let file = build();
        // The last paragraph may be incomplete.
        for n in 0..file.len() - 15 {
            let e = load(&file[..n], &LoadRequest::new(&map)).unwrap_err();
            if n >= 0x268 {
                assert!(matches!(e, LoadError::Truncated { .. }), "{n}: {e}");
            }
        }
        assert!(load(&file, &LoadRequest::new(&map)).is_ok());
    }

    #[test]
    fn old_and_odd_kernels_are_named() {
        let map = MemoryMap::new(64 << 20, 40).unwrap();
        let message = |at: usize, bytes: &[u8]| {
            let mut f = build();
            f[at..at + bytes.len()].copy_from_slice(bytes);
            load(&f, &LoadRequest::new(&map)).unwrap_err().to_string()
        };
        assert!(message(0x206, &[0x0b, 2]).contains("boot protocol 2.11"));
        assert!(message(0x236, &[0, 0]).contains("32-bit kernel"));
        assert!(message(0x211, &[0]).contains("zImage"));
        assert!(message(0x1f4, &[0, 0, 0, 0]).contains("0 bytes long"));
        assert!(message(0x24c, &[0xff; 4]).contains("payload"));
        assert!(message(0x260, &[0; 4]).contains("unpack"));
        assert!(message(0x258, &[0xff; 8]).contains("0xffffffffffffffff"));
        assert!(message(0x201, &[0xff]).contains("0x301"));
    }

    #[test]
    fn modules_are_refused() {
        let map = MemoryMap::new(64 << 20, 40).unwrap();
        let modules = [crate::Module {
            data: b"x",
            cmdline: "",
        }];
        let request = LoadRequest {
            modules: &modules,
            ..LoadRequest::new(&map)
        };
        assert!(matches!(
            load(&build(), &request),
            Err(LoadError::Unsupported { .. })
        ));
    }

    proptest::proptest! {
        /// Whatever a header claims: no panic, and what is accepted is in usable RAM.
        #[test]
        fn hostile_headers(at in 0x1f1usize..0x270, byte: u8, at2 in 0x1f1usize..0x270, byte2: u8, ram in 1u64..64) {
            let map = MemoryMap::new(ram << 20, 40).unwrap();
            let mut f = build();
            f[at] = byte;
            f[at2] = byte2;
            if let Ok(l) = load(&f, &LoadRequest::new(&map)) {
                for i in l.imports.iter().filter(|i| i.name == "kernel") {
                    assert!(map.is_usable(&i.range()));
                    let entry = GpaRange { start: l.boot.rip, end: l.boot.rip + 1 };
                    assert!(i.range().contains(&entry));
                }
            }
        }
    }
}
