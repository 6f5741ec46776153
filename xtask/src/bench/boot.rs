//! Debian to its first userland instruction.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use caisson_image::{CmdlineOptions, ImageStore, TerminalProgress, default_cmdline};

use super::{
    marker::{TEXT, Then, initramfs_with, program},
    resident::Resident,
    sample::Sample,
};

/// The peer.
const QEMU: &str = "qemu-system-x86_64";
/// A boot that takes longer has hung.
const HUNG: Duration = Duration::from_secs(300);

/// How to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Boots of each, in turn.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 512)]
    memory: u64,
    /// The tiers of the software CPU to measure, in turn.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1], value_parser = clap::value_parser!(u8).range(0..=1))]
    soft_tier: Vec<u8>,
}

/// What both boot.
struct Guest {
    kernel: PathBuf,
    initramfs: PathBuf,
    cmdline: String,
    memory_mib: u64,
}

/// Measures and prints.
pub(super) fn run(options: &Options) -> Result<()> {
    let binary = super::caisson()?;
    let image = ImageStore::open_default()?.ensure_mini(&TerminalProgress::default())?;
    let folder = tempfile::tempdir()?;
    let initramfs = |name: &str, then| -> Result<PathBuf> {
        let path = folder.path().join(name);
        initramfs_with(&image.initramfs, &program(then), &path)?;
        Ok(path)
    };
    let mut guest = Guest {
        kernel: image.kernel.clone(),
        initramfs: initramfs("boot.cpio", Then::PowerOff)?,
        cmdline: default_cmdline(&CmdlineOptions {
            speculation: false,
            ..CmdlineOptions::default()
        }),
        memory_mib: options.memory,
    };
    let has_peer = Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());

    let mut ours: Vec<(u8, Sample)> = (options.soft_tier.iter())
        .map(|&tier| (tier, Sample::default()))
        .collect();
    let mut theirs = Sample::default();
    for _ in 0..options.runs {
        for (tier, sample) in &mut ours {
            sample.push(measure(soft(&binary, &guest, *tier))?.0);
        }
        if has_peer {
            theirs.push(measure(tcg(&guest))?.0);
        }
    }
    println!(
        "Debian {} to its first userland instruction, {} MiB, 1 vCPU, {} runs",
        image.version, guest.memory_mib, options.runs
    );
    println!(
        "{:<28} {:>9} {:>9} {:>9}",
        "milliseconds", "median", "least", "greatest"
    );
    for (tier, sample) in &ours {
        println!("caisson --soft-tier {tier:<8} {sample}");
    }
    if let Some(peer) = theirs.median() {
        println!("{:<28} {theirs}", "qemu-system-x86_64 tcg");
        for (tier, sample) in &ours {
            let Some(ours) = sample.median() else {
                continue;
            };
            println!(
                "ratio of medians, tier {tier}: {:.2}",
                ours.as_secs_f64() / peer.as_secs_f64()
            );
        }
    } else {
        println!("{QEMU} is not installed: there is no ratio");
    }

    guest.initramfs = initramfs("wait.cpio", Then::Sleep)?;
    for (tier, _) in ours {
        let (_, mut child) = measure(soft(&binary, &guest, tier))?;
        let resident = Resident::of(child.0.id());
        child.0.kill()?;
        print!("tier {tier}\n{}", resident?);
    }
    Ok(())
}

fn soft(binary: &Path, guest: &Guest, tier: u8) -> Command {
    let mut command = Command::new(binary);
    command.args(["run", "--quiet", "--accel", "soft", "--serial", "stdio"]);
    command.args(["--soft-tier", &tier.to_string()]);
    command
        .arg("--kernel")
        .arg(&guest.kernel)
        .arg("--initrd")
        .arg(&guest.initramfs);
    command.args([
        "--cmdline",
        &guest.cmdline,
        "--memory",
        &format!("{}M", guest.memory_mib),
    ]);
    command
}

fn tcg(guest: &Guest) -> Command {
    let mut command = Command::new(QEMU);
    command.args([
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args([
        "-serial",
        "stdio",
        "-m",
        &guest.memory_mib.to_string(),
        "-append",
        &guest.cmdline,
    ]);
    command
        .arg("-kernel")
        .arg(&guest.kernel)
        .arg("-initrd")
        .arg(&guest.initramfs);
    command
}

/// A process that does not outlive its measurement.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `command` and waits for the guest's word. Gives the time since just before the start.
fn measure(mut command: Command) -> Result<(Duration, Ended)> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let since = Instant::now();
    let mut child = Ended(
        command
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?,
    );
    let output = child.0.stdout.take().context("it was piped")?;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut seen = String::new();
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line);
            if text.contains(TEXT.trim_end()) {
                let _ = sender.send(Ok(since.elapsed()));
                // Read on, so that the guest does not wait for a full pipe.
            }
            seen.push_str(&text);
            line.clear();
        }
        let _ = sender.send(Err(seen));
    });
    match receiver.recv_timeout(HUNG) {
        Ok(Ok(time)) => Ok((time, child)),
        Ok(Err(seen)) => bail!(
            "{:?} ended before its guest reached userland:\n{seen}",
            command.get_program()
        ),
        Err(_) => bail!(
            "{:?} does not get its guest to userland within {HUNG:?}",
            command.get_program()
        ),
    }
}
