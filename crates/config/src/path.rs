//! Paths on the host.

use alloc::string::{String, ToString};
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A path on the host, as UTF-8 text: TOML and JSON can hold no other, and one rule for files
/// and flags is easier to remember than two. Never empty, never with a NUL byte.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPath(String);

/// Why a text cannot be a [`HostPath`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HostPathError {
    /// No characters at all.
    #[error("a path may not be empty; leave the option out instead")]
    Empty,
    /// A NUL byte, which no file name can have.
    #[error("path {0:?} contains a NUL byte, which no file name can have")]
    Nul(String),
}

impl HostPath {
    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path for the standard library.
    #[cfg(feature = "std")]
    pub fn as_path(&self) -> &std::path::Path {
        std::path::Path::new(&self.0)
    }

    /// Takes a relative path as relative to `base`; leaves an absolute one alone.
    #[cfg(feature = "std")]
    pub fn resolve(&mut self, base: &std::path::Path) {
        if self.as_path().is_relative()
            && let Some(joined) = base.join(&self.0).to_str()
        {
            self.0 = joined.to_string();
        }
    }
}

#[cfg(feature = "std")]
impl AsRef<std::path::Path> for HostPath {
    fn as_ref(&self) -> &std::path::Path {
        self.as_path()
    }
}

impl FromStr for HostPath {
    type Err = HostPathError;

    fn from_str(path: &str) -> Result<Self, HostPathError> {
        Self::try_from(path.to_string())
    }
}

impl TryFrom<String> for HostPath {
    type Error = HostPathError;

    fn try_from(path: String) -> Result<Self, HostPathError> {
        if path.is_empty() {
            Err(HostPathError::Empty)
        } else if path.contains('\0') {
            Err(HostPathError::Nul(path))
        } else {
            Ok(Self(path))
        }
    }
}

impl From<HostPath> for String {
    fn from(path: HostPath) -> String {
        path.0
    }
}

impl fmt::Display for HostPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
