//! From a kernel file to memory contents and the first vCPU's registers.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use caisson_firmware::{BootState, ImportData, ImportList, LoadRequest, MemoryMap, Module, load};
use caisson_memory::{MemoryError, MemoryView};

use crate::{MachineError, host};

const MIB: u64 = 1 << 20;
/// A file that the guest starts from. Regular files are read when they are needed, at the start and at each reset, so
/// that the machine does not keep a copy.
#[derive(Clone, Debug)]
pub struct Input {
    path: PathBuf,
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Bytes(Arc<[u8]>),
    File(Arc<File>),
}

/// What an input holds.
enum Contents {
    Shared(Arc<[u8]>),
    Read(Vec<u8>),
}

impl core::ops::Deref for Contents {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Read(bytes) => bytes,
        }
    }
}

impl Input {
    /// Contents that are in memory already; `name` is for messages.
    pub fn bytes(name: impl Into<PathBuf>, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self {
            path: name.into(),
            source: Source::Bytes(bytes.into()),
        }
    }

    /// The file at `path`; `what` is what it is to the machine, for messages. What is not a regular file, such as a
    /// pipe, is read at once, up to `limit` bytes.
    ///
    /// # Errors
    /// The file cannot be opened or read, or is a pipe with more than `limit` bytes.
    pub fn open(what: &'static str, path: &Path, limit: u64) -> Result<Self, MachineError> {
        let fail = |source| MachineError::Input {
            what,
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(fail)?;
        let kind = file.metadata().map_err(fail)?;
        if kind.is_dir() {
            return Err(fail(io::ErrorKind::IsADirectory.into()));
        }
        let source = if kind.is_file() {
            Source::File(Arc::new(file))
        } else {
            let mut bytes = Vec::new();
            (&mut file)
                .take(limit.saturating_add(1))
                .read_to_end(&mut bytes)
                .map_err(fail)?;
            if bytes.len() as u64 > limit {
                return Err(fail(io::Error::other(format!(
                    "it has more than {} MiB",
                    limit / MIB
                ))));
            }
            Source::Bytes(bytes.into())
        };
        Ok(Self {
            path: path.to_owned(),
            source,
        })
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The contents now, at most as many bytes as the machine has memory.
    fn read(&self, what: &'static str, ram: u64) -> Result<Contents, MachineError> {
        let fail = |source| MachineError::Input {
            what,
            path: self.path.clone(),
            source,
        };
        let too_large = |len: u64| MachineError::InputSize {
            what,
            path: self.path.clone(),
            mib: len.div_ceil(MIB),
            ram: ram / MIB,
        };
        match &self.source {
            Source::Bytes(bytes) if bytes.len() as u64 > ram => Err(too_large(bytes.len() as u64)),
            Source::Bytes(bytes) => Ok(Contents::Shared(bytes.clone())),
            Source::File(file) => {
                let len = file.metadata().map_err(fail)?.len();
                if len > ram {
                    return Err(too_large(len));
                }
                let mut bytes = vec![0; usize::try_from(len).map_err(|_| too_large(len))?];
                host::read_exact_at(file, &mut bytes, 0).map_err(fail)?;
                Ok(Contents::Read(bytes))
            }
        }
    }
}

/// What a machine starts.
#[derive(Clone, Debug)]
pub struct BootSpec {
    /// The kernel.
    pub kernel: Input,
    /// The initial RAM disk.
    pub initrd: Option<Input>,
    /// Further modules and the strings that go with them, for kernels that take any.
    pub modules: Vec<(Input, String)>,
    /// The kernel command line.
    pub cmdline: String,
}

/// Everything that a start or a restart of the guest needs.
pub(crate) struct Boot {
    pub(crate) spec: BootSpec,
    pub(crate) map: MemoryMap,
    pub(crate) tables: ImportList<'static>,
    pub(crate) rsdp: Option<u64>,
}

impl Boot {
    /// Puts kernel and tables into memory and returns how the first vCPU starts. Contents of files are let go again.
    pub(crate) fn load(&self, memory: &MemoryView) -> Result<BootState, MachineError> {
        let ram = self.map.ram_bytes();
        let kernel = self.spec.kernel.read("kernel", ram)?;
        let initrd = self
            .spec
            .initrd
            .as_ref()
            .map(|initrd| initrd.read("initrd", ram))
            .transpose()?;
        let modules = self
            .spec
            .modules
            .iter()
            .map(|(module, cmdline)| Ok((module.read("module", ram)?, cmdline)))
            .collect::<Result<Vec<_>, MachineError>>()?;
        let modules: Vec<_> = modules
            .iter()
            .map(|(data, cmdline)| Module { data, cmdline })
            .collect();
        let name = self
            .spec
            .kernel
            .path
            .file_name()
            .map(|name| name.to_string_lossy());
        let request = LoadRequest {
            name: name.as_deref().unwrap_or_default(),
            cmdline: &self.spec.cmdline,
            initrd: initrd.as_deref(),
            modules: &modules,
            acpi_rsdp: self.rsdp,
            ..LoadRequest::new(&self.map)
        };
        let loaded = load(&kernel, &request).map_err(|source| MachineError::Load {
            path: self.spec.kernel.path.clone(),
            source,
        })?;
        write(memory, &self.tables)?;
        write(memory, &loaded.imports)?;
        Ok(loaded.boot)
    }
}

fn write(memory: &MemoryView, imports: &ImportList<'_>) -> Result<(), MachineError> {
    for import in imports {
        let written: Result<(), MemoryError> = match &import.data {
            ImportData::Bytes(bytes) => memory.write(import.gpa, bytes),
            ImportData::Zero(len) => memory.fill(import.gpa, *len, 0),
        };
        written.map_err(|source| MachineError::Import {
            what: import.name,
            source,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use caisson_memory::Gpa;

    use super::*;

    #[test]
    fn inputs_larger_than_memory_and_missing_ones_are_refused_by_name() {
        let input = Input::bytes("big.img", vec![0; 3 << 20]);
        let error = input
            .read("initrd", 2 << 20)
            .err()
            .expect("it grew")
            .to_string();
        assert!(
            error.contains("initrd \"big.img\" has 3 MiB") && error.contains("2 MiB of memory"),
            "{error}"
        );
        let error = Input::open("kernel", Path::new("/nonexistent/k"), 1)
            .unwrap_err()
            .to_string();
        assert!(error.contains("kernel \"/nonexistent/k\""), "{error}");
        assert!(Input::open("kernel", Path::new("/"), 1).is_err());
        assert!(Input::open("initrd", Path::new("/dev/zero"), 1 << 20).is_err());
        let empty = Input::open("initrd", Path::new("/dev/null"), 1 << 20).unwrap();
        assert_eq!(empty.read("initrd", 1).unwrap().len(), 0);
    }

    #[test]
    fn imports_overwrite_what_the_last_guest_left() {
        let map = MemoryMap::new(2 << 20, 40).unwrap();
        let spec = crate::MemorySpec {
            bytes: 2 << 20,
            hugepages: caisson_config::HugePages::Off,
        };
        let memory = MemoryView::new(
            crate::ram::table(&map, &crate::ram::allocate(&map, &spec).unwrap()).unwrap(),
        );
        memory.fill(Gpa(0), 2 << 20, 0xcc).unwrap();
        let mut list = ImportList::new();
        let import = |gpa, data| caisson_firmware::Import {
            name: "x",
            gpa: Gpa(gpa),
            vtl: caisson_memory::Vtl::VTL0,
            kind: caisson_firmware::PageKind::Image,
            measured: false,
            data,
        };
        list.push(&map, import(0x1000, ImportData::Zero(16)))
            .unwrap();
        list.push(&map, import(0x2000, ImportData::Bytes(vec![1, 2].into())))
            .unwrap();
        write(&memory, &list).unwrap();
        let byte = |gpa| memory.read_obj::<u8>(Gpa(gpa)).unwrap();
        assert_eq!((byte(0xfff), byte(0x100f), byte(0x1010)), (0xcc, 0, 0xcc));
        assert_eq!((byte(0x2001), byte(0x2002)), (2, 0xcc));
    }
}
