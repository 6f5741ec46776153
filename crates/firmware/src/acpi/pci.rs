//! The PCI host bridge (PCI Firmware Specification 3.3 §4), and virtio devices
//! that are on no bus.

use alloc::{boxed::Box, format, vec::Vec};

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else,
        Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Or, Package, Path, ResourceTemplate,
        Return, Uuid,
    },
};

use super::{
    dsdt::{Devices, Hid},
    table,
};
use crate::{GpaRange, layout};

/// Device numbers on a bus.
const DEVICES: u64 = 32;
/// Interrupt pins of a device.
const PINS: u64 = 4;
/// What the `_OSC` method of a host bridge is called with.
const HOST_BRIDGE_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// What the guest may control by itself, if it asks: power management events,
/// error reporting, capability structures. Not hot-plug, which there is not.
const NATIVE_CONTROL: u8 = 0b1_1100;

/// A PCI Express host bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciRoot {
    /// Guest physical address of bus 0 in the configuration window, below 4 GiB.
    pub ecam: u32,
    /// The last bus there is.
    pub last_bus: u8,
    /// Addresses below 4 GiB that it passes on.
    pub mem32: GpaRange,
    /// Addresses above 4 GiB that it passes on.
    pub mem64: Option<GpaRange>,
    /// Global system interrupts of the pins: pin `p` (0 is INTA#) of device `d`
    /// is wired to number (`d` + `p`) modulo 4. Level-triggered.
    pub interrupts: [u8; 4],
}

impl Default for PciRoot {
    fn default() -> Self {
        Self {
            ecam: layout::PCI_ECAM.start as u32,
            last_bus: 0,
            mem32: layout::PCI_MEMORY,
            mem64: None,
            interrupts: [16, 17, 18, 19],
        }
    }
}

impl PciRoot {
    /// The global system interrupt of INTA# of device `device`.
    pub fn interrupt_of(&self, device: u8) -> u8 {
        self.interrupts[usize::from(device % 4)]
    }
}

/// A virtio device behind memory-mapped registers (Virtio 1.3 §4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// Guest physical address of its 4096 bytes of registers.
    pub address: u32,
    /// Its global system interrupt, level-triggered and active high.
    pub interrupt: u8,
}

/// The memory-mapped configuration description table.
pub(super) fn mcfg(root: &PciRoot) -> Vec<u8> {
    let mut body = alloc::vec![0; 8];
    body.extend(u64::from(root.ecam).to_le_bytes());
    // Segment group 0, buses 0 to the last.
    body.extend([0, 0, 0, root.last_bus, 0, 0, 0, 0]);
    table(*b"MCFG", 1, &body)
}

/// The bridge, and what keeps its configuration window.
pub(super) fn root(root: &PciRoot, devices: &mut Devices) {
    let buses = u32::from(root.last_bus) + 1;
    let window = Memory32Fixed::new(true, root.ecam, buses << 20);
    devices.add("ECAM", Hid::Pnp("PNP0C02"), Some(1), &[&window]);

    let hid = Name::new(Path::new("_HID"), &EISAName::new("PNP0A08"));
    let cid = Name::new(Path::new("_CID"), &EISAName::new("PNP0A03"));
    let zero = 0u8;
    let uid = Name::new(Path::new("_UID"), &zero);
    let segment = Name::new(Path::new("_SEG"), &zero);
    let first_bus = Name::new(Path::new("_BBN"), &zero);
    let one = 1u8;
    let coherent = Name::new(Path::new("_CCA"), &one);
    let resources = resources(root);
    let resources = Name::new(
        Path::new("_CRS"),
        &ResourceTemplate::new(resources.iter().map(|resource| &**resource).collect()),
    );
    let routes = routes(root);
    let control = Control;
    let children: Vec<&dyn Aml> = alloc::vec![
        &hid, &cid, &uid, &segment, &first_bus, &coherent, &resources, &routes, &control,
    ];
    Device::new(Path::new("PCI0"), children).to_aml_bytes(&mut devices.aml);
}

/// What the bridge decodes itself and what it passes on.
fn resources(root: &PciRoot) -> Vec<Box<dyn Aml>> {
    const MEMORY: AddressSpaceCacheable = AddressSpaceCacheable::NotCacheable;
    let mut resources: Vec<Box<dyn Aml>> = alloc::vec![
        Box::new(AddressSpace::new_bus_number(0u16, root.last_bus.into())),
        Box::new(IO::new(0xcf8, 0xcf8, 1, 8)),
        Box::new(AddressSpace::new_io(0u16, 0xcf7, None)),
        Box::new(AddressSpace::new_io(0xd00u16, 0xffff, None)),
    ];
    let (start, last) = (root.mem32.start as u32, (root.mem32.end - 1) as u32);
    resources.push(Box::new(AddressSpace::new_memory(
        MEMORY, true, start, last, None,
    )));
    if let Some(range) = root.mem64 {
        let (start, last) = (range.start, range.end - 1);
        resources.push(Box::new(AddressSpace::new_memory(
            MEMORY, true, start, last, None,
        )));
    }
    resources
}

/// `_PRT`: which pin of which device is wired to which interrupt.
fn routes(root: &PciRoot) -> Name {
    let mut routes: Vec<[u64; 4]> = Vec::new();
    for device in 1..DEVICES {
        for pin in 0..PINS {
            let interrupt = root.interrupts[((device + pin) % 4) as usize];
            // All functions of the device; an interrupt instead of a link device.
            routes.push([device << 16 | 0xffff, pin, 0, interrupt.into()]);
        }
    }
    let packages: Vec<Package<'_>> = routes
        .iter()
        .map(|route| Package::new(route.iter().map(|n| n as &dyn Aml).collect()))
        .collect();
    let list = packages.iter().map(|p| p as &dyn Aml).collect();
    Name::new(Path::new("_PRT"), &Package::new(list))
}

/// `_OSC` (PCI Firmware Specification 3.3 §4.5.1): grants what the guest asks
/// for, as far as it is in [`NATIVE_CONTROL`].
struct Control;

impl Aml for Control {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let (first, third) = (Path::new("CDW1"), Path::new("CDW3"));
        let (four, eight) = (4u8, 8u8);
        let buffer = Arg(3);
        let zero = 0u8;
        let field_first = CreateDWordField::new(&first, &buffer, &zero);
        let field_third = CreateDWordField::new(&third, &buffer, &eight);
        let uuid = Uuid::new(HOST_BRIDGE_UUID);
        let ours = Equal::new(&Arg(0), &uuid);
        let granted = And::new(&third, &third, &NATIVE_CONTROL);
        let unknown = Or::new(&first, &first, &four);
        let answer = Return::new(&buffer);
        let known = If::new(&ours, alloc::vec![&field_third, &granted]);
        let other = Else::new(alloc::vec![&unknown]);
        let children: Vec<&dyn Aml> = alloc::vec![&field_first, &known, &other, &answer];
        // Serialized: it makes named fields.
        Method::new(Path::new("_OSC"), 4, true, children).to_aml_bytes(sink);
    }
}

/// The virtio devices on no bus.
pub(super) fn virtio_mmio(list: &[VirtioMmio], devices: &mut Devices) {
    for (number, device) in (0u32..).zip(list) {
        let registers = Memory32Fixed::new(true, device.address, 4096);
        let interrupt = Interrupt::new(true, false, false, true, device.interrupt.into());
        devices.add(
            &format!("VR{number:02X}"),
            Hid::Text("LNRO0005"),
            Some(number),
            &[&registers, &interrupt],
        );
    }
}
