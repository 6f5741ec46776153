//! The controller as a device.

use alloc::{string::String, sync::Arc, vec::Vec};
use core::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use caisson_block::{BlockBackend, Completion, Operation, Request};
use caisson_device::{
    Access, Claim, Clock, Device, Inspector, Outcome, ResetKind, SaveState, StateError, StateRecord,
};
use caisson_memory::MemoryView;
use caisson_pci::{
    BarKind, BarSpec, Function, FunctionHandles, FunctionSpec, Identity, InterruptPin, MsixSpec,
    Place, SpecError,
};
use serde::{Deserialize, Serialize};

use crate::{
    command::{Answer, Status},
    io::status_of,
    queue::MAX_UNDER_WAY,
    state::{ControllerState, Done, NvmeState},
};

/// The most I/O queues of either kind.
pub const MAX_QUEUES: u16 = 254;
/// The only namespace.
pub(crate) const NAMESPACE: u32 = 1;
/// Red Hat's vendor ID, as the virtio devices have; of its device IDs, 0x10f0 to 0x10ff are free for experiments.
pub(crate) const PCI_VENDOR: u16 = 0x1af4;
const PCI_DEVICE: u16 = 0x10f0;
/// Mass storage, non-volatile memory, NVM Express.
const CLASS: u32 = 0x01_08_02;
/// The base address register of everything: registers and doorbells, then the MSI-X structures.
const BAR: u8 = 0;
const LEN: u64 = 0x4000;
const MSIX_TABLE: u32 = 0x2000;
const MSIX_PENDING: u32 = 0x3000;
/// How many commands are taken from one queue per call.
const BUDGET: usize = 64;
/// The most commands of all queues that are under way.
const MAX_FLIGHTS: usize = 4096;

/// What a controller is to its host, besides what its backend says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeConfig {
    /// How many I/O queues of each kind, 1 to [`MAX_QUEUES`]: best as many as there are vCPUs.
    pub queues: u16,
    /// The serial number: at most 20 ASCII characters of it.
    pub serial: String,
}

/// What the controller may affect.
#[derive(Clone)]
pub struct NvmeHandles {
    /// The function's own.
    pub function: FunctionHandles,
    /// Guest memory.
    pub memory: MemoryView,
    /// Machine time, for the hours that the health log counts.
    pub clock: Arc<dyn Clock>,
}

/// How far a shutdown is that the host asked for (§7.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Shutdown {
    /// None was asked for.
    Off,
    /// Commands are under way.
    Draining,
    /// The storage makes durable what was written.
    Flushing,
    /// The power may go.
    Done,
}

/// A command that was taken and is not completed.
pub(crate) struct Flight {
    queue: u16,
    command: u16,
    opcode: u8,
    lba: u64,
    progress: Progress,
}

pub(crate) enum Progress {
    /// The storage has these requests of it.
    Under(Vec<Completion>),
    /// Nothing is missing but to tell the host.
    Done(Answer),
    /// It deletes this submission queue when no command of it is under way.
    Deleting(u16),
}

/// The controller.
pub struct Nvme {
    name: String,
    pub(crate) function: Function,
    pub(crate) memory: MemoryView,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) backend: Arc<dyn BlockBackend>,
    pub(crate) config: NvmeConfig,
    pub(crate) state: ControllerState,
    pub(crate) flights: Vec<Flight>,
    /// The flush of a shutdown.
    pub(crate) flush: Option<Completion>,
    /// The backend has requests that it was not told of.
    pub(crate) kick: bool,
    /// Vectors to be signalled: once for all completions of a call.
    signals: Vec<bool>,
    /// The submission queue that is looked at first, so that none starves.
    first: usize,
    waker: Option<Waker>,
}

impl Nvme {
    /// Bytes of its range; it is placed at a multiple of that.
    pub fn registers_len(_: &NvmeConfig) -> u64 {
        LEN
    }

    /// A controller called `name` in front of `backend`, at `place`, with its range at `registers`.
    ///
    /// # Errors
    /// A range that is not aligned.
    pub fn new(
        name: impl Into<String>,
        backend: Arc<dyn BlockBackend>,
        config: NvmeConfig,
        place: Place,
        registers: u64,
        handles: NvmeHandles,
    ) -> Result<Self, SpecError> {
        let queues = config.queues.clamp(1, MAX_QUEUES);
        let spec = FunctionSpec {
            place,
            identity: Identity {
                vendor: PCI_VENDOR,
                device: PCI_DEVICE,
                revision: 1,
                class: CLASS,
                subsystem_vendor: PCI_VENDOR,
                subsystem: PCI_DEVICE,
            },
            bars: alloc::vec![BarSpec {
                index: BAR,
                kind: BarKind::Memory64,
                size: LEN,
                address: registers,
                label: "registers",
            }],
            pin: handles.function.line.as_ref().map(|_| InterruptPin::A),
            msi: 0,
            msix: Some(MsixSpec {
                vectors: queues + 1,
                bar: BAR,
                table: MSIX_TABLE,
                pending: MSIX_PENDING,
            }),
            capabilities: Vec::new(),
        };
        let info = backend.info();
        Ok(Self {
            name: name.into(),
            function: Function::new(spec, handles.function)?,
            memory: handles.memory,
            clock: handles.clock,
            backend,
            config: NvmeConfig { queues, ..config },
            state: ControllerState::new(queues, info.size, info.write_cache),
            flights: Vec::new(),
            flush: None,
            kick: false,
            signals: alloc::vec![false; usize::from(queues) + 1],
            first: 0,
            waker: None,
        })
    }

    /// Whether the host has switched MSI-X on.
    #[cfg(feature = "testing")]
    pub(crate) fn uses_messages(&self) -> bool {
        self.function.uses_messages()
    }

    /// Has the controller polled soon.
    pub(crate) fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }

    /// Drives the interrupt pin: it is high while a queue holds completions that the host has not seen.
    pub(crate) fn drive_pin(&mut self) {
        let state = &self.state;
        let asserted = state.completion.iter().flatten().any(|queue| {
            let unmasked = |vector: u16| state.masked >> vector.min(31) & 1 == 0;
            queue.has_completions() && queue.vector.is_some_and(unmasked)
        });
        self.function.set_intx(asserted);
    }

    /// Takes commands while there is room, from the queues in turn. Whether there are more.
    fn take(&mut self) -> bool {
        let places = self.state.submission.len();
        let mut more = false;
        for turn in 0..places {
            let index = (self.first + turn) % places;
            more |= self.take_from(index);
        }
        self.first = (self.first + 1) % places.max(1);
        more
    }

    fn take_from(&mut self, index: usize) -> bool {
        let id = index as u16;
        let mut under_way = self.flights.iter().filter(|f| f.queue == id).count();
        for _ in 0..BUDGET {
            let Some(Some(queue)) = self.state.submission.get_mut(index) else {
                return false;
            };
            if !queue.has_commands() {
                return false;
            }
            // A completion makes room and has the controller polled.
            let most = queue.size.min(MAX_UNDER_WAY) as usize;
            if under_way >= most || self.flights.len() >= MAX_FLIGHTS {
                return false;
            }
            let Some(command) = queue.take(&self.memory) else {
                self.state.fatal = true;
                return false;
            };
            let progress = match index {
                0 => self.admin(&command),
                _ => Some(self.start(&command)),
            };
            if let Some(progress) = progress {
                under_way += 1;
                self.flights.push(Flight {
                    queue: id,
                    command: command.id(),
                    opcode: command.opcode(),
                    lba: command.quad(10),
                    progress,
                });
            }
        }
        true
    }

    /// Sees which requests were answered. Whether all were.
    fn poll_storage(&mut self, cx: &mut Context<'_>) -> bool {
        let mut all = true;
        for flight in &mut self.flights {
            let Progress::Under(completions) = &mut flight.progress else {
                continue;
            };
            let mut status = Status::SUCCESS;
            let mut pending = false;
            for completion in completions {
                match Pin::new(completion).poll(cx) {
                    Poll::Pending => pending = true,
                    Poll::Ready(outcome) if status.is_success() => {
                        status = status_of(flight.opcode, outcome);
                    }
                    Poll::Ready(_) => {}
                }
            }
            if pending {
                all = false;
            } else {
                flight.progress = Progress::Done(status.into());
            }
        }
        all
    }

    /// Tells the host of what is done, as far as its completion queues have room.
    fn complete(&mut self) {
        let mut index = 0;
        while let Some(flight) = self.flights.get(index) {
            let answer = match flight.progress {
                Progress::Under(_) => None,
                Progress::Done(answer) => Some(answer),
                Progress::Deleting(queue) => {
                    let empty = !self.flights.iter().any(|other| other.queue == queue);
                    empty.then_some(Status::SUCCESS.into())
                }
            };
            let Some(answer) = answer else {
                index += 1;
                continue;
            };
            if !self.put(flight.queue, flight.command, answer) {
                if self.state.fatal {
                    return;
                }
                index += 1;
                continue;
            }
            let flight = self.flights.remove(index);
            if let Progress::Deleting(queue) = flight.progress
                && let Some(place) = self.state.submission.get_mut(usize::from(queue))
            {
                *place = None;
            }
            if !answer.status.is_success() {
                let Flight {
                    queue,
                    command,
                    lba,
                    ..
                } = flight;
                let lba = if queue == 0 { 0 } else { lba };
                self.state
                    .events
                    .command_failed(queue, command, answer.status, lba);
                if answer.status.is_media_error() {
                    self.state.counters.media_errors += 1;
                }
            }
        }
        while self.has_room(0)
            && let Some((id, word)) = self.state.events.next(self.state.features.events)
        {
            let answer = Answer::of(Ok(word));
            if !self.put(0, id, answer) {
                return;
            }
        }
    }

    /// Raises the interrupts of what was completed.
    fn signal(&mut self) {
        for (vector, wanted) in (0..).zip(&mut self.signals) {
            if core::mem::take(wanted) {
                self.function.signal(vector);
            }
        }
    }

    fn has_room(&self, completion: usize) -> bool {
        matches!(self.state.completion.get(completion), Some(Some(queue)) if !queue.is_full())
    }

    /// Puts a completion into the queue that belongs to submission queue `queue`. `false` if there is no room, or the
    /// controller cannot go on.
    fn put(&mut self, queue: u16, command: u16, answer: Answer) -> bool {
        let state = &mut self.state;
        let Some(Some(submission)) = state.submission.get(usize::from(queue)) else {
            state.fatal = true;
            return false;
        };
        let Some(Some(completion)) = state.completion.get_mut(usize::from(submission.completion))
        else {
            state.fatal = true;
            return false;
        };
        if completion.is_full() {
            return false;
        }
        let entry = (queue, submission.head, command);
        if completion.put(&self.memory, entry, answer).is_none() {
            state.fatal = true;
            return false;
        }
        if let Some(vector) = completion.vector
            && let Some(wanted) = self.signals.get_mut(usize::from(vector))
        {
            *wanted = true;
        }
        true
    }

    /// Brings a shutdown on once nothing is under way.
    fn shut_down(&mut self, cx: &mut Context<'_>) {
        let under = |flight: &Flight| matches!(flight.progress, Progress::Under(_));
        if self.state.shutdown == Shutdown::Draining && !self.flights.iter().any(under) {
            let (request, completion) = Request::new(Operation::Flush);
            self.backend.submit(request);
            self.backend.kick();
            self.flush = Some(completion);
            self.state.shutdown = Shutdown::Flushing;
        }
        if self.state.shutdown == Shutdown::Flushing {
            let outcome = self.flush.as_mut().map(|flush| Pin::new(flush).poll(cx));
            if !matches!(outcome, Some(Poll::Pending)) {
                if matches!(outcome, Some(Poll::Ready(Err(_)))) {
                    self.state.counters.media_errors += 1;
                }
                self.flush = None;
                self.state.shutdown = Shutdown::Done;
            }
        }
    }
}

impl Device for Nvme {
    fn name(&self) -> &str {
        &self.name
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![self.function.place().claim()]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        match self.function.bar_of(&at) {
            None => self.function.read_config(at.offset, data),
            Some(_) if at.offset < MSIX_TABLE.into() => self.read_registers(at.offset, data),
            Some(bar) => {
                let _ = self.function.read_msix(bar, at.offset, data);
            }
        }
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        match self.function.bar_of(&at) {
            None => {
                self.function.write_config(at.offset, data);
                self.drive_pin();
                self.wake();
            }
            Some(_) if at.offset < MSIX_TABLE.into() => self.write_registers(at.offset, data),
            Some(bar) => {
                let _ = self.function.write_msix(bar, at.offset, data);
            }
        }
        Outcome::Done
    }

    fn poll(&mut self, cx: &mut Context<'_>) {
        match &mut self.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            None => self.waker = Some(cx.waker().clone()),
        }
        if let Poll::Ready(size) = self.backend.poll_resized(cx, self.state.size) {
            self.state.size = size;
            self.state.events.namespace_changed();
        }
        let may_access = self.function.is_bus_master();
        let mut more = self.is_at_work() && may_access && self.take();
        // Also before an end: what was submitted is waited for.
        if core::mem::take(&mut self.kick) {
            self.backend.kick();
        }
        let all = self.poll_storage(cx);
        if self.state.resetting {
            let flushed = match &mut self.flush {
                Some(flush) => Pin::new(flush).poll(cx).is_ready(),
                None => true,
            };
            if all && flushed {
                self.finish_reset();
                more = true;
            }
        } else if self.state.ready && !self.state.fatal && may_access {
            let before = self.flights.len();
            self.complete();
            self.signal();
            // What was held back for want of room may be taken now.
            more |= self.flights.len() < before && self.has_waiting();
        }
        if !self.state.resetting {
            self.shut_down(cx);
        }
        self.drive_pin();
        if more {
            cx.waker().wake_by_ref();
        }
    }

    fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let all = self.poll_storage(cx);
        let flushed = match &mut self.flush {
            Some(flush) => Pin::new(flush).poll(cx).is_ready(),
            None => true,
        };
        if !all || !flushed {
            return Poll::Pending;
        }
        if self.state.shutdown == Shutdown::Flushing {
            self.flush = None;
            self.state.shutdown = Shutdown::Done;
        }
        Poll::Ready(())
    }

    fn reset(&mut self, kind: ResetKind) {
        let info = self.backend.info();
        let fresh = ControllerState::new(self.config.queues, info.size, info.write_cache);
        let old = core::mem::replace(&mut self.state, fresh);
        // What is counted over the life of the medium.
        if kind == ResetKind::System {
            self.state.counters = old.counters;
        }
        self.flights.clear();
        self.flush = None;
        self.kick = false;
        self.first = 0;
        self.function.reset();
        self.drive_pin();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        let mut controller = self.state.clone();
        for flight in &self.flights {
            let (answer, deletes) = match flight.progress {
                Progress::Done(answer) => (answer, 0),
                Progress::Deleting(queue) => (Status::SUCCESS.into(), queue),
                Progress::Under(_) => {
                    return Err(StateError::Encode {
                        id: NvmeState::ID.into(),
                        what: "the storage has not answered all requests",
                    });
                }
            };
            controller.done.push(Done {
                queue: flight.queue,
                command: flight.command,
                lba: flight.lba,
                status: answer.status.0,
                result: answer.result,
                deletes,
            });
        }
        let function = self.function.state();
        NvmeState {
            function,
            controller,
        }
        .to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let NvmeState {
            function,
            controller,
        } = NvmeState::from_record(record)?;
        let mut state = controller.checked(self.config.queues)?;
        self.flights = core::mem::take(&mut state.done)
            .into_iter()
            .map(|done| Flight {
                queue: done.queue,
                command: done.command,
                opcode: 0,
                lba: done.lba,
                progress: match done.deletes {
                    0 => Progress::Done(Answer {
                        status: Status(done.status),
                        result: done.result,
                    }),
                    queue => Progress::Deleting(queue),
                },
            })
            .collect();
        self.state = state;
        self.function.restore(&function)?;
        self.drive_pin();
        Ok(())
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector.child("pci", |node| self.function.inspect(node));
        let state = &self.state;
        let queues = |count: usize| count.saturating_sub(1) as u64;
        inspector
            .bool("ready", state.ready)
            .bool("fatal", state.fatal)
            .u64("bytes", state.size)
            .bool("read-only", self.backend.info().read_only)
            .bool("write cache", state.features.write_cache)
            .u64("queues", queues(state.submission.iter().flatten().count()))
            .u64("reads", state.counters.reads)
            .u64("writes", state.counters.writes)
            .u64("errors", state.events.error_count)
            .u64("in flight", self.flights.len() as u64);
    }
}

impl Nvme {
    /// Whether a queue holds commands.
    fn has_waiting(&self) -> bool {
        let mut queues = self.state.submission.iter().flatten();
        queues.any(|queue| queue.has_commands())
    }
}
