//! The software CPU alone: kernels of integer code in the `bench` guest, and the
//! same source on the host's own processor.

use std::{
    collections::BTreeMap,
    hint::black_box,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use caisson_bench_kernels::{KERNELS, Kernel};

/// Exit status of a guest whose checks all passed.
const SUCCESS: i32 = 0x21;

/// How often a native kernel is timed: the least time counts, as in the guest.
const ROUNDS: u32 = 12;

/// How to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Runs of the guest and of the native kernels, in turn.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// The tier of the software CPU.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    tier: u8,
}

/// What a guest says of one kernel.
struct Line {
    /// Instructions that one unit of work takes.
    instructions: f64,
    /// Nanoseconds for one unit of work.
    time: f64,
    /// Bytes that one unit moves.
    bytes: f64,
    units: u64,
    checksum: u64,
}

/// Everything that one run of the guest says.
struct Report {
    kernels: BTreeMap<String, Line>,
    /// Nanoseconds to build a block.
    block: f64,
}

/// Measures and prints.
pub(super) fn run(options: &Options) -> Result<()> {
    let binary = super::caisson()?;
    let guest = super::guests("caisson-guest-bench")?.join("bench");
    let mut guests: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut natives: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut blocks = Vec::new();
    let mut last = None;
    for _ in 0..options.runs {
        let report = in_guest(&binary, &guest, options.tier)?;
        for kernel in KERNELS {
            let line = report
                .kernels
                .get(kernel.name)
                .with_context(|| format!("the guest says nothing of \"{}\"", kernel.name))?;
            guests.entry(kernel.name).or_default().push(line.time);
            let (time, checksum) = native(kernel, line.units);
            ensure!(
                checksum == line.checksum,
                "\"{}\" comes to {:#x} in the guest and to {checksum:#x} natively",
                kernel.name,
                line.checksum
            );
            natives.entry(kernel.name).or_default().push(time);
        }
        blocks.push(report.block);
        last = Some(report);
    }
    let report = last.context("there was a run")?;
    // The host's compiler may use vector units, so "native" counts the guest's instructions.

    println!(
        "software CPU, tier {}, bare-metal, medians of {} runs\n{:<10} {:>10} {:>12} {:>8}",
        options.tier, options.runs, "kernel", "soft MIPS", "native", "ratio"
    );
    let (mut product, mut count) = (0.0, 0u32);
    for kernel in KERNELS {
        let line = &report.kernels[kernel.name];
        let (soft, host) = (
            median(guests.get_mut(kernel.name)),
            median(natives.get_mut(kernel.name)),
        );
        if kernel.repeats {
            println!(
                "{:<10} {:>5.1} GB/s {:>7.1} GB/s {:>8.1}",
                kernel.name,
                line.bytes / soft,
                line.bytes / host,
                soft / host
            );
            continue;
        }
        let mips = line.instructions * 1000.0 / soft;
        product += mips.ln();
        count += 1;
        println!(
            "{:<10} {mips:>10.0} {:>12.0} {:>8.1}",
            kernel.name,
            line.instructions * 1000.0 / host,
            soft / host
        );
    }
    println!(
        "geometric mean: {:.0} MIPS",
        (product / f64::from(count)).exp()
    );
    println!("building a block: {:.0} ns", median(Some(&mut blocks)));
    Ok(())
}

fn median(values: Option<&mut Vec<f64>>) -> f64 {
    let Some(values) = values else {
        return f64::NAN;
    };
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Nanoseconds for a unit of work on the host's processor, and the checksum of
/// `units` of them.
fn native(kernel: &Kernel, units: u64) -> (f64, u64) {
    let mut checksum = 0;
    let mut least = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        checksum = (kernel.run)(black_box(units));
        least = least.min(start.elapsed().as_nanos() as f64);
    }
    (least / units as f64, checksum)
}

/// Runs the guest to its end.
fn in_guest(binary: &Path, guest: &Path, tier: u8) -> Result<Report> {
    let output = Command::new(binary)
        .args(["run", "--quiet", "--accel", "soft", "--memory", "128M"])
        .args(["--soft-tier", &tier.to_string()])
        .args(["--serial", "stdio", "--debug-exit", "--kernel"])
        .arg(guest)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", binary.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.code() == Some(SUCCESS),
        "the guest fails with {}:\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let mut report = Report {
        kernels: BTreeMap::new(),
        block: f64::NAN,
    };
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.clone().next()) {
            (Some("bench"), Some(name)) => {
                let value = |key| field(line, key);
                let units = value("units")?;
                let each = |key| Ok::<f64, anyhow::Error>(value(key)? as f64 / units as f64);
                let entry = Line {
                    instructions: each("instructions")?,
                    time: each("nanoseconds")?,
                    bytes: each("bytes")?,
                    units,
                    checksum: value("checksum")?,
                };
                report.kernels.insert(name.to_owned(), entry);
            }
            (Some("cold"), _) => {
                let spent = field(line, "first")?.saturating_sub(field(line, "second")?);
                report.block = spent as f64 / field(line, "blocks")? as f64;
            }
            _ => {}
        }
    }
    Ok(report)
}

/// The number after `key=` in `line`.
fn field(line: &str, key: &str) -> Result<u64> {
    for word in line.split_whitespace() {
        if let Some(value) = word.strip_prefix(key).and_then(|w| w.strip_prefix('=')) {
            return match value.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None => value.parse(),
            }
            .with_context(|| format!("\"{value}\" is no number in: {line}"));
        }
    }
    bail!("no {key}= in: {line}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_name() {
        let line = "bench hash units=12 nanoseconds=34 checksum=0xff";
        assert_eq!(field(line, "units").unwrap(), 12);
        assert_eq!(field(line, "checksum").unwrap(), 255);
        assert!(field(line, "bytes").is_err());
    }
}
