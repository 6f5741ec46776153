//! Guest RAM: laid out as firmware says, backed by one host mapping, never touched before the guest does.

use std::sync::Arc;

use caisson_firmware::MemoryMap;
use caisson_memory::{
    Gpa, GuestMemory, RegionKind,
    host::{HugePages, Mapping, physical_memory},
};

use crate::{MachineError, MemorySpec};

const MIB: u64 = 1 << 20;

/// Gets the memory that `map` calls for.
pub(crate) fn allocate(map: &MemoryMap, spec: &MemorySpec) -> Result<Arc<Mapping>, MachineError> {
    let bytes = map.ram_bytes();
    if let Some(host) = physical_memory()
        && bytes > host
    {
        return Err(MachineError::HostMemory {
            asked: bytes / MIB,
            host: host / MIB,
        });
    }
    let pages = match spec.hugepages {
        caisson_config::HugePages::Auto => HugePages::Transparent,
        caisson_config::HugePages::On => HugePages::Hugetlb,
        caisson_config::HugePages::Off => HugePages::Off,
    };
    let huge = pages == HugePages::Hugetlb;
    Mapping::new("caisson-ram", bytes, pages).map_err(|source| MachineError::Memory {
        mib: bytes / MIB,
        huge,
        source,
    })
}

/// Lays `mapping`, which has as many bytes as `map` has RAM, out in the guest's address space.
pub(crate) fn table(map: &MemoryMap, mapping: &Arc<Mapping>) -> Result<GuestMemory, MachineError> {
    let mut offset = 0;
    let mut regions = Vec::new();
    for range in map.backing() {
        let name = if range.start == 0 { "ram" } else { "high-ram" };
        regions.push(mapping.region(name, Gpa(range.start), offset, range.len(), RegionKind::Ram));
        offset += range.len();
    }
    Ok(GuestMemory::new(regions)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_hole_continues_at_four_gib() {
        let gib = 1 << 30;
        let map = MemoryMap::new(6 * gib, 40).unwrap();
        let spec = MemorySpec {
            bytes: 6 * gib,
            hugepages: caisson_config::HugePages::Off,
        };
        let memory = table(&map, &allocate(&map, &spec).unwrap()).unwrap();
        let ranges: Vec<_> = memory
            .regions()
            .iter()
            .map(|r| (r.gpa().0, r.len()))
            .collect();
        assert_eq!(ranges, [(0, 3 * gib), (4 * gib, 3 * gib)]);
    }

    #[test]
    fn more_than_the_host_has_is_refused_with_both_numbers() {
        let host = physical_memory().unwrap();
        let map = MemoryMap::new((host + (1 << 30)) & !4095, 52).unwrap();
        let spec = MemorySpec {
            bytes: map.ram_bytes(),
            hugepages: caisson_config::HugePages::Auto,
        };
        let error = allocate(&map, &spec).err().unwrap().to_string();
        assert!(error.contains(&(host >> 20).to_string()), "{error}");
    }
}
