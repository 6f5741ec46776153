//! `caisson run`: one virtual machine, from its description to its end.

mod boot;
mod command;
mod console;
pub(crate) mod debian;
mod disks;
mod nets;
mod plan;
mod saving;
mod stopper;
mod tail;

use std::io::{self, Write};
use std::sync::Arc;

use anyhow::{Context, Result};
use caisson_config::{Accel, MachineConfig, OnReboot};
use caisson_machine::{Machine, MachineSpec, Outcome};

use crate::backend;
use crate::cli::RunArgs;
use crate::exit::Exit;
use crate::terminal::{self, say};
use disks::Disks;
use saving::{SaveTo, Saved};
use stopper::Stopper;

/// Runs a machine until it ends.
pub(crate) fn run(args: &RunArgs, verbose: u8) -> Result<Exit> {
    let counters = args.soft_stats.then(backend::count);
    let exit = run_machine(args, verbose);
    if let Some(counters) = counters {
        say(counters.to_string().trim_end());
    }
    exit
}

fn run_machine(args: &RunArgs, verbose: u8) -> Result<Exit> {
    let (mut config, mut hypervisor) = plan::config(args)?;
    if args.print_config {
        io::stdout().write_all(config.to_toml()?.as_bytes())?;
        return Ok(Exit::Clean);
    }
    let saved = args.restore.as_ref().map(Saved::open).transpose()?;
    if let Some(saved) = &saved
        && config.accel == Accel::Auto
    {
        hypervisor = backend::like(saved.snapshot.backend(), config.soft_tier, hypervisor);
    }
    backend::require_usable(&*hypervisor)?;
    plan::check_files(&config)?;
    plan::check_cpu(&config, &*hypervisor)?;
    if plan::is_debian(&config) {
        let progress = crate::image::progress(args.quiet);
        let image = debian::ensure(config.accel, &*progress)?;
        debian::add_root(&mut config, &image, args.keep.as_ref(), &*progress)?;
    }
    if args.save_on_exit.is_some() {
        plan::check_can_be_saved(&config)?;
    }
    let boot = boot::spec(&config, args.quiet, verbose > 0)?;
    // After the image was fetched: a fetch is ended by signals in the ordinary way, and its helper
    // threads are gone. Before the machine has threads of its own.
    let signals = terminal::block_signals().context("cannot take signals")?;
    hypervisor.warm_up();
    // Their threads must not take the signals either.
    let disks = Disks::open(&config)?;
    let nets = nets::open(&config)?;
    let save = args
        .save_on_exit
        .as_ref()
        .map(|folder| SaveTo::new(folder, &config))
        .transpose()?;
    let stopper = Arc::new(Stopper::new(save, args.quiet));
    if config.command.is_empty() {
        console::run(
            &config,
            args.quiet,
            hypervisor,
            (boot, disks, nets, saved),
            signals,
            &stopper,
        )
    } else {
        // A guest that starts again would have lost the command.
        config.on_reboot = OnReboot::Stop;
        command::run(&config, hypervisor, (boot, disks, nets), signals, &stopper)
    }
}

/// Makes the machine and hands it to those who may stop it. Nothing runs yet.
fn make(spec: MachineSpec, saved: Option<&Saved>, stopper: &Arc<Stopper>) -> Result<Arc<Machine>> {
    let machine = Arc::new(match saved {
        Some(saved) => Machine::restore(spec, &saved.snapshot, saved.elapsed)?,
        None => Machine::new(spec)?,
    });
    stopper.set(&machine);
    Ok(machine)
}

/// Says how a machine ended, where that needs saying, and what to exit with.
fn conclude(config: &MachineConfig, outcome: &Outcome) -> Exit {
    match outcome {
        Outcome::PowerOff | Outcome::Reset | Outcome::Stopped => Exit::Clean,
        // What does not fit an exit status is cut to its low bits, as by the kernel.
        Outcome::DebugExit(value) => Exit::Guest(*value as u8),
        Outcome::Panic(_) | Outcome::TripleFault(_) => {
            say(&format!("machine \"{}\": {outcome}", config.name));
            Exit::GuestCrash
        }
        Outcome::Crash(_) => {
            say(&format!("error: machine \"{}\": {outcome}", config.name));
            Exit::Failed
        }
    }
}
