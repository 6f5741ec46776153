//! Which processor the guest sees.

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{HostPath, HostPathError, closest};

/// The processor that the guest sees.
///
/// As text: `host`; a model, `x86-64-v1` to `x86-64-v4` or `v1` to `v4`; or a file that describes
/// one, a path with a slash in it or one that ends in `.toml`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum Cpu {
    /// All that the backend can give on this host.
    #[default]
    Host,
    /// A model that is the same on every host and backend.
    Model(CpuModel),
    /// What a [`CpuFile`](crate::CpuFile) describes.
    File(HostPath),
}

/// The models: the x86-64 psABI's micro-architecture levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the levels' own names")]
pub enum CpuModel {
    V1,
    V2,
    V3,
    V4,
}

/// A text that is no [`Cpu`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CpuError {
    /// Neither a name nor a path.
    #[error("there is no processor \"{typed}\"{}; use host, x86-64-v1 to x86-64-v4, or the path of a TOML file (with a slash in it, or .toml at its end)",
        .suggestion.map(|meant| format!(": did you mean \"{meant}\"?")).unwrap_or_default())]
    Unknown {
        /// What was given.
        typed: String,
        /// The nearest name.
        suggestion: Option<&'static str>,
    },
    /// A path that no file can have.
    #[error(transparent)]
    Path(#[from] HostPathError),
}

/// The name in full, and the others that are taken.
const NAMES: [(&str, CpuModel); 9] = [
    ("x86-64-v1", CpuModel::V1),
    ("x86-64-v2", CpuModel::V2),
    ("x86-64-v3", CpuModel::V3),
    ("x86-64-v4", CpuModel::V4),
    ("v1", CpuModel::V1),
    ("v2", CpuModel::V2),
    ("v3", CpuModel::V3),
    ("v4", CpuModel::V4),
    ("x86-64", CpuModel::V1),
];
const HOST: &str = "host";

impl Cpu {
    /// The file that describes it, if it is one, to be changed.
    pub fn path_mut(&mut self) -> Option<&mut HostPath> {
        match self {
            Self::File(path) => Some(path),
            Self::Host | Self::Model(_) => None,
        }
    }
}

impl CpuModel {
    /// The name in full: `x86-64-v3`.
    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|(_, model)| *model == self)
            .map_or("", |(name, _)| name)
    }

    /// The model that is called `name`, in full or in short.
    pub fn named(name: &str) -> Option<Self> {
        NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, model)| *model)
    }
}

/// The refusal of `typed`, with the nearest name.
pub(crate) fn unknown(typed: &str) -> CpuError {
    let names = NAMES.iter().map(|(name, _)| *name).filter(|n| n.len() > 2);
    CpuError::Unknown {
        typed: typed.into(),
        suggestion: closest(typed, names.chain([HOST])),
    }
}

impl FromStr for Cpu {
    type Err = CpuError;

    fn from_str(text: &str) -> Result<Self, CpuError> {
        if text == HOST {
            return Ok(Self::Host);
        }
        if let Some(model) = CpuModel::named(text) {
            return Ok(Self::Model(model));
        }
        if text.contains('/') || text.ends_with(".toml") {
            return Ok(Self::File(text.parse()?));
        }
        Err(unknown(text))
    }
}

impl TryFrom<String> for Cpu {
    type Error = CpuError;

    fn try_from(text: String) -> Result<Self, CpuError> {
        text.parse()
    }
}

impl From<Cpu> for String {
    fn from(cpu: Cpu) -> Self {
        cpu.to_string()
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str(HOST),
            Self::Model(model) => f.write_str(model.name()),
            Self::File(path) => path.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_models_and_paths() {
        for (text, cpu) in [
            ("host", Cpu::Host),
            ("x86-64-v3", Cpu::Model(CpuModel::V3)),
            ("v3", Cpu::Model(CpuModel::V3)),
            ("x86-64", Cpu::Model(CpuModel::V1)),
            ("my.toml", Cpu::File("my.toml".parse().unwrap())),
            ("./v3", Cpu::File("./v3".parse().unwrap())),
        ] {
            assert_eq!(text.parse(), Ok(cpu.clone()), "{text}");
            assert_eq!(cpu.to_string().parse(), Ok(cpu), "{text}");
        }
        assert_eq!(Cpu::Model(CpuModel::V2).to_string(), "x86-64-v2");
    }

    #[test]
    fn what_is_none_of_them_gets_the_nearest() {
        for (text, meant) in [
            ("hsot", Some("host")),
            ("x86-64-v5", Some("x86-64-v1")),
            ("x86_64_v3", Some("x86-64-v3")),
            ("x86-64v3", Some("x86-64-v3")),
            ("", None),
            ("Haswell", None),
        ] {
            let error = text.parse::<Cpu>().unwrap_err();
            assert!(
                matches!(&error, CpuError::Unknown { suggestion, .. } if *suggestion == meant),
                "{text}: {error}"
            );
        }
    }
}
