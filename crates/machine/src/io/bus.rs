//! The machine as its vCPUs see it: ports, device memory, and the interrupt controllers' side of the local APICs.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use caisson_device::{AddressMap, Device, Hint, Outcome, Space};
use caisson_hypervisor::{Access, BusAnswer, IoBus, Space as VcpuSpace};
use caisson_memory::Vtl;

use super::{claims::Claims, interrupts::InterruptControllers, slot::DeviceSlot};

/// The widest access that a device is handed; wider ones reach it in pieces.
const DEVICE_ACCESS: usize = 8;

thread_local! {
    /// This vCPU thread's last hits. Harmless where it is stale or another machine's.
    static HINT: Cell<Hint> = Cell::new(Hint::default());
}

/// What nobody answered, by kind.
#[derive(Debug, Default)]
pub(crate) struct Unclaimed {
    counts: [AtomicU64; 4],
    last: [AtomicU64; 4],
}

/// The kinds of unclaimed access, in the order they are counted in.
pub(crate) const UNCLAIMED_KINDS: [&str; 4] =
    ["port-reads", "port-writes", "memory-reads", "memory-writes"];

impl Unclaimed {
    fn note(&self, space: Space, write: bool, address: u64) {
        let kind = usize::from(write) + if space == Space::Mmio { 2 } else { 0 };
        self.counts[kind].fetch_add(1, Ordering::Relaxed);
        self.last[kind].store(address, Ordering::Relaxed);
    }

    /// Per kind: how many there were, and the address of the last.
    pub(crate) fn snapshot(&self) -> [(u64, u64); 4] {
        core::array::from_fn(|kind| {
            (
                self.counts[kind].load(Ordering::Relaxed),
                self.last[kind].load(Ordering::Relaxed),
            )
        })
    }
}

/// Finds the device behind an access without a lock, and locks only that device.
pub(crate) struct MachineBus {
    claims: Arc<Claims>,
    controllers: Arc<dyn InterruptControllers>,
    unclaimed: Unclaimed,
}

impl MachineBus {
    pub(crate) fn new(claims: Arc<Claims>, controllers: Arc<dyn InterruptControllers>) -> Self {
        Self {
            claims,
            controllers,
            unclaimed: Unclaimed::default(),
        }
    }

    /// The claims as they are now.
    pub(crate) fn map(&self) -> Arc<AddressMap<Arc<DeviceSlot>>> {
        arc_swap::Guard::into_inner(self.claims.map())
    }

    /// Who answers, as it changes.
    pub(crate) fn claims(&self) -> &Claims {
        &self.claims
    }

    /// Accesses that nobody answered.
    pub(crate) fn unclaimed(&self) -> &Unclaimed {
        &self.unclaimed
    }

    /// Hands each piece of the access to `claimed` or, where nobody claims it, to `nobody`, until one cannot be
    /// answered yet.
    fn each_piece(
        &self,
        access: Access,
        len: usize,
        write: bool,
        mut claimed: impl FnMut(
            &mut dyn Device,
            caisson_device::Access,
            core::ops::Range<usize>,
        ) -> Outcome,
    ) -> BusAnswer {
        let space = match access.space {
            VcpuSpace::Mmio => Space::Mmio,
            VcpuSpace::Pio => Space::Pio,
        };
        let map = self.claims.map();
        let mut hint = HINT.get();
        let mut answer = BusAnswer::Done;
        for piece in map.pieces(space, access.address.0, len, &mut hint) {
            let Some(range) = piece.claimed else {
                self.unclaimed.note(space, write, piece.address);
                continue;
            };
            let mut start = piece.start;
            while start < piece.end {
                let end = piece.end.min(start + DEVICE_ACCESS);
                let at = range.access(piece.address.wrapping_add((start - piece.start) as u64));
                if claimed(&mut *range.target.lock(), at, start..end) == Outcome::Retry {
                    answer = BusAnswer::Park;
                    break;
                }
                start = end;
            }
            if answer == BusAnswer::Park {
                break;
            }
        }
        HINT.set(hint);
        answer
    }
}

impl IoBus for MachineBus {
    fn read(&self, access: Access, data: &mut [u8]) -> BusAnswer {
        data.fill(0xff);
        self.each_piece(access, data.len(), false, |device, at, bytes| {
            data.get_mut(bytes)
                .map_or(Outcome::Done, |bytes| device.read(at, bytes))
        })
    }

    fn write(&self, access: Access, data: &[u8]) -> BusAnswer {
        self.each_piece(access, data.len(), true, |device, at, bytes| {
            data.get(bytes)
                .map_or(Outcome::Done, |bytes| device.write(at, bytes))
        })
    }

    fn eoi(&self, vtl: Vtl, vector: u8) {
        self.controllers.eoi(vtl, vector);
    }

    fn acknowledge_pic(&self) -> u8 {
        self.controllers.acknowledge_pic()
    }
}
