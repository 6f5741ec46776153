//! The basic facilities of a device (§2), as a transport offers them to a driver.

use alloc::{format, vec::Vec};
use core::task::{Context, Poll, Waker};

use caisson_device::{Inspector, StateError, StateRecord};
use caisson_memory::MemoryView;
use serde::{Deserialize, Serialize};

use crate::{
    Fault, VirtioDevice, feature,
    queue::{Chain, Queue, QueueState, RingFeatures, RingPlace},
};

/// Bits of the device status field (§2.1).
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u8 = 4;
    /// Both sides agree on the features.
    pub const FEATURES_OK: u8 = 8;
    /// The device does nothing more until it is reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
    /// What a driver may set.
    pub(crate) const DRIVERS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// What waits until nothing works for the device any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum PendingReset {
    Device,
    Queue(u16),
}

/// What came of a poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polled {
    /// The device made the progress that it could.
    Done,
    /// A reset that the driver had asked for earlier has taken effect.
    Reset,
}

/// One of the device's queues.
#[derive(Debug)]
struct Slot {
    max_size: u16,
    /// What the driver has set, whether or not the queue is enabled.
    place: RingPlace,
    queue: Option<Queue>,
    /// The driver wants an interrupt that the transport has not taken yet.
    interrupt: bool,
}

impl Slot {
    fn reset(&mut self) {
        self.place = RingPlace {
            size: self.max_size,
            ..RingPlace::default()
        };
        self.queue = None;
        self.interrupt = false;
    }
}

/// A device with what its transport needs to drive it: status, features, queues, and what went wrong.
pub struct Facilities<D> {
    device: D,
    memory: MemoryView,
    offered: u64,
    accepted: u64,
    status: u8,
    generation: u8,
    config_changed: bool,
    queues: Vec<Slot>,
    pending: Option<PendingReset>,
    fault: Option<Fault>,
    faults: u64,
}

/// The saved state of [`Facilities`], a part of the transport's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FacilitiesState {
    accepted: u64,
    status: u8,
    generation: u8,
    config_changed: bool,
    pending: Option<PendingReset>,
    queues: Vec<SlotState>,
    /// The device's own record.
    device: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SlotState {
    place: RingPlace,
    queue: Option<QueueState>,
    interrupt: bool,
}

/// The queues of a device while it is polled.
pub struct Queues<'a> {
    slots: &'a mut [Slot],
    memory: &'a MemoryView,
}

impl Queues<'_> {
    /// Guest memory, for the buffers.
    pub fn memory(&self) -> &MemoryView {
        self.memory
    }

    /// Whether the driver has enabled queue `index`.
    pub fn is_enabled(&self, index: u16) -> bool {
        let slot = self.slots.get(usize::from(index));
        slot.is_some_and(|slot| slot.queue.is_some())
    }

    /// Takes the next buffer of queue `index` into `chain`. `false` if there is none or the queue is not enabled; the
    /// device is polled when that changes.
    ///
    /// # Errors
    /// The driver broke a rule.
    pub fn pop(&mut self, index: u16, chain: &mut Chain) -> Result<bool, Fault> {
        let slot = self.slots.get_mut(usize::from(index));
        match slot.and_then(|slot| slot.queue.as_mut()) {
            Some(queue) => queue.pop(self.memory, chain),
            None => Ok(false),
        }
    }

    /// Gives a buffer of queue `index` back, with `written` bytes in its writable part.
    ///
    /// # Errors
    /// The ring is not in memory.
    pub fn complete(&mut self, index: u16, chain: &Chain, written: u32) -> Result<(), Fault> {
        let slot = self.slots.get_mut(usize::from(index));
        match slot.and_then(|slot| slot.queue.as_mut()) {
            Some(queue) => queue.complete(self.memory, chain, written),
            None => Ok(()),
        }
    }
}

impl<D: VirtioDevice> Facilities<D> {
    /// `device` with access to `memory`, after a reset.
    pub fn new(device: D, memory: MemoryView) -> Self {
        let slot = |max_size| Slot {
            max_size,
            place: RingPlace::default(),
            queue: None,
            interrupt: false,
        };
        let offered = feature::OFFERED | device.features();
        let queues = device.queue_sizes().into_iter().map(slot).collect();
        let mut facilities = Self {
            device,
            memory,
            offered,
            accepted: 0,
            status: 0,
            generation: 0,
            config_changed: false,
            queues,
            pending: None,
            fault: None,
            faults: 0,
        };
        facilities.reset();
        facilities
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, for what reaches it from outside of the guest.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// The feature bits that the device offers.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// The feature bits that the driver has accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// The driver accepts 32 feature bits, from bit 32 × `select` on. After `FEATURES_OK` it cannot any more.
    pub fn accept(&mut self, select: u32, bits: u32) {
        if self.status & status::FEATURES_OK != 0 || select > 1 {
            return;
        }
        let shift = 32 * select;
        self.accepted = self.accepted & !(u64::from(u32::MAX) << shift) | u64::from(bits) << shift;
    }

    /// The device status field.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The driver writes the device status field. Returns whether the device was reset by it. Where something still
    /// works for the device, the reset takes effect later, and the field reads as before until then (§2.4.1).
    pub fn set_status(&mut self, value: u8) -> bool {
        if value == 0 {
            let quiet = self.is_quiet();
            match quiet {
                true => self.reset(),
                false => self.pending = Some(PendingReset::Device),
            }
            return quiet;
        }
        if self.pending == Some(PendingReset::Device) {
            return false;
        }
        // Bits are never taken away but by a reset.
        let mut new = (value & status::DRIVERS | self.status) & !self.status;
        if new & status::FEATURES_OK != 0
            && (self.accepted & !self.offered != 0 || self.accepted & feature::VERSION_1 == 0)
        {
            new &= !status::FEATURES_OK;
        }
        if new & status::DRIVER_OK != 0 && (self.status | new) & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.status |= new;
        if new & status::DRIVER_OK != 0 {
            self.device.activate(self.accepted);
        }
        false
    }

    /// Whether the driver has set the device up and nothing has gone wrong since.
    pub fn is_active(&self) -> bool {
        self.pending != Some(PendingReset::Device)
            && self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// Counts changes of the configuration, so that a driver notices one in the middle of reading.
    pub fn generation(&self) -> u8 {
        self.generation
    }

    /// How many queues there are.
    pub fn queue_count(&self) -> u16 {
        self.queues.len() as u16
    }

    /// The largest size of queue `index`; 0 if there is none.
    pub fn max_queue_size(&self, index: u16) -> u16 {
        let slot = self.queues.get(usize::from(index));
        slot.map_or(0, |slot| slot.max_size)
    }

    /// Where the driver has put queue `index`.
    pub fn queue_place(&self, index: u16) -> Option<RingPlace> {
        self.queues.get(usize::from(index)).map(|slot| slot.place)
    }

    /// Changes where queue `index` will be, unless it is enabled.
    pub fn place_queue(&mut self, index: u16, change: impl FnOnce(&mut RingPlace)) {
        if let Some(slot) = self.queues.get_mut(usize::from(index))
            && slot.queue.is_none()
        {
            change(&mut slot.place);
        }
    }

    /// Whether queue `index` is enabled.
    pub fn is_queue_enabled(&self, index: u16) -> bool {
        let slot = self.queues.get(usize::from(index));
        slot.is_some_and(|slot| slot.queue.is_some())
    }

    /// The driver enables queue `index`. It does so after `FEATURES_OK`; before it, nothing happens.
    pub fn enable_queue(&mut self, index: u16) {
        let features = RingFeatures::from_bits(self.accepted);
        let ready =
            self.status & (status::FEATURES_OK | status::NEEDS_RESET) == status::FEATURES_OK;
        let Some(slot) = self.queues.get_mut(usize::from(index)) else {
            return;
        };
        if !ready || slot.queue.is_some() {
            return;
        }
        let size = slot.place.size;
        let queue = match size > slot.max_size {
            true => Err(Fault::QueueSize { queue: index, size }),
            false => Queue::new(index, slot.place, features),
        };
        match queue {
            Ok(queue) => slot.queue = Some(queue),
            Err(fault) => self.fail(fault),
        }
    }

    /// The driver resets queue `index` alone (§2.6.1). Ignored unless that was negotiated. It may take effect later.
    pub fn reset_queue(&mut self, index: u16) {
        if self.accepted & feature::RING_RESET != 0 {
            self.disable_queue(index);
        }
    }

    /// Whether the reset of queue `index` has not taken effect yet.
    pub fn is_queue_resetting(&self, index: u16) -> bool {
        self.pending == Some(PendingReset::Queue(index))
    }

    /// Takes queue `index` out of use and forgets its buffers, at once or when nothing works for the device any more.
    pub fn disable_queue(&mut self, index: u16) {
        if self.pending.is_some() {
            return;
        }
        if !self.is_quiet() {
            self.pending = Some(PendingReset::Queue(index));
            return;
        }
        self.forget_queue(index);
    }

    fn forget_queue(&mut self, index: u16) {
        if let Some(slot) = self.queues.get_mut(usize::from(index)) {
            slot.reset();
            self.device.reset_queue(index);
        }
    }

    /// The driver broke a rule: the device stops until it is reset.
    pub fn fail(&mut self, fault: Fault) {
        self.fault = Some(fault);
        self.faults = self.faults.saturating_add(1);
        self.status |= status::NEEDS_RESET;
        if self.status & status::DRIVER_OK != 0 {
            self.config_changed = true;
        }
    }

    /// Whether nothing works for the device now.
    fn is_quiet(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.device.poll_quiet(&mut cx).is_ready()
    }

    /// See [`VirtioDevice::poll_quiet`].
    pub fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.device.poll_quiet(cx)
    }

    /// Lets the device make progress, or a reset take effect that waits; `may_access` says whether it may access memory.
    /// What is to be told the driver afterwards comes out of [`take_interrupt`](Self::take_interrupt) and
    /// [`take_config_change`](Self::take_config_change).
    pub fn poll(&mut self, cx: &mut Context<'_>, may_access: bool) -> Polled {
        if let Some(pending) = self.pending {
            if self.device.poll_quiet(cx).is_pending() {
                return Polled::Done;
            }
            self.pending = None;
            match pending {
                PendingReset::Queue(index) => self.forget_queue(index),
                PendingReset::Device => {
                    self.reset();
                    return Polled::Reset;
                }
            }
        }
        if may_access && self.is_active() {
            self.poll_device(cx);
        }
        Polled::Done
    }

    fn poll_device(&mut self, cx: &mut Context<'_>) {
        let mut queues = Queues {
            slots: &mut self.queues,
            memory: &self.memory,
        };
        let mut done = self.device.poll(cx, &mut queues);
        for slot in &mut self.queues {
            if let Some(queue) = &mut slot.queue {
                match queue.flush(&self.memory) {
                    Ok(wanted) => slot.interrupt |= wanted,
                    Err(fault) => done = done.and(Err(fault)),
                }
            }
        }
        if let Err(fault) = done {
            self.fail(fault);
        }
        self.notice_config();
    }

    /// Looks whether the device's configuration has changed.
    pub fn notice_config(&mut self) {
        if self.device.take_config_change() {
            self.generation = self.generation.wrapping_add(1);
            self.config_changed |= self.status & status::DRIVER_OK != 0;
        }
    }

    /// Whether the driver is to be interrupted for queue `index`, once.
    pub fn take_interrupt(&mut self, index: u16) -> bool {
        let slot = self.queues.get_mut(usize::from(index));
        slot.is_some_and(|slot| core::mem::take(&mut slot.interrupt))
    }

    /// Whether the driver is to be told of a change of configuration or of the need for a reset, once.
    pub fn take_config_change(&mut self) -> bool {
        core::mem::take(&mut self.config_changed)
    }

    /// Puts everything into the state after a reset.
    pub fn reset(&mut self) {
        self.status = 0;
        self.accepted = 0;
        self.config_changed = false;
        self.pending = None;
        self.fault = None;
        self.queues.iter_mut().for_each(Slot::reset);
        self.device.reset();
    }

    /// Its state.
    ///
    /// # Errors
    /// The device's.
    pub fn state(&self) -> Result<FacilitiesState, StateError> {
        let mut device = Vec::new();
        self.device.save()?.encode(&mut device);
        let slot = |slot: &Slot| SlotState {
            place: slot.place,
            queue: slot.queue.as_ref().map(Queue::state),
            interrupt: slot.interrupt,
        };
        Ok(FacilitiesState {
            accepted: self.accepted,
            status: self.status,
            generation: self.generation,
            config_changed: self.config_changed,
            pending: self.pending,
            queues: self.queues.iter().map(slot).collect(),
            device,
        })
    }

    /// Takes over `state`.
    ///
    /// # Errors
    /// It is of another kind of device, or cannot be.
    pub fn restore(&mut self, state: &FacilitiesState) -> Result<(), StateError> {
        let invalid = |what| StateError::Invalid {
            id: "virtio-facilities",
            what,
        };
        self.reset();
        if state.queues.len() != self.queues.len() {
            return Err(invalid("it has another number of queues"));
        }
        if state.status & status::FEATURES_OK != 0 && state.accepted & !self.offered != 0 {
            return Err(invalid("its driver uses features that this device lacks"));
        }
        if state.status & status::FEATURES_OK == 0
            && (state.status & status::DRIVER_OK != 0
                || state.queues.iter().any(|slot| slot.queue.is_some()))
        {
            return Err(invalid("it is active before the features are agreed on"));
        }
        let features = RingFeatures::from_bits(state.accepted);
        for (index, (slot, saved)) in (0..).zip(self.queues.iter_mut().zip(&state.queues)) {
            slot.place = saved.place;
            slot.interrupt = saved.interrupt;
            if let Some(queue) = &saved.queue {
                let queue = Queue::restore(index, queue, features)?;
                if queue.place().size > slot.max_size || *queue.place() != saved.place {
                    return Err(invalid("a queue is not where its driver put it"));
                }
                slot.queue = Some(queue);
            }
        }
        self.accepted = state.accepted;
        self.status = state.status & (status::DRIVERS | status::NEEDS_RESET);
        self.generation = state.generation;
        self.config_changed = state.config_changed;
        self.pending = state.pending;
        let mut bytes = state.device.as_slice();
        let record = StateRecord::decode(&mut bytes)?;
        if !bytes.is_empty() {
            return Err(invalid("something follows the device's record"));
        }
        self.device.restore(&record)
    }

    /// Shows the device and its queues.
    pub fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .hex("status", self.status)
            .hex("features", self.accepted)
            .u64("faults", self.faults);
        if let Some(fault) = &self.fault {
            inspector.text("needs reset because", format!("{fault}"));
        }
        for (index, slot) in self.queues.iter().enumerate() {
            if let Some(queue) = &slot.queue {
                inspector.child(format!("queue {index}"), |node| {
                    node.u64("size", queue.place().size)
                        .hex("descriptors", queue.place().descriptors)
                        .u64("in flight", queue.in_flight());
                });
            }
        }
        inspector.child("device", |node| self.device.inspect(node));
    }
}
