//! A guest that does its worst: the machine can still be looked at, held, continued and ended, and its host side does
//! not grow.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use caisson_config::OnReboot;
use caisson_hypervisor::Hypervisor;
use caisson_machine::{HostEnd, Input, Machine, OnCrash, Outcome, StreamEnd};
use caisson_tests::{
    guests::guest_path,
    process::resident_kib,
    vm::{Console, VmSpec, all_backends},
};

const LIMIT: u64 = 64 << 20;
/// How long the guest is left to it, at least.
const TIME: Duration = Duration::from_millis(1500);
/// An answer that takes longer will not come. Answers take milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the slowest backend may take to a first sign of life, and to a round.
const SLOW: Duration = Duration::from_secs(60);
/// A guest that executes whatever it finds may halt for good, loop, or send itself INIT. One that is
/// silent for so long is reset, as a user would do.
const SILENCE: Duration = Duration::from_secs(20);
/// How much the process may grow for a vCPU: the software CPU keeps up to 64 MiB of decoded code for
/// each, which a guest that jumps about fills in seconds.
const GROWTH_KIB: u64 = 80 << 10;
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// What the guest does, and what is to be seen of it.
struct Abuse {
    name: &'static str,
    cpus: u32,
    /// What the guest says again and again while it goes on.
    sign: &'static str,
    /// How often, in the time that it is watched.
    times: usize,
}

/// These machines measure their process, so there is one at a time.
fn alone<T>(body: impl FnOnce() -> T) -> T {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    body()
}

/// Runs the guest on each backend.
fn survives(abuse: &Abuse) {
    alone(|| {
        for backend in all_backends() {
            let result = endure(&backend, abuse, || {
                Box::new(StreamEnd::new(io::sink())) as Box<dyn HostEnd>
            });
            if let Err(error) = result {
                panic!("\"{}\" on {}: {error:#}", abuse.name, backend.name());
            }
        }
    });
}

fn endure(
    backend: &Arc<dyn Hypervisor>,
    abuse: &Abuse,
    end: impl Fn() -> Box<dyn HostEnd>,
) -> Result<()> {
    let kernel = Input::open("kernel", &guest_path("hostile")?, LIMIT)?;
    let mut spec = VmSpec::new(backend, kernel);
    spec.boot.cmdline = format!("abuse={}", abuse.name);
    spec.cpus = abuse.cpus;
    spec.on_reboot = OnReboot::Restart;
    spec.on_crash = OnCrash::Restart;
    let before = resident_kib()?;
    let console = Console::default();
    let debugcon: Box<dyn HostEnd> = Box::new(StreamEnd::new(console.clone()));
    let mut described = spec.machine([Some(end()), None, None, None], Some(debugcon));
    described.debug_exit = None;
    // Shared with the thread that asks: one that gets no answer keeps it from being dropped, and the test from hanging.
    let machine = Arc::new(Machine::new(described)?);
    machine.start()?;
    console.wait_for(abuse.name, 0, SLOW)?;

    let (answers, answered) = mpsc::channel();
    let asked = machine.clone();
    thread::spawn(move || ask(&asked, &answers));
    let until = Instant::now() + TIME;
    let mut most = 0;
    let mut rounds = 0;
    let (mut signs, mut last_sign) = (0, Instant::now());
    while Instant::now() < until || (rounds < 3 || seen(&console, abuse) < abuse.times) {
        match answered.recv_timeout(PATIENCE) {
            Ok(Ok(())) => rounds += 1,
            Ok(Err(error)) => {
                let ended = machine.wait_for(Duration::ZERO);
                return Err(error).context(format!(
                    "after {rounds} looks; it ended: {ended:?}\n{console}"
                ));
            }
            Err(_) => {
                std::mem::forget(machine);
                bail!("no answer within {PATIENCE:?} after {rounds} looks");
            }
        }
        most = most.max(resident_kib()?);
        ensure!(
            Instant::now() < until + 3 * SLOW,
            "the guest does not go on: {console}"
        );
        if signs != seen(&console, abuse) {
            (signs, last_sign) = (seen(&console, abuse), Instant::now());
        } else if abuse.times > signs && last_sign.elapsed() > SILENCE {
            machine.reset()?;
            last_sign = Instant::now();
        }
    }
    drop(answered);
    machine.stop();
    let outcome = machine.wait_for(PATIENCE);
    ensure!(
        outcome == Some(Outcome::Stopped),
        "it was stopped and is {outcome:?}"
    );
    let grown = most.saturating_sub(before);
    let bound = GROWTH_KIB * u64::from(abuse.cpus);
    ensure!(
        grown <= bound,
        "the process grew by {grown} KiB, and {bound} are enough"
    );
    println!(
        "\"{}\" on {}: {rounds} looks, {} signs of the guest, {grown} KiB more",
        abuse.name,
        backend.name(),
        seen(&console, abuse)
    );
    Ok(())
}

fn seen(console: &Console, abuse: &Abuse) -> usize {
    console.text().matches(abuse.sign).count()
}

/// Holds the machine, looks at it and lets it go on, until nobody listens any more.
fn ask(machine: &Machine, answers: &mpsc::Sender<Result<()>>) {
    loop {
        let look = || -> Result<()> {
            let _ = machine.inspect();
            machine.pause()?;
            let first = machine.now_ns();
            let _ = machine.inspect();
            ensure!(machine.now_ns() == first, "time passes while it is paused");
            machine.resume()?;
            Ok(())
        };
        let result = look();
        let over = result.is_err();
        if answers.send(result).is_err() || over {
            return;
        }
        thread::sleep(PAUSE);
    }
}

macro_rules! abuses {
    ($($(#[$about:meta])* $test:ident: $name:literal, $cpus:literal, $sign:literal, $times:literal;)*) => {
        $($(#[$about])* #[test]
        fn $test() {
            survives(&Abuse { name: $name, cpus: $cpus, sign: $sign, times: $times });
        })*
    };
}

abuses! {
    triple_faults_without_end: "triple-fault", 1, "hostile: triple-fault", 3;
    port_accesses_of_thousands_of_elements: "ports", 1, "round", 2;
    /// The guest says nothing after its first word: it executes one instruction.
    an_instruction_without_end: "endless-rep", 1, "hostile", 1;
    output_that_nobody_asked_for: "flood", 1, "round", 1;
    device_memory_in_every_way: "memory", 1, "round", 2;
    every_register_of_the_local_apic: "apic", 2, "round", 1;
    interrupts_by_the_hundred: "ipi", 2, "round", 1;
    all_model_specific_registers: "msr", 1, "round", 2;
}

/// Takes no byte until it is closed.
struct Stuck(Arc<Mutex<mpsc::Receiver<()>>>);

impl HostEnd for Stuck {
    fn send(&mut self, _: &[u8]) -> io::Result<()> {
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).recv();
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn patience(&self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
}

#[test]
fn a_console_that_takes_nothing() {
    let abuse = Abuse {
        name: "flood",
        cpus: 1,
        sign: "hostile",
        times: 1,
    };
    alone(|| {
        for backend in all_backends() {
            let (release, stuck) = mpsc::channel();
            let stuck = Arc::new(Mutex::new(stuck));
            let result = endure(&backend, &abuse, || Box::new(Stuck(stuck.clone())));
            drop(release);
            if let Err(error) = result {
                panic!("on {}: {error:#}", backend.name());
            }
        }
    });
}
