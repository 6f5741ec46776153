//! Which pages vCPUs wrote: from the kernel's bitmaps, or from a ring per vCPU.

use std::sync::Arc;

use caisson_hypervisor::{DirtyLog, DirtyMethod, HypervisorError};
use caisson_memory::{DirtyBitmap, PAGE_SIZE, RegionKind};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_dirty_gfn,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use parking_lot::Mutex;

use crate::{
    memslots::Memslots,
    partition::{Shared, enable},
    sys::{self, DirtyRing},
};

/// Lengths of rings. Shorter ones have no room beside what the kernel keeps free
/// for itself (64 entries, and 512 where the processor logs pages).
const LEAST_ENTRIES: u32 = 1024;
const MOST_ENTRIES: u32 = 65536;
/// The address space of system management mode is the upper half.
const SLOT: u32 = 0xffff;
/// Words of a bitmap that are cleared at once. The kernel stops vCPUs that
/// write memory for the time that one call takes: 64 MiB here.
const PIECE: usize = 256;

/// How a partition notes written pages.
pub(crate) enum Log {
    /// In a bitmap per memslot.
    Bitmap {
        /// Whether to read it leaves pages unwatched until they are cleared,
        /// piece by piece (Linux 5.1).
        by_piece: bool,
    },
    /// In a ring per vCPU. Its lock is taken after that of the memslots.
    Rings {
        entries: u32,
        rings: Mutex<Vec<DirtyRing>>,
    },
}

impl Log {
    /// Chooses: a ring if it is asked for, `hardware` runs the guest and there
    /// are such, else the bitmap. No vCPU may exist yet.
    ///
    /// A KVM without hardware executes many instructions of the guest's kernel
    /// before it looks whether a ring is full, and overwrites entries that
    /// nobody has read (seen with kvm_pvm on Linux 6.18).
    pub(crate) fn new(
        kvm: &Kvm,
        vm: &VmFd,
        method: DirtyMethod,
        hardware: bool,
    ) -> Result<Self, HypervisorError> {
        let has = |cap: u32| kvm.check_extension_raw(cap.into());
        let entry = size_of::<kvm_dirty_gfn>();
        if let DirtyMethod::Ring { entries } = method {
            if !entries.is_power_of_two() || !(LEAST_ENTRIES..=MOST_ENTRIES).contains(&entries) {
                return Err(HypervisorError::State(format!(
                    "a list of written pages has {LEAST_ENTRIES} to {MOST_ENTRIES} entries, a power of two, not {entries}"
                )));
            }
            // The second is older (Linux 5.11) and the same on x86.
            let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
            let cap = caps.into_iter().find(|&cap| hardware && has(cap) > 0);
            let most = cap.map_or(0, has).max(0) as usize / entry;
            let len = entries as usize * entry;
            let enabled =
                entries as usize <= most && cap.is_some_and(|cap| enable_ring(vm, cap, len as u64));
            if enabled {
                return Ok(Self::Rings {
                    entries,
                    rings: Mutex::default(),
                });
            }
            tracing::info!(most, entries, "written pages are noted in bitmaps");
        }
        let by_piece = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
        let can = has(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & by_piece.cast_signed() != 0;
        Ok(Self::Bitmap {
            by_piece: can && enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, by_piece.into()).is_ok(),
        })
    }

    /// The next vCPU in order.
    pub(crate) fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), HypervisorError> {
        if let Self::Rings { entries, rings } = self {
            let ring = DirtyRing::of(vcpu, *entries).map_err(|e| HypervisorError::Host {
                what: "mapping a vCPU's list of written pages",
                reason: e.to_string(),
            })?;
            rings.lock().push(ring);
        }
        Ok(())
    }
}

fn enable_ring(vm: &VmFd, cap: u32, len: u64) -> bool {
    enable(vm, cap, len)
        .inspect_err(|error| tracing::info!(%error, "KVM gives no dirty rings"))
        .is_ok()
}

/// Takes what is in `ring` into the bitmaps. Pages of memslots that are gone, or
/// that nobody asks for, are forgotten.
fn empty(ring: &mut DirtyRing, memslots: &Memslots) -> usize {
    ring.harvest(|slot, page| {
        if let Some(bitmap) = memslots.get(slot & SLOT).and_then(|region| region.dirty()) {
            bitmap.mark(page.saturating_mul(PAGE_SIZE), 1);
        }
    })
}

impl Shared {
    /// Empties the ring of vCPU `index`, which is outside of the guest.
    pub(crate) fn drain_ring(&self, index: u32) -> Result<(), HypervisorError> {
        let memslots = self.memslots.lock();
        let Log::Rings { rings, .. } = &self.log else {
            return Err(HypervisorError::State("there is none".into()));
        };
        let mut rings = rings.lock();
        if let Some(ring) = rings.get_mut(index as usize) {
            empty(ring, &memslots);
        }
        sys::reset_dirty_rings(&self.vm).map_err(|e| HypervisorError::Host {
            what: "watching written pages again",
            reason: e.to_string(),
        })
    }

    /// Takes all that vCPUs wrote so far into the bitmaps.
    pub(crate) fn sync_dirty(&self, memslots: &Memslots) {
        match &self.log {
            Log::Bitmap { by_piece } => {
                for (slot, region) in memslots.iter() {
                    if let Some(bitmap) = region.dirty()
                        && region.kind() == RegionKind::Ram
                    {
                        take_bitmap(&self.vm, slot, region.len(), bitmap, *by_piece);
                    }
                }
            }
            Log::Rings { rings, .. } => {
                // Processors that log pages themselves hand them over only there.
                for cell in &self.cells {
                    cell.doorstep.wait_outside();
                }
                let mut found = 0;
                for ring in rings.lock().iter_mut() {
                    found += empty(ring, memslots);
                }
                if found > 0
                    && let Err(error) = sys::reset_dirty_rings(&self.vm)
                {
                    // The entries are not free, and the vCPUs will say so.
                    tracing::warn!(%error, "written pages are not watched again");
                }
            }
        }
    }
}

impl DirtyLog for Shared {
    fn method(&self) -> DirtyMethod {
        match &self.log {
            Log::Bitmap { .. } => DirtyMethod::Bitmap,
            Log::Rings { entries, .. } => DirtyMethod::Ring { entries: *entries },
        }
    }

    fn set_enabled(&self, enabled: bool) -> Result<(), HypervisorError> {
        let mut memslots = self.memslots.lock();
        if memslots.logs_dirty() == enabled {
            return Ok(());
        }
        memslots.log_dirty(&self.vm, enabled)?;
        if !enabled && let Log::Rings { .. } = self.log {
            // What is left there would be found when it is switched on again.
            self.sync_dirty(&memslots);
        }
        Ok(())
    }

    fn sync(&self, bitmap: &Arc<DirtyBitmap>) {
        let memslots = self.memslots.lock();
        if memslots.logs_dirty() {
            self.sync_dirty(&memslots);
            return;
        }
        for (_, region) in memslots.iter() {
            if region.dirty().is_some_and(|own| Arc::ptr_eq(own, bitmap)) {
                bitmap.mark(0, region.len());
            }
        }
    }
}

/// Takes the kernel's bitmap of memslot `slot`, of `len` bytes, into `bitmap`.
fn take_bitmap(vm: &VmFd, slot: u32, len: u64, bitmap: &DirtyBitmap, by_piece: bool) {
    let words = match vm.get_dirty_log(slot, len as usize) {
        Ok(words) => words,
        Err(error) => {
            // What is not known to be clean is dirty.
            tracing::debug!(%error, slot, "no dirty log");
            bitmap.mark(0, len);
            return;
        }
    };
    for (at, &word) in (0u64..).zip(&words) {
        let mut left = word;
        while left != 0 {
            let page = at * 64 + u64::from(left.trailing_zeros());
            bitmap.mark(page * PAGE_SIZE, 1);
            left &= left - 1;
        }
    }
    if !by_piece {
        return;
    }
    // After the pages are marked: a write from now on to one that is not watched
    // yet is one that whoever asked sees when he reads the page.
    let first_pages = (0u64..).step_by(64 * PIECE);
    for (first, piece) in first_pages.zip(words.chunks(PIECE)) {
        if piece.iter().any(|&word| word != 0)
            && let Err(error) = sys::clear_dirty_log(vm, slot, len / PAGE_SIZE, first, piece)
        {
            // They are found dirty again next time.
            tracing::debug!(%error, slot, first, "written pages are not watched again");
        }
    }
}

#[cfg(test)]
mod tests {
    use caisson_hypervisor::{
        Access, BusAnswer, Completion, Exit, IoBus, Partition, PartitionConfig, Vcpu,
    };
    use caisson_memory::{
        Gpa, GuestMemory, MemoryView, Vtl,
        host::{HugePages, Mapping},
    };

    use super::*;
    use crate::{partition::KvmPartition, probe};

    const LEN: u64 = 0x1_0000;

    /// Parks everything: the guest's one port write ends its run.
    struct End;

    impl IoBus for End {
        fn read(&self, _: Access, _: &mut [u8]) -> BusAnswer {
            BusAnswer::Park
        }
        fn write(&self, _: Access, _: &[u8]) -> BusAnswer {
            BusAnswer::Park
        }
        fn eoi(&self, _: Vtl, _: u8) {}
        fn acknowledge_pic(&self) -> u8 {
            0xff
        }
    }

    /// Writes a byte to each of `pages`, in real mode: mov byte [page], 1 for
    /// each; out 0x80, al.
    fn write_to(vcpu: &mut dyn Vcpu, view: &MemoryView, pages: &[u8]) {
        let mut code = Vec::new();
        for page in pages {
            code.extend([0xc6, 0x06, 0, page << 4, 1]);
        }
        code.extend([0xe6, 0x80]);
        view.write(Gpa(0x1000), &code).unwrap();
        let mut state = vcpu.state(Vtl::VTL0).unwrap();
        (state.segments.cs.base, state.segments.cs.selector) = (0, 0);
        state.gprs.rip = 0x1000;
        vcpu.set_state(Vtl::VTL0, &state).unwrap();
        let exit = vcpu.run(&End);
        assert!(matches!(exit, Exit::Pending(_)), "{exit:?}");
        vcpu.complete(Completion::Abandoned).unwrap();
    }

    /// On any host: a few pages, which overrun no ring.
    #[test]
    fn rings_tell_the_pages_that_were_written() {
        let kvm = match probe::open() {
            Ok(kvm) => kvm,
            Err(refusal) => return println!("not tested: {refusal}"),
        };
        let dirty = Arc::new(DirtyBitmap::new(LEN / PAGE_SIZE));
        let mapping = Mapping::new("test", LEN, HugePages::Off).unwrap();
        let region = mapping.region("ram", Gpa(0), 0, LEN, RegionKind::Ram);
        let memory = GuestMemory::new(vec![region.with_dirty(dirty.clone())]).unwrap();
        let view = MemoryView::new(memory.clone());
        let asked = DirtyMethod::Ring { entries: 1024 };
        let config = PartitionConfig {
            dirty: asked,
            ..PartitionConfig::new(1, memory)
        };
        let partition = KvmPartition::on(&kvm, config, true).unwrap();
        let log = &*partition.shared;
        if log.method() != asked {
            return println!("not tested: this host's KVM has no dirty rings");
        }
        let mut vcpu = partition.create_vcpu(0).unwrap();
        log.set_enabled(true).unwrap();
        let mut written = |pages: &[u8]| {
            write_to(&mut *vcpu, &view, pages);
            dirty.harvest();
        };
        written(&[5, 9, 9, 15]);
        log.sync(&dirty);
        assert_eq!(dirty.harvest(), [1 << 5 | 1 << 9 | 1 << 15]);
        log.sync(&dirty);
        assert_eq!(dirty.harvest(), [0], "they are told once");
        written(&[9]);
        log.drain_ring(0).unwrap();
        assert_eq!(dirty.harvest(), [1 << 9], "as where a list is full");
        log.set_enabled(false).unwrap();
        written(&[7]);
        log.set_enabled(true).unwrap();
        written(&[8]);
        log.sync(&dirty);
        assert_eq!(dirty.harvest(), [1 << 8], "nothing while it was off");
        // Often enough that the ring begins anew.
        for round in 0..700u32 {
            written(&[2 + (round % 14) as u8, 3]);
            log.sync(&dirty);
            assert_eq!(dirty.harvest(), [1 << (2 + round % 14) | 1 << 3], "{round}");
        }
    }
}
