//! From the command line to the code that does it.

use std::io::{self, Write};

use clap::CommandFactory;

use crate::cli::{Cli, Command, CompletionsArgs, ManArgs};
use crate::exit::{Exit, UsageError};
use crate::{disk, doctor, image, run};

/// Does what the command line asks.
pub(crate) fn dispatch(cli: Cli) -> anyhow::Result<Exit> {
    match cli.command {
        Command::Run(args) => run::run(&args, cli.verbose),
        Command::Image(args) => image::run(&args),
        Command::Disk(args) => disk::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions(&args),
        Command::Man(args) => man(&args),
    }
}

fn completions(args: &CompletionsArgs) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "caisson", &mut script);
    io::stdout().write_all(&script)?;
    Ok(Exit::Clean)
}

fn man(args: &ManArgs) -> anyhow::Result<Exit> {
    let mut root = Cli::command();
    root.build();
    let mut command = &root;
    for word in &args.command {
        command = command.find_subcommand(word).ok_or_else(|| {
            let known: Vec<&str> = command.get_subcommands().map(|c| c.get_name()).collect();
            let hint = caisson_config::closest(word, known.iter().copied())
                .map(|name| format!(" (did you mean \"{name}\"?)"))
                .unwrap_or_default();
            UsageError(format!(
                "there is no command \"{word}\"{hint} in {}",
                command.get_name()
            ))
        })?;
    }
    let title = command
        .get_display_name()
        .unwrap_or(command.get_name())
        .to_owned();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone())
        .title(title)
        .render(&mut page)?;
    io::stdout().write_all(&page)?;
    Ok(Exit::Clean)
}
