//! A vCPU of the software CPU: the run loop around blocks of guest code.

pub(crate) mod cpuid;
mod env;
mod state;
mod step;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use caisson_hypervisor::{
    Completion, CrashReason, Exit, HypervisorError, IoBus, KickHandle, Pending, Space, Vcpu,
    VcpuStats,
    x86::{Feature, VcpuState},
};
use caisson_lapic::{Config, Lapic, Pending as ApicPending};
use caisson_memory::{Gpa, Vtl};
use caisson_x86_cpu::{
    cache::CodeCache,
    env::Env,
    exec::{self, Stop},
    fault::{Exception, Fault},
    jit::Settings,
    state::{Activity, Cpu, Shadow, request},
    sys,
};

use self::env::VcpuEnv;
use crate::{
    counters::VcpuCounters,
    exec_memory::TwoViews,
    shared::{Order, Remote, Shared},
    tier::Tier,
    timer::NEVER,
};

/// Bytes of decoded code that a vCPU keeps.
const CACHE_LIMIT: usize = 64 << 20;
/// Bytes of translated code that a vCPU keeps.
const NATIVE_LIMIT: usize = 32 << 20;

/// See [`Vcpu`].
pub(crate) struct SoftVcpu {
    cpu: Box<Cpu>,
    cache: CodeCache,
    env: Box<VcpuEnv>,
    shared: Arc<Shared>,
    index: usize,
    nmi_pending: bool,
    halts: u64,
    /// A fault that the completion of a parked access asked for.
    injected: Option<Exception>,
    /// An interrupt that another backend accepted and did not deliver.
    accepted: Option<u8>,
    /// What `cache` keeps translated code in.
    _native: Option<TwoViews>,
}

impl SoftVcpu {
    pub(crate) fn new(shared: Arc<Shared>, index: u32) -> Result<Self, HypervisorError> {
        let at = index as usize;
        let mut cpu = Box::new(cpuid::new_cpu(&shared));
        cpu.request = shared.vcpus[at].request.clone();
        let config = Config {
            physical_address_bits: shared.phys_bits,
            // As KVM has it, whose I/O APIC is the same.
            directed_eoi: Feature::named("x2apic").is_some_and(|f| shared.cpuid.has(f)),
            ..Config::new(index, index == 0)
        };
        let lapic = Lapic::new(config);
        shared.apic.publish(at, lapic.identity());
        let env = Box::new(VcpuEnv::new(shared.clone(), at, lapic));
        let mut cache = CodeCache::new(CACHE_LIMIT);
        let native = match shared.tier {
            Tier::Interpreted => None,
            Tier::Native => Some(native(&mut cache)?),
        };
        let mut vcpu = Self {
            cpu,
            cache,
            env,
            shared,
            index: at,
            nmi_pending: false,
            halts: 0,
            injected: None,
            accepted: None,
            _native: native,
        };
        if index != 0 {
            vcpu.cpu.activity = Activity::WaitForSipi;
        }
        Ok(vcpu)
    }

    fn remote(&self) -> &Remote {
        &self.shared.vcpus[self.index]
    }

    /// Obeys what other vCPUs ordered.
    fn obey(&mut self) {
        if self.env.refresh_memory() {
            self.cpu.flush_tlb(false);
            self.cache.flush(&mut self.cpu);
        }
        for order in self.shared.vcpus[self.index].take_orders() {
            match order {
                Order::Invalidate(page) => self.cache.invalidate(&mut self.cpu, page),
                Order::DropWriteTags(page) => {
                    self.cpu.tlbs.drop_write_tags(page);
                }
            }
        }
    }

    /// Looks at the APIC: INIT and start-up, expired timers, NMIs.
    fn collect(&mut self) {
        let Some(mailbox) = self.shared.apic.mailbox(self.index) else {
            return;
        };
        let received = self.env.lapic.collect(mailbox);
        let now = self.env.time();
        self.env.lapic.advance_timer(now);
        self.env.arm_timer();
        if received.init {
            self.env.publish();
            sys::reset(&mut self.cpu, true);
            self.cpu.flush_tlb(false);
            self.nmi_pending = false;
            self.cpu.replay.abandon();
            self.cpu.activity = if self.index == 0 {
                Activity::Running
            } else {
                Activity::WaitForSipi
            };
        }
        if let Some(vector) = received.start_up
            && self.cpu.activity == Activity::WaitForSipi
        {
            sys::start_up(&mut self.cpu, vector);
            self.cpu.activity = Activity::Running;
        }
        self.nmi_pending |= received.nmi;
    }

    /// Delivers the NMI or interrupt that is due, if the guest allows it. `Err`
    /// is a triple fault.
    fn deliver(&mut self) -> Result<(), Fault> {
        self.cpu.window_wanted = false;
        if matches!(
            self.cpu.activity,
            Activity::WaitForSipi | Activity::Shutdown
        ) {
            return Ok(());
        }
        if self.cpu.shadow != Shadow::None {
            self.cpu.window_wanted = self.nmi_pending || self.env.lapic.pending().is_some();
            return Ok(());
        }
        if let Some(e) = self.injected.take() {
            self.cpu.stats.exceptions += 1;
            return sys::deliver_exception(&mut self.cpu, e);
        }
        if let Some(vector) = self.accepted.take() {
            self.cpu.activity = Activity::Running;
            self.cpu.stats.interrupts += 1;
            self.cpu.window_wanted = true;
            return self.event(|cpu| sys::deliver_interrupt(cpu, vector));
        }
        if self.nmi_pending && !self.cpu.nmi_masked {
            self.nmi_pending = false;
            self.cpu.activity = Activity::Running;
            return self.event(sys::deliver_nmi);
        }
        let Some(pending) = self.env.lapic.pending() else {
            self.cpu.window_wanted = self.nmi_pending;
            return Ok(());
        };
        if !self.cpu.interrupts_enabled() {
            self.cpu.window_wanted = true;
            return Ok(());
        }
        let vector = match pending {
            ApicPending::Vector(v) => {
                self.env.lapic.accept(v);
                v
            }
            ApicPending::ExtInt => {
                self.env.lapic.accept_ext_int();
                self.env.acknowledge_pic()
            }
        };
        self.cpu.activity = Activity::Running;
        self.cpu.stats.interrupts += 1;
        self.event(|cpu| sys::deliver_interrupt(cpu, vector))?;
        // More may wait behind it.
        self.cpu.window_wanted = self.nmi_pending || self.env.lapic.pending().is_some();
        Ok(())
    }

    /// Runs a delivery; an exception on the way is delivered in its place.
    fn event(&mut self, deliver: impl FnOnce(&mut Cpu) -> Result<(), Fault>) -> Result<(), Fault> {
        match deliver(&mut self.cpu) {
            Err(Fault::Exception(e)) => {
                self.cpu.stats.exceptions += 1;
                sys::deliver_exception(&mut self.cpu, e)
            }
            other => other,
        }
    }

    /// Sleeps until something happens, at most until the APIC timer expires.
    fn sleep(&mut self) {
        self.halts += 1;
        let timeout = match self.env.deadline() {
            NEVER => None,
            at => {
                let now = self.shared.clock.nanos();
                if at <= now {
                    self.remote().request(request::EVENT);
                    return;
                }
                Some(Duration::from_nanos(at - now))
            }
        };
        self.remote().sleep(timeout);
        self.remote()
            .request
            .fetch_or(request::EVENT, Ordering::SeqCst);
    }

    fn run_loop(&mut self) -> Exit {
        // The first look at the APIC does not wait for an event.
        self.cpu.request_self(request::EVENT);
        loop {
            let bits = self.cpu.request.swap(0, Ordering::SeqCst);
            if bits & request::CODE != 0 {
                self.obey();
            }
            if bits & request::EXCLUSIVE != 0 {
                self.shared.wait_exclusive();
            }
            if bits & request::EVENT != 0 {
                self.collect();
                match self.deliver() {
                    Ok(()) => {}
                    Err(Fault::Internal(what)) => return self.failed(what),
                    Err(_) => self.cpu.activity = Activity::Shutdown,
                }
            }
            if bits & request::KICK != 0 {
                return Exit::Kicked;
            }
            match self.cpu.activity {
                Activity::Running => {}
                Activity::Halted | Activity::WaitForSipi => {
                    self.sleep();
                    continue;
                }
                Activity::Shutdown => return Exit::Shutdown,
            }
            if !self.remote().enter() {
                continue;
            }
            let stop = exec::run(&mut self.cpu, &mut self.cache);
            self.remote().leave();
            match stop {
                Stop::Request => {}
                Stop::Halt => {
                    self.cpu.activity = Activity::Halted;
                    self.cpu.request_self(request::EVENT);
                }
                Stop::Parked => {
                    if let Some(exit) = self.pending_exit() {
                        return exit;
                    }
                }
                Stop::Shutdown => return Exit::Shutdown,
                Stop::Internal(what) => return self.failed(what),
            }
        }
    }

    fn pending_exit(&self) -> Option<Exit> {
        let p = self.cpu.replay.pending.as_ref()?;
        let space = if p.port { Space::Pio } else { Space::Mmio };
        let address = Gpa(p.address);
        Some(Exit::Pending(match &p.data {
            None => Pending::Read {
                space,
                address,
                len: p.len,
            },
            Some(data) => Pending::Write {
                space,
                address,
                data: data.clone(),
            },
        }))
    }

    /// Does `work` with `bus` around the core.
    fn on_bus<T>(&mut self, bus: &dyn IoBus, work: impl FnOnce(&mut Self) -> T) -> T {
        self.env.attach(bus);
        let env: *mut dyn Env = &raw mut *self.env;
        self.cpu.env = Some(env);
        let done = work(self);
        self.cpu.env = None;
        self.env.detach();
        done
    }

    fn failed(&mut self, what: &str) -> Exit {
        Exit::Failed(Box::new(CrashReason {
            what: what.into(),
            rip: self.cpu.rip,
            instruction: Vec::new(),
        }))
    }
}

impl Vcpu for SoftVcpu {
    fn index(&self) -> u32 {
        self.index as u32
    }

    fn run(&mut self, bus: &dyn IoBus) -> Exit {
        self.on_bus(bus, Self::run_loop)
    }

    fn complete(&mut self, completion: Completion) -> Result<(), HypervisorError> {
        let none = || HypervisorError::State("no access is pending".into());
        match completion {
            Completion::Value(v) => {
                if !self.cpu.replay.answer(v) {
                    return Err(none());
                }
            }
            Completion::Fault(e) => {
                self.cpu.replay.pending.take().ok_or_else(none)?;
                self.cpu.replay.abandon();
                self.injected = Some(Exception {
                    vector: e.vector,
                    error: e.error,
                    payload: e.payload,
                });
            }
            Completion::Abandoned | Completion::Retry => {
                self.cpu.replay.pending.take().ok_or_else(none)?;
                if completion == Completion::Abandoned {
                    self.cpu.replay.abandon();
                } else {
                    self.cpu.replay.retry();
                }
            }
        }
        Ok(())
    }

    fn state(&self, vtl: Vtl) -> Result<VcpuState, HypervisorError> {
        state::check_vtl(vtl)?;
        Ok(self.save())
    }

    fn set_state(&mut self, vtl: Vtl, state: &VcpuState) -> Result<(), HypervisorError> {
        state::check_vtl(vtl)?;
        self.load(state)
    }

    fn reset(&mut self, vtl: Vtl, init: bool) {
        if vtl != Vtl::VTL0 {
            return;
        }
        sys::reset(&mut self.cpu, init);
        if init {
            self.env.lapic.init();
        } else {
            self.env.reset();
            if let Some(m) = self.shared.apic.mailbox(self.index) {
                m.clear();
            }
        }
        self.env.publish();
        self.cpu.flush_tlb(false);
        self.cpu.replay.abandon();
        self.nmi_pending = false;
        self.injected = None;
        self.accepted = None;
        self.cpu.activity = if self.index == 0 {
            Activity::Running
        } else {
            Activity::WaitForSipi
        };
    }

    fn kick_handle(&self) -> Arc<dyn KickHandle> {
        Arc::new(Kick {
            shared: self.shared.clone(),
            index: self.index,
        })
    }

    fn stats(&self) -> VcpuStats {
        let (c, s) = (&self.cpu.stats, &self.cache.stats);
        if let Some(counters) = &self.shared.counters {
            counters.publish(VcpuCounters {
                index: self.index,
                retired: self.cpu.retired,
                core: *c,
                cache: *s,
                decoded: self.cache.memory(),
                native: self.cache.translates().then(|| self.cache.native_memory()),
            });
        }
        VcpuStats {
            instructions: Some(self.cpu.retired),
            mmio: c.mmio,
            pio: c.pio,
            halts: self.halts,
            interrupts: c.interrupts,
            exceptions: c.exceptions,
            blocks_built: s.blocks_built,
            code_invalidations: s.invalidations,
            tlb_misses: c.tlb_misses,
            tlb_flushes: c.tlb_flushes,
            emulated: 0,
        }
    }
}

/// Memory for translated code, given to `cache`.
fn native(cache: &mut CodeCache) -> Result<TwoViews, HypervisorError> {
    let failed = |reason: String| HypervisorError::Host {
        what: "mapping memory for translated code",
        reason,
    };
    let views = TwoViews::new("caisson-native", NATIVE_LIMIT).map_err(|e| failed(e.to_string()))?;
    // SAFETY: asked for once; the vCPU drops its cache before the views, or runs
    // neither any more.
    let memory = unsafe { views.lend() };
    if !cache.translate_into(memory, Settings::default()) {
        return Err(failed("it is too small".into()));
    }
    Ok(views)
}

struct Kick {
    shared: Arc<Shared>,
    index: usize,
}

impl KickHandle for Kick {
    fn kick(&self) {
        self.shared.vcpus[self.index].request(request::KICK);
    }
}
