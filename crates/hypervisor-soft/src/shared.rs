//! What all threads of a partition share.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};

use arc_swap::ArcSwap;
use caisson_hypervisor::x86::CpuidTable;
use caisson_lapic::{ApicBus, Message};
use caisson_memory::{Gpa, GuestMemory, WriteWatch};
use caisson_x86_cpu::state::request;
use parking_lot::{Condvar, Mutex};

use crate::{
    clock::Clock, code_map::CodeMap, counters::Counters, exec_memory::ExecMemory, tier::Tier,
    timer::Timers,
};

/// What one vCPU asks of another before it runs guest code again.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// Forget blocks of this guest page.
    Invalidate(u64),
    /// Take back write tags of this guest page.
    DropWriteTags(u64),
}

/// A memory table and the code map that goes with it.
pub(crate) struct MemoryMap {
    pub(crate) memory: GuestMemory,
    pub(crate) code: CodeMap,
}

/// The part of a vCPU that other threads may touch.
pub(crate) struct Remote {
    /// [`request`] bits; the same word that the vCPU's run loop reads.
    pub(crate) request: Arc<AtomicU32>,
    /// The vCPU is running blocks. While it is not, it holds no pointer into
    /// guest memory and obeys its orders before it runs again.
    in_guest: AtomicBool,
    orders: Mutex<Vec<Order>>,
    /// Counts orders obeyed.
    obeyed: AtomicU64,
    sleeping: Mutex<bool>,
    wake: Condvar,
}

impl Remote {
    fn new() -> Self {
        Self {
            request: Arc::new(AtomicU32::new(0)),
            in_guest: AtomicBool::new(false),
            orders: Mutex::new(Vec::new()),
            obeyed: AtomicU64::new(0),
            sleeping: Mutex::new(false),
            wake: Condvar::new(),
        }
    }

    /// Asks the vCPU to look up from its guest code, and wakes it if it sleeps.
    pub(crate) fn request(&self, bits: u32) {
        self.request.fetch_or(bits, Ordering::SeqCst);
        let sleeping = self.sleeping.lock();
        if *sleeping {
            self.wake.notify_one();
        }
    }

    /// Sleeps until a request comes or `timeout` passes.
    pub(crate) fn sleep(&self, timeout: Option<std::time::Duration>) {
        let mut sleeping = self.sleeping.lock();
        if self.request.load(Ordering::SeqCst) != 0 {
            return;
        }
        *sleeping = true;
        match timeout {
            Some(t) => {
                self.wake.wait_for(&mut sleeping, t);
            }
            None => self.wake.wait(&mut sleeping),
        }
        *sleeping = false;
    }

    /// Before running guest code. `false`: there are requests to look at first.
    pub(crate) fn enter(&self) -> bool {
        self.in_guest.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let clear = self.request.load(Ordering::SeqCst) == 0;
        if !clear {
            self.leave();
        }
        clear
    }

    /// After running guest code, or before waiting for another vCPU.
    pub(crate) fn leave(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }

    pub(crate) fn is_in_guest(&self) -> bool {
        self.in_guest.load(Ordering::SeqCst)
    }

    /// Gives an order; [`Self::await_orders`] waits until it holds.
    fn order(&self, order: Order) -> u64 {
        let mut orders = self.orders.lock();
        orders.push(order);
        let ticket = self.obeyed.load(Ordering::SeqCst) + orders.len() as u64;
        drop(orders);
        self.request(request::CODE);
        ticket
    }

    /// Takes the orders to obey. They count as obeyed when `done` is called.
    pub(crate) fn take_orders(&self) -> Vec<Order> {
        let mut orders = self.orders.lock();
        let taken = std::mem::take(&mut *orders);
        self.obeyed.fetch_add(taken.len() as u64, Ordering::SeqCst);
        taken
    }
}

/// See the module.
pub(crate) struct Shared {
    pub(crate) clock: Clock,
    pub(crate) apic: ApicBus,
    pub(crate) vcpus: Box<[Remote]>,
    pub(crate) timers: Arc<Timers>,
    pub(crate) memory: ArcSwap<MemoryMap>,
    /// Counts memory tables.
    pub(crate) memory_generation: AtomicU64,
    pub(crate) thunks: Mutex<ExecMemory>,
    pub(crate) cpuid: CpuidTable,
    pub(crate) phys_bits: u8,
    /// How far vCPUs go with code that runs often.
    pub(crate) tier: Tier,
    /// Where vCPUs report what they have counted.
    pub(crate) counters: Option<Arc<Counters>>,
    /// Held by the vCPU for which all others stand still.
    exclusive: Mutex<()>,
    /// Drops of write tags that are being waited for.
    dropping: AtomicUsize,
}

/// Listens to what devices write. The memory outlives the partition, and the
/// partition holds the memory: hence weak.
pub(crate) struct DeviceWrites(pub(crate) Weak<Shared>);

impl WriteWatch for DeviceWrites {
    fn written(&self, gpa: Gpa, len: u64) {
        if let Some(shared) = self.0.upgrade() {
            shared.written_by_device(gpa, len);
        }
    }
}

impl Shared {
    pub(crate) fn new(
        memory: GuestMemory,
        vcpus: u32,
        cpuid: CpuidTable,
        clock: Clock,
        thunks: ExecMemory,
        phys_bits: u8,
        (tier, counters): (Tier, Option<Arc<Counters>>),
    ) -> Self {
        let ids: Vec<u32> = (0..vcpus).collect();
        let code = CodeMap::new(&memory);
        Self {
            clock,
            apic: ApicBus::new(&ids),
            vcpus: (0..vcpus).map(|_| Remote::new()).collect(),
            timers: Arc::new(Timers::new(vcpus as usize)),
            memory: ArcSwap::from_pointee(MemoryMap { memory, code }),
            memory_generation: AtomicU64::new(0),
            thunks: Mutex::new(thunks),
            cpuid,
            phys_bits,
            tier,
            counters,
            exclusive: Mutex::new(()),
            dropping: AtomicUsize::new(0),
        }
    }

    /// Delivers an interrupt message and wakes whom it concerns.
    pub(crate) fn deliver(&self, message: &Message, except: Option<usize>) {
        self.apic
            .deliver(message, except, |i| self.vcpus[i].request(request::EVENT));
    }

    /// Code in `page` was overwritten: everybody forgets its blocks.
    pub(crate) fn invalidate(&self, page: u64) {
        for v in &self.vcpus {
            v.order(Order::Invalidate(page));
        }
    }

    /// `len` bytes at `gpa` were stored by a vCPU without a write tag, or by a
    /// device. `true` if code was there.
    pub(crate) fn written(&self, map: &MemoryMap, gpa: Gpa, len: u64) -> bool {
        let Some(page) = map.code.page(gpa.page()) else {
            return false;
        };
        let hit = page.written(gpa, len);
        if hit {
            self.invalidate(gpa.page());
        }
        hit
    }

    /// `len` bytes at `gpa` were stored by a device: all pages of a DMA transfer.
    fn written_by_device(&self, gpa: Gpa, len: u64) {
        let map = self.memory.load();
        let (mut at, end) = (gpa.0, gpa.0.saturating_add(len));
        while at < end {
            let next = (at | 0xfff).saturating_add(1).min(end);
            self.written(&map, Gpa(at), next - at);
            at = next;
        }
    }

    /// vCPU `me` is about to decode `granules` of `page`. Waits until no other
    /// vCPU can write there unannounced; `true` if `me` has to drop its own tags.
    pub(crate) fn mark_code(&self, map: &MemoryMap, me: usize, page: u64, granules: u64) -> bool {
        let Some(code) = map.code.page(page) else {
            return false;
        };
        let writers = code.mark(granules);
        let others = writers & !(1 << me);
        if others != 0 {
            self.dropping.fetch_add(1, Ordering::SeqCst);
            let tickets: Vec<(usize, u64)> = (0..self.vcpus.len())
                .filter(|i| others >> i & 1 != 0)
                .map(|i| (i, self.vcpus[i].order(Order::DropWriteTags(page))))
                .collect();
            self.outside(me, || {
                for (i, ticket) in tickets {
                    let v = &self.vcpus[i];
                    while v.is_in_guest() && v.obeyed.load(Ordering::SeqCst) < ticket {
                        std::thread::yield_now();
                    }
                }
            });
            self.dropping.fetch_sub(1, Ordering::SeqCst);
        } else if self.dropping.load(Ordering::SeqCst) != 0 {
            // Somebody else marked this page and still waits: so must we.
            self.outside(me, || {
                while self.dropping.load(Ordering::SeqCst) != 0 {
                    std::thread::yield_now();
                }
            });
        }
        writers >> me & 1 != 0
    }

    /// Runs `wait` with vCPU `me` out of guest code. Whatever was ordered
    /// meanwhile is seen by its run loop before the next block.
    fn outside(&self, me: usize, wait: impl FnOnce()) {
        self.vcpus[me].leave();
        wait();
        self.vcpus[me].in_guest.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Stops all vCPUs but `me` at block borders.
    pub(crate) fn begin_exclusive(&self, me: usize) {
        // Another vCPU may hold it and wait for us to leave guest code.
        self.vcpus[me].leave();
        std::mem::forget(self.exclusive.lock());
        for (i, v) in self.vcpus.iter().enumerate() {
            if i != me {
                v.request(request::EXCLUSIVE);
            }
        }
        for (i, v) in self.vcpus.iter().enumerate() {
            while i != me && v.is_in_guest() {
                std::thread::yield_now();
            }
        }
        self.vcpus[me].in_guest.store(true, Ordering::SeqCst);
    }

    /// Lets them go on.
    pub(crate) fn end_exclusive(&self) {
        // SAFETY: locked and forgotten by `begin_exclusive` on this thread.
        unsafe { self.exclusive.force_unlock() };
    }

    /// Waits until nobody runs exclusively.
    pub(crate) fn wait_exclusive(&self) {
        drop(self.exclusive.lock());
    }
}
