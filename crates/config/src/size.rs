//! Sizes in bytes, written with a unit.

use alloc::string::{String, ToString};
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

/// A number of bytes, read from and written as text with a unit: `512M`, `1.5G`, `4096B`.
///
/// Units are powers of 1024: `B`, `K`, `M`, `G`, `T` (also `KiB`, `MiB`, `GiB`, `TiB`), in
/// either case. A bare number is refused: it means bytes to some programs and MiB to others.
/// `KB`, `MB` and so on are refused for the same reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

/// Why a text is not a [`ByteSize`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SizeError {
    /// No digits where the number should be.
    #[error("\"{0}\" is not a size; write a number and a unit, as in 512M or 2G")]
    NotANumber(String),
    /// A number without its unit.
    #[error("size \"{0}\" has no unit; write {0}M for MiB, {0}G for GiB or {0}B for bytes")]
    NoUnit(String),
    /// A unit that is not known, or that is decimal to some and binary to others.
    #[error("size \"{text}\" has the unit \"{unit}\"; use K, M, G or T (powers of 1024), or B")]
    Unit {
        /// The whole text.
        text: String,
        /// What stands where the unit should.
        unit: String,
    },
    /// A fraction that does not come out as whole bytes.
    #[error("size \"{0}\" is not a whole number of bytes; use a smaller unit")]
    Fraction(String),
    /// More than 2^64 - 1 bytes.
    #[error("size \"{0}\" is too large to be addressed; give less than 16777216T")]
    TooLarge(String),
}

impl ByteSize {
    /// `bytes` bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// `mib` MiB; saturates.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

const UNITS: [(u32, char); 4] = [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')];

impl fmt::Display for ByteSize {
    /// Writes the largest unit that leaves a whole number, so that reading it back is exact.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 != 0 {
            for (shift, unit) in UNITS {
                if self.0.trailing_zeros() >= shift {
                    return write!(f, "{}{unit}", self.0 >> shift);
                }
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits_end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits_end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.contains('.') || number.ends_with('.') {
            return Err(SizeError::NotANumber(text.to_string()));
        }
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" => return Err(SizeError::NoUnit(text.to_string())),
            "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => {
                return Err(SizeError::Unit {
                    text: text.to_string(),
                    unit: unit.to_string(),
                });
            }
        };
        let too_large = || SizeError::TooLarge(text.to_string());
        let whole: u64 = whole.parse().map_err(|_| too_large())?;
        let mut bytes = u128::from(whole) << shift;
        if !fraction.is_empty() {
            // 18 digits keep the product below within u128 for the largest unit.
            let fraction = fraction.trim_end_matches('0');
            if fraction.len() > 18 {
                return Err(SizeError::Fraction(text.to_string()));
            }
            let scale = 10u128.pow(fraction.len() as u32);
            let part: u128 = if fraction.is_empty() {
                0
            } else {
                fraction.parse().map_err(|_| too_large())?
            };
            let scaled = part << shift;
            if !scaled.is_multiple_of(scale) {
                return Err(SizeError::Fraction(text.to_string()));
            }
            bytes += scaled / scale;
        }
        u64::try_from(bytes).map(Self).map_err(|_| too_large())
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size with a unit, such as \"512M\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<ByteSize, E> {
                Err(E::custom(SizeError::NoUnit(number.to_string())))
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<ByteSize, E> {
                Err(E::custom(SizeError::NoUnit(number.to_string())))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024() {
        for (text, bytes) in [
            ("0B", 0),
            ("1b", 1),
            ("4k", 4096),
            ("1KiB", 1024),
            ("512M", 512 << 20),
            ("1.5G", 3 << 29),
            ("0.5K", 512),
            ("1.50MiB", 3 << 19),
            ("2T", 2 << 40),
            ("18446744073709551615B", u64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_says_how_to_write_one() {
        for (text, message) in [
            (
                "",
                "\"\" is not a size; write a number and a unit, as in 512M or 2G",
            ),
            (
                "big",
                "\"big\" is not a size; write a number and a unit, as in 512M or 2G",
            ),
            (
                "-1G",
                "\"-1G\" is not a size; write a number and a unit, as in 512M or 2G",
            ),
            (
                "1.G",
                "\"1.G\" is not a size; write a number and a unit, as in 512M or 2G",
            ),
            (
                "1.2.3G",
                "\"1.2.3G\" is not a size; write a number and a unit, as in 512M or 2G",
            ),
            (
                "512",
                "size \"512\" has no unit; write 512M for MiB, 512G for GiB or 512B for bytes",
            ),
            (
                "1GB",
                "size \"1GB\" has the unit \"GB\"; use K, M, G or T (powers of 1024), or B",
            ),
            (
                "0.3K",
                "size \"0.3K\" is not a whole number of bytes; use a smaller unit",
            ),
            (
                "16777216T",
                "size \"16777216T\" is too large to be addressed; give less than 16777216T",
            ),
            (
                "99999999999999999999G",
                "size \"99999999999999999999G\" is too large to be addressed; give less than 16777216T",
            ),
        ] {
            assert_eq!(ByteSize::from_str(text).unwrap_err().to_string(), message);
        }
    }
}
