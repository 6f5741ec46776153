//! `caisson disk`: its commands and flags.

use std::{path::PathBuf, str::FromStr};

use caisson_config::ByteSize;
use caisson_storage::Format;
use clap::{Args, Subcommand};

const EXAMPLES: &str = "\
Examples:
  caisson disk create web.qcow2 20G
  caisson disk create clone.qcow2 --backing web.qcow2 --backing-format qcow2
  caisson disk info web.qcow2 --json
  caisson disk check web.qcow2 --repair
  caisson disk resize web.qcow2 +10G
  caisson disk convert web.qcow2 web.raw
  caisson disk convert old.vmdk new.qcow2
  caisson disk snapshot create web.qcow2 before-upgrade

A format is only taken from a file if its name (.raw, .img, .qcow2, .vhd, .vhdx, .vmdk) and its
content say the same; else say it with --format. An image that a machine uses is locked.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DiskArgs {
    #[command(subcommand)]
    pub(crate) command: DiskCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Make an empty image
    Create {
        /// The new file; there must be nothing of that name
        path: PathBuf,
        /// Size of the disk, as in 20G; may be left out with --backing
        size: Option<ByteSize>,
        /// raw, qcow2, vhd or vhdx [default: what the name says]
        #[arg(long)]
        format: Option<Format>,
        /// Size of a cluster of qcow2, 512B to 2M [default: 64K], or of a block of VHDX, 1M to 256M
        /// [default: 2M]
        #[arg(long, value_name = "SIZE")]
        cluster: Option<ByteSize>,
        /// Have all of the disk in the file from the beginning (VHD and VHDX)
        #[arg(long)]
        fixed: bool,
        /// Show this image where nothing was written yet. A relative path begins at the new file's
        /// folder
        #[arg(long, value_name = "FILE", requires = "backing_format")]
        backing: Option<String>,
        /// The backing image's format
        #[arg(long, value_name = "FORMAT", requires = "backing")]
        backing_format: Option<Format>,
    },
    /// Say what an image is
    Info {
        /// The image
        path: PathBuf,
        /// Its format, where its name and content do not tell
        #[arg(long)]
        format: Option<Format>,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Look for damage in an image's tables; exits with 1 if there is any
    Check {
        /// The image
        path: PathBuf,
        /// Its format, where its name and content do not tell
        #[arg(long)]
        format: Option<Format>,
        /// Put reference counts right and take lost space back
        #[arg(long)]
        repair: bool,
        /// Print the findings as JSON
        #[arg(long)]
        json: bool,
    },
    /// Change the size of a disk
    Resize {
        /// The image
        path: PathBuf,
        /// The new size, as in 30G, or by how much it grows, as in +10G
        size: NewSize,
        /// Its format, where its name and content do not tell
        #[arg(long)]
        format: Option<Format>,
        /// Allow it to become smaller, which destroys what is beyond the new end
        #[arg(long)]
        shrink: bool,
        /// Open the backing files that the image names
        #[arg(long)]
        allow_backing: bool,
    },
    /// Copy a disk into a new image, without the zeroes in it
    Convert {
        /// The image
        from: PathBuf,
        /// The new file; there must be nothing of that name
        to: PathBuf,
        /// The image's format, where its name and content do not tell
        #[arg(long)]
        format: Option<Format>,
        /// The new format [default: what the new name says]
        #[arg(long, value_name = "FORMAT")]
        to_format: Option<Format>,
        /// Size of a cluster of qcow2 [default: 64K] or of a block of VHDX [default: 2M]
        #[arg(long, value_name = "SIZE")]
        cluster: Option<ByteSize>,
        /// Have all of the disk in the new file (VHD and VHDX)
        #[arg(long)]
        fixed: bool,
        /// Open the backing files that the image names
        #[arg(long)]
        allow_backing: bool,
        /// Show no progress
        #[arg(short, long)]
        quiet: bool,
    },
    /// Make, list, remove and go back to snapshots inside of a qcow2 image
    Snapshot {
        #[command(subcommand)]
        command: SnapshotCommand,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// List the snapshots in an image
    Ls {
        /// The image
        path: PathBuf,
        /// Print the list as JSON
        #[arg(long)]
        json: bool,
    },
    /// Keep the disk as it is now
    Create {
        /// The image
        path: PathBuf,
        /// What to call it
        name: String,
    },
    /// Make the disk what it was; what it is now is lost
    Apply {
        /// The image
        path: PathBuf,
        /// The snapshot
        name: String,
    },
    /// Remove a snapshot
    Rm {
        /// The image
        path: PathBuf,
        /// The snapshot
        name: String,
    },
}

/// A size, or a change of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewSize {
    To(ByteSize),
    By(ByteSize),
}

impl FromStr for NewSize {
    type Err = caisson_config::SizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix('+') {
            Some(more) => more.parse().map(Self::By),
            None => text.parse().map(Self::To),
        }
    }
}

impl NewSize {
    /// The new size in bytes of a disk of `old` bytes.
    pub(crate) fn of(self, old: u64) -> Option<u64> {
        match self {
            Self::To(size) => Some(size.bytes()),
            Self::By(more) => old.checked_add(more.bytes()),
        }
    }
}
