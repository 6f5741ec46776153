//! The flows between guest and host, by number and by addresses.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};
use core::net::SocketAddrV4;

use crate::{Protocol, tcp::Tcp, udp::Udp};

/// Names a flow for as long as it lives, and no other afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId {
    slot: u32,
    generation: u32,
}

impl FlowId {
    /// In one number.
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    /// From [`FlowId::to_bits`].
    pub fn from_bits(bits: u64) -> Self {
        Self {
            slot: bits as u32,
            generation: (bits >> 32) as u32,
        }
    }
}

/// What tells flows apart: the addresses as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FlowKey {
    pub(crate) protocol: Protocol,
    pub(crate) guest: SocketAddrV4,
    pub(crate) remote: SocketAddrV4,
}

pub(crate) enum Flow {
    Tcp(Tcp),
    Udp(Udp),
}

struct Slot {
    generation: u32,
    key: FlowKey,
    /// `None` while it is worked on, and in a slot that is free.
    flow: Option<Flow>,
    deadline: u64,
}

/// All flows.
#[derive(Default)]
pub(crate) struct Flows {
    slots: Vec<Slot>,
    free: Vec<u32>,
    keys: BTreeMap<FlowKey, u32>,
    deadlines: BTreeSet<(u64, u32)>,
    pub(crate) tcp: usize,
    pub(crate) udp: usize,
}

/// No deadline.
pub(crate) const NEVER: u64 = u64::MAX;

impl Flows {
    /// Makes room for a flow, which is to be put there with [`Flows::put`].
    pub(crate) fn insert(&mut self, key: FlowKey) -> FlowId {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(Slot {
                    generation: 0,
                    key,
                    flow: None,
                    deadline: NEVER,
                });
                self.slots.len() as u32 - 1
            }
        };
        self.keys.insert(key, slot);
        match key.protocol {
            Protocol::Tcp => self.tcp += 1,
            Protocol::Udp => self.udp += 1,
        }
        let mut generation = 0;
        if let Some(entry) = self.slots.get_mut(slot as usize) {
            entry.key = key;
            generation = entry.generation;
        }
        FlowId { slot, generation }
    }

    pub(crate) fn find(&self, key: &FlowKey) -> Option<FlowId> {
        self.keys.get(key).and_then(|slot| self.id(*slot))
    }

    fn id(&self, slot: u32) -> Option<FlowId> {
        let generation = self.slots.get(slot as usize)?.generation;
        Some(FlowId { slot, generation })
    }

    fn slot(&mut self, id: FlowId) -> Option<&mut Slot> {
        self.slots
            .get_mut(id.slot as usize)
            .filter(|slot| slot.generation == id.generation)
    }

    /// Takes a flow to work on it.
    pub(crate) fn take(&mut self, id: FlowId) -> Option<Flow> {
        self.slot(id)?.flow.take()
    }

    /// Puts a flow back that was worked on.
    pub(crate) fn put(&mut self, id: FlowId, flow: Flow, deadline: u64) {
        let Some(slot) = self.slot(id) else {
            return;
        };
        slot.flow = Some(flow);
        let old = core::mem::replace(&mut slot.deadline, deadline);
        if old != deadline {
            self.deadlines.remove(&(old, id.slot));
            if deadline != NEVER {
                self.deadlines.insert((deadline, id.slot));
            }
        }
    }

    /// Forgets a flow.
    pub(crate) fn remove(&mut self, id: FlowId) {
        let Some(slot) = self.slot(id) else {
            return;
        };
        slot.generation = slot.generation.wrapping_add(1);
        slot.flow = None;
        let deadline = core::mem::replace(&mut slot.deadline, NEVER);
        let key = slot.key;
        self.deadlines.remove(&(deadline, id.slot));
        self.keys.remove(&key);
        self.free.push(id.slot);
        match key.protocol {
            Protocol::Tcp => self.tcp -= 1,
            Protocol::Udp => self.udp -= 1,
        }
    }

    /// When something is due next.
    pub(crate) fn next_deadline(&self) -> Option<u64> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// A flow for which something is due at `now`.
    pub(crate) fn due(&self, now: u64) -> Option<FlowId> {
        let (at, slot) = self.deadlines.first()?;
        (*at <= now).then(|| self.id(*slot)).flatten()
    }

    pub(crate) fn ids(&self) -> Vec<FlowId> {
        self.keys
            .values()
            .filter_map(|slot| self.id(*slot))
            .collect()
    }

    pub(crate) fn each(&self) -> impl Iterator<Item = (FlowId, &FlowKey, &Flow)> {
        self.keys.iter().filter_map(|(key, slot)| {
            let flow = self.slots.get(*slot as usize)?.flow.as_ref()?;
            Some((self.id(*slot)?, key, flow))
        })
    }
}
