//! A host's driver, and one that does anything: for tests and fuzz targets.

use alloc::{string::String, sync::Arc, vec::Vec};
use core::task::{Context, Waker};

use caisson_block::testing::RamDisk;
use caisson_device::{
    Access, Device, Lines, ResetKind, Space,
    testing::{ManualTime, RecordedClaims, RecordedLines, RecordedMsis},
};
use caisson_memory::{
    Gpa, GuestMemory, MemoryView, RegionKind,
    host::{HugePages, Mapping},
};
use caisson_pci::{FunctionAddress, FunctionHandles, Place};

use crate::{Nvme, NvmeConfig, NvmeHandles};

/// Bytes of RAM, from address 0 on.
pub const RAM: u64 = 4 << 20;
/// The line that the controller's pin drives.
pub const LINE: u32 = 17;
/// I/O queues of each kind.
pub const QUEUES: u16 = 2;
/// Where queue `n` lies: commands, and 64 KiB after them completions.
const RINGS: u64 = 0x10_0000;
/// Entries of each queue that [`Host`] makes.
const ENTRIES: u32 = 8;

/// A completion as the host finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    /// The command's id.
    pub id: u16,
    /// Status code type and code, the *Do Not Retry* bit left out: 0 is success.
    pub status: u16,
    /// Dword 0.
    pub result: u32,
    /// Where the controller is in the submission queue.
    pub head: u16,
}

/// A controller wired to fakes, and the driver of it.
pub struct Host {
    /// The controller.
    pub device: Nvme,
    /// The disk behind it.
    pub disk: Arc<RamDisk>,
    /// Guest memory.
    pub memory: MemoryView,
    /// Interrupts sent.
    pub msis: Arc<RecordedMsis>,
    /// The pin.
    pub lines: Arc<RecordedLines>,
    /// The machine's clock.
    pub time: Arc<ManualTime>,
    claims: Arc<RecordedClaims>,
    tails: [u32; 3],
    heads: [(u32, bool); 3],
    next_id: u16,
}

/// Command dwords by their index, as a driver fills them in.
pub type Dwords = [(usize, u32)];

impl Host {
    /// A controller in front of `disk`, after a reset, with the serial number `serial`.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new(disk: &Arc<RamDisk>, serial: &str) -> Self {
        let mapping = Mapping::new("nvme-test", RAM, HugePages::Off).expect("some memory");
        let region = mapping.region("ram", Gpa(0), 0, RAM, RegionKind::Ram);
        let memory = GuestMemory::new(alloc::vec![region]).expect("one region");
        Self::with_memory(disk, serial, MemoryView::new(memory))
    }

    fn with_memory(disk: &Arc<RamDisk>, serial: &str, memory: MemoryView) -> Self {
        let (claims, msis, lines) = (
            RecordedClaims::new(),
            RecordedMsis::new(),
            RecordedLines::new(),
        );
        let time = ManualTime::new();
        let handles = NvmeHandles {
            function: FunctionHandles {
                claims: claims.clone(),
                msi: msis.clone(),
                line: Lines::new(lines.clone()).line(LINE).ok(),
            },
            memory: memory.clone(),
            clock: time.clone(),
        };
        let config = NvmeConfig {
            queues: QUEUES,
            serial: String::from(serial),
        };
        let place = Place {
            address: FunctionAddress::new(2, 0).expect("a function's number"),
            ecam: 0xe000_0000,
        };
        let mut device = Nvme::new("nvme0", disk.clone(), config, place, 0xc000_0000, handles)
            .expect("its range is sound");
        device.reset(ResetKind::PowerOn);
        Self {
            device,
            disk: disk.clone(),
            memory,
            msis,
            lines,
            time,
            claims,
            tails: [0; 3],
            heads: [(0, true); 3],
            next_id: 0,
        }
    }

    /// A fresh controller in front of the same disk and memory, whose driver is where this one is.
    pub fn twin(&self) -> Self {
        let twin = Self::with_memory(&self.disk, "serial", self.memory.clone());
        Self {
            tails: self.tails,
            heads: self.heads,
            next_id: self.next_id,
            ..twin
        }
    }

    /// Writes to configuration space.
    pub fn config(&mut self, offset: u64, data: &[u8]) {
        let at = Access {
            space: Space::Mmio,
            address: 0xe001_0000 + offset,
            region: 0,
            offset,
        };
        let _ = self.device.write(at, data);
    }

    fn access(&self, offset: u64) -> Option<Access> {
        let claim = self.claims.get(1)?;
        Some(Access {
            space: Space::Mmio,
            address: claim.range.base + offset,
            region: 1,
            offset,
        })
    }

    /// Writes registers, if they answer.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = self.access(offset) {
            let _ = self.device.write(at, data);
        }
    }

    /// Writes a register.
    pub fn set(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Reads two registers, if they answer.
    pub fn get(&mut self, offset: u64) -> u64 {
        let mut data = [0; 8];
        if let Some(at) = self.access(offset) {
            let _ = self.device.read(at, &mut data);
        }
        u64::from_le_bytes(data)
    }

    /// Lets the controller work until it has nothing more to do at once.
    pub fn poll(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..4 {
            self.device.poll(&mut cx);
        }
    }

    fn rings(queue: u16) -> (u64, u64) {
        let base = RINGS + 0x2_0000 * u64::from(queue);
        (base, base + 0x1_0000)
    }

    /// What a driver does until the controller is ready: memory and bus master on, MSI-X on, admin queues.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn enable(&mut self, msix: bool) {
        self.config(4, &[6, 0]);
        if msix {
            // Its only capability is the first.
            self.config(0x42, &0x8000u16.to_le_bytes());
            for vector in 0..u64::from(QUEUES) + 1 {
                let entry = 0x2000 + 16 * vector;
                self.set(entry, 0xfee0_0000);
                self.set(entry + 4, 0);
                self.set(entry + 8, 0x40 + vector as u32);
                self.set(entry + 12, 0);
            }
        }
        let (submission, completion) = Self::rings(0);
        self.set(0x24, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        self.write(0x28, &submission.to_le_bytes());
        self.write(0x30, &completion.to_le_bytes());
        self.memory
            .fill(Gpa(RINGS), 0x8_0000, 0)
            .expect("it is RAM");
        self.tails = [0; 3];
        self.heads = [(0, true); 3];
        self.set(0x14, 4 << 20 | 6 << 16 | 1);
        self.poll();
        assert_eq!(self.get(0x1c) & 3, 1, "ready and not fatal");
    }

    /// Makes the I/O queues of number `queue`.
    ///
    /// # Panics
    /// When the controller refuses.
    pub fn create_queues(&mut self, queue: u16) {
        let (submission, completion) = Self::rings(queue);
        let sizes = (ENTRIES - 1) << 16 | u32::from(queue);
        let vector = if self.device.uses_messages() {
            u32::from(queue)
        } else {
            0
        };
        let made = self.admin(
            5,
            &[(6, completion as u32), (10, sizes), (11, vector << 16 | 3)],
        );
        assert_eq!(made.status, 0);
        let link = u32::from(queue) << 16 | 1;
        let made = self.admin(1, &[(6, submission as u32), (10, sizes), (11, link)]);
        assert_eq!(made.status, 0);
    }

    /// Puts a command into `queue` without ringing. Gives its id.
    ///
    /// # Panics
    /// When memory cannot be written.
    pub fn offer(&mut self, queue: u16, opcode: u8, dwords: &Dwords) -> u16 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let mut command = [0u32; 16];
        command[0] = u32::from(opcode) | u32::from(id) << 16;
        command[1] = u32::from(queue > 0);
        for (index, value) in dwords {
            command[*index] |= *value;
        }
        let bytes: Vec<u8> = command.iter().flat_map(|d| d.to_le_bytes()).collect();
        let tail = &mut self.tails[usize::from(queue)];
        let at = Self::rings(queue).0 + 64 * u64::from(*tail);
        *tail = (*tail + 1) % ENTRIES;
        self.memory.write(Gpa(at), &bytes).expect("it is RAM");
        id
    }

    /// Rings the doorbell of submission queue `queue`, and lets the controller work.
    pub fn ring(&mut self, queue: u16) {
        let tail = self.tails[usize::from(queue)];
        self.set(0x1000 + 8 * u64::from(queue), tail);
        self.poll();
    }

    /// The next completion of `queue`, if there is one; the controller is told that it was seen.
    ///
    /// # Panics
    /// When memory cannot be read.
    pub fn reap(&mut self, queue: u16) -> Option<Completed> {
        let (head, phase) = &mut self.heads[usize::from(queue)];
        let mut entry = [0; 16];
        let at = Self::rings(queue).1 + 16 * u64::from(*head);
        self.memory.read(Gpa(at), &mut entry).expect("it is RAM");
        let word = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        if (word(14) & 1 == 1) != *phase {
            return None;
        }
        *head = (*head + 1) % ENTRIES;
        if *head == 0 {
            *phase = !*phase;
        }
        let head = *head;
        self.set(0x1004 + 8 * u64::from(queue), head);
        Some(Completed {
            id: word(12),
            status: word(14) >> 1 & 0x7ff,
            result: u32::from(word(0)) | u32::from(word(2)) << 16,
            head: word(8),
        })
    }

    /// Carries out an admin command.
    ///
    /// # Panics
    /// When it is not completed at once.
    pub fn admin(&mut self, opcode: u8, dwords: &Dwords) -> Completed {
        self.perform(0, opcode, dwords)
    }

    /// Carries out a command of `queue`.
    ///
    /// # Panics
    /// When it is not completed at once.
    pub fn perform(&mut self, queue: u16, opcode: u8, dwords: &Dwords) -> Completed {
        let id = self.offer(queue, opcode, dwords);
        self.ring(queue);
        let completed = self.reap(queue).expect("it is completed");
        assert_eq!(completed.id, id);
        completed
    }

    /// Has the storage answer everything, as a machine waits for before it saves or resets its devices.
    ///
    /// # Panics
    /// When the controller is not quiet then.
    pub fn settle(&mut self) {
        while self.disk.waiting() > 0 {
            self.disk.release(0);
        }
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..4 {
            if self.device.poll_quiet(&mut cx).is_ready() {
                return;
            }
            while self.disk.waiting() > 0 {
                self.disk.release(0);
            }
        }
        panic!("the controller waits for nothing");
    }
}

/// Reads numbers from fuzzer input, zeros past its end.
struct Input<'a>(core::slice::Iter<'a, u8>);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }
    fn long(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }
}

/// Drives a controller with whatever `input` says: registers, commands and lists in memory, doorbells, polls, resets,
/// moves through saved state.
///
/// # Panics
/// When the controller does, or comes back changed from being saved.
pub fn exercise(input: &[u8]) {
    let mut input = Input(input.iter());
    let disk = Arc::new(RamDisk::new(64 << 10));
    let mut host = Host::new(&disk, "serial");
    if input.byte() & 3 != 0 {
        host.enable(input.byte() & 1 != 0);
        for queue in 1..=QUEUES {
            host.create_queues(queue);
        }
    }
    while input.0.len() > 0 {
        match input.byte() {
            // A command with a few sensible fields.
            0..90 => {
                let queue = u16::from(input.byte() % 3);
                let opcode = input.byte() & 0x1f;
                let mut dwords = Vec::new();
                for _ in 0..input.byte() % 8 {
                    let index = usize::from(input.byte() % 16);
                    let value = match input.byte() {
                        0..100 => u32::from(input.byte()),
                        100..180 => u32::from(input.byte()) << 12,
                        _ => input.long(),
                    };
                    dwords.push((index, value));
                }
                host.offer(queue, opcode, &dwords);
                if input.byte() & 1 == 0 {
                    host.ring(queue);
                }
            }
            // Lists, anywhere low.
            90..130 => {
                let at = u64::from(input.byte()) << 12 | u64::from(input.byte() & 0xf) << 3;
                let mut value = [0; 16];
                value[0..4].copy_from_slice(&input.long().to_le_bytes());
                value[8] = input.byte();
                value[9] = input.byte();
                value[15] = input.byte() & 0x30;
                let _ = host.memory.write(Gpa(at), &value);
            }
            130..160 => host.poll(),
            160..190 => {
                host.reap(u16::from(input.byte() % 3));
            }
            190..210 => {
                let offset = match input.byte() {
                    0..100 => u64::from(input.byte() & 0x3f),
                    100..200 => 0x1000 + u64::from(input.byte()),
                    _ => u64::from(input.long() & 0x3fff),
                };
                let len = usize::from(input.byte() & 7) + 1;
                let data = [input.long().to_le_bytes(), input.long().to_le_bytes()].concat();
                host.write(offset, &data[..len]);
            }
            210..218 => {
                let offset = u64::from(input.long() & 0x3fff);
                host.get(offset);
            }
            218..222 => host.config(u64::from(input.byte()), &[input.byte()]),
            222..232 => disk.hold(input.byte() & 1 != 0),
            232..240 if disk.waiting() > 0 => {
                disk.release(usize::from(input.byte()) % disk.waiting());
            }
            240..243 => disk.resize(u64::from(input.byte() % 200 + 1) * 512),
            243..247 => {
                host.settle();
                host.device.reset(ResetKind::System);
            }
            _ => {
                host.settle();
                let mut fresh = host.twin();
                caisson_device::testing::check_state(&host.device, &mut fresh.device);
                host = fresh;
            }
        }
    }
    host.settle();
}
