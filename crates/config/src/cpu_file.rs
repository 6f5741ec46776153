//! A processor that a file describes.

use std::path::Path;
use std::string::{String, ToString};
use std::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::cpu::unknown;
use crate::file::{FileError, explain, read_text};
use crate::{CpuError, CpuModel};

/// A processor as its owner describes it: a base, and what is different.
///
/// That features exist, and find the ones that they need, is for the machine to say, which knows
/// them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CpuFile {
    /// What it starts from: `host`, or a model.
    pub base: CpuBase,
    /// Features that it has besides, as in `/proc/cpuinfo`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<String>,
    /// Features of the base that it does not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
    /// Whose it says it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<CpuVendor>,
    /// The brand string.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub brand: Option<String>,
    /// Family: 0 to 270.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<u16>,
    /// Model number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<u8>,
    /// Stepping: 0 to 15.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stepping: Option<u8>,
    /// Bits of a physical address: 36 to 52.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address_bits: Option<u8>,
}

/// What a described processor starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum CpuBase {
    /// All that the backend can give on this host.
    Host,
    /// A model.
    Model(CpuModel),
}

/// The vendors whose processors there are, by the names that CPUID gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the vendors' own names")]
pub enum CpuVendor {
    GenuineIntel,
    AuthenticAMD,
}

impl TryFrom<String> for CpuBase {
    type Error = CpuError;

    fn try_from(text: String) -> Result<Self, CpuError> {
        match CpuModel::named(&text) {
            Some(model) => Ok(Self::Model(model)),
            None if text == "host" => Ok(Self::Host),
            None => Err(unknown(&text)),
        }
    }
}

impl From<CpuBase> for String {
    fn from(base: CpuBase) -> Self {
        match base {
            CpuBase::Host => "host".into(),
            CpuBase::Model(model) => model.name().into(),
        }
    }
}

impl CpuFile {
    /// Reads it from TOML text.
    ///
    /// # Errors
    /// [`FileError::Parse`] shows the line and says what was expected there.
    pub fn from_toml(text: &str) -> Result<Self, FileError> {
        toml::from_str(text)
            .map_err(|error| FileError::Parse(explain(error.to_string(), error.message())))
    }

    /// Reads it from a TOML file.
    ///
    /// # Errors
    /// [`FileError`] names the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        Self::from_toml(&read_text(path)?).map_err(|error| FileError::ParseFile {
            path: path.to_path_buf(),
            message: error.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_say_what_is_different() {
        let file = CpuFile::from_toml(
            "base = \"v3\"\nadd = [\"sha_ni\"]\nremove = [\"avx2\"]\nvendor = \"AuthenticAMD\"\n\
             brand = \"b\"\nfamily = 25\nmodel = 1\nstepping = 2\naddress-bits = 40\n",
        )
        .unwrap();
        assert_eq!(file.base, CpuBase::Model(CpuModel::V3));
        assert_eq!(file.add, ["sha_ni"]);
        assert_eq!(file.vendor, Some(CpuVendor::AuthenticAMD));
        assert_eq!((file.family, file.address_bits), (Some(25), Some(40)));
        let written = toml::to_string(&file).unwrap();
        assert_eq!(CpuFile::from_toml(&written).unwrap(), file, "{written}");
        let least = CpuFile::from_toml("base = \"host\"").unwrap();
        assert_eq!((least.base, least.brand), (CpuBase::Host, None));
    }

    #[test]
    fn mistakes_get_the_nearest_and_the_line() {
        for (text, part) in [
            ("add = []", "missing field `base`"),
            ("base = \"x86-64-v5\"", "did you mean \"x86-64-v1\"?"),
            ("base = \"my.toml\"", "there is no processor"),
            ("base = \"v2\"\nad = []", "did you mean `add`?"),
            (
                "base = \"v2\"\nvendor = \"GenuineIntle\"",
                "did you mean `GenuineIntel`?",
            ),
            ("base = \"v2\"\nmodel = 256", "line 2"),
        ] {
            let message = CpuFile::from_toml(text).unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
        let missing = CpuFile::load(Path::new("/nonexistent/cpu.toml")).unwrap_err();
        assert!(
            missing.to_string().contains("/nonexistent/cpu.toml"),
            "{missing}"
        );
    }
}
