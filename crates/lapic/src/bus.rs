//! The interrupt fabric: routes messages to the mailboxes of the APICs they are for.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::{
    base::Mode,
    mailbox::Mailbox,
    message::{DeliveryMode, Destination, Ipi, Message, Shorthand},
    msr::x2apic_logical_id,
};

/// What routing has to know of an APIC besides its id: a mirror that the vCPU's thread publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its mode.
    pub mode: Mode,
    /// Whether it accepts interrupts with a vector.
    pub enabled: bool,
    /// Bits 31 to 24 of the LDR, for xAPIC mode.
    pub logical_id: u8,
    /// Whether the DFR says flat model, for xAPIC mode.
    pub flat: bool,
}

impl Identity {
    /// What an APIC is after reset.
    pub const RESET: Self = Self {
        mode: Mode::XApic,
        enabled: false,
        logical_id: 0,
        flat: true,
    };

    fn pack(self) -> u32 {
        let mode = match self.mode {
            Mode::Disabled => 0,
            Mode::XApic => 1,
            Mode::X2Apic => 2,
        };
        mode | u32::from(self.enabled) << 2
            | u32::from(self.flat) << 3
            | u32::from(self.logical_id) << 8
    }

    fn unpack(bits: u32) -> Self {
        Self {
            mode: match bits & 3 {
                1 => Mode::XApic,
                2 => Mode::X2Apic,
                _ => Mode::Disabled,
            },
            enabled: bits & 4 != 0,
            flat: bits & 8 != 0,
            logical_id: (bits >> 8) as u8,
        }
    }

    fn accepts(self, mode: DeliveryMode) -> bool {
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority | DeliveryMode::ExtInt => {
                self.enabled
            }
            DeliveryMode::Smi | DeliveryMode::Nmi | DeliveryMode::Init | DeliveryMode::StartUp => {
                self.mode != Mode::Disabled
            }
        }
    }

    /// Whether a logical destination includes the APIC with `id` (SDM "Logical Destination Mode").
    fn is_logically(self, id: u32, destination: u32) -> bool {
        match self.mode {
            Mode::Disabled => false,
            Mode::X2Apic => {
                let own = x2apic_logical_id(id);
                own >> 16 == destination >> 16 && own & destination & 0xFFFF != 0
            }
            Mode::XApic => {
                let (own, Ok(destination)) = (self.logical_id, u8::try_from(destination)) else {
                    return false;
                };
                if self.flat {
                    own & destination != 0
                } else {
                    let cluster = destination >> 4;
                    (cluster == 0xF || cluster == own >> 4) && own & destination & 0xF != 0
                }
            }
        }
    }
}

#[derive(Debug)]
struct Slot {
    id: u32,
    identity: AtomicU32,
    mailbox: Mailbox,
}

/// The APICs of one machine (or of one trust level of it), by vCPU index. Shared by all threads; never locks.
#[derive(Debug)]
pub struct ApicBus {
    slots: Vec<Slot>,
    /// Slot indices in ascending order of APIC id.
    by_id: Vec<usize>,
    /// Where the search for a lowest-priority target starts, so that equal ones take turns.
    turn: AtomicUsize,
}

impl ApicBus {
    /// A bus with an APIC for each of `ids`; the position in `ids` is the vCPU index used everywhere else. Of equal ids
    /// only the first is found by physical destinations.
    pub fn new(ids: &[u32]) -> Self {
        let slots: Vec<Slot> = ids
            .iter()
            .map(|id| Slot {
                id: *id,
                identity: AtomicU32::new(Identity::RESET.pack()),
                mailbox: Mailbox::new(),
            })
            .collect();
        let mut by_id: Vec<usize> = (0..slots.len()).collect();
        by_id.sort_by_key(|index| ids[*index]);
        Self {
            slots,
            by_id,
            turn: AtomicUsize::new(0),
        }
    }

    /// How many vCPUs there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The mailbox of vCPU `index`.
    #[inline]
    pub fn mailbox(&self, index: usize) -> Option<&Mailbox> {
        self.slots.get(index).map(|slot| &slot.mailbox)
    }

    /// Tells the bus what vCPU `index`'s APIC has become. Called by the vCPU's thread when [`crate::Effects`] or an
    /// INIT say so, and after a reset or restore.
    pub fn publish(&self, index: usize, identity: Identity) {
        if let Some(slot) = self.slots.get(index) {
            slot.identity.store(identity.pack(), Ordering::Release);
        }
    }

    /// The vCPU index of the APIC with `id`.
    pub fn find(&self, id: u32) -> Option<usize> {
        let at = self
            .by_id
            .partition_point(|index| self.slots[*index].id < id);
        self.by_id
            .get(at)
            .copied()
            .filter(|index| self.slots[*index].id == id)
    }

    /// Delivers an IPI of vCPU `source`, calling `kick` for each vCPU that has to look into its mailbox. Returns how
    /// many APICs accepted it.
    pub fn send(&self, source: usize, ipi: &Ipi, kick: impl FnMut(usize)) -> usize {
        match ipi.shorthand {
            Shorthand::None | Shorthand::AllIncludingSelf => self.deliver(&ipi.message, None, kick),
            Shorthand::AllExcludingSelf => self.deliver(&ipi.message, Some(source), kick),
        }
    }

    /// Delivers a message from any source to all APICs it is for but that of vCPU `except`, calling `kick` for each
    /// vCPU that has to look into its mailbox. Returns how many APICs accepted it.
    pub fn deliver(
        &self,
        message: &Message,
        except: Option<usize>,
        mut kick: impl FnMut(usize),
    ) -> usize {
        if let Destination::Physical(id) = message.destination {
            return match self.find(id) {
                Some(index) if Some(index) != except => {
                    usize::from(self.post(index, message, &mut kick))
                }
                _ => 0,
            };
        }
        if message.mode == DeliveryMode::LowestPriority {
            let start = self.turn.fetch_add(1, Ordering::Relaxed);
            let count = self.slots.len();
            return (0..count)
                .map(|step| start.wrapping_add(step) % count)
                .find(|index| {
                    Some(*index) != except
                        && self.is_target(*index, message)
                        && self.post(*index, message, &mut kick)
                })
                .map_or(0, |index| {
                    self.turn.store(index + 1, Ordering::Relaxed);
                    1
                });
        }
        (0..self.slots.len())
            .filter(|index| {
                Some(*index) != except
                    && self.is_target(*index, message)
                    && self.post(*index, message, &mut kick)
            })
            .count()
    }

    fn is_target(&self, index: usize, message: &Message) -> bool {
        let slot = &self.slots[index];
        match message.destination {
            Destination::Broadcast => true,
            Destination::Physical(id) => slot.id == id,
            Destination::Logical(destination) => {
                let identity = Identity::unpack(slot.identity.load(Ordering::Acquire));
                identity.is_logically(slot.id, destination)
            }
        }
    }

    fn post(&self, index: usize, message: &Message, kick: &mut impl FnMut(usize)) -> bool {
        let slot = &self.slots[index];
        let identity = Identity::unpack(slot.identity.load(Ordering::Acquire));
        if !identity.accepts(message.mode) {
            return false;
        }
        if slot
            .mailbox
            .post(message.mode, message.vector, message.level)
        {
            kick(index);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{vec, vec::Vec};

    const FLAT: Identity = Identity {
        mode: Mode::XApic,
        enabled: true,
        logical_id: 0,
        flat: true,
    };

    fn message(destination: Destination, mode: DeliveryMode) -> Message {
        Message {
            vector: 0x41,
            mode,
            level: false,
            destination,
        }
    }

    fn targets(bus: &ApicBus, destination: Destination) -> Vec<usize> {
        kicked(bus, &message(destination, DeliveryMode::Fixed), None)
    }

    fn kicked(bus: &ApicBus, message: &Message, except: Option<usize>) -> Vec<usize> {
        let mut kicked = vec![];
        let accepted = bus.deliver(message, except, |index| kicked.push(index));
        assert_eq!(accepted, kicked.len());
        (0..bus.len()).for_each(|index| bus.mailbox(index).unwrap().clear());
        kicked
    }

    #[test]
    fn physical_destinations_are_ids() {
        let bus = ApicBus::new(&[4, 0, 300]);
        (0..3).for_each(|index| bus.publish(index, FLAT));
        assert_eq!(targets(&bus, Destination::Physical(0)), [1]);
        assert_eq!(targets(&bus, Destination::Physical(4)), [0]);
        assert_eq!(targets(&bus, Destination::Physical(300)), [2]);
        assert_eq!(targets(&bus, Destination::Physical(44)), []);
        assert_eq!(targets(&bus, Destination::Broadcast), [0, 1, 2]);
    }

    #[test]
    fn flat_logical_destinations_are_bit_masks() {
        let bus = ApicBus::new(&[0, 1, 2]);
        for index in 0..3 {
            bus.publish(
                index,
                Identity {
                    logical_id: 1 << index,
                    ..FLAT
                },
            );
        }
        assert_eq!(targets(&bus, Destination::Logical(0b101)), [0, 2]);
        assert_eq!(targets(&bus, Destination::Logical(0b1000)), []);
        assert_eq!(targets(&bus, Destination::Logical(0x1_0001)), []);
    }

    #[test]
    fn clustered_logical_destinations_name_a_cluster() {
        let bus = ApicBus::new(&[0, 1, 2, 3]);
        for (index, logical_id) in [0x11, 0x12, 0x21, 0x24].into_iter().enumerate() {
            bus.publish(
                index,
                Identity {
                    logical_id,
                    flat: false,
                    ..FLAT
                },
            );
        }
        assert_eq!(targets(&bus, Destination::Logical(0x13)), [0, 1]);
        assert_eq!(targets(&bus, Destination::Logical(0x25)), [2, 3]);
        assert_eq!(targets(&bus, Destination::Logical(0xF1)), [0, 2]);
        assert_eq!(targets(&bus, Destination::Logical(0x3F)), []);
    }

    #[test]
    fn x2apic_logical_destinations_name_a_cluster_of_sixteen() {
        let ids: Vec<u32> = (0..40).collect();
        let bus = ApicBus::new(&ids);
        for index in 0..40 {
            bus.publish(
                index,
                Identity {
                    mode: Mode::X2Apic,
                    ..FLAT
                },
            );
        }
        assert_eq!(targets(&bus, Destination::Logical(0x0001_8001)), [16, 31]);
        assert_eq!(
            targets(&bus, Destination::Logical(0x0002_FFFF)),
            (32..40).collect::<Vec<_>>()
        );
        assert_eq!(targets(&bus, Destination::Logical(0x0003_FFFF)), []);
        assert_eq!(
            targets(&bus, Destination::Logical(0x81)),
            [0, 7],
            "an MSI's eight bits"
        );
    }

    #[test]
    fn disabled_apics_accept_less() {
        let bus = ApicBus::new(&[0, 1]);
        bus.publish(
            1,
            Identity {
                mode: Mode::Disabled,
                enabled: false,
                ..FLAT
            },
        );
        assert_eq!(targets(&bus, Destination::Broadcast), []);
        for mode in [DeliveryMode::Nmi, DeliveryMode::Init, DeliveryMode::StartUp] {
            assert_eq!(
                kicked(&bus, &message(Destination::Broadcast, mode), None),
                [0]
            );
        }
    }

    #[test]
    fn lowest_priority_targets_take_turns() {
        let bus = ApicBus::new(&[0, 1, 2, 3]);
        for index in 0..4 {
            bus.publish(
                index,
                Identity {
                    logical_id: 1 << index,
                    ..FLAT
                },
            );
        }
        let message = message(Destination::Logical(0b1011), DeliveryMode::LowestPriority);
        let order: Vec<_> = (0..6).flat_map(|_| kicked(&bus, &message, None)).collect();
        assert_eq!(order, [0, 1, 3, 0, 1, 3]);
    }

    #[test]
    fn shorthands_choose_instead_of_the_destination() {
        let bus = ApicBus::new(&[0, 1, 2]);
        (0..3).for_each(|index| bus.publish(index, FLAT));
        let mut ipi = Ipi {
            message: message(Destination::Broadcast, DeliveryMode::Fixed),
            shorthand: Shorthand::AllExcludingSelf,
        };
        let mut kicked = vec![];
        assert_eq!(bus.send(1, &ipi, |index| kicked.push(index)), 2);
        assert_eq!(kicked, [0, 2]);
        ipi.shorthand = Shorthand::AllIncludingSelf;
        assert_eq!(bus.send(1, &ipi, |index| kicked.push(index)), 3);
        assert_eq!(kicked, [0, 2, 1], "the others have been kicked already");
    }

    #[test]
    fn an_empty_bus_delivers_nothing() {
        let bus = ApicBus::new(&[]);
        for mode in [DeliveryMode::Fixed, DeliveryMode::LowestPriority] {
            assert_eq!(
                bus.deliver(&message(Destination::Broadcast, mode), None, |_| {}),
                0
            );
        }
    }
}
