//! Why a network cannot be had.

use std::{io, path::PathBuf};

use crate::Forward;

/// Why a network cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// This host has none.
    #[error("there is no user-mode network on this kind of host yet; use --net none")]
    Unsupported,
    /// The host refused what any network needs.
    #[error("cannot set up the user-mode network: {0}")]
    Setup(#[source] io::Error),
    /// The host's end of a forward.
    #[error("cannot forward {forward}: {source}; choose another port or address on the host")]
    Forward {
        /// Which.
        forward: Forward,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The file for a capture.
    #[error("cannot write the capture \"{path}\": {source}")]
    Capture {
        /// Which.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}
