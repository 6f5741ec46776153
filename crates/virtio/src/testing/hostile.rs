//! A driver that does anything.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::task::{Context, Waker};

use caisson_block::testing::RamDisk;
use caisson_device::{
    Access, Device, Lines, ResetKind, Space,
    testing::{RecordedBytes, RecordedClaims, RecordedDoorbells, RecordedLines, RecordedMsis},
};
use caisson_memory::{Gpa, MemoryView};
use caisson_packet::{Frame, MacAddress, testing::RecordedNetwork};
use caisson_pci::{FunctionAddress, FunctionHandles, Place};

use super::{Counting, Counts, RAM, memory};
use crate::{
    blk::{Blk, BlkConfig},
    console::Console,
    feature,
    mmio::{MmioHandles, VirtioMmio},
    net::{Net, NetConfig},
    pci::{PciHandles, Ranges, VirtioPci},
    queue::{Chain, Queue, RingFeatures, RingPlace},
    rng::Rng,
};

/// Reads numbers from fuzzer input, zeros past its end.
struct Input<'a>(core::slice::Iter<'a, u8>);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }
    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }
    fn long(&mut self) -> u32 {
        u32::from(self.word()) | u32::from(self.word()) << 16
    }
    fn is_over(&self) -> bool {
        self.0.len() == 0
    }
}

/// Drives one ring of either format with whatever `input` says: contents of its parts and of tables, buffers taken and
/// given back, moves through saved state.
///
/// # Panics
/// When the ring does something that no driver may bring it to.
pub fn exercise_ring(input: &[u8]) {
    let mut input = Input(input.iter());
    let bits = input.byte();
    let features = RingFeatures {
        packed: bits & 1 != 0,
        indirect: bits & 2 != 0,
        event_idx: bits & 4 != 0,
        in_order: bits & 8 != 0,
    };
    let place = RingPlace {
        size: match bits >> 4 {
            0..8 => 1 << (bits >> 4),
            8..12 => 3,
            _ => input.word(),
        },
        descriptors: 0x1000,
        driver: 0x8_1000,
        device: 0x9_2000,
    };
    let memory = memory();
    let Ok(mut queue) = Queue::new(0, place, features) else {
        return;
    };
    let mut taken: Vec<Chain> = Vec::new();
    while !input.is_over() {
        match input.byte() {
            0..120 => poke(&memory, &place, &mut input),
            120..200 => {
                let mut chain = Chain::default();
                match queue.pop(&memory, &mut chain) {
                    Ok(true) => {
                        let segments = chain.readable().len() + chain.writable().len();
                        assert!(segments <= 1024.max(usize::from(place.size)));
                        let mut bytes = [0; 64];
                        let _ = chain.read(&memory, 0, &mut bytes);
                        let _ = chain.write(&memory, u64::from(input.byte()), &bytes[..7]);
                        taken.push(chain);
                        assert_eq!(usize::from(queue.in_flight()), taken.len());
                    }
                    Ok(false) => {}
                    Err(_) => return,
                }
            }
            200..240 if !taken.is_empty() => {
                let index = usize::from(input.byte()) % taken.len();
                let chain = taken.swap_remove(index);
                if queue.complete(&memory, &chain, input.long()).is_err() {
                    return;
                }
            }
            200..250 => {
                if queue.flush(&memory).is_err() {
                    return;
                }
            }
            _ => {
                let state = queue.state();
                queue = Queue::restore(0, &state, features).expect("what was saved is possible");
                assert_eq!(queue.state(), state);
            }
        }
    }
}

/// Writes where a ring's owner looks: an index, a descriptor, or anything anywhere.
fn poke(memory: &MemoryView, place: &RingPlace, input: &mut Input<'_>) {
    let put = |gpa: u64, bytes: &[u8]| {
        let _ = memory.write(Gpa(gpa), bytes);
    };
    let slot = |input: &mut Input<'_>| u64::from(input.byte() % 16);
    match input.byte() % 6 {
        0 => put(place.driver + 2, &u16::from(input.byte()).to_le_bytes()),
        1 => {
            let at = place.driver + 4 + 2 * slot(input);
            put(at, &u16::from(input.byte()).to_le_bytes());
        }
        2 | 3 => {
            let table = if input.byte() & 3 == 0 {
                0x4_0000
            } else {
                place.descriptors
            };
            let at = table + 16 * slot(input);
            let target = match input.byte() {
                0..100 => 0x4_0000,
                100..200 => u64::from(input.word()),
                200..220 => place.descriptors,
                220..240 => RAM - 5,
                _ => u64::MAX - u64::from(input.byte()),
            };
            put(at, &target.to_le_bytes());
            let len = match input.byte() {
                0..100 => 16 * u32::from(input.byte() % 8),
                100..200 => input.byte().into(),
                _ => input.long(),
            };
            put(at + 8, &len.to_le_bytes());
            put(
                at + 12,
                &[input.byte(), 0, input.byte(), input.byte() & 0x80],
            );
        }
        4 => put(place.driver, &input.long().to_le_bytes()),
        _ => put(u64::from(input.long()) % RAM, &[input.byte()]),
    }
}

/// Each device under each transport.
const KINDS: u8 = 8;
/// What a driver of a network card may accept besides.
const NET_FEATURES: u64 = 0x01c0_0000_00bf_99af;

/// A device under a transport, and how accesses find it.
struct Rig {
    device: Box<dyn Device>,
    claims: Arc<RecordedClaims>,
}

fn rig(kind: u8, world: &World) -> Rig {
    let World {
        memory,
        output,
        counts,
        disk,
        network,
    } = world;
    let claims = RecordedClaims::new();
    let lines = RecordedLines::new();
    let line = Lines::new(lines).line(20).expect("a line");
    let rng = Rng::new(Box::new(Counting(counts.clone())));
    let console = Console::new(output.clone(), None);
    let doorbells = RecordedDoorbells::new();
    let pci = PciHandles {
        function: FunctionHandles {
            claims: claims.clone(),
            msi: RecordedMsis::new(),
            line: Some(line.clone()),
        },
        memory: memory.clone(),
        doorbells: Some(doorbells.clone()),
    };
    let mmio = MmioHandles {
        line,
        memory: memory.clone(),
        doorbells: Some(doorbells),
    };
    let place = Place {
        address: FunctionAddress::new(1, 0).expect("a function's number"),
        ecam: 0xe000_0000,
    };
    let ranges = Ranges {
        registers: 0xc000_0000,
        msix: 0xc001_0000,
    };
    let sound = "the ranges are sound";
    let blk = Blk::new(
        disk.clone(),
        BlkConfig {
            queues: 2,
            id: "hostile".into(),
        },
    );
    let net = Net::new(
        network.clone(),
        NetConfig {
            mac: MacAddress([2, 0, 0, 0, 0, 1]),
        },
    );
    let mut device: Box<dyn Device> = match kind % KINDS {
        0 => Box::new(VirtioPci::new("d", rng, place, ranges, pci).expect(sound)),
        1 => Box::new(VirtioPci::new("d", console, place, ranges, pci).expect(sound)),
        2 => Box::new(VirtioMmio::new("d", rng, 0xf000_0000, mmio)),
        3 => Box::new(VirtioMmio::new("d", console, 0xf000_0000, mmio)),
        4 => Box::new(VirtioPci::new("d", blk, place, ranges, pci).expect(sound)),
        5 => Box::new(VirtioMmio::new("d", blk, 0xf000_0000, mmio)),
        6 => Box::new(VirtioPci::new("d", net, place, ranges, pci).expect(sound)),
        _ => Box::new(VirtioMmio::new("d", net, 0xf000_0000, mmio)),
    };
    device.reset(ResetKind::PowerOn);
    Rig { device, claims }
}

impl Rig {
    fn access(&self, region: u8, offset: u64) -> Option<Access> {
        let claim = match region {
            0 => self.device.claims().first().copied()?,
            region => self.claims.get(region.into())?,
        };
        let offset = offset % claim.range.len;
        Some(Access {
            space: Space::Mmio,
            address: claim.range.base + offset,
            region: region.into(),
            offset,
        })
    }

    fn write(&mut self, region: u8, offset: u64, data: &[u8]) {
        if let Some(at) = self.access(region, offset) {
            let _ = self.device.write(at, data);
        }
    }

    /// What a driver does before it uses the device, as far as `bits` says.
    fn set_up(&mut self, kind: u8, bits: u8) {
        let (is_pci, is_net) = (is_pci(kind), kind % KINDS >= 6);
        let mut features = feature::VERSION_1 | (feature::OFFERED & u64::from(bits) << 28);
        if is_net && bits & 1 == 0 {
            features |= NET_FEATURES;
        }
        let queues: u16 = if is_net { 3 } else { 2 };
        let (low, high) = (features as u32, (features >> 32) as u32);
        if is_pci {
            self.write(0, 4, &6u16.to_le_bytes());
            for status in [0u8, 1, 3] {
                self.write(1, 0x14, &[status]);
            }
            for (select, bits) in [(0u32, low), (1, high)] {
                self.write(1, 8, &select.to_le_bytes());
                self.write(1, 12, &bits.to_le_bytes());
            }
            self.write(1, 0x14, &[11]);
            for queue in 0..queues {
                self.write(1, 0x16, &queue.to_le_bytes());
                self.write(1, 0x18, &16u16.to_le_bytes());
                for (field, gpa) in [(0x20, 0x1000u64), (0x28, 0x2000), (0x30, 0x3000)] {
                    let gpa = gpa + 0x4000 * u64::from(queue);
                    self.write(1, field, &gpa.to_le_bytes());
                }
                self.write(1, 0x1c, &1u16.to_le_bytes());
            }
            self.write(1, 0x14, &[15]);
            return;
        }
        for status in [0u32, 1, 3] {
            self.write(0, 0x70, &status.to_le_bytes());
        }
        for (select, bits) in [(0u32, low), (1, high)] {
            self.write(0, 0x24, &select.to_le_bytes());
            self.write(0, 0x20, &bits.to_le_bytes());
        }
        self.write(0, 0x70, &11u32.to_le_bytes());
        for queue in 0..u32::from(queues) {
            self.write(0, 0x30, &queue.to_le_bytes());
            self.write(0, 0x38, &16u32.to_le_bytes());
            for (field, gpa) in [(0x80, 0x1000u32), (0x90, 0x2000), (0xa0, 0x3000)] {
                let gpa = gpa + 0x4000 * queue;
                self.write(0, field, &gpa.to_le_bytes());
            }
            self.write(0, 0x44, &1u32.to_le_bytes());
        }
        self.write(0, 0x70, &15u32.to_le_bytes());
    }
}

fn is_pci(kind: u8) -> bool {
    matches!(kind % KINDS, 0 | 1 | 4 | 6)
}

/// What devices are wired to.
struct World {
    memory: MemoryView,
    output: Arc<RecordedBytes>,
    counts: Arc<Counts>,
    disk: Arc<RamDisk>,
    network: Arc<RecordedNetwork>,
}

/// Has the storage answer everything, as a machine waits for before it saves or resets its devices.
fn settle(rig: &mut Rig, world: &World) {
    while world.disk.waiting() > 0 {
        world.disk.release(0);
    }
    let mut cx = Context::from_waker(Waker::noop());
    assert!(rig.device.poll_quiet(&mut cx).is_ready());
}

/// Drives a device under either transport with whatever `input` says: registers, rings, polls, resets, moves through
/// saved state.
///
/// # Panics
/// When the device does, or comes back changed from being saved.
pub fn exercise_device(input: &[u8]) {
    let mut input = Input(input.iter());
    let kind = input.byte();
    let world = World {
        memory: memory(),
        output: RecordedBytes::new(),
        counts: Arc::default(),
        disk: Arc::new(RamDisk::new(64 << 10)),
        network: Arc::default(),
    };
    let (memory, output, counts) = (&world.memory, &world.output, &world.counts);
    let mut rig = rig(kind, &world);
    let mut cx = Context::from_waker(Waker::noop());
    while !input.is_over() {
        match input.byte() {
            0..8 => rig.set_up(kind, input.byte()),
            8..80 => {
                let queue = u64::from(input.byte() % 3);
                let place = RingPlace {
                    size: 16,
                    descriptors: 0x1000 + 0x4000 * queue,
                    driver: 0x2000 + 0x4000 * queue,
                    device: 0x3000 + 0x4000 * queue,
                };
                poke(memory, &place, &mut input);
            }
            80..130 => rig.device.poll(&mut cx),
            130..200 => {
                let (region, len) = (input.byte() & 3, usize::from(input.byte() & 7) + 1);
                let offset = match input.byte() {
                    0..150 => u64::from(input.byte()),
                    _ => u64::from(input.word()),
                };
                let mut data = input.long().to_le_bytes().repeat(2);
                data.truncate(len);
                rig.write(region, offset, &data);
            }
            200..230 => {
                let (region, offset) = (input.byte() & 3, u64::from(input.word()));
                let len = usize::from(input.byte() & 7) + 1;
                if let Some(at) = rig.access(region, offset) {
                    let _ = rig.device.read(at, &mut [0xff; 8][..len]);
                }
            }
            230..233 => output.set_full(input.byte() & 1 != 0),
            233 => {
                let bytes = alloc::vec![input.byte(); usize::from(input.word() & 0xfff)];
                world.network.give(Frame::from(bytes));
            }
            234 => world.network.set_full(input.byte() & 1 != 0),
            235..238 => counts
                .dry
                .store(input.byte() & 1 != 0, core::sync::atomic::Ordering::SeqCst),
            238..241 => {
                settle(&mut rig, &world);
                rig.device.reset(ResetKind::System);
            }
            241..244 => world.disk.hold(input.byte() & 1 != 0),
            244..247 if world.disk.waiting() > 0 => {
                let index = usize::from(input.byte()) % world.disk.waiting();
                world.disk.release(index);
            }
            _ => {
                settle(&mut rig, &world);
                let mut fresh = self::rig(kind, &world);
                caisson_device::testing::check_state(&*rig.device, &mut *fresh.device);
                rig = fresh;
            }
        }
    }
}
