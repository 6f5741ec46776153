//! Virtio over memory-mapped registers (§4.2), version 2: one page of registers and one interrupt line.
//!
//! The machine announces such a device in its ACPI tables as `LNRO0005`.

mod registers;
mod state;

use alloc::{string::String, sync::Arc, vec::Vec};
use core::task::{Context, Poll, Waker};

use caisson_device::{
    Access, AddressRange, Claim, Device, DoorbellSink, Inspector, Line, Outcome, ResetKind,
    SaveState, Space, StateError, StateRecord,
};
use caisson_memory::MemoryView;

use self::state::MmioState;
use crate::{Facilities, Polled, VirtioDevice};

/// Bytes of a device's registers.
pub const REGISTERS_LEN: u64 = 4096;
const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// What the device may affect.
#[derive(Clone)]
pub struct MmioHandles {
    /// Its interrupt, level-triggered.
    pub line: Line,
    /// Guest memory.
    pub memory: MemoryView,
    /// Takes notifications before they reach the device, where the machine can.
    pub doorbells: Option<Arc<dyn DoorbellSink>>,
}

/// A virtio device behind memory-mapped registers.
pub struct VirtioMmio<D> {
    name: String,
    address: u64,
    line: Line,
    facilities: Facilities<D>,
    doorbells: Option<Arc<dyn DoorbellSink>>,
    ringing: bool,
    waker: Option<Waker>,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u32,
    interrupt_status: u32,
}

impl<D: VirtioDevice> VirtioMmio<D> {
    /// `device`, called `name`, with its registers at `address`.
    pub fn new(name: impl Into<String>, device: D, address: u64, handles: MmioHandles) -> Self {
        Self {
            name: name.into(),
            address,
            line: handles.line,
            facilities: Facilities::new(device, handles.memory),
            doorbells: handles.doorbells,
            ringing: false,
            waker: None,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            interrupt_status: 0,
        }
    }

    /// The device.
    pub fn device(&self) -> &D {
        self.facilities.device()
    }

    /// Changes the device from outside of the guest, and has it polled.
    pub fn update<T>(&mut self, change: impl FnOnce(&mut D) -> T) -> T {
        let result = change(self.facilities.device_mut());
        self.facilities.notice_config();
        self.deliver();
        self.wake();
        result
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }

    /// Raises the line for what the device wants to tell.
    fn deliver(&mut self) {
        for queue in 0..self.facilities.queue_count() {
            if self.facilities.take_interrupt(queue) {
                self.interrupt_status |= INTERRUPT_QUEUE;
            }
        }
        if self.facilities.take_config_change() {
            self.interrupt_status |= INTERRUPT_CONFIG;
        }
        self.line.set(self.interrupt_status != 0);
    }

    /// Has notifications taken as doorbells while the device is at work.
    fn set_doorbells(&mut self) {
        let active = self.facilities.is_active();
        if active == self.ringing {
            return;
        }
        self.ringing = active;
        if let Some(sink) = &self.doorbells {
            let doorbell = (Space::Mmio, self.address + registers::QUEUE_NOTIFY);
            sink.set(if active {
                core::slice::from_ref(&doorbell)
            } else {
                &[]
            });
        }
    }

    fn reset_registers(&mut self) {
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        self.interrupt_status = 0;
    }
}

impl<D: VirtioDevice> Device for VirtioMmio<D> {
    fn name(&self) -> &str {
        &self.name
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![Claim::new(
            AddressRange::mmio(self.address, REGISTERS_LEN),
            "registers"
        )]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        data.fill(0);
        self.read_register(at.offset, data);
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        self.write_register(at.offset, data);
        self.deliver();
        self.set_doorbells();
        Outcome::Done
    }

    fn poll(&mut self, cx: &mut Context<'_>) {
        match &mut self.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            None => self.waker = Some(cx.waker().clone()),
        }
        if self.facilities.poll(cx, true) == Polled::Reset {
            self.reset_registers();
        }
        self.deliver();
        self.set_doorbells();
    }

    fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.facilities.poll_quiet(cx)
    }

    fn reset(&mut self, _: ResetKind) {
        self.facilities.reset();
        self.reset_registers();
        self.line.set(false);
        self.set_doorbells();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        MmioState {
            facilities: self.facilities.state()?,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt_status,
        }
        .to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = MmioState::from_record(record)?;
        self.facilities.restore(&state.facilities)?;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        self.interrupt_status = state.interrupt_status & (INTERRUPT_QUEUE | INTERRUPT_CONFIG);
        self.line.set(self.interrupt_status != 0);
        self.set_doorbells();
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .hex("address", self.address)
            .u64("line", self.line.number())
            .hex("interrupt status", self.interrupt_status)
            .bool("doorbells", self.ringing && self.doorbells.is_some());
        self.facilities.inspect(inspector);
    }
}
