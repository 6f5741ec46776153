//! The routing table of a partition: which number (GSI) stands for which message.
//!
//! Two kinds of routes share it. The first numbers are of *level-triggered
//! messages*: the kernel tells of the end of an interrupt (KVM_EXIT_IOAPIC_EOI)
//! only for those that it finds there (KVM API §7.5). They are noted as such
//! messages come, so the I/O APIC needs to know no route. The numbers above
//! belong to *interrupt events*.

use std::collections::{BTreeMap, VecDeque};

use caisson_hypervisor::{HypervisorError, Msi, x86::ApicState};
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use crate::sys;

/// Messages with trigger mode level.
const LEVEL: u32 = 1 << 15;

/// Words of [`ApicState::regs`] (Intel SDM Vol. 3 §12.4.1): the APIC id (in the upper byte, or in x2APIC
/// mode the whole word), and the first of eight in service, of level-triggered ones, and of requested ones.
const APIC_ID: usize = 0x02;
const ISR: usize = 0x10;
const TMR: usize = 0x18;
const IRR: usize = 0x20;

/// How many routes the kernel looks through for ends of interrupts: more than
/// an I/O APIC has inputs, for those that were reprogrammed while an interrupt
/// was in service. A guest that goes on reprogramming forgets the message that
/// was not raised for longest.
pub(crate) const LEVEL_ROUTES: u32 = 64;

/// Whether any local APIC hears a message to this address (Intel SDM Vol. 3
/// §12.11.1; bits 63:40 are the upper destination bits of the extended format).
pub(crate) fn is_heard(msi: Msi) -> bool {
    msi.address & 0xff_fff0_0000 == 0xfee0_0000
}

/// The routing table of one partition.
pub(crate) struct Routes {
    /// The highest GSI that this kernel has, and one.
    limit: u32,
    table: Mutex<Table>,
}

#[derive(Clone, Default)]
struct Table {
    /// The one raised longest ago comes first.
    levels: VecDeque<Msi>,
    events: BTreeMap<u32, Msi>,
}

impl Table {
    fn tell(&self, vm: &VmFd) -> Result<(), HypervisorError> {
        let levels = (0..).zip(self.levels.iter().copied());
        let events = self.events.iter().map(|(&gsi, &msi)| (gsi, msi));
        let entries: Vec<_> = levels
            .chain(events)
            .map(|(gsi, msi)| entry(gsi, msi))
            .collect();
        let refused = |reason: String| HypervisorError::Host {
            what: "routing an interrupt",
            reason,
        };
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| refused(format!("{} routes: {e:?}", entries.len())))?;
        vm.set_gsi_routing(&table)
            .map_err(|e| refused(sys::error(e).to_string()))
    }
}

impl Routes {
    /// An empty table; the kernel has `limit` GSIs (KVM_CAP_IRQ_ROUTING).
    pub(crate) fn new(limit: u32) -> Self {
        Self {
            limit,
            table: Mutex::default(),
        }
    }

    /// Makes `change`, or leaves the table as it was.
    fn change(
        &self,
        vm: &VmFd,
        table: &mut Table,
        change: impl FnOnce(&mut Table),
    ) -> Result<(), HypervisorError> {
        let mut changed = table.clone();
        change(&mut changed);
        changed.tell(vm)?;
        *table = changed;
        Ok(())
    }

    /// Sees to it that the ends of the level-triggered interrupts are told that a local APIC, which
    /// is restored, has accepted and not ended: whoever noted their messages was another process.
    pub(crate) fn announce_accepted(&self, vm: &VmFd, apic: &ApicState) {
        let word = |n: usize| apic.regs.get(n).copied().unwrap_or(0);
        let id = word(APIC_ID).rotate_left(8) & 0xff | word(APIC_ID) & 0xff;
        for n in 0..8 {
            let mut accepted = (word(ISR + n) | word(IRR + n)) & word(TMR + n);
            while accepted != 0 {
                let vector = 32 * n as u32 + accepted.trailing_zeros();
                accepted &= accepted - 1;
                let address = 0xfee0_0000 | u64::from(id) << 12;
                let data = LEVEL | vector;
                self.announce(vm, Msi { address, data });
            }
        }
    }

    /// Sees to it that the end of `msi` is told, if that matters.
    pub(crate) fn announce(&self, vm: &VmFd, msi: Msi) {
        if msi.data & LEVEL == 0 {
            return;
        }
        let mut table = self.table.lock();
        if let Some(at) = table.levels.iter().position(|known| *known == msi) {
            // The kernel does not care for the order.
            if at + 1 < table.levels.len() {
                table.levels.remove(at);
                table.levels.push_back(msi);
            }
            return;
        }
        let told = self.change(vm, &mut table, |table| {
            if table.levels.len() >= LEVEL_ROUTES as usize {
                table.levels.pop_front();
            }
            table.levels.push_back(msi);
        });
        if let Err(error) = told {
            tracing::warn!(%error, ?msi, "a level-triggered interrupt may hang");
        }
    }

    /// A GSI of its own for `msi`.
    ///
    /// # Errors
    /// All are taken; the host out of memory.
    pub(crate) fn claim(&self, vm: &VmFd, msi: Msi) -> Result<u32, HypervisorError> {
        let mut table = self.table.lock();
        let gsi = (LEVEL_ROUTES..self.limit)
            .find(|gsi| !table.events.contains_key(gsi))
            .ok_or_else(|| HypervisorError::Host {
                what: "routing an interrupt",
                reason: format!(
                    "KVM has {} routes, and all are in use; give the machine fewer devices or queues",
                    self.limit
                ),
            })?;
        self.change(vm, &mut table, |table| {
            table.events.insert(gsi, msi);
        })?;
        Ok(gsi)
    }

    /// Has `gsi`, which was claimed, stand for `msi` from now on.
    ///
    /// # Errors
    /// The host out of memory; all is as it was.
    pub(crate) fn redirect(&self, vm: &VmFd, gsi: u32, msi: Msi) -> Result<(), HypervisorError> {
        let mut table = self.table.lock();
        if table.events.get(&gsi) == Some(&msi) {
            return Ok(());
        }
        self.change(vm, &mut table, |table| {
            table.events.insert(gsi, msi);
        })
    }

    /// Gives `gsi` back.
    pub(crate) fn release(&self, vm: &VmFd, gsi: u32) {
        let mut table = self.table.lock();
        table.events.remove(&gsi);
        // A route that the kernel keeps goes nowhere: no event is bound to it.
        if let Err(error) = table.tell(vm) {
            tracing::debug!(%error, gsi, "a route stays");
        }
    }
}

fn entry(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = msi.address as u32;
    entry.u.msi.address_hi = (msi.address >> 32) as u32;
    entry.u.msi.data = msi.data;
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_to_the_apics_are_heard() {
        let heard = |address| {
            is_heard(Msi {
                address,
                data: 0x31,
            })
        };
        for address in [
            0xfee0_0000,
            0xfeef_f00c,
            0x0000_0100_fee0_0000,
            0xffff_ff00_fee0_1000,
        ] {
            assert!(heard(address), "{address:#x}");
        }
        for address in [0, 0xfed0_0000, 0xfef0_0000, 0x1_fee0_0000, 0x80_fee0_0000] {
            assert!(!heard(address), "{address:#x}");
        }
    }
}
