//! A vCPU of KVM: the loop around KVM_RUN.

mod held;
mod kick;
mod registers;
mod reset;
mod state;

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use caisson_hypervisor::{
    Access, BusAnswer, Completion, CrashReason, Exit, HypervisorError, IoBus, KickHandle, Pending,
    Vcpu, VcpuStats, x86::VcpuState,
};
use caisson_hypervisor_soft::{StepEnd, Stepper};
use caisson_memory::{Gpa, Vtl};
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_INTERNAL_ERROR_EMULATION};
use kvm_ioctls::{VcpuExit, VcpuFd};
use parking_lot::Mutex;

pub(crate) use self::{held::Held, kick::Doorstep, state::settle_pending};
use crate::{
    partition::Shared,
    sys::{self, Data},
};

/// A vCPU's kernel side. The partition holds it too, for the clock.
pub(crate) struct Cell {
    pub(crate) doorstep: Doorstep,
    pub(crate) kernel: Mutex<Kernel>,
}

/// What one thread at a time may use.
pub(crate) struct Kernel {
    pub(crate) fd: VcpuFd,
    /// What stands still while the machine's clock does.
    pub(crate) held: Option<Held>,
    /// The vCPU's whole state, if the kernel has not been given it yet: the state after a reset,
    /// which most often is replaced before the clock goes on.
    pub(crate) pending: Option<Box<VcpuState>>,
}

impl Cell {
    pub(crate) fn new(fd: VcpuFd) -> io::Result<Self> {
        Ok(Self {
            doorstep: Doorstep::new(sys::ImmediateExit::of(&fd)?),
            kernel: Mutex::new(Kernel {
                fd,
                held: None,
                pending: None,
            }),
        })
    }
}

/// See [`Vcpu`].
pub(crate) struct KvmVcpu {
    shared: Arc<Shared>,
    cell: Arc<Cell>,
    index: u32,
    /// A device access whose answer the kernel still waits for.
    parked: Option<Parked>,
    /// After a triple fault, until reset.
    dead: bool,
    /// KVM_RUN was called and may be in the middle of an access.
    entered: bool,
    /// It was reset and has done nothing since.
    fresh: bool,
    stepper: Option<Box<Stepper>>,
    stats: VcpuStats,
}

/// A device access that the bus parked. Its data are in the run page.
struct Parked {
    /// The element of a repeated port access that waits.
    element: usize,
    answer: Option<Vec<u8>>,
}

/// How one access ended.
enum Served {
    Done,
    Parked(usize, Pending),
}

impl KvmVcpu {
    pub(crate) fn new(shared: Arc<Shared>, cell: Arc<Cell>, index: u32) -> Self {
        Self {
            shared,
            cell,
            index,
            parked: None,
            dead: false,
            entered: false,
            fresh: false,
            stepper: None,
            stats: VcpuStats::default(),
        }
    }

    /// Runs the guest until `run` has something to return.
    fn turn(&mut self, kernel: &mut Kernel, bus: &dyn IoBus) -> Exit {
        let cell = self.cell.clone();
        let _turn = cell.doorstep.enter();
        (self.entered, self.fresh) = (true, false);
        if let Some(parked) = self.parked.take()
            && let Some(exit) = self.serve_again(kernel, bus, parked)
        {
            return exit;
        }
        loop {
            if cell.doorstep.take_nmi()
                && let Err(e) = state::deliver_nmi(&kernel.fd)
            {
                return self.failed(kernel, format!("cannot raise an NMI: {e}"), Vec::new());
            }
            self.acknowledge(kernel, bus);
            cell.doorstep.pass();
            let exit = kernel.fd.run();
            cell.doorstep.pass();
            let exit = match exit {
                Ok(exit) => exit,
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                    cell.doorstep.hurry(false);
                    if cell.doorstep.take_kick() {
                        return Exit::Kicked;
                    }
                    continue;
                }
                Err(e) => {
                    let what = format!("KVM_RUN failed: {e}");
                    return self.failed(kernel, what, Vec::new());
                }
            };
            let served = match exit {
                VcpuExit::IoOut(..) | VcpuExit::IoIn(..) => {
                    self.stats.pio += 1;
                    self.serve(kernel, bus, 0)
                }
                VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) => {
                    self.stats.mmio += 1;
                    self.serve(kernel, bus, 0)
                }
                VcpuExit::X86Rdmsr(exit) => {
                    match bus.read_msr(Vtl::VTL0, self.index, exit.index) {
                        Some(value) => {
                            *exit.data = value;
                            *exit.error = 0;
                        }
                        None => *exit.error = 1,
                    }
                    Served::Done
                }
                VcpuExit::X86Wrmsr(exit) => {
                    let taken = bus.write_msr(Vtl::VTL0, self.index, exit.index, exit.data);
                    *exit.error = u8::from(!taken);
                    Served::Done
                }
                VcpuExit::IoapicEoi(vector) => {
                    bus.eoi(Vtl::VTL0, vector);
                    Served::Done
                }
                VcpuExit::IrqWindowOpen | VcpuExit::Intr => Served::Done,
                VcpuExit::Hlt => {
                    self.stats.halts += 1;
                    return Exit::Halt;
                }
                VcpuExit::Shutdown => {
                    self.dead = true;
                    return Exit::Shutdown;
                }
                VcpuExit::Debug(_) => return Exit::Debug,
                VcpuExit::InternalError => {
                    let error = sys::internal_error(&mut kernel.fd);
                    if error.suberror != KVM_INTERNAL_ERROR_EMULATION {
                        let what = format!("KVM reports internal error {}", error.suberror);
                        return self.failed(kernel, what, error.instruction);
                    }
                    match self.help(kernel, bus) {
                        Ok(None) => Served::Done,
                        Ok(Some(exit)) => return exit,
                        Err(what) => return self.failed(kernel, what, error.instruction),
                    }
                }
                VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                    match self.shared.drain_ring(self.index) {
                        Ok(()) => Served::Done,
                        Err(e) => {
                            let what = format!("cannot empty the list of written pages: {e}");
                            return self.failed(kernel, what, Vec::new());
                        }
                    }
                }
                VcpuExit::FailEntry(reason, cpu) => {
                    let what = format!(
                        "the processor refuses to enter the guest (reason {reason:#x} on host CPU {cpu})"
                    );
                    return self.failed(kernel, what, Vec::new());
                }
                VcpuExit::MemoryFault { flags, gpa, size } => {
                    let what = format!(
                        "the host cannot give guest memory at {gpa:#x} ({size} bytes, flags {flags:#x})"
                    );
                    return self.failed(kernel, what, Vec::new());
                }
                other => {
                    let what = format!("an exit of KVM that Caisson does not know: {other:?}");
                    return self.failed(kernel, what, Vec::new());
                }
            };
            if let Served::Parked(element, pending) = served {
                self.parked = Some(Parked {
                    element,
                    answer: None,
                });
                return Exit::Pending(pending);
            }
        }
    }

    /// Asks the bus for the access that the vCPU left the guest for, from
    /// `element` of a repeated one on.
    fn serve(&self, kernel: &mut Kernel, bus: &dyn IoBus, element: usize) -> Served {
        let Some(exit) = sys::device_exit(&mut kernel.fd) else {
            return Served::Done;
        };
        let access = Access {
            vtl: Vtl::VTL0,
            vcpu: self.index,
            space: exit.space,
            address: Gpa(exit.address),
        };
        ask(bus, access, exit.data, element, exit.width)
    }

    /// Goes on with an access that had been parked.
    fn serve_again(
        &mut self,
        kernel: &mut Kernel,
        bus: &dyn IoBus,
        parked: Parked,
    ) -> Option<Exit> {
        let mut element = parked.element;
        if let Some(answer) = parked.answer {
            if let Some(exit) = sys::device_exit(&mut kernel.fd)
                && let Data::In(data) = exit.data
            {
                let place = data.chunks_mut(exit.width).nth(element);
                let bytes = answer.into_iter().chain(std::iter::repeat(0xff));
                for (to, byte) in place.into_iter().flatten().zip(bytes) {
                    *to = byte;
                }
            }
            element += 1;
        }
        match self.serve(kernel, bus, element) {
            Served::Done => None,
            Served::Parked(element, pending) => {
                self.parked = Some(Parked {
                    element,
                    answer: None,
                });
                Some(Exit::Pending(pending))
            }
        }
    }

    /// Hands the 8259 pair's interrupt to the vCPU, or asks to be told when it can take it.
    fn acknowledge(&self, kernel: &mut Kernel, bus: &dyn IoBus) {
        if self.index != 0 {
            return;
        }
        let waiting = self.shared.extint.load(Ordering::SeqCst);
        let run = kernel.fd.get_kvm_run();
        let ready = run.ready_for_interrupt_injection != 0;
        run.request_interrupt_window = (waiting && !ready).into();
        if waiting && ready {
            run.ready_for_interrupt_injection = 0;
            let vector = bus.acknowledge_pic();
            if let Err(error) = sys::interrupt(&kernel.fd, vector) {
                tracing::warn!(%error, vector, "KVM took no interrupt of the 8259");
            }
        }
    }

    /// Executes the instruction that KVM gave up on.
    fn help(&mut self, kernel: &mut Kernel, bus: &dyn IoBus) -> Result<Option<Exit>, String> {
        self.stats.emulated += 1;
        let before = state::get(&self.shared, kernel).map_err(|e| e.to_string())?;
        let stepper = match &mut self.stepper {
            Some(stepper) => stepper,
            None => {
                let stepper = self.shared.stepper(self.index).map_err(|e| e.to_string())?;
                self.stepper.insert(stepper)
            }
        };
        match stepper.step(&before, bus).map_err(|e| e.to_string())? {
            StepEnd::Done(after) => {
                state::set_after_step(&self.shared, kernel, &before, &after)
                    .map_err(|e| e.to_string())?;
                Ok(None)
            }
            // The instruction starts again, in the kernel and then here.
            StepEnd::Pending(pending) => Ok(Some(Exit::Pending(pending))),
            StepEnd::Shutdown => {
                self.dead = true;
                Ok(Some(Exit::Shutdown))
            }
            StepEnd::Failed(what) => Err(what),
        }
    }

    fn failed(&self, kernel: &mut Kernel, what: String, instruction: Vec<u8>) -> Exit {
        Exit::Failed(Box::new(CrashReason {
            what,
            rip: kernel.fd.get_regs().map_or(0, |regs| regs.rip),
            instruction,
        }))
    }

    /// Makes the kernel finish the access it is in the middle of; parked reads give ones.
    fn settle(&mut self, kernel: &mut Kernel) -> io::Result<()> {
        if !self.entered {
            return Ok(());
        }
        if self.parked.take().is_some()
            && let Some(exit) = sys::device_exit(&mut kernel.fd)
            && let Data::In(data) = exit.data
        {
            data.fill(0xff);
        }
        self.cell.doorstep.hurry(true);
        // A repeated access may come in pieces; a page of bytes is the most that
        // one instruction can make of one exit.
        for _ in 0..4096 {
            match kernel.fd.run() {
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => break,
                Err(e) => return Err(io::Error::from_raw_os_error(e.errno())),
                Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(0xff),
                Ok(_) => {}
            }
        }
        self.cell.doorstep.hurry(false);
        self.entered = false;
        Ok(())
    }
}

/// Asks the bus for elements of `width` bytes, from number `first` on.
fn ask(bus: &dyn IoBus, access: Access, data: Data<'_>, first: usize, width: usize) -> Served {
    let (space, address) = (access.space, access.address);
    match data {
        Data::In(bytes) => {
            for (n, part) in bytes.chunks_mut(width).enumerate().skip(first) {
                if bus.read(access, part) == BusAnswer::Park {
                    let len = part.len() as u8;
                    return Served::Parked(
                        n,
                        Pending::Read {
                            space,
                            address,
                            len,
                        },
                    );
                }
            }
        }
        Data::Out(bytes) => {
            for (n, part) in bytes.chunks(width).enumerate().skip(first) {
                if bus.write(access, part) == BusAnswer::Park {
                    let data = part.to_vec();
                    return Served::Parked(
                        n,
                        Pending::Write {
                            space,
                            address,
                            data,
                        },
                    );
                }
            }
        }
    }
    Served::Done
}

impl Vcpu for KvmVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self, bus: &dyn IoBus) -> Exit {
        if self.dead {
            return Exit::Shutdown;
        }
        let cell = self.cell.clone();
        let mut kernel = cell.kernel.lock();
        if let Err(e) = state::settle_pending(&self.shared, &mut kernel) {
            let what = format!("KVM refuses the reset state: {e}");
            return self.failed(&mut kernel, what, Vec::new());
        }
        self.turn(&mut kernel, bus)
    }

    fn complete(&mut self, completion: Completion) -> Result<(), HypervisorError> {
        let state = |what: &str| HypervisorError::State(what.into());
        match completion {
            Completion::Retry | Completion::Abandoned if self.parked.is_none() => Ok(()),
            Completion::Retry => Ok(()),
            Completion::Value(value) => match &mut self.parked {
                Some(parked) => {
                    parked.answer = Some(value);
                    Ok(())
                }
                None => Err(state("no access is pending")),
            },
            Completion::Abandoned => {
                let cell = self.cell.clone();
                let mut kernel = cell.kernel.lock();
                self.settle(&mut kernel)
                    .map_err(|e| HypervisorError::State(format!("cannot end an access: {e}")))
            }
            Completion::Fault(_) => Err(state("KVM cannot turn a device access into a fault")),
        }
    }

    fn state(&self, vtl: Vtl) -> Result<VcpuState, HypervisorError> {
        state::check_vtl(vtl)?;
        if self.parked.is_some() {
            return Err(HypervisorError::State(
                "a device access waits for its answer; KVM keeps half of it".into(),
            ));
        }
        let mut state = state::get(&self.shared, &mut self.cell.kernel.lock())?;
        if self.dead {
            state.run_state = caisson_hypervisor::x86::RunState::Shutdown;
        }
        Ok(state)
    }

    fn set_state(&mut self, vtl: Vtl, state: &VcpuState) -> Result<(), HypervisorError> {
        state::check_vtl(vtl)?;
        let cell = self.cell.clone();
        let mut kernel = cell.kernel.lock();
        self.settle(&mut kernel)
            .map_err(|e| HypervisorError::State(format!("cannot end an access: {e}")))?;
        let fresh = std::mem::take(&mut self.fresh);
        if fresh {
            // What it goes back to if the state is refused is known.
            state::check(&self.shared, state)?;
            state::put(&self.shared, &mut kernel, state).inspect_err(|_| {
                let _ = reset::reset(&self.shared, &mut kernel, self.index, false);
            })?;
        } else {
            state::set(&self.shared, &mut kernel, state)?;
        }
        self.dead = state.run_state == caisson_hypervisor::x86::RunState::Shutdown;
        Ok(())
    }

    fn reset(&mut self, vtl: Vtl, init: bool) {
        if vtl != Vtl::VTL0 || self.fresh && !init {
            return;
        }
        let cell = self.cell.clone();
        let mut kernel = cell.kernel.lock();
        let done = self
            .settle(&mut kernel)
            .map_err(|e| HypervisorError::State(e.to_string()))
            .and_then(|()| reset::reset(&self.shared, &mut kernel, self.index, init));
        if let Err(error) = done {
            tracing::error!(%error, vcpu = self.index, "KVM refuses the reset state");
        }
        self.dead = false;
        self.fresh = !init;
        let _ = cell.doorstep.take_nmi();
    }

    fn kick_handle(&self) -> Arc<dyn KickHandle> {
        Arc::new(kick::Kick(self.cell.clone()))
    }

    fn stats(&self) -> VcpuStats {
        self.stats
    }
}
