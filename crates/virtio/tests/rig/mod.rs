//! A device under a transport, wired to fakes and driven through its registers. Each test program uses a part of it.
#![allow(dead_code)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Wake, Waker},
};

use caisson_device::{
    Access, Device, Inspector, Lines, Outcome, ResetKind, Space, StateRecord,
    testing::{RecordedBytes, RecordedClaims, RecordedDoorbells, RecordedLines, RecordedMsis},
};
use caisson_memory::MemoryView;
use caisson_pci::{FunctionAddress, FunctionHandles, Place};
use caisson_virtio::{
    VirtioDevice,
    console::Console,
    feature,
    mmio::{MmioHandles, VirtioMmio},
    pci::{PciHandles, Ranges, VirtioPci},
    queue::{RingFeatures, RingPlace},
    rng::Rng,
    testing::{Counting, Counts, Driver, memory},
};

pub(crate) const LINE: u32 = 20;
pub(crate) const ECAM: u64 = 0xe000_0000;
pub(crate) const REGISTERS: u64 = 0xc000_0000;
pub(crate) const MSIX: u64 = 0xc000_8000;
pub(crate) const MMIO: u64 = 0xf000_0000;
/// What a driver here negotiates besides version 1.
pub(crate) const FEATURES: u64 = feature::VERSION_1 | feature::INDIRECT_DESC | feature::RING_RESET;

#[derive(Default)]
pub(crate) struct Wakes(pub(crate) AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Pci,
    Mmio,
}

pub(crate) const TRANSPORTS: [Transport; 2] = [Transport::Pci, Transport::Mmio];

/// What a device is wired to; it outlives the device, as memory and the host's ends do when a machine moves.
pub(crate) struct World {
    pub(crate) memory: MemoryView,
    pub(crate) counts: Arc<Counts>,
    pub(crate) output: Arc<RecordedBytes>,
    pub(crate) room: Arc<Wakes>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self {
            memory: memory(),
            counts: Arc::default(),
            output: RecordedBytes::new(),
            room: Arc::default(),
        }
    }

    pub(crate) fn rng(&self) -> Rng {
        Rng::new(Box::new(Counting(self.counts.clone())))
    }

    pub(crate) fn console(&self) -> Console {
        Console::new(self.output.clone(), Some(Waker::from(self.room.clone())))
    }

    pub(crate) fn place<D: VirtioDevice + 'static>(
        &self,
        device: D,
        transport: Transport,
    ) -> Rig<D> {
        Rig::new(device, transport, self.memory.clone())
    }
}

pub(crate) enum Under<D> {
    Pci(Box<VirtioPci<D>>),
    Mmio(Box<VirtioMmio<D>>),
}

/// A device under a transport, and everything it affects.
pub(crate) struct Rig<D> {
    pub(crate) under: Under<D>,
    pub(crate) memory: MemoryView,
    pub(crate) claims: Arc<RecordedClaims>,
    pub(crate) msis: Arc<RecordedMsis>,
    pub(crate) lines: Arc<RecordedLines>,
    pub(crate) doorbells: Arc<RecordedDoorbells>,
    pub(crate) wakes: Arc<Wakes>,
}

impl<D: VirtioDevice + 'static> Rig<D> {
    pub(crate) fn new(device: D, transport: Transport, memory: MemoryView) -> Self {
        let (claims, msis, lines, doorbells) = (
            RecordedClaims::new(),
            RecordedMsis::new(),
            RecordedLines::new(),
            RecordedDoorbells::new(),
        );
        let line = Lines::new(lines.clone()).line(LINE).unwrap();
        let under = match transport {
            Transport::Pci => {
                let place = Place {
                    address: FunctionAddress::new(1, 0).unwrap(),
                    ecam: ECAM,
                };
                let ranges = Ranges {
                    registers: REGISTERS,
                    msix: MSIX,
                };
                let handles = PciHandles {
                    function: FunctionHandles {
                        claims: claims.clone(),
                        msi: msis.clone(),
                        line: Some(line),
                    },
                    memory: memory.clone(),
                    doorbells: Some(doorbells.clone()),
                };
                let device = VirtioPci::new("d", device, place, ranges, handles).unwrap();
                Under::Pci(Box::new(device))
            }
            Transport::Mmio => {
                let handles = MmioHandles {
                    line,
                    memory: memory.clone(),
                    doorbells: Some(doorbells.clone()),
                };
                Under::Mmio(Box::new(VirtioMmio::new("d", device, MMIO, handles)))
            }
        };
        let mut rig = Self {
            under,
            memory,
            claims,
            msis,
            lines,
            doorbells,
            wakes: Arc::default(),
        };
        rig.device().reset(ResetKind::PowerOn);
        rig.poll();
        rig
    }

    pub(crate) fn device(&mut self) -> &mut dyn Device {
        match &mut self.under {
            Under::Pci(device) => &mut **device,
            Under::Mmio(device) => &mut **device,
        }
    }

    pub(crate) fn update<T>(&mut self, change: impl FnOnce(&mut D) -> T) -> T {
        match &mut self.under {
            Under::Pci(device) => device.update(change),
            Under::Mmio(device) => device.update(change),
        }
    }

    pub(crate) fn poll(&mut self) {
        let waker = Waker::from(self.wakes.clone());
        self.device().poll(&mut Context::from_waker(&waker));
    }

    /// Whether nothing works for the device.
    pub(crate) fn is_quiet(&mut self) -> bool {
        let waker = Waker::from(self.wakes.clone());
        let mut cx = Context::from_waker(&waker);
        self.device().poll_quiet(&mut cx).is_ready()
    }

    pub(crate) fn woken(&self) -> bool {
        self.wakes.0.swap(0, Ordering::SeqCst) > 0
    }

    pub(crate) fn access(&mut self, address: u64) -> Access {
        let claims = self.claims.clone();
        caisson_device::testing::access(self.device(), Space::Mmio, address)
            .or_else(|| claims.access(Space::Mmio, address))
            .unwrap_or_else(|| panic!("nothing answers at {address:#x}"))
    }

    pub(crate) fn write(&mut self, address: u64, len: usize, value: u64) {
        let at = self.access(address);
        let done = self.device().write(at, &value.to_le_bytes()[..len]);
        assert_eq!(done, Outcome::Done);
    }

    pub(crate) fn read(&mut self, address: u64, len: usize) -> u64 {
        let at = self.access(address);
        let mut data = [0xff; 8];
        assert_eq!(self.device().read(at, &mut data[..len]), Outcome::Done);
        data[len..].fill(0);
        u64::from_le_bytes(data)
    }

    pub(crate) fn is_pci(&self) -> bool {
        matches!(self.under, Under::Pci(_))
    }

    pub(crate) fn status(&mut self) -> u8 {
        match self.is_pci() {
            true => self.read(REGISTERS + 0x14, 1) as u8,
            false => self.read(MMIO + 0x70, 4) as u8,
        }
    }

    pub(crate) fn set_status(&mut self, value: u8) {
        match self.is_pci() {
            true => self.write(REGISTERS + 0x14, 1, value.into()),
            false => self.write(MMIO + 0x70, 4, value.into()),
        }
    }

    /// Lets the device decode and write to memory.
    pub(crate) fn enable(&mut self) {
        if self.is_pci() {
            self.write(ECAM + (1 << 15) + 4, 2, 6);
        }
    }

    pub(crate) fn accept(&mut self, features: u64) {
        for select in 0..2u64 {
            let half = features >> (32 * select) & 0xffff_ffff;
            let (at, value) = match self.is_pci() {
                true => (REGISTERS + 8, REGISTERS + 12),
                false => (MMIO + 0x24, MMIO + 0x20),
            };
            self.write(at, 4, select);
            self.write(value, 4, half);
        }
    }

    pub(crate) fn select(&mut self, queue: u16) {
        match self.is_pci() {
            true => self.write(REGISTERS + 0x16, 2, queue.into()),
            false => self.write(MMIO + 0x30, 4, queue.into()),
        }
    }

    /// Enables `queue` of 8 entries and gives the driver's side of it.
    pub(crate) fn set_queue(&mut self, queue: u16, features: u64) -> Driver {
        let base = 0x1_0000 * (u64::from(queue) + 1);
        let place = RingPlace {
            size: 8,
            descriptors: base,
            driver: base + 0x1000,
            device: base + 0x2000,
        };
        let driver = Driver::new(&self.memory, place, RingFeatures::from_bits(features));
        self.select(queue);
        if self.is_pci() {
            self.write(REGISTERS + 0x18, 2, 8);
            // One address in two halves.
            self.write(REGISTERS + 0x20, 4, place.descriptors);
            self.write(REGISTERS + 0x24, 4, 0);
            self.write(REGISTERS + 0x28, 8, place.driver);
            self.write(REGISTERS + 0x30, 8, place.device);
            self.write(REGISTERS + 0x1c, 2, 1);
        } else {
            self.write(MMIO + 0x38, 4, 8);
            for (at, gpa) in [
                (0x80, place.descriptors),
                (0x90, place.driver),
                (0xa0, place.device),
            ] {
                self.write(MMIO + at, 4, gpa);
                self.write(MMIO + at + 4, 4, 0);
            }
            self.write(MMIO + 0x44, 4, 1);
        }
        driver
    }

    pub(crate) fn is_queue_enabled(&mut self, queue: u16) -> bool {
        self.select(queue);
        match self.is_pci() {
            true => self.read(REGISTERS + 0x1c, 2) == 1,
            false => self.read(MMIO + 0x44, 4) == 1,
        }
    }

    /// Everything a driver does before it uses the device (§3.1.1), with `queues` queues.
    pub(crate) fn set_up(&mut self, features: u64, queues: u16) -> Vec<Driver> {
        self.enable();
        for value in [0, 1, 3] {
            self.set_status(value);
        }
        self.accept(features);
        self.set_status(11);
        assert_eq!(self.status(), 11, "the features are accepted");
        let drivers = (0..queues).map(|queue| self.set_queue(queue, features));
        let drivers = drivers.collect();
        self.set_status(15);
        drivers
    }

    pub(crate) fn notify(&mut self, queue: u16) {
        match self.is_pci() {
            true => self.write(REGISTERS + 0x3000 + 4 * u64::from(queue), 2, queue.into()),
            false => self.write(MMIO + 0x50, 4, queue.into()),
        }
    }

    /// What interrupted without messages, once.
    pub(crate) fn interrupt_cause(&mut self) -> u64 {
        let cause = match self.is_pci() {
            true => self.read(REGISTERS + 0x1000, 1),
            false => {
                let cause = self.read(MMIO + 0x60, 4);
                self.write(MMIO + 0x64, 4, cause);
                cause
            }
        };
        assert!(!self.lines.level(LINE), "acknowledged");
        cause
    }

    pub(crate) fn inspect(&mut self) -> String {
        let mut tree = Inspector::new();
        self.device().inspect(&mut tree);
        tree.to_string()
    }
}

/// The record in `tests/kept/NAME` restores into `fresh`, and is what `device` saves today.
pub(crate) fn check_kept(name: &str, device: &dyn Device, fresh: &mut dyn Device) {
    let path = format!("{}/tests/kept/{name}", env!("CARGO_MANIFEST_DIR"));
    let record = device.save().unwrap();
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    if std::env::var_os("CAISSON_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, &bytes).unwrap();
    }
    let kept = std::fs::read(&path).unwrap();
    let kept = StateRecord::decode(&mut &kept[..]).unwrap();
    fresh.restore(&kept).unwrap();
    assert_eq!(fresh.save().unwrap(), record, "{name}");
}
