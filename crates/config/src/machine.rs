//! The whole description.

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::{
    Accel, CharBackend, Cpu, DebugExit, Disk, HostPath, ImageName, MachineName, Memory, Net,
    NetKind, SoftTier, VirtioTransport, defaults,
};

/// One virtual machine, as its owner describes it.
///
/// Every field has a default, so an empty file is a description: the default image on one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct MachineConfig {
    /// What the machine is called.
    pub name: MachineName,
    /// The image to run. Without it and without `kernel`: [`defaults::IMAGE`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageName>,
    /// The kernel to run instead of an image: bzImage, ELF `vmlinux` (PVH too), or Multiboot 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<HostPath>,
    /// The initial RAM disk; the first module of a Multiboot kernel. With an image, it replaces
    /// the image's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<HostPath>,
    /// The kernel command line. With `kernel` it is the whole line
    /// ([`defaults::CMDLINE`] if absent); with an image it follows the image's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// vCPUs, from 1 to what the backend can run.
    pub cpus: u32,
    /// The processor that the guest sees.
    pub cpu: Cpu,
    /// What runs the vCPUs.
    pub accel: Accel,
    /// How far the software CPU goes with code that runs often.
    pub soft_tier: SoftTier,
    /// What a guest's reboot does.
    pub on_reboot: OnReboot,
    /// A command for the guest to run instead of a shell: the program and its arguments. The
    /// image's init runs it, so it goes with an image, not with a kernel.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// The serial ports COM1 to COM4, in this order. Ports that are not listed do not exist.
    pub serial: Vec<CharBackend>,
    /// The virtio consoles, `hvc0` and so on in Linux. At most 8.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub console: Vec<CharBackend>,
    /// The disks, in the order in which the guest finds them. At most 16.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<Disk>,
    /// The network cards, in the order in which the guest finds them. At most 4.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<Net>,
    /// Whether there is a virtio entropy device, fed by the host's random numbers.
    pub rng: bool,
    /// What carries the virtio devices.
    pub virtio: VirtioTransport,
    /// Guest RAM.
    pub memory: Memory,
    /// The debug console: what the guest writes to I/O port 0xe9.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debugcon: Option<CharBackend>,
    /// The debug-exit device of test kernels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debug_exit: Option<DebugExit>,
}

/// What the machine does when its guest reboots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// Start again, as hardware does.
    #[default]
    Restart,
    /// End, as if the guest had powered off.
    Stop,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            name: MachineName::default(),
            image: None,
            kernel: None,
            initrd: None,
            cmdline: None,
            cpus: defaults::CPUS,
            cpu: Cpu::default(),
            memory: Memory::default(),
            accel: Accel::default(),
            soft_tier: SoftTier::default(),
            serial: alloc::vec![CharBackend::Stdio],
            console: Vec::new(),
            disk: Vec::new(),
            net: Vec::new(),
            rng: false,
            virtio: VirtioTransport::default(),
            debugcon: None,
            debug_exit: None,
            command: Vec::new(),
            on_reboot: OnReboot::default(),
        }
    }
}

impl MachineConfig {
    /// The image to run, or `None` when a kernel is given instead.
    pub fn effective_image(&self) -> Option<ImageName> {
        match (&self.image, &self.kernel) {
            (Some(image), _) => Some(image.clone()),
            (None, None) => Some(ImageName::default()),
            (None, Some(_)) => None,
        }
    }

    /// The network cards that there are.
    pub fn cards(&self) -> impl Iterator<Item = &Net> {
        self.net.iter().filter(|net| net.kind != NetKind::None)
    }

    /// Every host path in the description, to be changed.
    pub fn paths_mut(&mut self) -> impl Iterator<Item = &mut HostPath> {
        self.kernel
            .iter_mut()
            .chain(self.initrd.iter_mut())
            .chain(self.cpu.path_mut())
            .chain(self.serial.iter_mut().filter_map(CharBackend::path_mut))
            .chain(self.console.iter_mut().filter_map(CharBackend::path_mut))
            .chain(self.debugcon.iter_mut().filter_map(CharBackend::path_mut))
            .chain(self.disk.iter_mut().flat_map(Disk::paths_mut))
            .chain(self.net.iter_mut().filter_map(|net| net.pcap.as_mut()))
    }
}
