//! The thread that owns the others: starts them, deals with what happens to the machine, and ends them.

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use caisson_config::OnReboot;
use caisson_device::PowerRequest;

use super::events::Event;
use crate::{
    Fault, MachineError, OnCrash, Outcome,
    host::PreciseTimers,
    machine::{Phase, Shared, panic_text},
};

/// How long the vCPUs get to leave guest code when the machine ends.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// How long the ports of a stopped machine get to deliver what the guest said last.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// The machine's other threads.
#[derive(Default)]
struct Threads {
    vcpus: Vec<JoinHandle<()>>,
    worker: Option<JoinHandle<()>>,
    doorbells: Option<JoinHandle<()>>,
    ports: Vec<JoinHandle<()>>,
}

/// Starts all threads of the machine and lets it run. The vCPUs come first, and run while the others are being started:
/// what they want of those waits in queues.
pub(crate) fn start(
    shared: &Arc<Shared>,
    phase: &mut Phase,
) -> Result<JoinHandle<()>, MachineError> {
    let mut threads = Threads::default();
    let started = start_vcpus(shared, &mut threads).and_then(|()| {
        *phase = Phase::Paused;
        shared.go(phase);
        start_others(shared, &mut threads)?;
        shared.spawn("supervisor".into(), {
            let threads = core::mem::take(&mut threads);
            move |shared| supervise(shared, threads)
        })
    });
    if started.is_err() {
        shared.vcpus.end(None);
        shared.gate.shut_down();
        shared.worker.stop();
        if let Some(doorbells) = &shared.doorbells {
            doorbells.stop();
        }
        shared.partition.set_clock_running(false);
        *phase = Phase::Created;
        shared.ports.iter().for_each(|port| port.output.stop());
    }
    started
}

fn start_vcpus(shared: &Arc<Shared>, threads: &mut Threads) -> Result<(), MachineError> {
    for index in 0..shared.vcpus.count() {
        threads
            .vcpus
            .push(shared.spawn(format!("vcpu{index}"), move |shared| {
                shared
                    .vcpus
                    .thread(index, &shared.bus, &shared.worker, &shared.events);
            })?);
    }
    Ok(())
}

fn start_others(shared: &Arc<Shared>, threads: &mut Threads) -> Result<(), MachineError> {
    for (index, port) in shared.ports.iter().enumerate() {
        let Some(mut end) = port.end.lock().take() else {
            continue;
        };
        threads
            .ports
            .push(shared.spawn(port.name.clone(), move |shared| {
                /// Leaves no guest waiting for a thread that panicked.
                struct Abandon<'a>(&'a Shared, usize);
                impl Drop for Abandon<'_> {
                    fn drop(&mut self) {
                        self.0.ports[self.1].output.abandon();
                    }
                }
                let _abandon = Abandon(shared, index);
                shared.ports[index].output.run(&mut *end);
            })?);
    }
    threads.worker = Some(shared.spawn("devices".into(), |shared| {
        let _precise = PreciseTimers::new();
        shared.worker.run(&shared.clock, &shared.gate);
    })?);
    if shared.doorbells.is_some() {
        threads.doorbells = Some(shared.spawn("doorbells".into(), |shared| {
            if let Some(doorbells) = &shared.doorbells {
                doorbells.run(shared.pc.devices(), &shared.worker, &shared.gate);
            }
        })?);
    }
    Ok(())
}

fn supervise(shared: &Arc<Shared>, threads: Threads) {
    let judge = std::panic::AssertUnwindSafe(|| {
        loop {
            let event = shared.events.wait();
            if let Some(outcome) = decide(shared, &event) {
                return outcome;
            }
        }
    });
    let outcome = std::panic::catch_unwind(judge).unwrap_or_else(|payload| {
        Outcome::Crash(format!(
            "panic in the supervisor thread: {}",
            panic_text(&*payload)
        ))
    });
    end(shared, threads, &outcome);
    shared.finish(shared.phase.lock(), outcome);
}

/// What `event` means: the machine's end, or a restart, which is done here.
fn decide(shared: &Shared, event: &Event) -> Option<Outcome> {
    let outcome = match event {
        Event::Power(PowerRequest::Reset) => match shared.panic_message() {
            Some(message) if shared.on_crash == OnCrash::End => Outcome::Panic(message),
            _ if shared.on_reboot == OnReboot::Stop => Outcome::Reset,
            _ => return restart(shared, event),
        },
        Event::Power(PowerRequest::PowerOff) => Outcome::PowerOff,
        Event::Power(PowerRequest::Exit(value)) => Outcome::DebugExit(*value),
        Event::Power(other) => {
            Outcome::Crash(format!("a device asked for {other:?}, which is not known"))
        }
        Event::TripleFault(fault) => match shared.on_crash {
            OnCrash::End => Outcome::TripleFault(Fault { ..*fault }),
            OnCrash::Restart => return restart(shared, event),
        },
        Event::Crash(what) => Outcome::Crash(what.clone()),
        Event::Stop => Outcome::Stopped,
    };
    Some(outcome)
}

fn restart(shared: &Shared, event: &Event) -> Option<Outcome> {
    let mut phase = shared.phase.lock();
    // The event is forgotten while the vCPUs stand still: what they did after it belongs to the old guest, what they
    // do from now on to the new one.
    let done = shared.restart(&mut phase, || shared.events.clear(event));
    done.err()
        .map(|error| Outcome::Crash(format!("the guest asked for a reboot, but {error}")))
}

fn end(shared: &Shared, threads: Threads, outcome: &Outcome) {
    let mut phase = shared.phase.lock();
    let stopped = shared.vcpus.end(Some(Instant::now() + END_PATIENCE));
    if stopped {
        for thread in threads.vcpus {
            let _ = thread.join();
        }
        shared.gate.shut_down();
        shared.worker.stop();
        if let Some(doorbells) = &shared.doorbells {
            doorbells.stop();
        }
        for thread in threads.worker.into_iter().chain(threads.doorbells) {
            let _ = thread.join();
        }
        shared.partition.set_clock_running(false);
    }
    *phase = Phase::Ended;
    drop(phase);

    for port in &shared.ports {
        port.input.close();
    }
    let since = Instant::now();
    let mut delivered = true;
    for port in &shared.ports {
        let patience = match outcome {
            Outcome::Stopped | Outcome::Crash(_) => Some(STOP_PATIENCE),
            _ => port.patience,
        };
        // Whoever loses patience with a host end that does not take its bytes calls `stop`.
        delivered &= port
            .output
            .drain(patience.map(|patience| since + patience), || {
                *outcome != Outcome::Stopped && shared.events.stop_posted()
            });
        port.output.stop();
    }
    if delivered {
        for thread in threads.ports {
            let _ = thread.join();
        }
    }
}
