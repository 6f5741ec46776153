//! What the guest starts from.
//!
//! Everything here is a pure function from bytes and a [`MemoryMap`] to an
//! [`ImportList`] (what to put where in guest memory) and a [`BootState`] (the
//! registers of the first vCPU). Nothing touches guest memory, so the same
//! lists serve direct boot, a re-boot, an IGVM writer and a launch digest.
//!
//! * [`load`] takes a kernel file of any accepted kind (see [`KernelKind`]),
//! * [`acpi::build`] and [`smbios::build`] make the tables that describe the machine.
//!
//! # Which protocol a file is started with
//! A file may be several things at once. [`load`] takes the first that applies:
//!
//! 1. **Linux bzImage**: the `HdrS` header of the Linux/x86 boot protocol, at
//!    its 64-bit entry (protocol 2.12 or newer).
//! 2. **Linux vmlinux**: a 64-bit x86 ELF executable that is recognisably
//!    Linux: a `Linux` ELF note, a Xen `GUEST_OS` note saying `linux`, or the
//!    version banner, and an entry point inside a loaded segment. It gets the
//!    same hand-over as a bzImage. This goes before PVH, which Linux kernels
//!    also offer, because the 64-bit entry skips the mode switches.
//! 3. **PVH**: an x86 ELF with the Xen `PHYS32_ENTRY` note. Before Multiboot,
//!    because it also hands over the RSDP.
//! 4. **Multiboot 1**: the magic in the first 8 KiB, as ELF (32- or 64-bit) or
//!    by the address fields of the header.
//!
//! [`LoadRequest::protocol`] overrides the choice. Anything else is refused
//! with [`LoadError::NotAKernel`], which says what the file is.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

pub mod acpi;
mod boot_state;
mod bytes;

mod elf;
mod error;
mod identify;
mod import;
mod linux;
mod load;
mod memory_map;
mod multiboot;
mod paging;
mod pvh;
pub mod smbios;
mod stage;

pub use boot_state::{BOOT_GDT, BootMode, BootState, CODE_SELECTOR, DATA_SELECTOR, TSS_SELECTOR};
pub use error::{LoadError, Size};
pub use identify::FileKind;
pub use import::{Import, ImportData, ImportError, ImportList, PageKind};
pub use load::{KernelKind, LoadRequest, Loaded, Module, load};
pub use memory_map::{E820Entry, E820Kind, GpaRange, MemoryMap, MemoryMapError, layout};
