//! Virtio devices, and the bus that carries them.
//!
//! With PCI, device numbers are given in the order of assembly from 1 on (0 is the host bridge), pins are wired to the
//! I/O APIC's inputs 16 to 19 as the tables say, and ranges lie one after another from the start of the window below
//! 4 GiB, where a guest without paging reaches them too. Without, each device has a page of registers and shares one of
//! the inputs 20 to 23.

use std::sync::Arc;

use caisson_block::BlockBackend;
use caisson_chipset::config_ports::ConfigPorts;
use caisson_config::VirtioTransport;
use caisson_device::Lines;
use caisson_firmware::{
    acpi::{PciRoot, VirtioMmio as MmioEntry},
    layout,
};
use caisson_nvme::{Nvme, NvmeConfig, NvmeHandles};
use caisson_pci::{FunctionAddress, FunctionHandles, HostBridge, Place};
use caisson_virtio::{
    VirtioDevice,
    console::Console,
    mmio::{self, MmioHandles, VirtioMmio},
    pci::{PciHandles, Ranges, VirtioPci},
};

use super::{Builder, PcHandles, PcSpec};
use crate::{
    MachineError,
    io::{
        claims::{DeviceClaims, EcamAccess},
        slot::Slot,
    },
    serial::SerialDevice,
};

/// The first interrupt input of virtio devices without PCI, and how many they share.
const MMIO_LINES: (u32, u32) = (20, 4);

/// What carries virtio devices, and what it has to tell the guest.
#[derive(Default)]
pub(crate) struct VirtioBus {
    /// The PCI host bridge, if there is one.
    pub(crate) root: Option<PciRoot>,
    /// The devices that are not on it.
    pub(crate) mmio: Vec<MmioEntry>,
    transport: VirtioTransport,
    functions: u8,
    next_range: u64,
}

/// A virtio device in its place.
pub(super) enum Attached<D> {
    Pci(Arc<Slot<VirtioPci<D>>>),
    Mmio(Arc<Slot<VirtioMmio<D>>>),
}

impl VirtioBus {
    /// The bus of `spec`, with a host bridge and configuration ports if there is PCI.
    pub(super) fn new(spec: &PcSpec<'_>, pc: &mut Builder<'_>) -> Result<Self, MachineError> {
        let mut bus = Self {
            transport: spec.transport,
            ..Self::default()
        };
        if spec.pci {
            let root = PciRoot {
                mem64: spec.map.pci_memory_high(),
                ..PciRoot::default()
            };
            let base = u64::from(root.ecam);
            let functions = EcamAccess {
                claims: Arc::downgrade(&pc.handles.claims),
                base,
            };
            let power = pc.handles.power.clone();
            pc.add(ConfigPorts::new(Arc::new(functions), power));
            pc.add(HostBridge::new(base)?);
            bus.next_range = root.mem32.start;
            bus.root = Some(root);
        }
        Ok(bus)
    }

    /// Puts `device` on the bus as `name`.
    pub(super) fn add<D: VirtioDevice + 'static>(
        &mut self,
        name: &str,
        device: D,
        lines: &mut Lines,
        pc: &mut Builder<'_>,
    ) -> Result<Attached<D>, MachineError> {
        match self.root.clone() {
            Some(root) if self.transport == VirtioTransport::Pci => {
                self.add_function(name, device, &root, lines, pc)
            }
            _ => self.add_registers(name, device, lines, pc),
        }
    }

    fn add_function<D: VirtioDevice + 'static>(
        &mut self,
        name: &str,
        device: D,
        root: &PciRoot,
        lines: &mut Lines,
        pc: &mut Builder<'_>,
    ) -> Result<Attached<D>, MachineError> {
        let (place, function) = self.next_function(root, lines, pc)?;
        let queues = device.queue_sizes().len() as u16;
        let ranges = Ranges {
            registers: self.range(Ranges::REGISTERS_LEN),
            msix: self.range(Ranges::msix_len(queues)),
        };
        let handles = PciHandles {
            function,
            memory: pc.handles.memory.clone(),
            doorbells: doorbells(pc),
        };
        let function = VirtioPci::new(name, device, place, ranges, handles)?;
        Ok(Attached::Pci(pc.add(function)))
    }

    /// The next place on the bus, and what the function there may affect.
    fn next_function(
        &mut self,
        root: &PciRoot,
        lines: &mut Lines,
        pc: &Builder<'_>,
    ) -> Result<(Place, FunctionHandles), MachineError> {
        let number = self.functions + 1;
        let address = FunctionAddress::new(number, 0).ok_or(MachineError::TooManyDevices {
            most: 31,
            bus: "PCI bus",
        })?;
        self.functions = number;
        let handles = FunctionHandles {
            claims: Arc::new(DeviceClaims {
                claims: Arc::downgrade(&pc.handles.claims),
                device: pc.next_number(),
            }),
            msi: pc.handles.msi.clone(),
            line: Some(lines.line(root.interrupt_of(number).into())?),
        };
        let place = Place {
            address,
            ecam: root.ecam.into(),
        };
        Ok((place, handles))
    }

    /// Puts an NVMe controller on the PCI bus as `name`.
    pub(super) fn add_nvme(
        &mut self,
        name: &str,
        (backend, config): (Arc<dyn BlockBackend>, NvmeConfig),
        lines: &mut Lines,
        pc: &mut Builder<'_>,
    ) -> Result<(), MachineError> {
        let root = self
            .root
            .clone()
            .ok_or_else(|| MachineError::Tables("an NVMe controller needs a PCI bus".to_owned()))?;
        let (place, function) = self.next_function(&root, lines, pc)?;
        let handles = NvmeHandles {
            function,
            memory: pc.handles.memory.clone(),
            clock: pc.handles.clock.clone(),
        };
        let registers = self.range(Nvme::registers_len(&config));
        let nvme = Nvme::new(name, backend, config, place, registers, handles)?;
        pc.add(nvme);
        Ok(())
    }

    /// The next free `len` bytes of the window below 4 GiB. A bus of 31 devices takes a small part of it.
    fn range(&mut self, len: u64) -> u64 {
        let base = self.next_range.next_multiple_of(len);
        self.next_range = base + len;
        base
    }

    fn add_registers<D: VirtioDevice + 'static>(
        &mut self,
        name: &str,
        device: D,
        lines: &mut Lines,
        pc: &mut Builder<'_>,
    ) -> Result<Attached<D>, MachineError> {
        let number = self.mmio.len() as u64;
        let address = layout::VIRTIO_MMIO.start + number * mmio::REGISTERS_LEN;
        if address >= layout::VIRTIO_MMIO.end {
            return Err(MachineError::TooManyDevices {
                most: (layout::VIRTIO_MMIO.len() / mmio::REGISTERS_LEN) as u32,
                bus: "window for virtio registers",
            });
        }
        let (first, count) = MMIO_LINES;
        let interrupt = first + number as u32 % count;
        let handles = MmioHandles {
            line: lines.line(interrupt)?,
            memory: pc.handles.memory.clone(),
            doorbells: doorbells(pc),
        };
        self.mmio.push(MmioEntry {
            address: address as u32,
            interrupt: interrupt as u8,
        });
        let device = VirtioMmio::new(name, device, address, handles);
        Ok(Attached::Mmio(pc.add(device)))
    }
}

/// The doorbells of the device that is added next.
fn doorbells(pc: &Builder<'_>) -> Option<Arc<dyn caisson_device::DoorbellSink>> {
    let PcHandles { doorbells, .. } = pc.handles;
    let service = doorbells.as_ref()?;
    Some(service.of_device(pc.next_number()))
}

impl<D: VirtioDevice> Attached<D> {
    fn update<T>(&self, change: impl FnOnce(&mut D) -> T) -> T {
        match self {
            Self::Pci(slot) => slot.lock().update(change),
            Self::Mmio(slot) => slot.lock().update(change),
        }
    }
}

/// A virtio console from outside.
pub(crate) trait ConsoleDevice: SerialDevice {
    /// Changes the size that the guest is told, in characters.
    fn set_size(&self, columns: u16, rows: u16);
}

impl SerialDevice for Attached<Console> {
    fn offer(&self, bytes: &[u8]) -> usize {
        self.update(|console| console.receive(bytes))
    }

    fn output_ready(&self) {
        self.update(|_| ());
    }
}

impl ConsoleDevice for Attached<Console> {
    fn set_size(&self, columns: u16, rows: u16) {
        self.update(|console| console.set_size(columns, rows));
    }
}
