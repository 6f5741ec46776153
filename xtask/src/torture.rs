//! Tortures: long runs of what the tests do shortly.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use caisson_storage::{
    Format,
    torture::{Tally, Torture},
};

/// Which torture.
#[derive(clap::Subcommand)]
pub(crate) enum Target {
    /// Power cuts and failing calls under images that are written to, at every write.
    Disk(Options),
}

/// How long.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The first seed. A failure is repeated by its seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Minutes after which no other seed is begun.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// At most so many seeds.
    #[arg(long)]
    seeds: Option<u64>,
}

/// Error numbers of failing calls: EIO and ENOSPC.
const ERRORS: [i32; 2] = [5, 28];

impl Target {
    pub(crate) fn run(&self) -> Result<()> {
        let Self::Disk(options) = self;
        let end = Instant::now() + Duration::from_secs_f64(options.minutes * 60.0);
        let mut sum = Tally::default();
        let mut seed = options.seed;
        while Instant::now() < end && options.seeds.is_none_or(|n| seed - options.seed < n) {
            for torture in [
                Torture::by_seed(seed),
                Torture::of_blocks(Format::Vhd, seed),
                Torture::of_blocks(Format::Vhdx, seed),
            ] {
                match torture.run() {
                    Ok(tally) => {
                        sum.cuts += tally.cuts;
                        sum.images += tally.images;
                        sum.leaks += tally.leaks;
                    }
                    Err(why) => bail!("seed {seed}: {why}"),
                }
                for errno in ERRORS {
                    if let Err(why) = torture.run_with_faults(errno) {
                        bail!("seed {seed}: {why}");
                    }
                }
            }
            seed += 1;
            if seed.is_multiple_of(10) {
                println!(
                    "{} seeds, {} cuts, {} images",
                    seed - options.seed,
                    sum.cuts,
                    sum.images
                );
            }
        }
        println!(
            "{} seeds, {} cuts, {} images opened, {} leaked clusters in them, nothing lost",
            seed - options.seed,
            sum.cuts,
            sum.images,
            sum.leaks
        );
        Ok(())
    }
}
