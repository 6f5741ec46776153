//! The `caisson` command.

mod backend;
mod cli;
mod commands;
mod disk;
mod doctor;
mod exit;
mod host;
mod image;
mod logging;
mod run;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    logging::start(cli.verbose);
    match commands::dispatch(cli) {
        Ok(code) => code.into(),
        Err(error) => exit::report(&error).into(),
    }
}
