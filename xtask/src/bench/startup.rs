//! What a machine costs around its guest: time to its first instruction and to its end, memory, exits.
//!
//! The guests are a few instructions long, and the peer is `bare-kvm` (benches/bare), which does nothing but run them.

use std::{
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{resident::Resident, sample::Sample};

/// Guest memory in MiB.
const MEMORY: u64 = 128;
/// Writes of the guests `tiny-ports` and `tiny-mmio`.
const WRITES: u32 = 100_000;
/// How long a machine gets to settle down.
const SETTLE: Duration = Duration::from_millis(500);

/// The most that times may be of the bare program's.
const TIME_LIMIT: f64 = 1.25;
/// The least that the rate of exits may be of the bare program's.
const RATE_LIMIT: f64 = 0.9;
/// The most KiB beyond guest RAM.
const MEMORY_LIMIT: u64 = 5 << 10;

/// How to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Starts of each, in turn.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Runs of each guest that writes, in turn.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    exits: u32,
}

/// What runs guests.
struct Programs {
    caisson: PathBuf,
    bare: PathBuf,
    guests: PathBuf,
}

/// Which of the two.
#[derive(Clone, Copy)]
enum Who {
    Caisson,
    Bare,
}

impl Programs {
    /// The command that runs `guest`, with its debug console on standard output, or COM1 for the guest that uses that.
    fn command(&self, who: Who, guest: &str) -> Command {
        let memory = MEMORY.to_string();
        let mut command;
        match who {
            Who::Bare => {
                command = Command::new(&self.bare);
                command.arg(memory);
            }
            Who::Caisson => {
                let (serial, debugcon) = match guest {
                    "tiny-idle" => ("stdio", "null"),
                    _ => ("null", "stdio"),
                };
                command = Command::new(&self.caisson);
                command.args(["run", "--quiet", "--accel", "kvm", "--cpus", "1"]);
                command.args(["--memory", &format!("{memory}M"), "--serial", serial]);
                command.args(["--debugcon", debugcon, "--kernel"]);
            }
        }
        command
            .arg(self.guests.join(guest))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        command
    }

    /// From just before the start to the program's end.
    fn to_exit(&self, who: Who) -> Result<Duration> {
        let mut command = self.command(who, "tiny-off");
        command.stdout(Stdio::null());
        let since = Instant::now();
        let status = command.status().context("cannot start it")?;
        let time = since.elapsed();
        ensure!(
            status.success(),
            "{:?} fails: {status}",
            command.get_program()
        );
        Ok(time)
    }

    /// From just before the start to the byte that the guest's first instructions write.
    fn to_first_instruction(&self, who: Who) -> Result<Duration> {
        let mut command = self.command(who, "tiny-first");
        let since = Instant::now();
        let mut child = command.spawn().context("cannot start it")?;
        read_byte(&mut child)?;
        let time = since.elapsed();
        finish(child)?;
        Ok(time)
    }

    /// From the first byte that `guest` says to the second.
    fn between_bytes(&self, who: Who, guest: &str) -> Result<Duration> {
        let mut child = self
            .command(who, guest)
            .spawn()
            .context("cannot start it")?;
        read_byte(&mut child)?;
        let since = Instant::now();
        read_byte(&mut child)?;
        let time = since.elapsed();
        finish(child)?;
        Ok(time)
    }

    /// What stays resident while the guest halts.
    fn idle(&self) -> Result<Resident> {
        let mut child = self
            .command(Who::Caisson, "tiny-idle")
            .spawn()
            .context("cannot start it")?;
        let said = read_byte(&mut child);
        thread::sleep(SETTLE);
        let resident = said.and_then(|()| Resident::of(child.id()));
        child.kill()?;
        child.wait()?;
        resident
    }
}

fn read_byte(child: &mut Child) -> Result<()> {
    let output = child.stdout.as_mut().context("it was piped")?;
    let read = output.read_exact(&mut [0]);
    read.context("the guest ends without its word")
}

fn finish(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    ensure!(status.success(), "it fails: {status}");
    Ok(())
}

/// Measures and prints.
pub(super) fn run(options: &Options) -> Result<()> {
    if !Path::new("/dev/kvm").exists() {
        println!("/dev/kvm is not there: there is nothing to measure");
        return Ok(());
    }
    let programs = Programs {
        caisson: super::caisson()?,
        bare: super::release("caisson-bench-bare", "bare-kvm")?,
        guests: super::guests("caisson-guest-tiny")?,
    };
    let mut verdicts = Vec::new();

    println!(
        "{MEMORY} MiB, 1 vCPU, {} runs each in turn\n{:<40} {:>9} {:>9} {:>9}",
        options.runs, "milliseconds", "median", "least", "greatest"
    );
    type Measure = fn(&Programs, Who) -> Result<Duration>;
    let times: [(&str, Measure); 2] = [
        ("to the first instruction", Programs::to_first_instruction),
        ("to the exit", Programs::to_exit),
    ];
    for (what, measure) in times {
        let (ours, theirs) = in_turn(options.runs, |who| measure(&programs, who))?;
        println!("{:<40} {ours:.2}", format!("exec {what}: caisson"));
        println!("{:<40} {theirs:.2}", format!("exec {what}: bare program"));
        let ratio = ratio(&ours, &theirs)?;
        verdicts.push(at_most(&format!("exec {what}"), ratio, TIME_LIMIT));
    }

    println!("\n{:<40} {:>9}", "exits a second, medians", "thousand");
    for (what, guest) in [("port writes", "tiny-ports"), ("MMIO writes", "tiny-mmio")] {
        let (ours, theirs) = in_turn(options.exits, |who| programs.between_bytes(who, guest))?;
        for (who, sample) in [("caisson", &ours), ("bare program", &theirs)] {
            let median = sample.median().context("there was a run")?;
            let rate = f64::from(WRITES) / median.as_secs_f64() / 1000.0;
            println!("{:<40} {rate:>9.0}", format!("{what}: {who}"));
        }
        let rates = ratio(&theirs, &ours)?;
        let holds = if rates >= RATE_LIMIT {
            "holds"
        } else {
            "FAILS"
        };
        verdicts.push(format!(
            "{what}: {rates:.2} of the bare program, at least {RATE_LIMIT}: {holds}"
        ));
    }

    println!("\nwith serial and one idle vCPU:");
    let resident = programs.idle()?;
    print!("{resident}");
    let beyond = resident.beyond_guest();
    let holds = if beyond <= MEMORY_LIMIT {
        "holds"
    } else {
        "FAILS"
    };
    verdicts.push(format!(
        "resident beyond guest RAM: {beyond} KiB, at most {MEMORY_LIMIT}: {holds}"
    ));
    println!("\n{}", verdicts.join("\n"));
    Ok(())
}

/// Measures both, alternating who goes first, so that neither profits from the other's caches.
fn in_turn(runs: u32, measure: impl Fn(Who) -> Result<Duration>) -> Result<(Sample, Sample)> {
    let (mut ours, mut theirs) = (Sample::default(), Sample::default());
    for run in 0..runs {
        let order = match run % 2 {
            0 => [Who::Caisson, Who::Bare],
            _ => [Who::Bare, Who::Caisson],
        };
        for who in order {
            let time = measure(who)?;
            match who {
                Who::Caisson => ours.push(time),
                Who::Bare => theirs.push(time),
            }
        }
    }
    Ok((ours, theirs))
}

fn ratio(one: &Sample, other: &Sample) -> Result<f64> {
    let median = |sample: &Sample| sample.median().context("there was a run");
    Ok(median(one)?.as_secs_f64() / median(other)?.as_secs_f64())
}

fn at_most(what: &str, ratio: f64, limit: f64) -> String {
    let holds = if ratio <= limit { "holds" } else { "FAILS" };
    format!("{what}: {ratio:.2} of the bare program, at most {limit}: {holds}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_holds_or_fails() {
        assert!(at_most("x", 1.25, 1.25).ends_with("holds"));
        assert!(at_most("x", 1.26, 1.25).ends_with("FAILS"));
    }

    #[test]
    fn both_are_measured_equally_often_and_told_apart() {
        let (ours, theirs) = in_turn(3, |who| {
            Ok(Duration::from_millis(match who {
                Who::Caisson => 3,
                Who::Bare => 2,
            }))
        })
        .unwrap();
        assert!((ratio(&ours, &theirs).unwrap() - 1.5).abs() < 1e-9);
    }
}
