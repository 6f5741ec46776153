//! Guest writes that wake a device without a vCPU leaving for it, where the backend can.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Context,
};

use caisson_device::{DoorbellSink, Space};
use caisson_hypervisor::{
    Doorbell, DoorbellHandle, DoorbellMatch, Event, EventWaiter, Partition, Space as VcpuSpace,
};
use caisson_memory::{Gpa, Vtl};
use parking_lot::Mutex;

use super::{slot::DeviceSlot, worker::Worker};
use crate::run::gate::Gate;

/// The doorbells of a machine, and the thread that hears them.
pub(crate) struct DoorbellService {
    partition: Arc<dyn Partition>,
    waiter: Box<dyn EventWaiter>,
    stop: AtomicBool,
}

impl DoorbellService {
    /// `None` where the backend has no doorbells, or the host nothing to wait for them with: then every notification
    /// reaches its device on the bus.
    pub(crate) fn new(partition: &Arc<dyn Partition>) -> Option<Arc<Self>> {
        let waiter = partition.power().doorbells?.waiter().ok()?;
        Some(Arc::new(Self {
            partition: partition.clone(),
            waiter,
            stop: AtomicBool::new(false),
        }))
    }

    /// The doorbells of the device at position `device`.
    pub(crate) fn of_device(self: &Arc<Self>, device: u32) -> Arc<dyn DoorbellSink> {
        Arc::new(DeviceDoorbells {
            service: self.clone(),
            device,
            state: Mutex::default(),
        })
    }

    /// The thread's body: polls devices whose doorbells ring, until [`stop`](Self::stop) or until `gate` is gone.
    pub(crate) fn run(&self, devices: &[Arc<DeviceSlot>], worker: &Arc<Worker>, gate: &Gate) {
        let wakers: Vec<_> = (0..devices.len() as u32)
            .map(|device| worker.device_waker(device))
            .collect();
        let mut rung = Vec::new();
        while !self.stop.load(Ordering::Acquire) {
            self.waiter.wait(&mut rung);
            for device in rung.iter().map(|token| *token as usize) {
                let (Some(slot), Some(waker)) = (devices.get(device), wakers.get(device)) else {
                    continue;
                };
                let Some(_inside) = gate.enter() else { return };
                slot.lock().poll(&mut Context::from_waker(waker));
                worker.announce();
            }
        }
    }

    /// Ends [`run`](Self::run).
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.waiter.wake();
    }
}

/// The doorbells of one device. They share one event: which queue it was is found out by looking.
struct DeviceDoorbells {
    service: Arc<DoorbellService>,
    device: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    event: Option<Arc<dyn Event>>,
    registered: Vec<Box<dyn DoorbellHandle>>,
}

impl DeviceDoorbells {
    /// The device's event, made and waited for when it is first needed. `None` where the host has none to give.
    fn event(&self, state: &mut State) -> Option<Arc<dyn Event>> {
        if state.event.is_none() {
            let event = self.service.partition.power().doorbells?.event().ok()?;
            self.service
                .waiter
                .add(event.clone(), self.device.into())
                .ok()?;
            state.event = Some(event);
        }
        state.event.clone()
    }
}

impl DoorbellSink for DeviceDoorbells {
    fn set(&self, doorbells: &[(Space, u64)]) {
        let mut state = self.state.lock();
        state.registered.clear();
        if doorbells.is_empty() {
            return;
        }
        let power = self.service.partition.power();
        let (Some(event), Some(power)) = (self.event(&mut state), power.doorbells) else {
            return;
        };
        for (space, address) in doorbells {
            let doorbell = Doorbell {
                space: match space {
                    Space::Mmio => VcpuSpace::Mmio,
                    Space::Pio => VcpuSpace::Pio,
                },
                address: Gpa(*address),
                matches: DoorbellMatch::Any,
            };
            // One that is refused, because a guest has put two devices at one address, arrives on the bus.
            if let Ok(handle) = power.register(Vtl::VTL0, doorbell, event.clone()) {
                state.registered.push(handle);
            }
        }
    }
}
