//! Names of machines and images.

use alloc::string::{String, ToString};
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest name: what a DNS label, and so a guest's host name, may have (RFC 1035 §2.3.4).
const MAX_LEN: usize = 63;

/// Why a text cannot be a name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// No characters at all.
    #[error("a {0} name may not be empty")]
    Empty(&'static str),
    /// Longer than 63 characters.
    #[error("{what} name \"{name}\" has {len} characters; use at most 63")]
    TooLong {
        /// `machine` or `image`.
        what: &'static str,
        /// The name.
        name: String,
        /// Its length.
        len: usize,
    },
    /// A character that is not a letter, digit, `-`, `_` or `.`, or a first one that is no
    /// letter or digit.
    #[error(
        "{what} name \"{name}\" may not contain {bad:?} there; use letters, digits, '-', '_' and '.', and start with a letter or digit"
    )]
    Character {
        /// `machine` or `image`.
        what: &'static str,
        /// The name.
        name: String,
        /// The offending character.
        bad: char,
    },
}

fn check(what: &'static str, name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty(what));
    }
    let bad = name.chars().enumerate().find(|&(index, c)| {
        !(c.is_ascii_alphanumeric() || index > 0 && matches!(c, '-' | '_' | '.'))
    });
    if let Some((_, bad)) = bad {
        return Err(NameError::Character {
            what,
            name: name.to_string(),
            bad,
        });
    }
    if name.len() > MAX_LEN {
        return Err(NameError::TooLong {
            what,
            name: name.to_string(),
            len: name.len(),
        });
    }
    Ok(())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(name: &str) -> Result<Self, NameError> {
                check($what, name)?;
                Ok(Self(name.to_string()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(name: String) -> Result<Self, NameError> {
                check($what, &name)?;
                Ok(Self(name))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// What a machine is called: 1 to 63 letters, digits, `-`, `_` and `.`, the first one a
    /// letter or digit. It becomes the guest's host name and part of host paths, hence the limits.
    MachineName, "machine"
}

name_type! {
    /// The name of a guest image in the cache, with the same rules as a [`MachineName`].
    ImageName, "image"
}

impl Default for MachineName {
    fn default() -> Self {
        Self(crate::defaults::NAME.to_string())
    }
}

impl Default for ImageName {
    fn default() -> Self {
        Self(crate::defaults::IMAGE.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_paths_and_host_names() {
        for good in ["a", "web", "web-2", "Web_2.example", "0", &"x".repeat(63)] {
            assert!(MachineName::from_str(good).is_ok(), "{good}");
        }
        for (bad, message) in [
            ("", "a machine name may not be empty"),
            (
                "../x",
                "machine name \"../x\" may not contain '.' there; use letters, digits, '-', '_' and '.', and start with a letter or digit",
            ),
            (
                "a b",
                "machine name \"a b\" may not contain ' ' there; use letters, digits, '-', '_' and '.', and start with a letter or digit",
            ),
        ] {
            assert_eq!(MachineName::from_str(bad).unwrap_err().to_string(), message);
        }
        let long = "x".repeat(64);
        assert!(
            ImageName::from_str(&long)
                .unwrap_err()
                .to_string()
                .ends_with("has 64 characters; use at most 63")
        );
    }
}
