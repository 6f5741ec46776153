//! The software CPU alone: kernels in the `bench` guest, on each tier, on QEMU's
//! TCG, and the same source on the host's own processor.

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
    /// The tiers of the software CPU to measure, in turn.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1], value_parser = clap::value_parser!(u8).range(0..=1))]
    soft_tier: Vec<u8>,
}

/// The peer.
const QEMU: &str = "qemu-system-x86_64";

/// Who runs the guest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Engine {
    Tier(u8),
    Tcg,
}

impl Engine {
    fn name(self) -> String {
        match self {
            Self::Tier(tier) => format!("tier {tier}"),
            Self::Tcg => "tcg".to_owned(),
        }
    }
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

/// What one engine needed, run by run.
#[derive(Default)]
struct Measured {
    /// Nanoseconds for a unit of work, by kernel.
    times: BTreeMap<&'static str, Vec<f64>>,
    /// Nanoseconds to build a block.
    blocks: Vec<f64>,
}

/// Measures and prints.
pub(super) fn run(options: &Options) -> Result<()> {
    let binary = super::caisson()?;
    let guest = super::guests("caisson-guest-bench")?.join("bench");
    let mut engines: Vec<Engine> = options.soft_tier.iter().map(|&t| Engine::Tier(t)).collect();
    let has_peer = (Command::new(QEMU).arg("--version").stdout(Stdio::null()))
        .status()
        .is_ok_and(|s| s.success());
    if has_peer {
        engines.push(Engine::Tcg);
    }
    let kernels: Vec<&Kernel> = KERNELS.iter().filter(|k| k.runs()).collect();
    let mut measured: BTreeMap<Engine, Measured> = BTreeMap::new();
    let mut natives: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut last = None;
    for _ in 0..options.runs {
        for &engine in &engines {
            let report = in_guest(engine, &binary, &guest)?;
            let measured = measured.entry(engine).or_default();
            for kernel in &kernels {
                let line = report.kernel(kernel)?;
                measured
                    .times
                    .entry(kernel.name)
                    .or_default()
                    .push(line.time);
                let (time, checksum) = native(kernel, line.units);
                ensure!(
                    checksum == line.checksum,
                    "\"{}\" comes to {:#x} on {} and to {checksum:#x} natively",
                    kernel.name,
                    line.checksum,
                    engine.name()
                );
                natives.entry(kernel.name).or_default().push(time);
            }
            measured.blocks.push(report.block);
            last = Some(report);
        }
    }
    let report = last.context("there was a run")?;
    let mut table = Table {
        engines,
        measured,
        natives,
        products: BTreeMap::new(),
    };

    println!("software CPU, bare-metal, medians of {} runs", options.runs);
    println!("MIPS (GB/s where so marked), and times the native time in brackets");
    table.head();
    // The host's compiler may use vector units, so "native" counts the guest's instructions.
    for kernel in kernels {
        table.print(kernel, report.kernel(kernel)?);
    }
    table.finish();
    if !has_peer {
        println!("{QEMU} is not installed: there is no column for it");
    }
    Ok(())
}

/// The figures, to be printed kernel by kernel.
struct Table {
    engines: Vec<Engine>,
    measured: BTreeMap<Engine, Measured>,
    natives: BTreeMap<&'static str, Vec<f64>>,
    /// Sums of the logarithms of MIPS, of ratios to native and to the peer, and their number.
    products: BTreeMap<Engine, [f64; 4]>,
}

impl Table {
    fn time(&mut self, engine: Engine, kernel: &Kernel) -> f64 {
        median(
            self.measured
                .get_mut(&engine)
                .and_then(|m| m.times.get_mut(kernel.name)),
        )
    }

    fn head(&self) {
        print!("{:<10}", "kernel");
        for engine in &self.engines {
            print!(" {:>16}", engine.name());
        }
        print!(" {:>8}", "native");
        self.each_tier(|tier| print!(" {:>12}", format!("tier {tier} : tcg")));
        println!();
    }

    fn each_tier(&self, mut f: impl FnMut(u8)) {
        if !self.engines.contains(&Engine::Tcg) {
            return;
        }
        for engine in &self.engines {
            if let Engine::Tier(tier) = engine {
                f(*tier);
            }
        }
    }

    fn print(&mut self, kernel: &Kernel, line: &Line) {
        let native = median(self.natives.get_mut(kernel.name));
        let tcg = self.time(Engine::Tcg, kernel);
        let rate = |time: f64| {
            if kernel.repeats {
                line.bytes / time
            } else {
                line.instructions * 1000.0 / time
            }
        };
        let places = usize::from(kernel.repeats);
        print!("{:<10}", kernel.name);
        for engine in self.engines.clone() {
            let time = self.time(engine, kernel);
            let ratio = time / native;
            print!(" {:>16}", format!("{:.places$} ({ratio:.1})", rate(time)));
            if !kernel.repeats {
                let sums = self.products.entry(engine).or_default();
                for (sum, value) in sums.iter_mut().zip([rate(time), ratio, time / tcg]) {
                    *sum += value.ln();
                }
                sums[3] += 1.0;
            }
        }
        print!(" {:>8.places$}", rate(native));
        let tiers: Vec<f64> = (self.engines.clone().into_iter())
            .filter(|e| *e != Engine::Tcg)
            .map(|e| self.time(e, kernel) / tcg)
            .collect();
        if tcg.is_finite() {
            for ratio in tiers {
                print!(" {ratio:>12.2}");
            }
        }
        println!("{}", if kernel.repeats { "  GB/s" } else { "" });
    }

    fn finish(&mut self) {
        for engine in &self.engines {
            let Some([rate, native, tcg, count]) = self.products.get(engine) else {
                continue;
            };
            let mean = |sum: &f64| (sum / count).exp();
            print!(
                "{}: geometric means: {:.0} MIPS, {:.2} times the native time",
                engine.name(),
                mean(rate),
                mean(native)
            );
            if tcg.is_finite() {
                print!(", {:.2} times TCG's", mean(tcg));
            }
            let blocks = self.measured.get_mut(engine).map(|m| &mut m.blocks);
            println!("; building a block: {:.0} ns", median(blocks));
        }
    }
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

impl Report {
    fn kernel(&self, kernel: &Kernel) -> Result<&Line> {
        (self.kernels.get(kernel.name))
            .with_context(|| format!("the guest says nothing of \"{}\"", kernel.name))
    }
}

/// Runs the guest to its end.
fn in_guest(engine: Engine, binary: &Path, guest: &Path) -> Result<Report> {
    let mut command;
    match engine {
        Engine::Tier(tier) => {
            command = Command::new(binary);
            command
                .args(["run", "--quiet", "--accel", "soft", "--memory", "128M"])
                .args(["--soft-tier", &tier.to_string()])
                .args(["--serial", "stdio", "--debug-exit", "--kernel"]);
        }
        Engine::Tcg => {
            command = Command::new(QEMU);
            command
                .args(["-accel", "tcg", "-cpu", "max", "-m", "128", "-nodefaults"])
                .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
                .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"]);
        }
    }
    let output = command
        .arg(guest)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
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
