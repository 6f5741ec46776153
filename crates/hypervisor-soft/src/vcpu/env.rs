//! What the core asks of the partition.

use std::sync::{Arc, atomic::Ordering};

use caisson_hypervisor::{Access, BusAnswer, IoBus, Space};
use caisson_lapic::{Deadline, Effects, Lapic, Time, X2APIC_MSR_FIRST, X2APIC_MSR_LAST};
use caisson_memory::{Gpa, RegionKind, Vtl};
use caisson_x86_cpu::{
    env::{Env, HostPage, IoOutcome},
    state::request,
};
use rustix::mm::{Advice, madvise};

use crate::{
    msr::{self, Mtrrs},
    shared::{MemoryMap, Shared},
    speculation::Speculation,
    timer::NEVER,
};

/// IA32_APIC_BASE's global enable.
const APIC_ENABLED: u64 = 1 << 11;
/// CPUID.1:EDX bit that mirrors it (Intel SDM Vol. 3 §12.4.3).
const CPUID_APIC: u32 = 1 << 9;
/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;
/// PAUSE instructions before the thread gives way: on a host with fewer free
/// cores than vCPUs, the vCPU that is waited for may need this one's.
const PAUSES: u32 = 64;

/// The surroundings of one vCPU.
pub(crate) struct VcpuEnv {
    pub(crate) shared: Arc<Shared>,
    index: usize,
    pub(crate) lapic: Lapic,
    map: Arc<MemoryMap>,
    map_generation: u64,
    /// Region looked up last.
    recent: usize,
    bus: Option<*const dyn IoBus>,
    /// IA32_TSC_ADJUST: this vCPU's TSC is the partition's plus this.
    pub(crate) tsc_adjust: u64,
    pub(crate) mtrrs: Mtrrs,
    pub(crate) speculation: Speculation,
    pauses: u32,
    /// Pages that got a write tag in a single step, where dirty pages are noted.
    tagged: Option<Vec<u64>>,
}

// SAFETY: `bus` is only set while the owning thread is inside `Vcpu::run`.
unsafe impl Send for VcpuEnv {}

impl VcpuEnv {
    pub(crate) fn new(shared: Arc<Shared>, index: usize, lapic: Lapic) -> Self {
        let map = shared.memory.load_full();
        Self {
            speculation: Speculation::new(&shared.cpuid),
            shared,
            index,
            lapic,
            map,
            map_generation: 0,
            recent: 0,
            bus: None,
            tsc_adjust: 0,
            mtrrs: Mtrrs::default(),
            pauses: 0,
            tagged: None,
        }
    }

    /// A single step begins: what it writes is noted once more when it ends. The
    /// write tag comes before the store, and a harvest may come between.
    pub(crate) fn begin_step(&mut self) {
        self.tagged = Some(Vec::new());
    }

    /// See [`Self::begin_step`].
    pub(crate) fn end_step(&mut self) {
        for page in self.tagged.take().unwrap_or_default() {
            self.mark_dirty(page << 12, 1);
        }
    }

    /// Notes a write of `len` bytes in one page. Gives whether anybody asks.
    fn mark_dirty(&self, gpa: u64, len: u64) -> bool {
        let region = self.map.memory.find(Gpa(gpa));
        let Some((region, dirty)) = region.and_then(|r| Some((r, r.dirty()?))) else {
            return false;
        };
        dirty.mark(gpa - region.gpa().0, len);
        true
    }

    /// Lends the bus for a run.
    pub(crate) fn attach(&mut self, bus: &dyn IoBus) {
        // SAFETY: only the lifetime is forgotten; `detach` comes before it ends.
        self.bus = Some(unsafe { std::mem::transmute::<*const dyn IoBus, *const dyn IoBus>(bus) });
    }

    /// Ends the loan.
    pub(crate) fn detach(&mut self) {
        self.bus = None;
    }

    fn bus(&self) -> &dyn IoBus {
        let bus = self.bus.expect("the vCPU is running");
        // SAFETY: set from a borrow that lasts as long as the run.
        unsafe { &*bus }
    }

    pub(crate) fn acknowledge_pic(&self) -> u8 {
        self.bus().acknowledge_pic()
    }

    /// Takes a new memory table if there is one.
    pub(crate) fn refresh_memory(&mut self) -> bool {
        let generation = self.shared.memory_generation.load(Ordering::SeqCst);
        if generation == self.map_generation {
            return false;
        }
        self.map = self.shared.memory.load_full();
        self.map_generation = generation;
        self.recent = 0;
        true
    }

    /// Now, on both of the APIC timer's clocks.
    pub(crate) fn time(&self) -> Time {
        let tsc = self.shared.clock.tsc();
        Time {
            nanos: self.shared.clock.nanos_at(tsc),
            tsc: tsc.wrapping_add(self.tsc_adjust),
        }
    }

    /// When the APIC timer expires, in machine nanoseconds.
    pub(crate) fn deadline(&self) -> u64 {
        match self.lapic.next_timer_deadline() {
            None => NEVER,
            Some(Deadline::Nanos(n)) => n,
            Some(Deadline::Tsc(t)) => {
                // Rounded up: waking early would find the timer not yet expired.
                self.shared
                    .clock
                    .nanos_at(t.wrapping_sub(self.tsc_adjust))
                    .saturating_add(1)
            }
        }
    }

    /// Tells the timer thread.
    pub(crate) fn arm_timer(&self) {
        self.shared.timers.set(self.index, self.deadline());
    }

    /// Tells the other vCPUs what this one's APIC has become.
    pub(crate) fn publish(&self) {
        self.shared.apic.publish(self.index, self.lapic.identity());
        self.arm_timer();
    }

    /// Power-on values.
    pub(crate) fn reset(&mut self) {
        self.lapic.reset();
        self.tsc_adjust = 0;
        self.mtrrs = Mtrrs::default();
        self.speculation.reset();
    }

    /// Carries out what an access to the APIC causes elsewhere.
    fn apply(&mut self, effects: Effects) {
        if effects.identity_changed {
            self.publish();
        }
        if effects.timer_changed {
            self.arm_timer();
        }
        if let Some(ipi) = effects.ipi {
            let shared = &self.shared;
            shared.apic.send(self.index, &ipi, |i| {
                shared.vcpus[i].request(request::EVENT)
            });
        }
        if let Some(vector) = effects.eoi {
            self.bus().eoi(Vtl::VTL0, vector);
        }
        self.look_again();
    }

    /// Something may have become deliverable.
    fn look_again(&self) {
        if self.lapic.pending().is_some() {
            self.shared.vcpus[self.index]
                .request
                .fetch_or(request::EVENT, Ordering::SeqCst);
        }
    }

    fn apic_offset(&self, gpa: u64) -> Option<u64> {
        let base = self.lapic.mmio_base()?;
        (gpa & !0xfff == base).then_some(gpa & 0xfff)
    }

    fn access(&self, space: Space, address: u64) -> Access {
        Access {
            vtl: Vtl::VTL0,
            vcpu: self.index as u32,
            space,
            address: Gpa(address),
        }
    }
}

fn outcome(answer: BusAnswer) -> IoOutcome {
    match answer {
        BusAnswer::Done => IoOutcome::Done,
        BusAnswer::Park => IoOutcome::Parked,
    }
}

impl Env for VcpuEnv {
    fn host_page(&mut self, page: u64) -> Option<HostPage> {
        let gpa = page << 12;
        if self.lapic.mmio_base() == Some(gpa) {
            return None;
        }
        let regions = self.map.memory.regions();
        let holds = |i: usize| regions.get(i).filter(|r| r.gpa().0 <= gpa && gpa < r.end());
        let r = match holds(self.recent) {
            Some(r) => r,
            None => {
                self.recent = regions
                    .partition_point(|r| r.gpa().0 <= gpa)
                    .checked_sub(1)?;
                holds(self.recent)?
            }
        };
        // SAFETY: inside the region, whose mapping the table keeps.
        let host = unsafe { r.host().as_ptr().add((gpa - r.gpa().0) as usize) };
        Some(HostPage {
            host,
            writable: r.kind() == RegionKind::Ram,
        })
    }

    fn allow_write_tag(&mut self, page: u64) -> bool {
        if self.mark_dirty(page << 12, 1)
            && let Some(tagged) = &mut self.tagged
        {
            tagged.push(page);
        }
        self.map
            .code
            .page(page)
            .is_none_or(|p| p.claim_writer(1 << self.index))
    }

    fn code_written(&mut self, gpa: u64, len: u64) -> bool {
        self.mark_dirty(gpa, len);
        self.shared.written(&self.map, Gpa(gpa), len)
    }

    fn code_page(&mut self, page: u64, granules: u64) -> bool {
        self.shared.mark_code(&self.map, self.index, page, granules)
    }

    fn populate(&mut self, at: *mut u8, len: usize) {
        // SAFETY: the engine owns these pages, and neither call changes a byte.
        // Where the host refuses, pages are small and come in one by one.
        unsafe {
            if len >= HUGE_PAGE {
                let _ = madvise(at.cast(), len, Advice::LinuxHugepage);
            }
            let _ = madvise(at.cast(), len, Advice::LinuxPopulateWrite);
        }
    }

    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> IoOutcome {
        if let Some(offset) = self.apic_offset(gpa) {
            let now = self.time();
            self.lapic.read_mmio(offset, data, now);
            return IoOutcome::Done;
        }
        outcome(self.bus().read(self.access(Space::Mmio, gpa), data))
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> IoOutcome {
        if let Some(offset) = self.apic_offset(gpa) {
            let now = self.time();
            let effects = self.lapic.write_mmio(offset, data, now);
            self.apply(effects);
            return IoOutcome::Done;
        }
        outcome(self.bus().write(self.access(Space::Mmio, gpa), data))
    }

    fn port_read(&mut self, port: u16, data: &mut [u8]) -> IoOutcome {
        outcome(self.bus().read(self.access(Space::Pio, port.into()), data))
    }

    fn port_write(&mut self, port: u16, data: &[u8]) -> IoOutcome {
        outcome(self.bus().write(self.access(Space::Pio, port.into()), data))
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let mut regs = super::cpuid::leaf(&self.shared.cpuid, self.index as u32, leaf, subleaf);
        if leaf == 1 && self.lapic.apic_base() & APIC_ENABLED == 0 {
            regs[3] &= !CPUID_APIC;
        }
        regs
    }

    fn read_msr(&mut self, index: u32) -> Option<u64> {
        match index {
            msr::TSC => Some(self.tsc()),
            msr::TSC_ADJUST => Some(self.tsc_adjust),
            msr::APIC_BASE => Some(self.lapic.apic_base()),
            msr::TSC_DEADLINE => {
                let now = self.time();
                Some(self.lapic.tsc_deadline(now))
            }
            X2APIC_MSR_FIRST..=X2APIC_MSR_LAST => {
                let now = self.time();
                self.lapic.read_msr(index, now).ok()
            }
            _ => self
                .mtrrs
                .read(index, self.shared.phys_bits)
                .or_else(|| self.speculation.read(index))
                .or_else(|| msr::read_constant(index))
                .or_else(|| self.bus().read_msr(Vtl::VTL0, self.index as u32, index)),
        }
    }

    fn write_msr(&mut self, index: u32, value: u64) -> bool {
        let now = self.time();
        let effects = match index {
            msr::TSC => {
                // Writing the TSC moves this vCPU's alone, and TSC_ADJUST with it.
                self.tsc_adjust = self.tsc_adjust.wrapping_add(value.wrapping_sub(now.tsc));
                Ok(Effects {
                    timer_changed: true,
                    ..Effects::default()
                })
            }
            msr::TSC_ADJUST => {
                self.tsc_adjust = value;
                Ok(Effects {
                    timer_changed: true,
                    ..Effects::default()
                })
            }
            msr::APIC_BASE => self.lapic.set_apic_base(value, now),
            msr::TSC_DEADLINE => Ok(self.lapic.set_tsc_deadline(value, now)),
            X2APIC_MSR_FIRST..=X2APIC_MSR_LAST => self.lapic.write_msr(index, value, now),
            _ => {
                return self
                    .mtrrs
                    .write(index, value, self.shared.phys_bits)
                    .or_else(|| self.speculation.write(index, value))
                    .unwrap_or_else(|| {
                        msr::write_ignored(index, value)
                            || self
                                .bus()
                                .write_msr(Vtl::VTL0, self.index as u32, index, value)
                    });
            }
        };
        match effects {
            Ok(e) => {
                self.apply(e);
                true
            }
            Err(_) => false,
        }
    }

    fn tsc(&mut self) -> u64 {
        self.shared.clock.tsc().wrapping_add(self.tsc_adjust)
    }

    fn cr8(&mut self) -> u8 {
        self.lapic.cr8()
    }

    fn set_cr8(&mut self, value: u8) {
        self.lapic.set_cr8(value);
        self.look_again();
    }

    fn begin_exclusive(&mut self) {
        self.shared.begin_exclusive(self.index);
    }

    fn end_exclusive(&mut self) {
        self.shared.end_exclusive();
    }

    fn pause(&mut self) {
        self.pauses = self.pauses.wrapping_add(1);
        if self.pauses.is_multiple_of(PAUSES) && self.shared.vcpus.len() > 1 {
            std::thread::yield_now();
        }
    }

    fn place_thunk(&mut self, code: &[u8]) -> Option<*const u8> {
        self.shared.thunks.lock().place(code)
    }
}
