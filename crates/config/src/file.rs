//! Reading and writing a description as TOML or JSON.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::string::{String, ToString};

use thiserror::Error;

use crate::MachineConfig;
use crate::suggest::for_serde_message;

/// A description longer than this is not one: nothing reads further than here.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why a description could not be read from a file or text.
#[derive(Debug, Error)]
pub enum FileError {
    /// The file could not be read.
    #[error("cannot read config file \"{}\": {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The file is not a plausible description.
    #[error("cannot read config file \"{}\": {cause}", path.display())]
    NotAConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: &'static str,
    },
    /// The text is not well formed, or has keys or values that do not exist.
    #[error("{0}")]
    Parse(String),
    /// The same, for a file.
    #[error("in config file \"{}\": {message}", path.display())]
    ParseFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the line where the format knows it.
        message: String,
    },
    /// The description cannot be written in this format.
    #[error("cannot write the description: {0}")]
    Write(String),
}

pub(crate) fn explain(message: String, bare: &str) -> String {
    let message = message.trim_end().to_string();
    match for_serde_message(bare) {
        Some(meant) => std::format!("{message}\ndid you mean `{meant}`?"),
        None => message,
    }
}

/// The text of a file that is short enough to be a description.
pub(crate) fn read_text(path: &Path) -> Result<String, FileError> {
    let read = |source| FileError::Read {
        path: path.to_path_buf(),
        source,
    };
    let not_a_config = |cause| FileError::NotAConfig {
        path: path.to_path_buf(),
        cause,
    };
    let mut bytes = std::vec::Vec::new();
    let file = File::open(path).map_err(read)?;
    if file.metadata().map_err(read)?.is_dir() {
        return Err(not_a_config("it is a directory; name a TOML or JSON file"));
    }
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(not_a_config(
            "it is longer than 1 MiB, so it is no machine description; name a TOML or JSON file",
        ));
    }
    String::from_utf8(bytes)
        .map_err(|_| not_a_config("it is not UTF-8 text; name a TOML or JSON file"))
}

impl MachineConfig {
    /// Reads a description from TOML text.
    ///
    /// # Errors
    /// [`FileError::Parse`] shows the line and says what was expected there.
    pub fn from_toml(text: &str) -> Result<Self, FileError> {
        toml::from_str(text)
            .map_err(|error| FileError::Parse(explain(error.to_string(), error.message())))
    }

    /// Writes the description as TOML text, defaults included.
    ///
    /// # Errors
    /// [`FileError::Write`] if TOML cannot hold it.
    pub fn to_toml(&self) -> Result<String, FileError> {
        toml::to_string(self).map_err(|error| FileError::Write(error.to_string()))
    }

    /// Reads a description from JSON text.
    ///
    /// # Errors
    /// [`FileError::Parse`] names the line and says what was expected there.
    pub fn from_json(text: &str) -> Result<Self, FileError> {
        serde_json::from_str(text).map_err(|error| {
            let message = error.to_string();
            FileError::Parse(explain(message.clone(), &message))
        })
    }

    /// Writes the description as JSON text, defaults included.
    ///
    /// # Errors
    /// [`FileError::Write`] if JSON cannot hold it.
    pub fn to_json(&self) -> Result<String, FileError> {
        serde_json::to_string_pretty(self).map_err(|error| FileError::Write(error.to_string()))
    }

    /// Reads a description from a file: JSON if its name ends in `.json`, else TOML. Relative
    /// paths in it are relative to the file's directory.
    ///
    /// # Errors
    /// [`FileError`] names the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        let text = read_text(path)?;
        let json = path
            .extension()
            .is_some_and(|extension| extension == "json");
        let parsed = if json {
            Self::from_json(&text)
        } else {
            Self::from_toml(&text)
        };
        let mut config = parsed.map_err(|error| FileError::ParseFile {
            path: path.to_path_buf(),
            message: error.to_string(),
        })?;
        let base = path.parent().unwrap_or(Path::new(""));
        for path in config.paths_mut() {
            path.resolve(base);
        }
        Ok(config)
    }
}
