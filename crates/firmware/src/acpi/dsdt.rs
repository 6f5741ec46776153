//! The Differentiated System Description Table: the devices, in AML.

use alloc::{format, vec::Vec};

use acpi_tables::{
    Aml, AmlSink,
    aml::{Device, EISAName, IO, Name, Package, Path, ResourceTemplate, Scope},
};

use super::{AcpiSpec, pci, table};

/// Port and interrupt of COM1 to COM4.
const COM: [(u16, u8); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

/// An ISA interrupt: edge-triggered and active high (6.4.2.1). Unlike the
/// extended descriptor it names an ISA interrupt and not a global one, so the
/// overrides in the MADT apply to it.
struct IsaIrq {
    irq: u8,
    shared: bool,
}

impl Aml for IsaIrq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const EDGE: u8 = 1;
        const SHARED: u8 = 1 << 4;
        sink.byte(if self.shared { 0x23 } else { 0x22 });
        sink.word(1 << self.irq);
        if self.shared {
            sink.byte(EDGE | SHARED);
        }
    }
}

/// `count` I/O ports at `port`.
fn io(port: u16, count: u8) -> IO {
    IO::new(port, port, 1, count)
}

/// A device's identifier: one of Plug and Play, or a string.
pub(super) enum Hid {
    Pnp(&'static str),
    Text(&'static str),
}

impl Aml for Hid {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        match self {
            Self::Pnp(id) => EISAName::new(id).to_aml_bytes(sink),
            Self::Text(id) => id.to_aml_bytes(sink),
        }
    }
}

/// The children of `\_SB`.
pub(super) struct Devices {
    pub(super) aml: Vec<u8>,
}

impl Devices {
    /// `name` has four characters, `uid` tells devices with one `hid` apart.
    pub(super) fn add(&mut self, name: &str, hid: Hid, uid: Option<u32>, resources: &[&dyn Aml]) {
        let hid = Name::new(Path::new("_HID"), &hid);
        let uid = uid.map(|n| Name::new(Path::new("_UID"), &n));
        let crs = (!resources.is_empty()).then(|| {
            Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(resources.to_vec()),
            )
        });
        let mut children: Vec<&dyn Aml> = alloc::vec![&hid];
        children.extend(uid.iter().map(|n| n as &dyn Aml));
        children.extend(crs.iter().map(|n| n as &dyn Aml));
        Device::new(Path::new(name), children).to_aml_bytes(&mut self.aml);
    }
}

/// Builds the table.
pub(super) fn build(spec: &AcpiSpec) -> Vec<u8> {
    let mut devices = Devices { aml: Vec::new() };
    for n in 0..spec.apic_ids.len() as u32 {
        devices.add(&format!("C{n:03X}"), Hid::Text("ACPI0007"), Some(n), &[]);
    }
    legacy(spec, &mut devices);
    serial(spec, &mut devices);
    if let Some(port) = spec.fw_cfg_port {
        devices.add("FWCF", Hid::Text("QEMU0002"), None, &[&io(port, 12)]);
    }

    if let Some(root) = &spec.pci {
        pci::root(root, &mut devices);
    }
    pci::virtio_mmio(&spec.virtio_mmio, &mut devices);

    let mut body = Vec::new();
    let off = spec.power.s5_sleep_type;
    let zero = 0u8;
    let s5 = Package::new(alloc::vec![&off, &zero, &zero, &zero]);
    Name::new(Path::new("_S5_"), &s5).to_aml_bytes(&mut body);
    body.extend(Scope::raw(Path::new("_SB_"), devices.aml));
    // Revision 2: integers have 64 bits.
    table(*b"DSDT", 2, &body)
}

/// What every PC has on its ISA bus, and where the power management registers are.
fn legacy(spec: &AcpiSpec, devices: &mut Devices) {
    let irq = |irq| IsaIrq { irq, shared: false };
    devices.add(
        "PIC_",
        Hid::Pnp("PNP0000"),
        None,
        &[&io(0x20, 2), &io(0xa0, 2), &io(0x4d0, 2), &irq(2)],
    );
    devices.add("TIMR", Hid::Pnp("PNP0100"), None, &[&io(0x40, 4), &irq(0)]);
    if spec.rtc {
        devices.add("RTC_", Hid::Pnp("PNP0B00"), None, &[&io(0x70, 2), &irq(8)]);
    }
    if let Some(i8042) = spec.i8042 {
        // The keyboard owns the controller's ports; a mouse alone has to.
        let ports: [&dyn Aml; 2] = [&io(0x60, 1), &io(0x64, 1)];
        if i8042.keyboard {
            devices.add(
                "KBD_",
                Hid::Pnp("PNP0303"),
                None,
                &[ports[0], ports[1], &irq(1)],
            );
        }
        match (i8042.mouse, i8042.keyboard) {
            (true, true) => devices.add("MOU_", Hid::Pnp("PNP0F13"), None, &[&irq(12)]),
            (true, false) => devices.add(
                "MOU_",
                Hid::Pnp("PNP0F13"),
                None,
                &[ports[0], ports[1], &irq(12)],
            ),
            (false, _) => {}
        }
    }
    let pm = &spec.power;
    let ports = [
        Some(io(pm.event_port, 4)),
        Some(io(pm.control_port, 2)),
        Some(io(pm.timer_port, 4)),
        spec.gpe0_port.map(|port| io(port, 4)),
    ];
    let ports: Vec<&dyn Aml> = ports.iter().flatten().map(|p| p as &dyn Aml).collect();
    devices.add("PWRM", Hid::Pnp("PNP0C02"), None, &ports);
}

fn serial(spec: &AcpiSpec, devices: &mut Devices) {
    let present = |n: usize| spec.com_ports.get(n).copied().unwrap_or(false);
    for (n, (port, irq)) in COM.into_iter().enumerate() {
        if !present(n) {
            continue;
        }
        let shared = COM
            .iter()
            .enumerate()
            .any(|(m, c)| m != n && present(m) && c.1 == irq);
        let resources: [&dyn Aml; 2] = [&io(port, 8), &IsaIrq { irq, shared }];
        let number = n as u32 + 1;
        devices.add(
            &format!("COM{number}"),
            Hid::Pnp("PNP0501"),
            Some(number),
            &resources,
        );
    }
}
