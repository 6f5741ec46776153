//! Why a disk cannot be used.

use std::{io, path::PathBuf};

/// Why an image could not be opened, made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The host does not open the file.
    #[error("cannot open \"{}\": {source}; check the path and its permissions", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// It is a folder, a socket or the like.
    #[error("\"{}\" is neither a file nor a block device", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else uses it.
    #[error("\"{}\" is in use by {holder}; {}", path.display(), lock_remedy(*write))]
    Locked {
        /// The file.
        path: PathBuf,
        /// Whether we wanted to write.
        write: bool,
        /// Who has it.
        holder: String,
    },
    /// The format has to be said.
    #[error("cannot tell the format of \"{}\": {why}; say it with format=", path.display())]
    Ambiguous {
        /// The file.
        path: PathBuf,
        /// What speaks against guessing.
        why: String,
    },
    /// The image is not of the format, is damaged, or has something that is not supported.
    #[error("cannot use \"{}\" as {format}: {why}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format's name.
        format: &'static str,
        /// The reason, with a way out where there is one.
        why: String,
    },
    /// A backing file is not allowed or not found.
    #[error("cannot use the backing file \"{backing}\" of \"{}\": {why}", path.display())]
    Backing {
        /// The image that names it.
        path: PathBuf,
        /// The name in the image.
        backing: String,
        /// The reason and the way out.
        why: String,
    },
    /// Reading or writing failed on the way.
    #[error("\"{}\": {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
}

fn lock_remedy(write: bool) -> &'static str {
    if write {
        "stop that first, or use a throw-away layer (,ephemeral) or a copy"
    } else {
        "stop that first, or use a copy"
    }
}

/// The error of an image whose own tables are damaged.
pub(crate) fn corrupt(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}
