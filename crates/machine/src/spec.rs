//! What a machine is made from: the description with everything it names resolved.

use std::sync::Arc;

use caisson_block::BlockBackend;
use caisson_config::{CharBackend, DiskBus, HugePages, MachineConfig, OnReboot, VirtioTransport};
use caisson_hypervisor::Hypervisor;
use caisson_packet::{MacAddress, PacketBackend};

use crate::{
    BootSpec, CpuSpec, MachineError,
    serial::{HostEnd, NullEnd, SocketEnd, StreamEnd},
};

/// How many serial ports a PC has.
pub const SERIAL_PORTS: usize = 4;

/// Guest RAM and what backs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySpec {
    /// How much, a multiple of the page size.
    pub bytes: u64,
    /// Which of the host's pages back it.
    pub hugepages: HugePages,
}

/// A disk.
#[derive(Clone)]
pub struct DiskSpec {
    /// What the guest can tell it from others by: at most 20 bytes of it.
    pub id: String,
    /// What it is in front of.
    pub backend: Arc<dyn BlockBackend>,
    /// The device that the guest sees.
    pub bus: DiskBus,
}

/// A virtio network card.
#[derive(Clone)]
pub struct NetSpec {
    /// Its address.
    pub mac: MacAddress,
    /// The network that it is in.
    pub backend: Arc<dyn PacketBackend>,
}

/// What happens when the guest crashes: its kernel panics and asks for a reset, or a vCPU triple-faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCrash {
    /// The machine ends and says so: who started it learns of the crash, and a kernel that crashes at each start does
    /// not do so for ever.
    #[default]
    End,
    /// It restarts as after any other reset, as hardware does.
    Restart,
}

/// Everything that [`Machine::new`](crate::Machine::new) needs.
pub struct MachineSpec {
    /// The machine's name, for messages and thread names.
    pub name: String,
    /// What runs its vCPUs.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// How many vCPUs, at least 1.
    pub vcpus: u32,
    /// Which processor each is.
    pub cpu: CpuSpec,
    /// RAM.
    pub memory: MemorySpec,
    /// What it starts.
    pub boot: BootSpec,
    /// The host's ends of COM1 to COM4; a port without one does not exist.
    pub serial: [Option<Box<dyn HostEnd>>; SERIAL_PORTS],
    /// The host's end of the debug console at port 0xE9.
    pub debugcon: Option<Box<dyn HostEnd>>,
    /// The port at which a write ends the machine.
    pub debug_exit: Option<u16>,
    /// What carries the virtio devices. There is a PCI bus if there are devices for it.
    pub virtio: VirtioTransport,
    /// Whether there is a virtio entropy device, fed by the host's random numbers.
    pub rng: bool,
    /// The disks.
    pub disks: Vec<DiskSpec>,
    /// The network cards.
    pub nets: Vec<NetSpec>,
    /// The host's ends of the virtio consoles (`hvc0`, … in Linux).
    pub consoles: Vec<Box<dyn HostEnd>>,
    /// What a reboot by the guest does.
    pub on_reboot: OnReboot,
    /// What a crash of the guest does.
    pub on_crash: OnCrash,
}

impl MachineSpec {
    /// Whether there are virtio devices.
    pub(crate) fn has_virtio(&self) -> bool {
        let disk = |disk: &DiskSpec| disk.bus == DiskBus::Virtio;
        self.rng
            || !self.consoles.is_empty()
            || !self.nets.is_empty()
            || self.disks.iter().any(disk)
    }

    /// Whether there is a PCI bus: it is there for the devices on it.
    pub(crate) fn has_pci(&self) -> bool {
        let nvme = |disk: &DiskSpec| disk.bus == DiskBus::Nvme;
        self.virtio == VirtioTransport::Pci && self.has_virtio() || self.disks.iter().any(nvme)
    }

    /// The machine that `config` describes, starting `boot`. Ports that `config` gives to standard input and output
    /// get what `stdio` makes; it is called at most once. Files and sockets are opened here.
    ///
    /// # Errors
    /// A file or socket that cannot be opened, or a need for standard input and output where there is none.
    pub fn from_config(
        config: &MachineConfig,
        hypervisor: Arc<dyn Hypervisor>,
        boot: BootSpec,
        stdio: impl FnOnce() -> Option<Box<dyn HostEnd>>,
    ) -> Result<Self, MachineError> {
        let mut stdio = Some(stdio);
        let mut open = |backend: &CharBackend, port: &str| {
            open(backend, port, || stdio.take().and_then(|make| make()))
        };
        let mut serial = [const { None }; SERIAL_PORTS];
        for (index, (place, backend)) in serial.iter_mut().zip(&config.serial).enumerate() {
            *place = Some(open(backend, &format!("COM{}", index + 1))?);
        }
        let debugcon = config
            .debugcon
            .as_ref()
            .map(|backend| open(backend, "the debug console"))
            .transpose()?;
        let consoles = config
            .console
            .iter()
            .enumerate()
            .map(|(index, backend)| open(backend, &format!("console {index}")))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            name: config.name.to_string(),
            hypervisor,
            vcpus: config.cpus,
            cpu: CpuSpec::open(&config.cpu)?,
            memory: MemorySpec {
                bytes: config.memory.size.bytes(),
                hugepages: config.memory.hugepages,
            },
            boot,
            serial,
            debugcon,
            disks: Vec::new(),
            nets: Vec::new(),
            consoles,
            virtio: config.virtio,
            rng: config.rng,
            debug_exit: config.debug_exit.as_ref().map(|debug_exit| debug_exit.port),
            on_reboot: config.on_reboot,
            on_crash: OnCrash::default(),
        })
    }
}

fn open(
    backend: &CharBackend,
    port: &str,
    stdio: impl FnOnce() -> Option<Box<dyn HostEnd>>,
) -> Result<Box<dyn HostEnd>, MachineError> {
    Ok(match backend {
        CharBackend::Stdio => stdio().ok_or_else(|| MachineError::NoStdio { port: port.into() })?,
        CharBackend::Null => Box::new(NullEnd),
        CharBackend::File(file) => {
            let path = file.path.as_path();
            let end = StreamEnd::file(path, file.append);
            Box::new(end.map_err(|source| MachineError::Serial {
                port: port.into(),
                path: path.to_owned(),
                source,
            })?)
        }
        CharBackend::Socket(socket) => {
            let path = socket.path.as_path();
            Box::new(SocketEnd::listen(path).map_err(|source| {
                let (port, path) = (port.into(), path.to_owned());
                match source.kind() {
                    std::io::ErrorKind::AddrInUse => MachineError::SocketInUse { port, path },
                    _ => MachineError::Serial { port, path, source },
                }
            })?)
        }
    })
}
