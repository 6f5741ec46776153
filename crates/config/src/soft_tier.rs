//! How far the software CPU goes.

use alloc::string::{String, ToString};
use core::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The most that the software CPU does with guest code: a number, as more may come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
#[non_exhaustive]
pub enum SoftTier {
    /// 0: it is decoded and interpreted.
    #[default]
    Interpreted,
    /// 1: what runs often is translated to native code.
    Native,
}

impl From<SoftTier> for u8 {
    fn from(tier: SoftTier) -> u8 {
        match tier {
            SoftTier::Interpreted => 0,
            SoftTier::Native => 1,
        }
    }
}

impl TryFrom<u8> for SoftTier {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        match number {
            0 => Ok(Self::Interpreted),
            1 => Ok(Self::Native),
            _ => Err(unknown(&number)),
        }
    }
}

impl FromStr for SoftTier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number: u8 = text.parse().map_err(|_| unknown(&text))?;
        number.try_into()
    }
}

impl fmt::Display for SoftTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        u8::from(*self).fmt(f)
    }
}

fn unknown(what: &dyn fmt::Display) -> String {
    [
        "the software CPU has no tier ",
        &what.to_string(),
        "; known: 0, 1",
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_are_their_numbers() {
        for tier in [SoftTier::Interpreted, SoftTier::Native] {
            assert_eq!(tier.to_string().parse(), Ok(tier));
        }
        for wrong in ["2", "-1", "native", ""] {
            let error = wrong.parse::<SoftTier>().unwrap_err();
            assert!(error.contains("known: 0, 1"), "{error}");
        }
    }
}
