//! ACPI tables for a PC: RSDP, RSDT, XSDT, FADT, FACS, MADT, DSDT, and with PCI the MCFG.
//!
//! Source: ACPI specification 6.3. The platform is always in ACPI mode (there
//! is no SMI command port), is not hardware-reduced, and has power-off (S5),
//! the power button, the PM timer and the SCI in the PM1 register block, and
//! general-purpose events that no device uses yet. Left out: other sleep
//! states, thermal zones, C- and P-states and the HPET, none of which the
//! machine has.
//!
//! Everything that a table claims comes from [`AcpiSpec`], so that a device
//! which is not there is not described.

mod dsdt;
mod fadt;
mod madt;
mod pci;

pub use pci::{PciRoot, VirtioMmio};

use alloc::vec::Vec;

use acpi_tables::{Aml, facs::FACS, sdt::Sdt};
use caisson_memory::{Gpa, Vtl};

use crate::{
    GpaRange, Import, ImportData, ImportError, ImportList, MemoryMap, PageKind, bytes::align_up,
    error::Size, layout,
};

const OEM_ID: [u8; 6] = *b"CAISSN";
const OEM_TABLE_ID: [u8; 8] = *b"CAISSONM";
const OEM_REVISION: u32 = 1;
/// Length of an ACPI 2.0 RSDP.
const RSDP_LEN: usize = 36;
/// vCPU devices are called `C000` to `CFFF`.
const MAX_VCPUS: usize = 4096;

/// The PM1 event, PM1 control and PM timer registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PowerManagement {
    /// I/O port of the PM1a event block: status, then enable, 2 bytes each.
    pub event_port: u16,
    /// I/O port of the PM1a control register, 2 bytes.
    pub control_port: u16,
    /// I/O port of the PM timer, 4 bytes.
    pub timer_port: u16,
    /// Whether the timer counts 32 bits instead of 24.
    pub timer_32_bit: bool,
    /// Global system interrupt of the SCI, which is level-triggered and
    /// active high. It must be an ISA interrupt (0 to 15).
    pub sci: u8,
    /// Whether PM1 reports a power button.
    pub power_button: bool,
    /// SLP_TYP that powers off (S5).
    pub s5_sleep_type: u8,
}

/// A register that resets the machine when written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetRegister {
    /// I/O port, one byte wide.
    pub port: u16,
    /// The value to write.
    pub value: u8,
}

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Its APIC ID.
    pub id: u8,
    /// Guest physical address of its registers.
    pub address: u32,
}

/// Devices on the i8042 keyboard controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct I8042 {
    /// Whether there is a keyboard.
    pub keyboard: bool,
    /// Whether there is a mouse.
    pub mouse: bool,
}

/// What the tables describe. The default is a machine with one vCPU, COM1, RTC,
/// PIC, PIT and I/O APIC at their usual places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiSpec {
    /// Local APIC ID of each vCPU, the boot vCPU first.
    pub apic_ids: Vec<u32>,
    /// The I/O APIC; its inputs are global system interrupts 0 to 23.
    pub ioapic: IoApic,
    /// Power management registers.
    pub power: PowerManagement,
    /// First I/O port of general-purpose event block 0, if there is one: two
    /// ports of status, two of enable.
    pub gpe0_port: Option<u16>,
    /// Reset register, if there is one.
    pub reset: Option<ResetRegister>,
    /// Which of COM1 to COM4 there are.
    pub com_ports: [bool; 4],
    /// Whether there is an MC146818 at port 0x70.
    pub rtc: bool,
    /// CMOS index of the century byte, if the RTC has one.
    pub rtc_century: Option<u8>,
    /// The keyboard controller at ports 0x60 and 0x64, if there is one.
    pub i8042: Option<I8042>,
    /// First I/O port of fw_cfg, if there is one; it takes 12.
    pub fw_cfg_port: Option<u16>,
    /// The PCI host bridge, if there is one.
    pub pci: Option<PciRoot>,
    /// Virtio devices without PCI.
    pub virtio_mmio: Vec<VirtioMmio>,
}

impl Default for AcpiSpec {
    fn default() -> Self {
        Self {
            apic_ids: alloc::vec![0],
            ioapic: IoApic {
                id: 0,
                address: layout::IOAPIC as u32,
            },
            power: PowerManagement {
                event_port: 0x600,
                control_port: 0x604,
                timer_port: 0x608,
                timer_32_bit: true,
                sci: 9,
                power_button: true,
                s5_sleep_type: 5,
            },
            gpe0_port: Some(0x620),
            reset: Some(ResetRegister {
                port: 0xcf9,
                value: 6,
            }),
            com_ports: [true, false, false, false],
            rtc: true,
            rtc_century: Some(0x32),
            i8042: None,
            fw_cfg_port: None,
            pci: None,
            virtio_mmio: Vec::new(),
        }
    }
}

/// Why tables could not be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// A machine without vCPUs, or with more than can be named.
    #[error("ACPI tables can describe 1 to {MAX_VCPUS} vCPUs, not {0}")]
    VcpuCount(usize),
    /// Two vCPUs with one APIC ID.
    #[error("two vCPUs have local APIC ID {0}")]
    DuplicateApicId(u32),
    /// An SCI that no ISA interrupt carries.
    #[error("the ACPI interrupt (SCI) must be one of the interrupts 1 to 15, not {0}")]
    Sci(u8),
    /// Tables that do not fit where they belong.
    #[error("the ACPI tables for {vcpus} vCPUs take {needed}, but only {room} are reserved for them: \
        give the machine fewer vCPUs", needed = Size(*.needed), room = Size(*.room))]
    TooLarge {
        /// How many vCPUs.
        vcpus: usize,
        /// Length of the tables in bytes.
        needed: u64,
        /// Length of the area in bytes.
        room: u64,
    },
    /// A table where there is no memory.
    #[error(transparent)]
    Import(#[from] ImportError),
}

/// Tables ready to be put in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// What goes where.
    pub imports: ImportList<'static>,
    /// Guest physical address of the RSDP.
    pub rsdp: u64,
}

/// Builds the tables into [`layout::ACPI_TABLES`], where a guest also finds the
/// RSDP by searching.
///
/// # Errors
/// A spec that contradicts itself or whose tables do not fit.
pub fn build(spec: &AcpiSpec, map: &MemoryMap) -> Result<AcpiTables, AcpiError> {
    check(spec)?;
    let mut area = Area {
        tables: Vec::new(),
        next: layout::ACPI_TABLES.start,
    };
    // The RSDP comes first but needs the addresses of the others.
    let rsdp = area.reserve(RSDP_LEN, 16);
    let facs = area.add("ACPI FACS", to_bytes(&FACS::new()), 64);
    let dsdt = area.add("ACPI DSDT", dsdt::build(spec), 16);
    let fadt = area.add("ACPI FADT", fadt::build(spec, facs, dsdt), 16);
    let madt = area.add("ACPI MADT", madt::build(spec), 16);
    let mut tables = alloc::vec![fadt, madt];
    if let Some(pci) = &spec.pci {
        tables.push(area.add("ACPI MCFG", pci::mcfg(pci), 16));
    }
    // Both lists: old 32-bit systems read only the RSDT.
    let rsdt = area.add("ACPI RSDT", rsdt(&tables), 16);
    let xsdt = area.add("ACPI XSDT", xsdt(&tables), 16);
    area.tables
        .push(("ACPI RSDP", rsdp, rsdp_bytes(rsdt, xsdt)));

    let used = GpaRange {
        start: layout::ACPI_TABLES.start,
        end: area.next,
    };
    if !layout::ACPI_TABLES.contains(&used) {
        let room = layout::ACPI_TABLES.len();
        return Err(AcpiError::TooLarge {
            vcpus: spec.apic_ids.len(),
            needed: used.len(),
            room,
        });
    }
    let mut imports = ImportList::new();
    for (name, gpa, bytes) in area.tables {
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
    Ok(AcpiTables { imports, rsdp })
}

fn check(spec: &AcpiSpec) -> Result<(), AcpiError> {
    if !(1..=MAX_VCPUS).contains(&spec.apic_ids.len()) {
        return Err(AcpiError::VcpuCount(spec.apic_ids.len()));
    }
    let mut ids = spec.apic_ids.clone();
    ids.sort_unstable();
    if let Some(pair) = ids.windows(2).find(|p| p[0] == p[1]) {
        return Err(AcpiError::DuplicateApicId(pair[0]));
    }
    if !(1..=15).contains(&spec.power.sci) {
        return Err(AcpiError::Sci(spec.power.sci));
    }
    Ok(())
}

/// Tables laid out one after another.
struct Area {
    tables: Vec<(&'static str, u64, Vec<u8>)>,
    next: u64,
}

impl Area {
    fn reserve(&mut self, len: usize, align: u64) -> u64 {
        // Far from the end of the address space: the tables are at most some 100 KiB.
        let gpa = align_up(self.next, align).unwrap_or(self.next);
        self.next = gpa + len as u64;
        gpa
    }

    /// Lays out a table and says where; always below 1 MiB, or `build` fails.
    fn add(&mut self, name: &'static str, bytes: Vec<u8>, align: u64) -> u32 {
        let gpa = self.reserve(bytes.len(), align);
        self.tables.push((name, gpa, bytes));
        gpa as u32
    }
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A table with the common header around `body`.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER: u32 = 36;
    let mut sdt = Sdt::new(
        signature,
        HEADER,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    sdt.append_slice(body);
    sdt.as_slice().to_vec()
}

fn rsdt(tables: &[u32]) -> Vec<u8> {
    let body: Vec<u8> = tables.iter().flat_map(|t| t.to_le_bytes()).collect();
    table(*b"RSDT", 1, &body)
}

fn xsdt(tables: &[u32]) -> Vec<u8> {
    let body: Vec<u8> = tables
        .iter()
        .flat_map(|t| u64::from(*t).to_le_bytes())
        .collect();
    table(*b"XSDT", 1, &body)
}

/// The root pointer, revision 2 (5.2.5.3).
fn rsdp_bytes(rsdt: u32, xsdt: u32) -> Vec<u8> {
    let mut b = Vec::with_capacity(RSDP_LEN);
    b.extend(b"RSD PTR \0");
    b.extend(OEM_ID);
    b.push(2);
    b.extend(rsdt.to_le_bytes());
    b.extend((RSDP_LEN as u32).to_le_bytes());
    b.extend(u64::from(xsdt).to_le_bytes());
    b.resize(RSDP_LEN, 0);
    let checksum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
    b[8] = checksum(&b[..20]);
    b[32] = checksum(&b);
    b
}

#[cfg(test)]
mod tests {
    use alloc::{string::ToString, vec};

    use super::*;

    fn map() -> MemoryMap {
        MemoryMap::new(1 << 20, 40).unwrap()
    }

    fn read(t: &AcpiTables, gpa: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        t.imports.read(gpa, &mut b);
        b
    }

    fn word(t: &AcpiTables, gpa: u64) -> u64 {
        u32::from_le_bytes(read(t, gpa, 4).try_into().unwrap()).into()
    }

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b)) == 0
    }

    /// Follows the pointers as a guest does: signature and address of each table.
    fn walk(t: &AcpiTables) -> Vec<([u8; 4], u64)> {
        let rsdp = (0xe_0000..0x10_0000u64)
            .step_by(16)
            .find(|gpa| read(t, *gpa, 8) == b"RSD PTR ")
            .expect("found by search");
        assert_eq!(rsdp, t.rsdp);
        assert!(sums_to_zero(&read(t, rsdp, 20)) && sums_to_zero(&read(t, rsdp, 36)));
        let xsdt = word(t, rsdp + 24);
        let rsdt = word(t, rsdp + 16);
        let mut found = Vec::new();
        for i in 0..(word(t, xsdt + 4) - 36) / 8 {
            let gpa = word(t, xsdt + 36 + i * 8);
            assert_eq!(gpa, word(t, rsdt + 36 + i * 4), "RSDT and XSDT agree");
            found.push(gpa);
            if read(t, gpa, 4) == b"FACP" {
                assert_eq!(
                    word(t, gpa + 40),
                    word(t, gpa + 140),
                    "DSDT and X_DSDT agree"
                );
                found.push(word(t, gpa + 40));
                assert_eq!(read(t, word(t, gpa + 36), 4), b"FACS");
                assert_eq!(word(t, gpa + 36) % 64, 0);
            }
        }
        found.extend([rsdt, xsdt]);
        for gpa in &found {
            let len = word(t, gpa + 4) as usize;
            assert!(sums_to_zero(&read(t, *gpa, len)));
        }
        found
            .iter()
            .map(|gpa| (read(t, *gpa, 4).try_into().unwrap(), *gpa))
            .collect()
    }

    #[test]
    fn a_guest_finds_every_table() {
        let t = build(&AcpiSpec::default(), &map()).unwrap();
        let signatures: Vec<_> = walk(&t).into_iter().map(|(s, _)| s).collect();
        assert_eq!(
            signatures,
            [*b"FACP", *b"DSDT", *b"APIC", *b"RSDT", *b"XSDT"]
        );
    }

    #[test]
    fn tables_stay_in_their_area_or_say_so() {
        let map = map();
        for n in [1, 2, 255, 256, 1000] {
            let spec = AcpiSpec {
                apic_ids: (0..n).collect(),
                ..AcpiSpec::default()
            };
            let t = build(&spec, &map).unwrap();
            assert!(
                t.imports
                    .iter()
                    .all(|i| layout::ACPI_TABLES.contains(&i.range()))
            );
            walk(&t);
        }
        let spec = AcpiSpec {
            apic_ids: (0..4096).collect(),
            ..AcpiSpec::default()
        };
        let e = build(&spec, &map).unwrap_err().to_string();
        assert!(e.contains("4096 vCPUs") && e.contains("64 KiB"), "{e}");
    }

    #[test]
    fn contradictions_are_refused() {
        let with = |f: fn(&mut AcpiSpec)| {
            let mut spec = AcpiSpec::default();
            f(&mut spec);
            build(&spec, &map()).unwrap_err()
        };
        assert_eq!(with(|s| s.apic_ids.clear()), AcpiError::VcpuCount(0));
        assert_eq!(
            with(|s| s.apic_ids = vec![1, 2, 1]),
            AcpiError::DuplicateApicId(1)
        );
        assert_eq!(with(|s| s.power.sci = 20), AcpiError::Sci(20));
        assert!(matches!(
            with(|s| s.apic_ids = (0..5000).collect()),
            AcpiError::VcpuCount(5000)
        ));
    }

    #[test]
    fn a_machine_with_pci_has_an_mcfg_that_says_where() {
        let spec = AcpiSpec {
            pci: Some(PciRoot {
                mem64: map().pci_memory_high(),
                ..PciRoot::default()
            }),
            ..AcpiSpec::default()
        };
        let t = build(&spec, &map()).unwrap();
        let tables = walk(&t);
        let (_, gpa) = tables.iter().find(|(s, _)| s == b"MCFG").unwrap();
        assert_eq!(word(&t, gpa + 4), 36 + 8 + 16);
        assert_eq!(word(&t, gpa + 44), layout::PCI_ECAM.start);
        assert_eq!(read(&t, gpa + 44 + 8, 4), [0, 0, 0, 0]);
    }

    #[test]
    fn only_devices_that_exist_are_named() {
        let names = |spec: &AcpiSpec| {
            let t = build(spec, &map()).unwrap();
            let (_, gpa) = walk(&t).into_iter().find(|(s, _)| s == b"DSDT").unwrap();
            let len = word(&t, gpa + 4) as usize;
            let aml = read(&t, gpa, len);
            let known = [
                "COM1", "COM2", "COM3", "COM4", "RTC_", "KBD_", "MOU_", "FWCF", "C000", "C001",
            ];
            known
                .into_iter()
                .filter(|n| aml.windows(4).any(|w| w == n.as_bytes()))
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&AcpiSpec::default()), ["COM1", "RTC_", "C000"]);
        let full = AcpiSpec {
            apic_ids: vec![0, 2],
            com_ports: [true; 4],
            i8042: Some(I8042 {
                keyboard: true,
                mouse: true,
            }),
            fw_cfg_port: Some(0x510),
            ..AcpiSpec::default()
        };
        assert_eq!(names(&full).len(), 10);
        let bare = AcpiSpec {
            com_ports: [false; 4],
            rtc: false,
            i8042: Some(I8042 {
                keyboard: false,
                mouse: false,
            }),
            ..AcpiSpec::default()
        };
        assert_eq!(names(&bare), ["C000"]);
    }
}
