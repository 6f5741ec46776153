//! Developer tasks: `cargo xtask TASK`.

mod bench;
mod targets;
mod torture;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Developer tasks of Caisson.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measure and compare with the peer found on this machine.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Long runs that look for what only chance finds.
    #[command(subcommand)]
    Torture(torture::Target),
    /// Check the crates that are to build elsewhere: without an operating system, on other hosts.
    CheckTargets {
        /// Only for these targets.
        targets: Vec<String>,
    },
}

fn main() -> Result<()> {
    match Cli::parse().task {
        Task::Bench(bench) => bench.run(),
        Task::Torture(target) => target.run(),
        Task::CheckTargets { targets } => targets::check(&targets),
    }
}
