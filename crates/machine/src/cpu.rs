//! The processor that a machine's guests see: which it is, and whether the backend can give it here.

use caisson_config::{Cpu, CpuBase, CpuFile, CpuModel, CpuVendor, closest};
use caisson_firmware::MemoryMap;
use caisson_hypervisor::{
    Hypervisor,
    x86::{ADDRESS_BITS, Base, CpuidTable, Feature, Level, Processor, Vendor},
};

use crate::MachineError;

/// The most bits that a physical address has (Intel SDM Vol. 3 §4.1.4).
const MOST_ADDRESS_BITS: u8 = 52;

/// The processor that guests see.
#[derive(Clone, Debug, Default)]
pub struct CpuSpec {
    /// As the user wrote it, for messages.
    name: String,
    /// `None`: the backend's default, which is the host's.
    processor: Option<Processor>,
}

impl CpuSpec {
    /// The host's processor, as far as the backend can give it.
    pub fn host() -> Self {
        Self::default()
    }

    /// A fixed model.
    pub fn model(level: Level) -> Self {
        Self::described(level.name(), Processor::new(Base::Level(level)))
    }

    /// A processor that the caller describes; `name` is for messages.
    pub fn described(name: impl Into<String>, processor: Processor) -> Self {
        Self {
            name: name.into(),
            processor: Some(processor),
        }
    }

    /// What `cpu` names. A file is read here.
    ///
    /// # Errors
    /// A file that cannot be read, or names features that do not exist.
    pub fn open(cpu: &Cpu) -> Result<Self, MachineError> {
        match cpu {
            Cpu::Model(model) => Ok(Self::model(level(*model))),
            Cpu::File(path) => {
                let file = CpuFile::load(path.as_path())
                    .map_err(|e| MachineError::CpuFile(e.to_string()))?;
                let processor = describe(&file).map_err(|what| {
                    MachineError::CpuFile(format!("in config file \"{path}\": {what}"))
                })?;
                Ok(Self::described(path.as_str(), processor))
            }
            // `Cpu` may grow; what this build does not know it cannot have been given.
            _ => Ok(Self::host()),
        }
    }

    /// The CPUID of `vcpus` of it with `ram` bytes of memory on `hypervisor`; `None` where that is the backend's own
    /// default.
    ///
    /// # Errors
    /// [`MachineError::Cpu`] with everything that the backend cannot give on this host.
    pub fn table(
        &self,
        hypervisor: &dyn Hypervisor,
        vcpus: u32,
        ram: u64,
    ) -> Result<Option<CpuidTable>, MachineError> {
        let Some(processor) = &self.processor else {
            return Ok(None);
        };
        let offered = hypervisor.offers(vcpus)?;
        let width = (ADDRESS_BITS..MOST_ADDRESS_BITS)
            .find(|bits| MemoryMap::new(ram, *bits).is_ok())
            .unwrap_or(MOST_ADDRESS_BITS);
        let table = processor.table(&offered, vcpus, width).map_err(|source| {
            MachineError::CpuDescription {
                cpu: self.name.clone(),
                source,
            }
        })?;
        let lacking = table.lacking(&offered);
        if lacking.is_empty() {
            return Ok(Some(table));
        }
        Err(MachineError::Cpu {
            cpu: self.name.clone(),
            backend: hypervisor.name(),
            lacking,
        })
    }
}

fn level(model: CpuModel) -> Level {
    match model {
        CpuModel::V1 => Level::V1,
        CpuModel::V2 => Level::V2,
        CpuModel::V3 => Level::V3,
        CpuModel::V4 => Level::V4,
    }
}

fn describe(file: &CpuFile) -> Result<Processor, String> {
    let features = |names: &[String]| -> Result<Vec<Feature>, String> {
        names.iter().map(|name| feature(name)).collect()
    };
    Ok(Processor {
        add: features(&file.add)?,
        remove: features(&file.remove)?,
        vendor: file.vendor.map(|vendor| match vendor {
            CpuVendor::GenuineIntel => Vendor::Intel,
            CpuVendor::AuthenticAMD => Vendor::Amd,
        }),
        brand: file.brand.clone(),
        family: file.family,
        model: file.model,
        stepping: file.stepping,
        address_bits: file.address_bits,
        ..Processor::new(match file.base {
            CpuBase::Host => Base::Host,
            CpuBase::Model(model) => Base::Level(level(model)),
        })
    })
}

fn feature(name: &str) -> Result<Feature, String> {
    Feature::named(name).ok_or_else(|| {
        let plain = |name: &str| name.replace(['_', '.', '-'], "").to_lowercase();
        let alike = Feature::names().find(|known| plain(known) == plain(name));
        let hint = match alike.or_else(|| closest(name, Feature::names())) {
            Some(meant) => format!("did you mean \"{meant}\"?"),
            None => "features have the names that /proc/cpuinfo shows".into(),
        };
        format!("there is no feature \"{name}\"; {hint}")
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing;

    fn file(text: &str) -> Result<CpuSpec, MachineError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpu.toml");
        fs::write(&path, text).unwrap();
        CpuSpec::open(&Cpu::File(path.to_str().unwrap().parse().unwrap()))
    }

    #[test]
    fn a_file_becomes_a_processor() {
        let spec = file(
            "base = \"v2\"\nadd = [\"aes\", \"sha-ni\"]\nremove = [\"cx16\"]\nvendor = \"AuthenticAMD\"\n\
             brand = \"mine\"\nfamily = 25\nmodel = 1\nstepping = 2\naddress-bits = 40\n",
        )
        .unwrap();
        let processor = spec.processor.unwrap();
        assert_eq!(processor.base, Base::Level(Level::V2));
        assert_eq!(processor.add[1].name(), Some("sha_ni"));
        assert_eq!(processor.remove[0].name(), Some("cx16"));
        assert_eq!(processor.vendor, Some(Vendor::Amd));
        assert_eq!(
            (processor.family, processor.address_bits),
            (Some(25), Some(40))
        );
        assert_eq!(processor.brand.as_deref(), Some("mine"));
    }

    #[test]
    fn misspelled_features_get_the_nearest_one() {
        for (text, part) in [
            (
                "base = \"v2\"\nadd = [\"sse42\"]",
                "no feature \"sse42\"; did you mean \"sse4_2\"?",
            ),
            (
                "base = \"v3\"\nremove = [\"avx3\"]",
                "did you mean \"avx\"?",
            ),
            ("base = \"v3\"\nadd = [\"telepathy\"]", "/proc/cpuinfo"),
            ("base = \"v3\"\nadd = [\"telepathy\"]", "cpu.toml"),
        ] {
            let error = file(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_lacking_is_said_before_anything_is_made() {
        let backend = testing::scripted_hypervisor();
        let spec = CpuSpec::model(Level::V1);
        let error = spec.table(&*backend, 1, 1 << 30).unwrap_err().to_string();
        // The scripted backend has a processor without any feature.
        for part in ["x86-64-v1", "scripted", "sse2", "nonstop_tsc", "--cpu host"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(
            CpuSpec::host()
                .table(&*backend, 1, 1 << 30)
                .unwrap()
                .is_none()
        );
        let wrong = file("base = \"v1\"\nadd = [\"avx2\"]").unwrap();
        let error = wrong.table(&*backend, 1, 1 << 30).unwrap_err().to_string();
        assert!(error.contains("\"avx2\" needs \"avx\""), "{error}");
    }

    #[test]
    fn large_memories_get_wider_addresses() {
        struct Everything;
        impl Hypervisor for Everything {
            fn name(&self) -> &'static str {
                "everything"
            }
            fn probe(&self) -> caisson_hypervisor::Probe {
                unreachable!("nobody asks")
            }
            fn max_vcpus(&self) -> u32 {
                64
            }
            fn offers(
                &self,
                vcpus: u32,
            ) -> Result<CpuidTable, caisson_hypervisor::HypervisorError> {
                let most = Processor::new(Base::Level(Level::V4));
                Ok(most.table(&CpuidTable::default(), vcpus, 42).unwrap())
            }
            fn create_partition(
                &self,
                _: caisson_hypervisor::PartitionConfig,
            ) -> Result<
                std::sync::Arc<dyn caisson_hypervisor::Partition>,
                caisson_hypervisor::HypervisorError,
            > {
                unreachable!("nobody asks")
            }
        }
        let width = |ram| {
            let table = CpuSpec::model(Level::V3).table(&Everything, 2, ram);
            table.map(|t| t.unwrap().get(0x8000_0008, 0)[0] & 0xff)
        };
        assert_eq!(width(64 << 30).unwrap(), 39);
        assert_eq!(width(1 << 40).unwrap(), 41);
        let error = width(8 << 40).unwrap_err().to_string();
        assert!(
            error.contains("44-bit physical addresses (here 42)"),
            "{error}"
        );
    }
}
