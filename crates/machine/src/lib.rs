//! A virtual machine: assembled from its description, run, held, looked at, saved and ended.
//!
//! This is the only crate that knows both hypervisor backends and devices. [`MachineSpec`] says what to make,
//! [`Machine`] is the result:
//!
//! ```no_run
//! # fn hypervisor() -> std::sync::Arc<dyn caisson_hypervisor::Hypervisor> { unimplemented!() }
//! use caisson_machine::{BootSpec, Input, Machine, MachineSpec};
//!
//! let config = caisson_config::MachineConfig { serial: vec![caisson_config::CharBackend::Null], ..Default::default() };
//! let kernel = Input::open("kernel", "vmlinuz".as_ref(), 64 << 20)?;
//! let boot = BootSpec { kernel, initrd: None, modules: vec![], cmdline: "console=ttyS0".into() };
//! let machine = Machine::new(MachineSpec::from_config(&config, hypervisor(), boot, || None)?)?;
//! machine.start()?;
//! println!("{}", machine.wait());
//! # Ok::<(), caisson_machine::MachineError>(())
//! ```
//!
//! # Threads
//!
//! | thread | does |
//! |---|---|
//! | `vcpuN` | runs guest code and, on its exit path, the device that the guest accesses |
//! | `devices` | delivers timers, lets devices make progress, moves input into serial ports |
//! | `doorbells` | lets virtio devices make progress when their doorbells ring, on backends that have them |
//! | `com1`, `hvc0`, … | hands a port's output to its host end, which may block |
//! | `supervisor` | deals with power-off, reset, crashes and `stop`, and ends the others |
//!
//! A device is called by one thread at a time (there is a lock around each). A thread that holds a device may go on to
//! the interrupt controllers and to the queues of the other threads, never to another device, so no circle of waiting
//! can form. The PCI configuration ports are the one exception: they go on to the function that they address, and no
//! function ever goes on to them.
//!
//! # How a guest's end is told
//!
//! Power-off ends the machine; a reset restarts it from its kernel, or ends it, as `on-reboot` says. A triple fault and
//! a kernel panic are crashes, and [`OnCrash`] says what they do. A panic is recognised by what Linux prints on its
//! console before the reset that `panic=-1` makes it ask for: this needs no driver in the guest and works from the
//! kernel's first line on. A kernel that does not reset after a panic stands still, as on hardware.
//!
//! # Hosts
//!
//! What differs between the operating systems of hosts is in `host` and, for memory, in
//! [`caisson_memory::host`]. Only Linux's part has been run; those of macOS and Windows are type-checked.
#![cfg_attr(not(windows), forbid(unsafe_code))]
// `host` calls Windows for what the standard library lacks.
#![cfg_attr(windows, deny(unsafe_code))]

mod boot;
mod command;
mod cpu;
mod error;
mod host;
mod inspect;
mod io;
mod machine;
mod outcome;
mod pc;
mod ram;
mod run;
mod serial;
mod snapshot;
mod spec;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use boot::{BootSpec, Input};
pub use caisson_memory::host::physical_memory as host_memory;
pub use command::{CommandEnd, CommandEnding, CommandSession, command};
pub use cpu::CpuSpec;
pub use error::MachineError;
pub use machine::{Machine, Phase};
pub use outcome::{Fault, Outcome};
pub use serial::{Closed, HostEnd, NullEnd, SerialInput, SocketEnd, StreamEnd};
pub use snapshot::{Elapsed, SavedMachine, Snapshot, SnapshotError};
pub use spec::{DiskSpec, MachineSpec, MemorySpec, NetSpec, OnCrash, SERIAL_PORTS};
