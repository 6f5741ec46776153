//! How fast disks are: the engine alone against `fio` on the same file, and qcow2 against raw.
//!
//! The page cache is left out on both sides (O_DIRECT). Cases run in turn, so that a slow minute of the host hits all of
//! them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use caisson_image::{ImageStore, TerminalProgress};

/// The least part of `fio`'s rate that the engine must reach.
const ENGINE: f64 = 0.90;
/// The least part of raw's rate that qcow2 must reach.
const QCOW2: f64 = 0.85;

/// Where Debian's packages have shared libraries.
const LIBRARIES: [&str; 3] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/ceph",
    "lib/x86_64-linux-gnu",
];

/// How to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Runs of each case, in turn.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Seconds of each run.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Size of the disk in MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..))]
    mib: u64,
    /// Where the images are made: a folder on the disk that is measured.
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// A way to read.
struct Pattern {
    name: &'static str,
    mode: &'static str,
    block: u64,
    depth: u32,
}

const PATTERNS: [Pattern; 3] = [
    Pattern {
        name: "4 KiB random, depth 32",
        mode: "random",
        block: 4096,
        depth: 32,
    },
    Pattern {
        name: "4 KiB random, depth 1",
        mode: "random",
        block: 4096,
        depth: 1,
    },
    Pattern {
        name: "128 KiB sequential, depth 8",
        mode: "sequential",
        block: 128 << 10,
        depth: 8,
    },
];

/// What a run came to.
#[derive(Clone, Copy)]
struct Rate {
    operations: f64,
    /// Microseconds of processor time per operation.
    processor: f64,
}

fn median(rates: &mut [Rate]) -> Result<Rate> {
    rates.sort_by(|a, b| a.operations.total_cmp(&b.operations));
    rates.get(rates.len() / 2).copied().context("no runs")
}

pub(super) fn run(options: &Options) -> Result<()> {
    super::build(
        &super::root(),
        &[
            "--release",
            "--package",
            "caisson-storage",
            "--example",
            "read_rate",
        ],
    )?;
    let reader = super::target().join("release/examples/read_rate");
    let fio = fio();
    if let Err(error) = &fio {
        println!("no fio to compare with: {error:#}");
    }
    let folder = match &options.folder {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let raw = folder.path().join("disk.raw");
    let qcow2 = folder.path().join("disk.qcow2");
    fill(&raw, options.mib)?;
    convert(&raw, &qcow2)?;
    let mut failed = Vec::new();
    println!(
        "{:30} {:>10} {:>10} {:>10} {:>8} {:>8}",
        "", "fio", "raw", "qcow2", "raw/fio", "qcow2/raw"
    );
    for pattern in &PATTERNS {
        let mut rates: [Vec<Rate>; 3] = Default::default();
        for _ in 0..options.runs {
            if let Ok(fio) = &fio {
                rates[0].push(fio.rate(&raw, pattern, options.seconds)?);
            }
            for (place, file, format) in [(1, &raw, "raw"), (2, &qcow2, "qcow2")] {
                let rate = ours(&reader, file, format, pattern, options.seconds)?;
                rates[place].push(rate);
            }
        }
        let [theirs, raw, qcow2] = rates.each_mut().map(|rates| median(rates));
        let (raw, qcow2) = (raw?, qcow2?);
        let of_fio = theirs
            .as_ref()
            .ok()
            .map(|theirs| raw.operations / theirs.operations);
        let of_raw = qcow2.operations / raw.operations;
        let text = |rate: Option<f64>| rate.map_or("-".into(), |rate| format!("{rate:.2}"));
        println!(
            "{:30} {:>10} {:>10.0} {:>10.0} {:>8} {:>8.2}",
            pattern.name,
            theirs
                .as_ref()
                .map_or("-".into(), |r| format!("{:.0}", r.operations)),
            raw.operations,
            qcow2.operations,
            text(of_fio),
            of_raw
        );
        println!(
            "{:30} {:>10} {:>10.1} {:>10.1}",
            "  CPU µs per operation",
            theirs.map_or("-".into(), |r| format!("{:.1}", r.processor)),
            raw.processor,
            qcow2.processor
        );
        if of_fio.is_some_and(|ratio| ratio < ENGINE) {
            failed.push(format!(
                "{}: the engine is below {ENGINE} of fio",
                pattern.name
            ));
        }
        if of_raw < QCOW2 {
            failed.push(format!("{}: qcow2 is below {QCOW2} of raw", pattern.name));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Makes a file of `mib` MiB without holes.
fn fill(path: &Path, mib: u64) -> Result<()> {
    use std::io::Write;
    let mut file = fs::File::create(path)?;
    let mut state = 1u64;
    let mut bytes = vec![0u8; 1 << 20];
    for _ in 0..mib {
        for word in bytes.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&bytes)?;
    }
    file.sync_all()?;
    Ok(())
}

fn convert(raw: &Path, qcow2: &Path) -> Result<()> {
    caisson_storage::manage::convert(
        &caisson_storage::DiskOptions::new(raw),
        &caisson_storage::manage::NewImage {
            path: qcow2.to_owned(),
            format: caisson_storage::Format::Qcow2,
            size: None,
            cluster: None,
            fixed: false,
            version: None,
            backing: None,
        },
        &mut |_, _| {},
    )?;
    Ok(())
}

fn ours(reader: &Path, file: &Path, format: &str, pattern: &Pattern, seconds: f64) -> Result<Rate> {
    let out = Command::new(reader)
        .arg(file)
        .args([
            format,
            &pattern.block.to_string(),
            &pattern.depth.to_string(),
        ])
        .args([&seconds.to_string(), pattern.mode])
        .output()
        .context("cannot run read_rate")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(
        out.status.success(),
        "read_rate: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    let numbers: Vec<f64> = text
        .split_ascii_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    match numbers[..] {
        [operations, _, processor] => Ok(Rate {
            operations,
            processor,
        }),
        _ => bail!("read_rate says {text:?}"),
    }
}

/// `fio` and where its libraries are.
struct Fio {
    program: PathBuf,
    libraries: String,
}

/// The host's `fio`, or that of Debian's package.
fn fio() -> Result<Fio> {
    let here = Command::new("fio").arg("--version").output();
    if here.is_ok_and(|out| out.status.success()) {
        return Ok(Fio {
            program: "fio".into(),
            libraries: String::new(),
        });
    }
    let store = ImageStore::open_default()?;
    let packages = store.packages_with_dependencies(&["fio"], &TerminalProgress::default())?;
    let program = packages
        .iter()
        .map(|package| package.root.join("usr/bin/fio"))
        .find(|path| path.exists())
        .context("the package has no fio")?;
    // The host's own loader and C library stay.
    let folders = packages
        .iter()
        .filter(|package| !package.root.join("lib64").exists())
        .flat_map(|package| LIBRARIES.map(|f| package.root.join(f)))
        .filter(|folder| folder.is_dir())
        .map(|folder| folder.display().to_string());
    Ok(Fio {
        program,
        libraries: folders.collect::<Vec<_>>().join(":"),
    })
}

impl Fio {
    fn rate(&self, file: &Path, pattern: &Pattern, seconds: f64) -> Result<Rate> {
        let mode = if pattern.mode == "random" {
            "randread"
        } else {
            "read"
        };
        let out = Command::new(&self.program)
            .env("LD_LIBRARY_PATH", &self.libraries)
            .args([
                "--name=x",
                "--ioengine=io_uring",
                "--direct=1",
                "--thread",
                "--minimal",
            ])
            .arg(format!("--filename={}", file.display()))
            .arg(format!("--rw={mode}"))
            .arg(format!("--bs={}", pattern.block))
            .arg(format!("--iodepth={}", pattern.depth))
            .args([
                "--time_based",
                &format!("--runtime={}ms", (seconds * 1000.0) as u64),
            ])
            .output()
            .context("cannot run fio")?;
        ensure!(
            out.status.success(),
            "fio: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        // The terse format, version 3: IOPS are field 8; processor time in percent of the run fields 88 and 89.
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let line = text
            .lines()
            .rfind(|line| line.starts_with("3;"))
            .context("fio says nothing")?;
        let fields: Vec<&str> = line.split(';').collect();
        let field = |n: usize| -> Result<f64> {
            let text = fields.get(n - 1).context("a field is missing")?;
            text.trim_end_matches('%')
                .parse()
                .context("a field is no number")
        };
        let operations = field(8)?;
        ensure!(operations > 0.0, "fio did nothing");
        Ok(Rate {
            operations,
            processor: (field(88)? + field(89)?) * 1e4 / operations,
        })
    }
}
