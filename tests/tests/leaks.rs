//! Machines that come and go leave nothing behind in the process that made them.

use std::{
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use caisson_hypervisor::Hypervisor;
use caisson_machine::{HostEnd, Input, Machine, Outcome, StreamEnd};
use caisson_tests::{
    guests::guest_path,
    process::Holdings,
    vm::{Console, VmSpec, all_backends},
};

const LIMIT: u64 = 64 << 20;
/// Machines, one after the other.
const MACHINES: usize = 50;
/// Machines at the same time.
const AT_ONCE: usize = 8;
/// A machine that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the allocator may keep of the last machines, over that of the first. A machine that leaks is half a MiB.
const KEPT_KIB: u64 = 6 << 10;
/// What it may keep besides of machines at the same time: their threads share its arenas differently each time.
const KEPT_AT_ONCE_KIB: u64 = 18 << 10;

/// A guest, and what comes of its machine.
#[derive(Clone, Copy)]
enum Life {
    /// It switches the machine off.
    PowersOff,
    /// It is stopped while it writes to a port without pause.
    StoppedBusy,
    /// It is stopped while it halts.
    StoppedIdle,
    /// It is dropped without having run.
    NeverRuns,
}

const LIVES: [Life; 4] = [
    Life::PowersOff,
    Life::StoppedBusy,
    Life::StoppedIdle,
    Life::NeverRuns,
];

/// One machine from its beginning to its end.
fn live(backend: &Arc<dyn Hypervisor>, life: Life) -> Result<()> {
    let guest = match life {
        Life::PowersOff => "tiny-first",
        Life::StoppedBusy => "tiny-ports",
        Life::StoppedIdle | Life::NeverRuns => "tiny-idle",
    };
    let spec = VmSpec::new(backend, Input::open("kernel", &guest_path(guest)?, LIMIT)?);
    let console = Console::default();
    let end = || -> Option<Box<dyn HostEnd>> { Some(Box::new(StreamEnd::new(console.clone()))) };
    let sink: Option<Box<dyn HostEnd>> = Some(Box::new(StreamEnd::new(io::sink())));
    let machine = Machine::new(spec.machine([end(), sink, None, None], end()))?;
    if matches!(life, Life::NeverRuns) {
        return Ok(());
    }
    machine.start()?;
    let deadline = Instant::now() + PATIENCE;
    while console.bytes().is_empty() {
        ensure!(Instant::now() < deadline, "the guest says nothing");
        thread::sleep(Duration::from_micros(200));
    }
    if !matches!(life, Life::PowersOff) {
        machine.stop();
    }
    let outcome = machine.wait_for(PATIENCE);
    let expected = match life {
        Life::PowersOff => outcome == Some(Outcome::PowerOff),
        // It may be through with its writes already.
        Life::StoppedBusy => matches!(outcome, Some(Outcome::Stopped | Outcome::PowerOff)),
        _ => outcome == Some(Outcome::Stopped),
    };
    ensure!(expected, "it ended with {outcome:?}");
    Ok(())
}

/// Machines one after the other.
fn in_a_row(backend: &Arc<dyn Hypervisor>, count: usize) -> Result<()> {
    LIVES
        .iter()
        .cycle()
        .take(count)
        .try_for_each(|life| live(backend, *life))
}

/// As many machines at the same time.
fn at_once(backend: &Arc<dyn Hypervisor>, count: usize) -> Result<()> {
    thread::scope(|scope| {
        let threads: Vec<_> = LIVES
            .iter()
            .cycle()
            .take(count)
            .map(|life| scope.spawn(|| live(backend, *life)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("it does not panic"))
    })
}

/// What the process holds once the threads of machines that are gone have ended: that is not waited for.
fn at_rest(threads: usize) -> Result<Holdings> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = Holdings::now()?;
        if now.threads <= threads {
            return Ok(now);
        }
        ensure!(Instant::now() < deadline, "threads stay: {now}");
        thread::sleep(Duration::from_millis(5));
    }
}

// One test, because others in this process would have threads and descriptors of their own.
#[test]
fn machines_leave_no_descriptors_threads_or_memory_behind() -> Result<()> {
    let threads = Holdings::now()?.threads;
    for backend in all_backends() {
        // What is made once, and the allocator's arenas.
        at_once(&backend, AT_ONCE)?;
        in_a_row(&backend, LIVES.len())?;
        let before = at_rest(threads)?;
        in_a_row(&backend, MACHINES)?;
        let after = at_rest(threads)?;
        at_once(&backend, AT_ONCE)?;
        let last = at_rest(threads)?;
        println!("{}: {before}; {after}; {last}", backend.name());
        for (now, kept) in [(after, KEPT_KIB), (last, KEPT_KIB + KEPT_AT_ONCE_KIB)] {
            ensure!(
                now.descriptors == before.descriptors,
                "on {}: {before}, and later {now}",
                backend.name()
            );
            ensure!(
                now.resident_kib <= before.resident_kib + kept,
                "on {}: {before}, and later {now}",
                backend.name()
            );
        }
    }
    Ok(())
}
