//! `caisson image`: its commands and flags.

use caisson_config::ImageName;
use clap::{Args, Subcommand};

const EXAMPLES: &str = "\
Examples:
  caisson image pull              fetch the default image now, so that run needs no network
  caisson image ls --json
  caisson image path mini         where its kernel and initramfs are
  caisson image rm mini

Images are kept under $XDG_CACHE_HOME/caisson (~/.cache/caisson). Removing one costs nothing
but the time to fetch it again.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Fetch an image and make it ready to run
    Pull {
        /// The image [default: mini]
        name: Option<ImageName>,
        /// Show no progress
        #[arg(short, long)]
        quiet: bool,
    },
    /// List the images that can be run and which of them are here
    Ls {
        /// Print the list as JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove an image from the cache
    Rm {
        /// The image
        name: ImageName,
    },
    /// Print where the files of an image are
    Path {
        /// The image [default: mini]
        name: Option<ImageName>,
        /// Print the paths as JSON
        #[arg(long)]
        json: bool,
    },
}
