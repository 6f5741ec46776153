//! How soon a saved machine goes on: from the start of the process to the guest's next instructions.
//!
//! The guest says a byte on the debug console again and again. Its machine is saved once for each size of memory, and
//! then continued from the same files many times. Beside it stands the same machine from its kernel, which is what a
//! user without a snapshot has.

use std::{
    fmt,
    io::{self, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::sample::Sample;

/// Sizes of guest memory in MiB.
const SIZES: [u64; 2] = [128, 8 << 10];
/// The most that it may take.
const LIMIT: Duration = Duration::from_millis(20);

/// How to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Restores and starts of each size on each backend, in turn.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

/// What is measured.
#[derive(Clone, Copy)]
struct Machine {
    backend: &'static str,
    mib: u64,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} MiB", self.backend, self.mib)
    }
}

struct Programs {
    caisson: PathBuf,
    kernel: PathBuf,
}

impl Programs {
    /// The command that runs `machine`, its debug console on standard output.
    fn command(&self, machine: Machine) -> Command {
        let mut command = Command::new(&self.caisson);
        command
            .args(["run", "--quiet", "--accel", machine.backend, "--memory"])
            .arg(format!("{}M", machine.mib))
            .args(["--serial", "null", "--debugcon", "stdio", "--kernel"])
            .arg(&self.kernel)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }

    /// Runs `machine` until the guest has begun, and saves it to `folder`.
    fn save(&self, machine: Machine, folder: &Path) -> Result<()> {
        let mut command = self.command(machine);
        let mut child = command.arg("--save-on-exit").arg(folder).spawn()?;
        read_byte(&mut child)?;
        let mut rest = child.stdout.take().context("it was piped")?;
        // A guest that nobody listens to would wait in the midst of an instruction.
        let reader = thread::spawn(move || io::copy(&mut rest, &mut io::sink()));
        kill_process(Pid::from_child(&child), Signal::TERM)?;
        child.wait()?;
        reader.join().ok();
        ensure!(folder.join("state").exists(), "{machine} was not saved");
        Ok(())
    }

    fn to_first_byte(&self, machine: Machine, snapshot: Option<&Path>) -> Result<Duration> {
        let mut command = match snapshot {
            None => self.command(machine),
            Some(folder) => {
                let mut command = Command::new(&self.caisson);
                command
                    .args(["run", "--quiet", "--accel", machine.backend, "--restore"])
                    .arg(folder)
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped());
                command
            }
        };
        let since = Instant::now();
        let mut child = command.spawn().context("cannot start it")?;
        let said = read_byte(&mut child);
        let time = since.elapsed();
        child.kill()?;
        child.wait()?;
        said.map(|()| time)
    }
}

fn read_byte(child: &mut Child) -> Result<()> {
    let output = child.stdout.as_mut().context("it was piped")?;
    let read = output.read_exact(&mut [0]);
    read.context("the guest ends without its word")
}

/// The backends that run here.
fn backends() -> Vec<&'static str> {
    let kvm = Path::new("/dev/kvm").exists().then_some("kvm");
    kvm.into_iter().chain(["soft"]).collect()
}

/// Measures and prints.
pub(super) fn run(options: &Options) -> Result<()> {
    let programs = Programs {
        caisson: super::caisson()?,
        kernel: super::guests("caisson-guest-tiny")?.join("tiny-again"),
    };
    if !Path::new("/dev/kvm").exists() {
        println!("/dev/kvm is not there: only the software CPU is measured");
    }
    println!(
        "exec to the guest's first byte, {} runs each in turn\n{:<40} {:>9} {:>9} {:>9}",
        options.runs, "milliseconds", "median", "least", "greatest"
    );
    let mut verdicts = Vec::new();
    for backend in backends() {
        for mib in SIZES {
            let machine = Machine { backend, mib };
            let folder = tempfile::tempdir()?;
            programs.save(machine, folder.path())?;
            let (mut restored, mut started) = (Sample::default(), Sample::default());
            for _ in 0..options.runs {
                restored.push(programs.to_first_byte(machine, Some(folder.path()))?);
                started.push(programs.to_first_byte(machine, None)?);
            }
            println!("{:<40} {restored:.2}", format!("{machine}: restored"));
            println!("{:<40} {started:.2}", format!("{machine}: from its kernel"));
            let (Some(ours), Some(fresh)) = (restored.median(), started.median()) else {
                bail!("there was no run");
            };
            verdicts.push(verdict(machine, ours, fresh));
        }
    }
    println!("\n{}", verdicts.join("\n"));
    Ok(())
}

fn verdict(machine: Machine, restored: Duration, started: Duration) -> String {
    let holds = if restored <= LIMIT { "holds" } else { "FAILS" };
    format!(
        "{machine}: {:.2} ms, at most {} ms: {holds}; {:.2} of a start from its kernel",
        restored.as_secs_f64() * 1000.0,
        LIMIT.as_millis(),
        restored.as_secs_f64() / started.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_holds_or_fails() {
        let machine = Machine {
            backend: "soft",
            mib: 128,
        };
        let millis = Duration::from_millis;
        let holds = verdict(machine, millis(20), millis(10));
        assert_eq!(
            holds,
            "soft, 128 MiB: 20.00 ms, at most 20 ms: holds; 2.00 of a start from its kernel"
        );
        assert!(verdict(machine, millis(21), millis(10)).contains("FAILS"));
    }
}
