//! The entry point: choosing a boot protocol.

use core::fmt;

use crate::{
    BootState, FileKind, ImportList, LoadError, MemoryMap, elf::Elf, identify::identify, linux,
    multiboot, pvh, stage::Stage,
};

/// A way to start a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum KernelKind {
    /// A Linux bzImage, at its 64-bit entry point.
    LinuxBzImage,
    /// A Linux `vmlinux` for x86-64, at its 64-bit entry point.
    LinuxElf,
    /// An ELF kernel with a PVH entry point.
    Pvh,
    /// A Multiboot 1 kernel.
    Multiboot,
}

impl KernelKind {
    /// All of them in words, for error messages.
    pub(crate) const ACCEPTED: &'static str = "a Linux bzImage or vmlinux for x86-64, \
        an ELF kernel with a PVH note, and a Multiboot 1 kernel";
}

impl fmt::Display for KernelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LinuxBzImage => "Linux bzImage",
            Self::LinuxElf => "Linux vmlinux",
            Self::Pvh => "PVH kernel",
            Self::Multiboot => "Multiboot kernel",
        })
    }
}

/// A file that is handed to the kernel beside its initrd.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// Its contents.
    pub data: &'a [u8],
    /// The string that goes with it; by convention its path and arguments.
    pub cmdline: &'a str,
}

/// What to start a kernel with.
#[derive(Clone, Copy, Debug)]
pub struct LoadRequest<'a> {
    /// The machine's memory.
    pub memory_map: &'a MemoryMap,
    /// The kernel's name. Multiboot kernels find it as the first word of their
    /// command line, as GRUB puts it there; left out where it is empty.
    pub name: &'a str,
    /// The kernel command line, without NUL.
    pub cmdline: &'a str,
    /// The initial RAM disk. For PVH and Multiboot it is the first module.
    pub initrd: Option<&'a [u8]>,
    /// Further modules, for PVH and Multiboot.
    pub modules: &'a [Module<'a>],
    /// Guest physical address of the RSDP. Linux and PVH are told it; a
    /// Multiboot kernel searches the BIOS area.
    pub acpi_rsdp: Option<u64>,
    /// Start it this way, or refuse.
    pub protocol: Option<KernelKind>,
}

impl<'a> LoadRequest<'a> {
    /// A request with nothing but the memory.
    pub const fn new(memory_map: &'a MemoryMap) -> Self {
        Self {
            memory_map,
            name: "",
            cmdline: "",
            initrd: None,
            modules: &[],
            acpi_rsdp: None,
            protocol: None,
        }
    }
}

/// A kernel ready to be put in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded<'a> {
    /// What goes where.
    pub imports: ImportList<'a>,
    /// The first vCPU at entry.
    pub boot: BootState,
    /// How it is started.
    pub kind: KernelKind,
}

/// Lays out `kernel` in the memory of `request`. See the crate's documentation
/// for how a protocol is chosen.
///
/// # Errors
/// A file of no accepted kind, a damaged one, and anything that does not fit.
pub fn load<'a>(kernel: &'a [u8], request: &LoadRequest<'a>) -> Result<Loaded<'a>, LoadError> {
    let kind = match request.protocol {
        Some(kind) => kind,
        None => choose(kernel)?,
    };
    let mut stage = Stage::new(request.memory_map);
    let boot = match kind {
        KernelKind::LinuxBzImage => linux::bzimage::load(kernel, request, &mut stage),
        KernelKind::LinuxElf => linux::vmlinux::load(kernel, request, &mut stage),
        KernelKind::Pvh => pvh::load(kernel, request, &mut stage),
        KernelKind::Multiboot => multiboot::load(kernel, request, &mut stage),
    }?;
    stage.bios_data_area()?;
    Ok(Loaded {
        imports: stage.into_imports(),
        boot,
        kind,
    })
}

fn choose(kernel: &[u8]) -> Result<KernelKind, LoadError> {
    if linux::bzimage::is_bzimage(kernel) {
        return Ok(KernelKind::LinuxBzImage);
    }
    let elf = Elf::parse(kernel);
    if let Ok(elf) = &elf {
        if linux::vmlinux::is_linux(elf) {
            return Ok(KernelKind::LinuxElf);
        }
        if pvh::entry_note(elf).is_some() {
            return Ok(KernelKind::Pvh);
        }
    }
    if multiboot::header::find(kernel).is_some() {
        return Ok(KernelKind::Multiboot);
    }
    match elf {
        // A damaged x86 executable: say what is damaged rather than that it is ELF.
        Err(e) if crate::elf::is_x86_executable(kernel) => Err(e.for_elf(kernel)),
        _ => Err(LoadError::NotAKernel {
            found: identify(kernel),
        }),
    }
}

impl FileKind {
    /// What `file` is, if it is no kernel that [`load`] would try to start.
    pub fn of(file: &[u8]) -> Option<Self> {
        match choose(file) {
            Ok(_) => None,
            Err(_) => Some(identify(file)),
        }
    }
}
