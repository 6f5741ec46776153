//! The description of a virtual machine, as typed values.
//!
//! One set of types serves every way in: a TOML or JSON file, a command-line flag
//! (`--memory 1G,hugepages=on`), and any program that fills in a [`MachineConfig`]. The option
//! strings are parsed from the same serde derives as the files (see [`options`]), so a field
//! that is added here is at once a key in the file and a key on the command line.
//!
//! Reading a description only says that it is well formed. [`MachineConfig::validate`] says
//! whether it makes sense on a given backend and host, and lists every problem at once.
//!
//! The types need `alloc` only; files are behind the default feature `std`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

mod accel;
mod chardev;
mod cpu;
#[cfg(feature = "std")]
mod cpu_file;
mod debug_exit;
mod disk;
#[cfg(feature = "std")]
mod file;
mod machine;
mod memory;
mod name;
mod net;
pub mod options;
mod path;
mod size;
mod soft_tier;
mod suggest;
mod validate;
mod virtio;

pub use accel::Accel;
pub use chardev::{CharBackend, FileBackend, SocketBackend};
pub use cpu::{Cpu, CpuError, CpuModel};
#[cfg(feature = "std")]
pub use cpu_file::{CpuBase, CpuFile, CpuVendor};
pub use debug_exit::DebugExit;
pub use disk::{Backing, BlockSize, Disk, DiskBus, DiskCache, DiskFormat, Ephemeral};
#[cfg(feature = "std")]
pub use file::{FileError, MAX_FILE_BYTES};
pub use machine::{MachineConfig, OnReboot};
pub use memory::{HugePages, Memory};
pub use name::{ImageName, MachineName, NameError};
pub use net::{Net, NetKind};
pub use options::OptionError;
pub use path::{HostPath, HostPathError};
pub use size::{ByteSize, SizeError};
pub use soft_tier::SoftTier;
pub use suggest::closest;
pub use validate::{Invalid, Limits, Problem};
pub use virtio::VirtioTransport;

/// The values that apply where a description is silent, in one place.
pub mod defaults {
    use crate::ByteSize;

    /// Name of a machine that was not given one.
    pub const NAME: &str = "caisson";
    /// The image that runs when neither an image nor a kernel is named.
    pub const IMAGE: &str = "mini";
    /// vCPUs.
    pub const CPUS: u32 = 1;
    /// Guest RAM.
    pub const MEMORY: ByteSize = ByteSize::from_mib(512);
    /// Kernel command line of a kernel given with `kernel` and no `cmdline`.
    pub const CMDLINE: &str = "console=ttyS0";
    /// I/O port of the debug-exit device, where bare-metal test kernels look for it by custom.
    pub const DEBUG_EXIT_PORT: u16 = 0xf4;
}
