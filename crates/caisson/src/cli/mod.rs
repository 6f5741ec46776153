//! The command line: what can be asked, and the help that teaches it.

mod disk;
mod image;
mod restore;
mod run;

pub(crate) use disk::{DiskArgs, DiskCommand, SnapshotCommand};
pub(crate) use image::{ImageArgs, ImageCommand};
pub(crate) use restore::{GuestTime, RestoreFrom};
pub(crate) use run::RunArgs;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

const EXAMPLES: &str = "\
Examples:
  caisson run                       a shell in a fresh Debian virtual machine
  caisson run -- uname -a           one command in a fresh machine; exits with its status
  seq 9 | caisson run -- sort -r    its input and output are the command's own
  caisson run --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0'
                                    your own kernel
  caisson doctor                    what this host can do, and what to change

Exit codes:
  0  clean shutdown        1  Caisson failed
  2  wrong usage           3  the guest crashed (panic, triple fault)
  With `run -- COMMAND`, the command's own status.";

/// Virtual machines from the terminal.
#[derive(Debug, Parser)]
#[command(name = "caisson", version, after_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Cli {
    /// Log more on standard error: -v what happens, -vv details, -vvv everything. The variable
    /// CAISSON_LOG, if set, says it more finely (such as caisson_machine=debug)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a virtual machine and stay with it until it ends
    Run(Box<RunArgs>),
    /// Fetch, list, remove and locate guest images
    Image(ImageArgs),
    /// Make, check, resize and convert images of disks
    Disk(DiskArgs),
    /// Say what this host can do and what it cannot, each with the remedy
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Print the manual page of caisson or of one of its commands
    Man(ManArgs),
}

const DOCTOR_EXAMPLES: &str = "\
Examples:
  caisson doctor
  caisson doctor --json | jq '.[] | select(.status != \"ok\")'

Exits with 0 if machines can run here, with 1 if not.";

#[derive(Debug, Args)]
#[command(after_help = DOCTOR_EXAMPLES)]
pub(crate) struct DoctorArgs {
    /// Print the findings as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  caisson completions bash > ~/.local/share/bash-completion/completions/caisson
  caisson completions zsh > ~/.zfunc/_caisson     (a folder in your $fpath)
  caisson completions fish > ~/.config/fish/completions/caisson.fish";

#[derive(Debug, Args)]
#[command(after_help = COMPLETIONS_EXAMPLES)]
pub(crate) struct CompletionsArgs {
    /// The shell that will read the script
    pub(crate) shell: Shell,
}

const MAN_EXAMPLES: &str = "\
Examples:
  caisson man run | man -l -
  caisson man > ~/.local/share/man/man1/caisson.1";

#[derive(Debug, Args)]
#[command(after_help = MAN_EXAMPLES)]
pub(crate) struct ManArgs {
    /// The command, such as run or image pull; without it, caisson itself
    pub(crate) command: Vec<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
