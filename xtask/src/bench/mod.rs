//! Benchmarks. Each prints a table with a ratio to a peer on this machine, and says so where there is none.

mod boot;
mod marker;
mod resident;
mod sample;
mod soft;

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
    /// Kernels of integer code on the software CPU, bare-metal, and on this host's processor.
    Soft(soft::Options),
}

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            Self::Boot(options) => boot::run(&options),
            Self::Soft(options) => soft::run(&options),
        }
    }
}

/// Builds the release binary and gives its path.
fn caisson() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--package", "caisson"])
        .current_dir(&root)
        .status();
    ensure!(
        status.context("cannot run cargo")?.success(),
        "the release build fails"
    );
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("release/caisson"))
}
