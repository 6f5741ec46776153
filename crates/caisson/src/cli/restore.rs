//! `--restore`: what a machine goes on from, and how.

use std::str::FromStr;

use caisson_config::{HostPath, OptionError, options};
use serde::Deserialize;

/// A saved machine: `DIR[,time=continue|jump][,verify=on]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct RestoreFrom {
    /// The folder.
    pub(crate) path: HostPath,
    /// How guest time goes on.
    #[serde(default)]
    pub(crate) time: GuestTime,
    /// Read all memory and compare it with its checksum first.
    #[serde(default)]
    pub(crate) verify: bool,
}

/// How guest time goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum GuestTime {
    /// Where it stood.
    #[default]
    Continue,
    /// As if the machine had run on.
    Jump,
}

impl FromStr for RestoreFrom {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        options::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_comes_first_and_the_rest_has_defaults() {
        let plain: RestoreFrom = "saved".parse().unwrap();
        assert_eq!(plain.path.as_str(), "saved");
        assert_eq!((plain.time, plain.verify), (GuestTime::Continue, false));
        let full: RestoreFrom = "saved,time=jump,verify=on".parse().unwrap();
        assert_eq!((full.time, full.verify), (GuestTime::Jump, true));
        let error = "saved,time=jmp".parse::<RestoreFrom>().unwrap_err();
        assert!(error.to_string().contains("jump"), "{error}");
    }
}
