//! SMBIOS structures: what the machine calls itself.
//!
//! Source: DMTF DSP0134 (SMBIOS) 3.2, in the 64-bit entry point form (5.2.2),
//! which is found by searching [`layout::SMBIOS`]. Structures: 0, 1, 3, 4, 16,
//! 17, 19, 32 and 127, the ones that the specification requires and that make
//! sense for a virtual machine; caches, slots and boards are left out.

mod structure;

use alloc::{string::String, vec::Vec};

use caisson_memory::{Gpa, Vtl};

use self::structure::Structure;
use crate::{
    GpaRange, Import, ImportData, ImportError, ImportList, MemoryMap, PageKind, error::Size, layout,
};

/// Length of the 64-bit entry point.
const ENTRY_LEN: usize = 24;
const MAJOR: u8 = 3;
const MINOR: u8 = 2;
const NO_HANDLE: u16 = 0xffff;
const NO_ERROR_HANDLE: u16 = 0xfffe;

mod handle {
    pub(super) const BIOS: u16 = 0;
    pub(super) const SYSTEM: u16 = 0x100;
    pub(super) const CHASSIS: u16 = 0x300;
    pub(super) const PROCESSOR: u16 = 0x400;
    pub(super) const MEMORY_ARRAY: u16 = 0x1000;
    pub(super) const MEMORY_DEVICE: u16 = 0x1100;
    pub(super) const MAPPED: u16 = 0x1300;
    pub(super) const BOOT: u16 = 0x2000;
    pub(super) const END: u16 = 0x7f00;
}

/// What the structures say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmbiosSpec {
    /// Manufacturer of the system.
    pub manufacturer: String,
    /// Product name.
    pub product: String,
    /// Version of the product, which is also that of the firmware.
    pub version: String,
    /// Serial number; guests show it. Empty for none.
    pub serial: String,
    /// UUID of the machine in RFC 4122 byte order; all zero for none.
    pub uuid: [u8; 16],
    /// Number of vCPUs, as the cores of one socket.
    pub vcpus: u16,
    /// CPUID leaf 1, EAX in the low and EDX in the high half.
    pub processor_id: u64,
    /// Vendor string of the CPU.
    pub processor_vendor: String,
}

impl Default for SmbiosSpec {
    fn default() -> Self {
        Self {
            manufacturer: "Caisson".into(),
            product: "Caisson".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            serial: String::new(),
            uuid: [0; 16],
            vcpus: 1,
            processor_id: 0,
            processor_vendor: String::new(),
        }
    }
}

/// Why the structures could not be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SmbiosError {
    /// They are longer than their area.
    #[error("the SMBIOS structures take {needed}, but only {room} are reserved for them: use shorter names",
        needed = Size(*.needed), room = Size(*.room))]
    TooLarge {
        /// Length in bytes.
        needed: u64,
        /// Length of the area in bytes.
        room: u64,
    },
    /// A string with a NUL byte in it.
    #[error("the SMBIOS string {0:?} contains a NUL byte")]
    NulByte(String),
    /// Structures where there is no memory.
    #[error(transparent)]
    Import(#[from] ImportError),
}

/// Builds entry point and structures for the machine of `map` into
/// [`layout::SMBIOS`].
///
/// # Errors
/// Strings with NUL bytes, or too long.
pub fn build(spec: &SmbiosSpec, map: &MemoryMap) -> Result<ImportList<'static>, SmbiosError> {
    for s in [
        &spec.manufacturer,
        &spec.product,
        &spec.version,
        &spec.serial,
        &spec.processor_vendor,
    ] {
        if s.contains('\0') {
            return Err(SmbiosError::NulByte(s.clone()));
        }
    }
    let table = structures(spec, map);
    let start = layout::SMBIOS.start;
    let table_at = start + (ENTRY_LEN as u64).next_multiple_of(16);
    let end = table_at + table.len() as u64;
    if !layout::SMBIOS.contains(&GpaRange { start, end }) {
        return Err(SmbiosError::TooLarge {
            needed: end - start,
            room: layout::SMBIOS.len(),
        });
    }
    let mut imports = ImportList::new();
    let parts = [
        (
            "SMBIOS entry point",
            start,
            entry_point(table_at, table.len() as u32),
        ),
        ("SMBIOS structures", table_at, table),
    ];
    for (name, gpa, bytes) in parts {
        let import = Import {
            name,
            gpa: Gpa(gpa),
            vtl: Vtl::VTL0,
            kind: PageKind::Parameters,
            measured: false,
            data: ImportData::Bytes(bytes.into()),
        };
        imports.push(map, import)?;
    }
    Ok(imports)
}

fn entry_point(table: u64, len: u32) -> Vec<u8> {
    let mut e = Vec::with_capacity(ENTRY_LEN);
    e.extend(b"_SM3_\0");
    e.extend([ENTRY_LEN as u8, MAJOR, MINOR, 0, 1, 0]);
    e.extend(len.to_le_bytes());
    e.extend(table.to_le_bytes());
    e[5] = e.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
    e
}

fn structures(spec: &SmbiosSpec, map: &MemoryMap) -> Vec<u8> {
    let mut out = Vec::new();
    identity(spec, &mut out);
    processor(spec, &mut out);
    memory(map, &mut out);
    // Boot information: no errors.
    Structure::new(32, handle::BOOT)
        .bytes(&[0; 7])
        .finish(&mut out);
    Structure::new(127, handle::END).finish(&mut out);
    out
}

/// Firmware, system and chassis.
fn identity(spec: &SmbiosSpec, out: &mut Vec<u8>) {
    const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
    const IS_A_VIRTUAL_MACHINE: u8 = 1 << 4;
    Structure::new(0, handle::BIOS)
        .string(&spec.manufacturer)
        .string(&spec.version)
        .u16((layout::SMBIOS.start >> 4) as u16)
        // Release date: none. Size: 64 KiB.
        .string("")
        .u8(0)
        .u64(CHARACTERISTICS_NOT_SUPPORTED)
        .bytes(&[0, IS_A_VIRTUAL_MACHINE])
        // Release numbers: not given.
        .bytes(&[0xff; 4])
        .u16(0)
        .finish(out);

    // The first three fields of the UUID are little-endian (7.2.1).
    let mut uuid = spec.uuid;
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    const POWER_SWITCH: u8 = 6;
    Structure::new(1, handle::SYSTEM)
        .string(&spec.manufacturer)
        .string(&spec.product)
        .string(&spec.version)
        .string(&spec.serial)
        .bytes(&uuid)
        .u8(POWER_SWITCH)
        .string("")
        .string("Virtual machine")
        .finish(out);

    const OTHER: u8 = 1;
    const SAFE: u8 = 3;
    const SECURITY_NONE: u8 = 3;
    Structure::new(3, handle::CHASSIS)
        .string(&spec.manufacturer)
        .u8(OTHER)
        .string(&spec.version)
        .string(&spec.serial)
        .string("")
        .bytes(&[SAFE, SAFE, SAFE, SECURITY_NONE])
        .u32(0)
        // Height, power cords, contained elements and their length, SKU.
        .bytes(&[0; 5])
        .finish(out);
}

fn processor(spec: &SmbiosSpec, out: &mut Vec<u8>) {
    const CENTRAL: u8 = 3;
    const OTHER: u8 = 1;
    const POPULATED_ENABLED: u8 = 0x41;
    const CAPABLE_64_BIT: u16 = 1 << 2;
    const MULTI_CORE: u16 = 1 << 3;
    let count = u8::try_from(spec.vcpus).unwrap_or(0xff);
    let multi = if spec.vcpus > 1 { MULTI_CORE } else { 0 };
    Structure::new(4, handle::PROCESSOR)
        .string("CPU 0")
        .u8(CENTRAL)
        .u8(OTHER)
        .string(&spec.processor_vendor)
        .u64(spec.processor_id)
        .string("")
        // Voltage; external, maximum and current speed: unknown.
        .u8(0)
        .bytes(&[0; 6])
        .u8(POPULATED_ENABLED)
        .u8(OTHER)
        // Caches.
        .u16(NO_HANDLE)
        .u16(NO_HANDLE)
        .u16(NO_HANDLE)
        // Serial number, asset tag, part number.
        .bytes(&[0; 3])
        .bytes(&[count; 3])
        .u16(CAPABLE_64_BIT | multi)
        .u16(OTHER.into())
        .u16(spec.vcpus)
        .u16(spec.vcpus)
        .u16(spec.vcpus)
        .finish(out);
}

/// One memory device with all RAM, and where it appears.
fn memory(map: &MemoryMap, out: &mut Vec<u8>) {
    const OTHER: u8 = 1;
    const SYSTEM_MEMORY: u8 = 3;
    const NO_ECC: u8 = 3;
    const USE_EXTENDED: u32 = 0x8000_0000;
    let ram = map.ram_bytes();
    Structure::new(16, handle::MEMORY_ARRAY)
        .bytes(&[OTHER, SYSTEM_MEMORY, NO_ECC])
        .u32(USE_EXTENDED)
        .u16(NO_ERROR_HANDLE)
        .u16(1)
        .u64(ram)
        .finish(out);

    const UNKNOWN_WIDTH: u16 = 0xffff;
    const DIMM: u8 = 9;
    const RAM: u8 = 7;
    const DETAIL_OTHER: u16 = 1 << 1;
    let mib = ram >> 20;
    let (size, extended) = match u16::try_from(mib) {
        Ok(n) if n < 0x7fff => (n, 0),
        // 31 bits of MiB: 2 PiB.
        _ => (0x7fff, mib.min(0x7fff_ffff) as u32),
    };
    Structure::new(17, handle::MEMORY_DEVICE)
        .u16(handle::MEMORY_ARRAY)
        .u16(NO_ERROR_HANDLE)
        .u16(UNKNOWN_WIDTH)
        .u16(UNKNOWN_WIDTH)
        .u16(size)
        .bytes(&[DIMM, 0])
        .string("DIMM 0")
        .string("")
        .u8(RAM)
        .u16(DETAIL_OTHER)
        .u16(0)
        // Manufacturer, serial number, asset tag, part number, attributes.
        .bytes(&[0; 5])
        .u32(extended)
        // Speed and voltages.
        .bytes(&[0; 8])
        .finish(out);

    for (n, range) in map.backing().iter().enumerate() {
        const IN_EXTENDED: u32 = 0xffff_ffff;
        Structure::new(19, handle::MAPPED + n as u16)
            .u32(IN_EXTENDED)
            .u32(IN_EXTENDED)
            .u16(handle::MEMORY_ARRAY)
            .u8(1)
            .u64(range.start)
            .u64(range.end - 1)
            .finish(out);
    }
}

#[cfg(test)]
mod tests {
    use alloc::{string::ToString, vec};

    use super::*;

    /// A structure as a guest reads it: type, formatted part, strings.
    type Parsed = (u8, Vec<u8>, Vec<String>);

    fn parse(imports: &ImportList<'_>) -> Vec<Parsed> {
        let mut e = [0; ENTRY_LEN];
        imports.read(0xf_0000, &mut e);
        assert_eq!(&e[..5], b"_SM3_");
        assert_eq!(e.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
        let len = u32::from_le_bytes(e[12..16].try_into().unwrap()) as usize;
        let mut table = vec![0; len];
        imports.read(
            u64::from_le_bytes(e[16..24].try_into().unwrap()),
            &mut table,
        );
        let mut rest = &table[..];
        let mut out = Vec::new();
        while !rest.is_empty() {
            let formatted = rest[..usize::from(rest[1])].to_vec();
            rest = &rest[formatted.len()..];
            let end = rest.windows(2).position(|w| w == [0, 0]).unwrap();
            let strings = rest[..end]
                .split(|b| *b == 0)
                .map(|s| String::from_utf8(s.to_vec()).unwrap());
            let strings = strings.filter(|s| !s.is_empty()).collect();
            out.push((formatted[0], formatted, strings));
            rest = &rest[end + 2..];
        }
        out
    }

    #[test]
    fn a_guest_reads_what_was_said() {
        let map = MemoryMap::new(6 << 30, 40).unwrap();
        let spec = SmbiosSpec {
            serial: "S1".into(),
            uuid: core::array::from_fn(|i| i as u8),
            vcpus: 300,
            ..SmbiosSpec::default()
        };
        let t = parse(&build(&spec, &map).unwrap());
        let kinds: Vec<_> = t.iter().map(|s| s.0).collect();
        assert_eq!(kinds, [0, 1, 3, 4, 16, 17, 19, 19, 32, 127]);
        // Lengths for version 3.2 of the specification (2.8 for types 16 to 19).
        let lens: Vec<_> = t.iter().map(|s| s.1.len()).collect();
        assert_eq!(
            lens,
            [0x1a, 0x1b, 0x16, 0x30, 0x17, 0x28, 0x1f, 0x1f, 0x0b, 4]
        );
        assert_eq!(t[1].2[3], "S1");
        assert_eq!(
            t[1].1[8..24],
            [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15]
        );
        assert_eq!(
            (t[3].1[0x23], &t[3].1[0x2a..0x2c]),
            (0xff, &300u16.to_le_bytes()[..])
        );
        assert_eq!(t[5].1[0x0c..0x0e], 6144u16.to_le_bytes());
        assert_eq!(t[7].1[0x0f..0x17], (4u64 << 30).to_le_bytes());
        assert_eq!(t[7].1[0x17..0x1f], ((7u64 << 30) - 1).to_le_bytes());
    }

    #[test]
    fn much_memory_uses_the_extended_size() {
        let map = MemoryMap::new(1 << 40, 46).unwrap();
        let t = parse(&build(&SmbiosSpec::default(), &map).unwrap());
        assert_eq!(t[5].1[0x0c..0x0e], [0xff, 0x7f]);
        assert_eq!(t[5].1[0x1c..0x20], (1u32 << 20).to_le_bytes());
    }

    #[test]
    fn bad_strings_are_refused() {
        let map = MemoryMap::new(1 << 20, 40).unwrap();
        let with = |product: String| {
            build(
                &SmbiosSpec {
                    product,
                    ..SmbiosSpec::default()
                },
                &map,
            )
            .unwrap_err()
            .to_string()
        };
        assert!(with("a\0b".into()).contains("NUL"));
        assert!(with("x".repeat(70_000)).contains("64 KiB"));
    }
}
