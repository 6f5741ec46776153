//! The PC around the vCPUs: which devices there are, what they are wired to, and how the guest is told of them.

mod ports;
mod tables;
mod virtio;

pub(crate) use tables::tables;
pub(crate) use virtio::ConsoleDevice;

use std::{sync::Arc, task::Waker};

use caisson_chipset::{
    acpi_pm::{AcpiPm, AcpiPmConfig, AcpiPmHandles, SCI_LINE},
    debug::{DebugCon, DebugExit, PostCode},
    fw_cfg::{FwCfg, ItemError, Items, keys},
    i8042::{I8042, KEYBOARD_LINE, MOUSE_LINE},
    interrupts::{InterruptHub, IntrOutput},
    pit::{Pit, PitHandles},
    power::ResetPorts,
    rtc::{RTC_LINE, Rtc, RtcConfig, RtcHandles},
    uart::{PC_PORTS, Uart, UartHandles},
};
use caisson_config::{DiskBus, VirtioTransport};
use caisson_device::{
    AddressMap, AddressMapBuilder, ByteSink, Claimant, Clock, Device, LineSink, Lines, MsiSink,
    PowerSink, ResetKind, Timer, TimerKey, TimerService, WallClock,
};
use caisson_firmware::{MemoryMap, layout};
use caisson_hypervisor::Partition;
use caisson_memory::{MemoryView, Vtl};
use caisson_nvme::NvmeConfig;
use caisson_virtio::{
    blk::{Blk, BlkConfig},
    console::Console,
    net::{Net, NetConfig},
    rng::Rng,
};

use self::{ports::SendOnly, virtio::VirtioBus};
use crate::{
    DiskSpec, MachineError, NetSpec, SERIAL_PORTS,
    io::{
        claims::Claims,
        doorbells::DoorbellService,
        interrupts::InterruptControllers,
        slot::{DeviceSlot, Slot},
        sources::HostEntropy,
    },
    serial::SerialDevice,
};

/// What a device may affect, as the machine provides it.
pub(crate) struct PcHandles {
    pub(crate) msi: Arc<dyn MsiSink>,
    pub(crate) intr: Arc<dyn IntrOutput>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) timers: Arc<dyn TimerService>,
    pub(crate) power: Arc<dyn PowerSink>,
    pub(crate) wall: Arc<dyn WallClock>,
    pub(crate) memory: MemoryView,
    pub(crate) ports: Vec<PortHandles>,
    pub(crate) claims: Arc<Claims>,
    pub(crate) doorbells: Option<Arc<DoorbellService>>,
}

/// What the device of a port may affect.
pub(crate) struct PortHandles {
    /// Takes what the guest sends.
    pub(crate) output: Arc<dyn ByteSink>,
    /// Woken when a device that took fewer bytes than it was offered has room.
    pub(crate) room: Waker,
}

/// Drives LINT0 of the first vCPU.
pub(crate) struct Lint0(pub(crate) Arc<dyn Partition>);

impl IntrOutput for Lint0 {
    fn set_intr(&self, level: bool) {
        self.0.set_extint(Vtl::VTL0, level);
    }
}

/// The interrupt controllers as the end of all lines.
struct HubLines(Arc<Slot<InterruptHub>>);

impl LineSink for HubLines {
    fn set(&self, line: u32, source: u8, level: bool) {
        self.0.lock().set_line(line, source, level);
    }
}

impl InterruptControllers for Slot<InterruptHub> {
    fn eoi(&self, vtl: Vtl, vector: u8) {
        if vtl == Vtl::VTL0 {
            self.lock().end_of_interrupt(vector);
        }
    }

    fn acknowledge_pic(&self) -> u8 {
        self.lock().acknowledge()
    }
}

/// The devices of a machine, in the order in which they are reset, saved and restored: interrupt controllers first,
/// so that what the others drive afterwards arrives.
pub(crate) struct Pc {
    hub: Arc<Slot<InterruptHub>>,
    pm: Arc<Slot<AcpiPm>>,
    devices: Vec<Arc<DeviceSlot>>,
    ports: Vec<Arc<dyn SerialDevice>>,
    consoles: Vec<Arc<dyn ConsoleDevice>>,
    virtio: VirtioBus,
}

struct Builder<'a> {
    handles: &'a PcHandles,
    devices: Vec<Arc<DeviceSlot>>,
}

impl Builder<'_> {
    fn add<D: Device + 'static>(&mut self, device: D) -> Arc<Slot<D>> {
        let slot = Slot::new(device);
        self.devices.push(slot.clone());
        slot
    }

    /// The position of the device that is added next.
    fn next_number(&self) -> u32 {
        self.devices.len() as u32
    }

    /// A timer of the device that is added next.
    fn timer(&self, id: u32) -> Timer {
        let key = TimerKey {
            device: self.next_number(),
            id,
        };
        Timer::new(self.handles.timers.clone(), key)
    }
}

/// Which of the optional devices there are. Ports are indices into [`PcHandles::ports`].
pub(crate) struct PcSpec<'a> {
    pub(crate) vcpus: u32,
    pub(crate) map: &'a MemoryMap,
    pub(crate) serial: [Option<usize>; SERIAL_PORTS],
    pub(crate) debugcon: Option<usize>,
    pub(crate) debug_exit: Option<u16>,
    /// Whether there is a PCI bus.
    pub(crate) pci: bool,
    /// What carries the virtio devices.
    pub(crate) transport: VirtioTransport,
    pub(crate) rng: bool,
    pub(crate) disks: Vec<DiskSpec>,
    pub(crate) nets: Vec<NetSpec>,
    /// The ports of the virtio consoles.
    pub(crate) consoles: Vec<usize>,
}

/// Line of the interval timer.
const PIT_LINE: u32 = 0;

/// Makes all devices. None has been reset or restored yet.
pub(crate) fn assemble(spec: &PcSpec<'_>, handles: &PcHandles) -> Result<Pc, MachineError> {
    let mut pc = Builder {
        handles,
        devices: Vec::new(),
    };
    let hub = pc.add(InterruptHub::new(handles.msi.clone(), handles.intr.clone()));
    let mut lines = Lines::new(Arc::new(HubLines(hub.clone())));
    let mut ports: Vec<Arc<dyn SerialDevice>> = Vec::new();
    ports.resize_with(handles.ports.len(), || Arc::new(SendOnly));

    pc.add(Pit::new(PitHandles {
        line: lines.line(PIT_LINE)?,
        clock: handles.clock.clone(),
        timer: pc.timer(0),
    }));
    let [periodic, update] = RtcHandles::TIMER_IDS.map(|id| pc.timer(id));
    let rtc = RtcHandles {
        line: lines.line(RTC_LINE)?,
        clock: handles.clock.clone(),
        wall: handles.wall.clone(),
        periodic,
        update,
    };
    pc.add(Rtc::new(rtc, rtc_config(spec.map)));
    pc.add(I8042::new(
        lines.line(KEYBOARD_LINE)?,
        lines.line(MOUSE_LINE)?,
        handles.power.clone(),
    ));
    let pm = AcpiPmHandles {
        sci: lines.line(SCI_LINE)?,
        clock: handles.clock.clone(),
        timer: pc.timer(0),
        power: handles.power.clone(),
    };
    let pm = pc.add(AcpiPm::new(AcpiPmConfig::default(), pm));
    let power = handles.power.clone();
    pc.add(match spec.pci {
        true => ResetPorts::without_reset_control(power),
        false => ResetPorts::new(power),
    });
    pc.add(PostCode::new());
    let items = fw_cfg_items(spec).map_err(|error| MachineError::Tables(error.to_string()))?;
    pc.add(FwCfg::new(items, handles.memory.clone()));
    for (index, (place, (base, line))) in spec.serial.iter().zip(PC_PORTS).enumerate() {
        let Some((number, port)) =
            place.and_then(|number| Some((number, handles.ports.get(number)?)))
        else {
            continue;
        };
        let uart = UartHandles {
            line: lines.line(line)?,
            output: port.output.clone(),
            room: Some(port.room.clone()),
        };
        let uart = pc.add(Uart::new(format!("uart{index}"), base, uart));
        if let Some(place) = ports.get_mut(number) {
            *place = uart;
        }
    }
    if let Some(port) = spec.debugcon.and_then(|number| handles.ports.get(number)) {
        pc.add(DebugCon::new(DebugCon::PORT, port.output.clone()));
    }
    if let Some(port) = spec.debug_exit {
        pc.add(DebugExit::new(port, handles.power.clone()));
    }
    let mut virtio = VirtioBus::new(spec, &mut pc)?;
    if spec.rng {
        let rng = Rng::new(Box::new(HostEntropy));
        virtio.add("virtio-rng", rng, &mut lines, &mut pc)?;
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        let queues = u16::try_from(spec.vcpus).unwrap_or(u16::MAX);
        let (id, backend) = (disk.id.clone(), disk.backend.clone());
        match disk.bus {
            DiskBus::Virtio => {
                let blk = Blk::new(backend, BlkConfig { queues, id });
                virtio.add(&format!("virtio-blk{index}"), blk, &mut lines, &mut pc)?;
            }
            DiskBus::Nvme => {
                let config = NvmeConfig { queues, serial: id };
                virtio.add_nvme(
                    &format!("nvme{index}"),
                    (backend, config),
                    &mut lines,
                    &mut pc,
                )?;
            }
        }
    }
    for (index, net) in spec.nets.iter().enumerate() {
        let card = Net::new(net.backend.clone(), NetConfig { mac: net.mac });
        virtio.add(&format!("virtio-net{index}"), card, &mut lines, &mut pc)?;
    }
    let mut consoles: Vec<Arc<dyn ConsoleDevice>> = Vec::new();
    for (index, number) in spec.consoles.iter().enumerate() {
        let Some(port) = handles.ports.get(*number) else {
            continue;
        };
        let console = Console::new(port.output.clone(), Some(port.room.clone()));
        let name = format!("virtio-console{index}");
        let console = Arc::new(virtio.add(&name, console, &mut lines, &mut pc)?);
        consoles.push(console.clone());
        if let Some(place) = ports.get_mut(*number) {
            *place = console;
        }
    }
    Ok(Pc {
        hub,
        pm,
        devices: pc.devices,
        ports,
        consoles,
        virtio,
    })
}

/// How RAM is divided, as the clock's memory tells it.
fn rtc_config(map: &MemoryMap) -> RtcConfig {
    let (mut low_memory, mut high_memory) = (0, 0);
    for range in map.backing() {
        if range.start < layout::HIGH_RAM {
            low_memory += range.len();
        } else {
            high_memory += range.len();
        }
    }
    RtcConfig {
        low_memory,
        high_memory,
    }
}

/// What the firmware configuration interface tells of the machine.
fn fw_cfg_items(spec: &PcSpec<'_>) -> Result<Items, ItemError> {
    let vcpus = u16::try_from(spec.vcpus).unwrap_or(u16::MAX);
    let mut items = Items::new();
    items.add_u64(keys::RAM_SIZE, spec.map.ram_bytes())?;
    items.add_u16(keys::NO_GRAPHIC, 1)?;
    items.add_u16(keys::CPU_COUNT, vcpus)?;
    items.add_u16(keys::MAX_CPUS, vcpus)?;
    Ok(items)
}

impl Pc {
    /// All devices, in the order in which they are reset, saved and restored.
    pub(crate) fn devices(&self) -> &[Arc<DeviceSlot>] {
        &self.devices
    }

    /// The devices behind [`PcHandles::ports`], in the same order.
    pub(crate) fn ports(&self) -> &[Arc<dyn SerialDevice>] {
        &self.ports
    }

    /// The virtio consoles, in their order.
    pub(crate) fn consoles(&self) -> &[Arc<dyn ConsoleDevice>] {
        &self.consoles
    }

    /// The interrupt controllers.
    pub(crate) fn controllers(&self) -> Arc<dyn InterruptControllers> {
        self.hub.clone()
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        self.pm.lock().press_power_button();
    }

    /// Resets every device.
    pub(crate) fn reset(&self, kind: ResetKind) {
        for slot in &self.devices {
            slot.lock().reset(kind);
        }
    }

    /// Where each device answers.
    pub(crate) fn address_map(&self) -> Result<AddressMap<Arc<DeviceSlot>>, MachineError> {
        let mut map = AddressMapBuilder::new();
        for slot in &self.devices {
            for (region, claim) in (0..).zip(slot.lock().claims()) {
                let claimant = Claimant {
                    owner: slot.name().clone(),
                    region,
                    label: claim.label,
                };
                map.claim(claim.range, claimant, slot.clone())?;
            }
        }
        Ok(map.build())
    }
}
