//! Virtio over PCI (§4.1): a modern device behind a PCI function.
//!
//! | base address register | holds |
//! |---|---|
//! | 0 and 1 (64-bit memory, 16 KiB) | common configuration, ISR status, device configuration, notifications: 4 KiB each |
//! | 2 (memory) | MSI-X table and pending bits: a vector per queue and one for the configuration |
//!
//! Each queue has a notification address of its own, so that a doorbell can stand for it. The window into these ranges
//! through configuration space (`VIRTIO_PCI_CAP_PCI_CFG`) is there too.

mod capabilities;
mod common_config;
mod state;

use alloc::{string::String, sync::Arc, vec::Vec};
use core::task::{Context, Poll, Waker};

use caisson_device::{
    Access, Claim, Device, DoorbellSink, Inspector, Outcome, ResetKind, SaveState, Space,
    StateError, StateRecord,
};
use caisson_memory::MemoryView;
use caisson_pci::{
    BarKind, BarSpec, Function, FunctionHandles, FunctionSpec, Identity, InterruptPin, MsixSpec,
    Place, SpecError,
};

use self::{capabilities::ConfigWindow, state::PciState};
use crate::{Facilities, Polled, VirtioDevice};

/// Red Hat, to whom the specification gives all virtio devices (§4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device ID of the device type 0.
const FIRST_DEVICE: u16 = 0x1040;
/// The base address register of the registers.
const REGISTERS_BAR: u8 = 0;
/// The base address register of the MSI-X structures.
const MSIX_BAR: u8 = 2;
/// Bytes of the registers.
const REGISTERS_LEN: u64 = 0x4000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u64 = 4;
/// No MSI-X vector (`VIRTIO_MSI_NO_VECTOR`).
const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Where the ranges of a function are after a reset, as firmware would have placed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranges {
    /// Guest physical address of the registers, a multiple of [`Ranges::REGISTERS_LEN`].
    pub registers: u64,
    /// Guest physical address of the MSI-X structures below 4 GiB, a multiple of [`Ranges::msix_len`].
    pub msix: u64,
}

impl Ranges {
    /// Bytes of the registers.
    pub const REGISTERS_LEN: u64 = REGISTERS_LEN;

    /// Bytes of the MSI-X structures of a device with `queues` queues.
    pub fn msix_len(queues: u16) -> u64 {
        let vectors = u64::from(queues) + 1;
        (pending_offset(vectors) + vectors.div_ceil(64) * 8)
            .next_power_of_two()
            .max(4096)
    }
}

/// Where the pending bits follow a table of `vectors` entries: on the next multiple of 2 KiB.
fn pending_offset(vectors: u64) -> u64 {
    (vectors * 16).next_multiple_of(2048)
}

/// What the function may affect.
#[derive(Clone)]
pub struct PciHandles {
    /// The function's own.
    pub function: FunctionHandles,
    /// Guest memory.
    pub memory: MemoryView,
    /// Takes notifications before they reach the device, where the machine can.
    pub doorbells: Option<Arc<dyn DoorbellSink>>,
}

/// A virtio device as a PCI function.
pub struct VirtioPci<D> {
    name: String,
    function: Function,
    facilities: Facilities<D>,
    window: ConfigWindow,
    doorbells: Option<Arc<dyn DoorbellSink>>,
    /// The base of the notification addresses that are set as doorbells.
    ringing: Option<u64>,
    waker: Option<Waker>,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// `device`, called `name`, at `place` with its ranges at `ranges`.
    ///
    /// # Errors
    /// Ranges that are not aligned or have no room, or a device with too many queues.
    pub fn new(
        name: impl Into<String>,
        device: D,
        place: Place,
        ranges: Ranges,
        handles: PciHandles,
    ) -> Result<Self, SpecError> {
        let kind = device.kind();
        let facilities = Facilities::new(device, handles.memory);
        let queues = facilities.queue_count();
        let (capabilities, window) = capabilities::list(queues);
        let vectors = queues.saturating_add(1);
        let spec = FunctionSpec {
            place,
            identity: Identity {
                vendor: VENDOR,
                device: FIRST_DEVICE.saturating_add(kind.id),
                // §4.1.2.1: 1 or higher, and a subsystem of 0x40 or higher.
                revision: 1,
                class: kind.class,
                subsystem_vendor: VENDOR,
                subsystem: FIRST_DEVICE.saturating_add(kind.id),
            },
            bars: alloc::vec![
                BarSpec {
                    index: REGISTERS_BAR,
                    kind: BarKind::Memory64,
                    size: REGISTERS_LEN,
                    address: ranges.registers,
                    label: "registers",
                },
                BarSpec {
                    index: MSIX_BAR,
                    kind: BarKind::Memory32,
                    size: Ranges::msix_len(queues),
                    address: ranges.msix,
                    label: "MSI-X",
                },
            ],
            pin: handles.function.line.as_ref().map(|_| InterruptPin::A),
            msi: 0,
            msix: Some(MsixSpec {
                vectors,
                bar: MSIX_BAR,
                table: 0,
                pending: pending_offset(u64::from(vectors)) as u32,
            }),
            capabilities,
        };
        let function = Function::new(spec, handles.function)?;
        Ok(Self {
            name: name.into(),
            window: window.located(&function),
            function,
            queue_vectors: alloc::vec![NO_VECTOR; usize::from(queues)],
            facilities,
            doorbells: handles.doorbells,
            ringing: None,
            waker: None,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            config_vector: NO_VECTOR,
            isr: 0,
        })
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

    /// Has the device polled soon.
    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }

    /// Sends the interrupts that the device wants.
    fn deliver(&mut self) {
        for queue in 0..self.facilities.queue_count() {
            if self.facilities.take_interrupt(queue) {
                let vector = self.queue_vectors.get(usize::from(queue));
                self.interrupt(vector.copied().unwrap_or(NO_VECTOR), ISR_QUEUE);
            }
        }
        if self.facilities.take_config_change() {
            self.interrupt(self.config_vector, ISR_CONFIG);
        }
    }

    fn interrupt(&mut self, vector: u16, cause: u8) {
        if self.function.msix_enabled() {
            if vector != NO_VECTOR {
                self.function.signal(vector);
            }
        } else {
            self.isr |= cause;
            self.function.set_intx(true);
        }
    }

    /// Has the notification addresses taken as doorbells while the device is at work, where the guest has put them.
    fn set_doorbells(&mut self) {
        let Some(sink) = &self.doorbells else {
            return;
        };
        let base = self
            .function
            .bar_range(REGISTERS_BAR)
            .filter(|_| self.facilities.is_active())
            .map(|range| range.base + NOTIFY);
        if base == self.ringing {
            return;
        }
        self.ringing = base;
        let address = |base: u64, queue: u16| base + NOTIFY_STEP * u64::from(queue);
        let doorbells: Vec<_> = base
            .into_iter()
            .flat_map(|base| {
                let queues = 0..self.facilities.queue_count();
                queues.map(move |queue| (Space::Mmio, address(base, queue)))
            })
            .collect();
        sink.set(&doorbells);
    }

    /// A read in the range of the registers.
    fn read_registers(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset & !0xfff {
            COMMON => self.read_common(offset, data),
            ISR if offset == ISR => {
                if let Some(byte) = data.first_mut() {
                    *byte = core::mem::take(&mut self.isr);
                    self.function.set_intx(false);
                }
            }
            DEVICE => self.facilities.device().read_config(offset - DEVICE, data),
            _ => {}
        }
    }

    /// A write in the range of the registers.
    fn write_registers(&mut self, offset: u64, data: &[u8]) {
        match offset & !0xfff {
            COMMON => self.write_common(offset, data),
            DEVICE => {
                self.facilities
                    .device_mut()
                    .write_config(offset - DEVICE, data);
                self.facilities.notice_config();
            }
            NOTIFY => self.wake(),
            _ => {}
        }
        self.deliver();
        self.set_doorbells();
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        if bar == REGISTERS_BAR {
            self.read_registers(offset, data);
        } else {
            let _ = self.function.read_msix(bar, offset, data);
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if bar == REGISTERS_BAR {
            self.write_registers(offset, data);
        } else {
            let _ = self.function.write_msix(bar, offset, data);
        }
    }

    /// What a reset by the driver or the machine does to the transport's own registers.
    fn reset_registers(&mut self) {
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        self.config_vector = NO_VECTOR;
        self.queue_vectors.fill(NO_VECTOR);
        self.isr = 0;
        self.function.set_intx(false);
    }
}

impl<D: VirtioDevice> Device for VirtioPci<D> {
    fn name(&self) -> &str {
        &self.name
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![self.function.place().claim()]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        match self.function.bar_of(&at) {
            Some(bar) => self.read_bar(bar, at.offset, data),
            None => match self.window.access(&self.function, at.offset, data.len()) {
                Some((bar, offset, len)) => {
                    data.fill(0);
                    if let Some(data) = data.get_mut(..len) {
                        self.read_bar(bar, offset, data);
                    }
                }
                None => self.function.read_config(at.offset, data),
            },
        }
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        match self.function.bar_of(&at) {
            Some(bar) => self.write_bar(bar, at.offset, data),
            None => match self.window.access(&self.function, at.offset, data.len()) {
                Some((bar, offset, len)) => {
                    if let Some(data) = data.get(..len) {
                        self.write_bar(bar, offset, data);
                    }
                }
                None => {
                    self.function.write_config(at.offset, data);
                    self.set_doorbells();
                    self.wake();
                }
            },
        }
        Outcome::Done
    }

    fn poll(&mut self, cx: &mut Context<'_>) {
        match &mut self.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            None => self.waker = Some(cx.waker().clone()),
        }
        let may_access = self.function.is_bus_master();
        if self.facilities.poll(cx, may_access) == Polled::Reset {
            self.reset_registers();
        }
        self.deliver();
        if self.ringing.is_some() && !self.facilities.is_active() {
            self.set_doorbells();
        }
    }

    fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.facilities.poll_quiet(cx)
    }

    fn reset(&mut self, _: ResetKind) {
        self.facilities.reset();
        self.reset_registers();
        self.function.reset();
        self.set_doorbells();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        PciState {
            function: self.function.state(),
            facilities: self.facilities.state()?,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            config_vector: self.config_vector,
            queue_vectors: self.queue_vectors.clone(),
            isr: self.isr,
        }
        .to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = PciState::from_record(record)?;
        let known = |vector: &u16| *vector == NO_VECTOR || *vector < self.function.msix_vectors();
        let vectors_fit = state.queue_vectors.len() == self.queue_vectors.len();
        if !vectors_fit || !state.queue_vectors.iter().all(known) || !known(&state.config_vector) {
            return Err(PciState::invalid("it has other interrupt vectors"));
        }
        self.facilities.restore(&state.facilities)?;
        self.function.restore(&state.function)?;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        self.config_vector = state.config_vector;
        self.queue_vectors = state.queue_vectors;
        self.isr = state.isr;
        self.set_doorbells();
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector.child("pci", |node| self.function.inspect(node));
        inspector.bool("doorbells", self.ringing.is_some());
        self.facilities.inspect(inspector);
    }
}
