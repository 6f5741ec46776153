//! Which device answers an address, while some of them move.

use std::sync::{Arc, Weak};

use arc_swap::{ArcSwap, Guard};
use caisson_chipset::config_ports::ConfigAccess;
use caisson_device::{Access, AddressMap, Claim, ClaimSink, Claimant, Hint, Space};
use caisson_pci::ECAM_BUS_LEN;
use parking_lot::Mutex;

use super::slot::DeviceSlot;

type Map = AddressMap<Arc<DeviceSlot>>;

/// The claims of all devices: those that stay, and over them those that the guest moves (PCI ranges). A change makes a
/// new map and publishes it; exits read the map without a lock.
#[derive(Default)]
pub(crate) struct Claims {
    map: ArcSwap<Map>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    fixed: Map,
    devices: Vec<Arc<DeviceSlot>>,
    /// In the order in which they were placed: where two want the same addresses, the earlier has them.
    moving: Vec<(Mover, Claim)>,
    hidden: u64,
}

/// A range that moves: device and region.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mover {
    device: u32,
    region: u32,
}

impl Claims {
    /// Says which devices there are, and which claims of them stay.
    pub(crate) fn set(&self, fixed: Map, devices: Vec<Arc<DeviceSlot>>) {
        let mut state = self.state.lock();
        (state.fixed, state.devices) = (fixed, devices);
        self.publish(&mut state);
    }

    /// The claims as they are now.
    pub(crate) fn map(&self) -> Guard<Arc<Map>> {
        self.map.load()
    }

    /// How many ranges are not answered because another device has their addresses.
    pub(crate) fn hidden(&self) -> u64 {
        self.state.lock().hidden
    }

    fn publish(&self, state: &mut State) {
        let mut builder = state.fixed.to_builder();
        let mut hidden = 0;
        for (mover, claim) in &state.moving {
            let Some(slot) = state.devices.get(mover.device as usize) else {
                continue;
            };
            let claimant = Claimant {
                owner: slot.name().clone(),
                region: mover.region,
                label: claim.label,
            };
            if builder.claim(claim.range, claimant, slot.clone()).is_err() {
                hidden += 1;
            }
        }
        state.hidden = hidden;
        self.map.store(Arc::new(builder.build()));
    }

    fn change(&self, mover: Mover, claim: Option<Claim>) {
        let mut state = self.state.lock();
        state.moving.retain(|(other, _)| *other != mover);
        state.moving.extend(claim.map(|claim| (mover, claim)));
        self.publish(&mut state);
    }
}

/// The moving claims of one device.
pub(crate) struct DeviceClaims {
    pub(crate) claims: Weak<Claims>,
    /// The device's position among all.
    pub(crate) device: u32,
}

impl ClaimSink for DeviceClaims {
    fn set(&self, region: u32, claim: Option<Claim>) {
        let device = self.device;
        if let Some(claims) = self.claims.upgrade() {
            claims.change(Mover { device, region }, claim);
        }
    }
}

/// The configuration ports' way to the functions.
pub(crate) struct EcamAccess {
    pub(crate) claims: Weak<Claims>,
    /// Guest physical address of bus 0.
    pub(crate) base: u64,
}

impl EcamAccess {
    /// Hands `call` the device whose configuration page is at `offset`.
    fn with(&self, offset: u64, call: impl FnOnce(&DeviceSlot, Access)) {
        if offset >= ECAM_BUS_LEN {
            return;
        }
        let Some(claims) = self.claims.upgrade() else {
            return;
        };
        let address = self.base + offset;
        let map = claims.map();
        if let Some(claimed) = map.find(Space::Mmio, address, &mut Hint::default()) {
            call(&claimed.target, claimed.access(address));
        }
    }
}

impl ConfigAccess for EcamAccess {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.with(offset, |slot, at| {
            let _ = slot.lock().read(at, data);
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.with(offset, |slot, at| {
            let _ = slot.lock().write(at, data);
        });
    }
}

#[cfg(test)]
mod tests {
    use caisson_chipset::debug::PostCode;
    use caisson_device::AddressRange;

    use super::*;
    use crate::io::slot::Slot;

    #[test]
    fn who_was_there_first_stays_and_the_other_comes_up_when_it_leaves() {
        let claims = Arc::new(Claims::default());
        let devices: Vec<Arc<DeviceSlot>> =
            vec![Slot::new(PostCode::new()), Slot::new(PostCode::new())];
        claims.set(AddressMap::default(), devices);
        let sink = |device| DeviceClaims {
            claims: Arc::downgrade(&claims),
            device,
        };
        let (first, second) = (sink(0), sink(1));
        let at = |base| Some(Claim::new(AddressRange::mmio(base, 0x1000), "x"));
        let region = |address| {
            let map = claims.map();
            let found = map.find(Space::Mmio, address, &mut Hint::default());
            found.map(|claimed| claimed.claimant.region)
        };
        first.set(1, at(0xc000_0000));
        second.set(2, at(0xc000_0800));
        assert_eq!((region(0xc000_0900), claims.hidden()), (Some(1), 1));
        assert_eq!(region(0xc000_1000), None);
        first.set(1, at(0xd000_0000));
        assert_eq!((region(0xc000_1000), claims.hidden()), (Some(2), 0));
        assert_eq!(region(0xd000_0000), Some(1));
        second.set(2, None);
        assert_eq!(region(0xc000_0900), None);
    }
}
