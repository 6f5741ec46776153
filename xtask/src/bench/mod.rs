//! Benchmarks. Each prints a table with a ratio to a peer on this machine, and says so where there is none.

mod boot;
mod disk;
mod marker;
mod resident;
mod restore;
mod sample;
mod soft;
mod startup;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::Subcommand;

/// Which benchmark.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Debian to its first userland instruction: `caisson` and `qemu-system-x86_64 -accel tcg`, in turn.
    Boot(boot::Options),
    /// The disk engine alone against `fio` with io_uring on the same file, and qcow2 against raw.
    Disk(disk::Options),
    /// Saved machines of 128 MiB and 8 GiB that go on: from exec to the guest's next instructions.
    Restore(restore::Options),
    /// Kernels of code on both tiers of the software CPU, bare-metal, on QEMU's TCG, and on this host's processor.
    Soft(soft::Options),
    /// Start, end, memory and exits of the smallest guests on KVM: `caisson`, and a bare program that does nothing else.
    Startup(startup::Options),
}

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            Self::Boot(options) => boot::run(&options),
            Self::Disk(options) => disk::run(&options),
            Self::Restore(options) => restore::run(&options),
            Self::Soft(options) => soft::run(&options),
            Self::Startup(options) => startup::run(&options),
        }
    }
}

/// Builds the release binary and gives its path.
fn caisson() -> Result<PathBuf> {
    release("caisson", "caisson")
}

/// Builds the binary `name` of `package`, optimised, and gives its path.
fn release(package: &str, name: &str) -> Result<PathBuf> {
    build(&root(), &["--release", "--package", package])?;
    Ok(target().join("release").join(name))
}

/// Builds the guests of `package` and gives the folder they are in.
fn guests(package: &str) -> Result<PathBuf> {
    let target = target().join("guests");
    let folder = target
        .to_str()
        .context("the target folder's name is not text")?;
    build(
        &root().join("guests"),
        &["--target-dir", folder, "--package", package],
    )?;
    Ok(target.join("x86_64-unknown-linux-gnu/debug"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn build(folder: &Path, arguments: &[&str]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet"])
        .args(arguments)
        // The guests' own configuration decides.
        .env_remove("RUSTFLAGS")
        .current_dir(folder)
        .status();
    ensure!(
        status.context("cannot run cargo")?.success(),
        "`cargo build {}` fails",
        arguments.join(" ")
    );
    Ok(())
}
