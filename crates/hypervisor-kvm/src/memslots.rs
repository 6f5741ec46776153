//! Guest memory in the kernel's terms: memslots.

use std::collections::BTreeMap;

use caisson_hypervisor::HypervisorError;
use caisson_memory::{GuestMemory, Region, RegionKind};
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
};
use kvm_ioctls::VmFd;

use crate::sys::GuestMemfd;

/// What makes two memslots the same: address, length, host address, kind.
type Key = (u64, u64, usize, bool);

fn key(region: &Region) -> Key {
    (
        region.gpa().0,
        region.len(),
        region.host().as_ptr() as usize,
        region.kind() == RegionKind::Rom,
    )
}

/// The memslots of one partition.
pub(crate) struct Memslots {
    limit: u32,
    slots: BTreeMap<u32, Region>,
    log_dirty: bool,
}

impl Memslots {
    /// None yet; `limit` is how many the kernel allows.
    pub(crate) fn new(limit: u32) -> Self {
        Self {
            limit,
            slots: BTreeMap::new(),
            log_dirty: false,
        }
    }

    /// Makes the guest's memory `memory`: what is gone is unmapped first, what
    /// is the same is left alone.
    pub(crate) fn set(&mut self, vm: &VmFd, memory: &GuestMemory) -> Result<(), HypervisorError> {
        let wanted: Vec<Key> = memory.regions().iter().map(key).collect();
        let gone: Vec<u32> = self
            .slots
            .iter()
            .filter(|(_, region)| !wanted.contains(&key(region)))
            .map(|(&slot, _)| slot)
            .collect();
        for slot in gone {
            if let Some(region) = self.slots.get(&slot) {
                tell(vm, slot, region, 0, 0)?;
            }
            self.slots.remove(&slot);
        }
        for region in memory.regions() {
            let known = key(region);
            if let Some(slot) = self.slots.values_mut().find(|held| key(held) == known) {
                // The same memory; its bitmap may be another.
                *slot = region.clone();
                continue;
            }
            let slot = (0..self.limit)
                .find(|slot| !self.slots.contains_key(slot))
                .ok_or_else(|| HypervisorError::Map {
                    gpa: region.gpa(),
                    reason: format!("KVM has only {} memslots", self.limit),
                })?;
            tell(vm, slot, region, self.flags(region), region.len())?;
            self.slots.insert(slot, region.clone());
        }
        Ok(())
    }

    fn flags(&self, region: &Region) -> u32 {
        match region.kind() {
            RegionKind::Rom => KVM_MEM_READONLY,
            RegionKind::Ram if self.log_dirty => KVM_MEM_LOG_DIRTY_PAGES,
            RegionKind::Ram => 0,
        }
    }

    /// Switches the kernel's dirty log on or off, or leaves it as it was.
    pub(crate) fn log_dirty(&mut self, vm: &VmFd, on: bool) -> Result<(), HypervisorError> {
        let before = std::mem::replace(&mut self.log_dirty, on);
        let told = self.tell_flags(vm);
        if told.is_err() {
            self.log_dirty = before;
            // What the kernel accepted before it accepts again.
            let _ = self.tell_flags(vm);
        }
        told
    }

    fn tell_flags(&self, vm: &VmFd) -> Result<(), HypervisorError> {
        self.slots.iter().try_for_each(|(&slot, region)| {
            tell(vm, slot, region, self.flags(region), region.len())
        })
    }

    /// Whether the kernel's dirty log is on.
    pub(crate) fn logs_dirty(&self) -> bool {
        self.log_dirty
    }

    /// What memslot `slot` maps.
    pub(crate) fn get(&self, slot: u32) -> Option<&Region> {
        self.slots.get(&slot)
    }

    /// The memslots and what they map.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Region)> {
        self.slots.iter().map(|(&slot, region)| (slot, region))
    }
}

fn tell(
    vm: &VmFd,
    slot: u32,
    region: &Region,
    flags: u32,
    len: u64,
) -> Result<(), HypervisorError> {
    let guest_phys_addr = region.gpa().0;
    let userspace_addr = region.host().as_ptr() as u64;
    let done = match region.mapping().downcast_ref::<GuestMemfd>() {
        Some(_) if flags & KVM_MEM_LOG_DIRTY_PAGES != 0 => {
            return Err(HypervisorError::Host {
                what: "noting written pages",
                reason: format!(
                    "KVM does not watch guest_memfd (\"{}\"); give the machine memory of the process",
                    region.name()
                ),
            });
        }
        Some(memory) => {
            let argument = kvm_userspace_memory_region2 {
                slot,
                flags: flags | KVM_MEM_GUEST_MEMFD,
                guest_phys_addr,
                memory_size: len,
                userspace_addr,
                guest_memfd_offset: 0,
                guest_memfd: memory.descriptor().cast_unsigned(),
                ..Default::default()
            };
            // SAFETY: as below; the descriptor is open as long as the region.
            unsafe { vm.set_user_memory_region2(argument) }
        }
        None => {
            let argument = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr,
                memory_size: len,
                userspace_addr,
            };
            // SAFETY: the region is host memory that no Rust reference points into,
            // and `Memslots` holds it, and with it the mapping, until the slot is
            // deleted or the virtual machine is gone.
            unsafe { vm.set_user_memory_region(argument) }
        }
    };
    done.map_err(|e| HypervisorError::Map {
        gpa: region.gpa(),
        reason: format!(
            "KVM refuses {} MiB of \"{}\": {e}",
            region.len() >> 20,
            region.name()
        ),
    })
}
