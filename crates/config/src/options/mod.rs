//! Option strings: `1G,hugepages=on`, `file=console.log,append=on`.
//!
//! An option string is one value of a serde type written on one line, for a command-line flag
//! and for short entries in a file. The type's derive is its grammar:
//!
//! - A struct is a list of `key=value` items with commas between them, in any order. The first
//!   item may leave out its key and then sets the struct's first field.
//! - An enum starts with the name of the variant: alone for a variant without content, else
//!   `variant=…` followed by the content's own option string.
//! - A boolean is `on` or `off` (also `true`/`false`, `yes`/`no`); its key alone means `on`.
//! - A number is decimal, or hexadecimal after `0x`.
//! - A value that contains a comma or an equals sign, begins with a double quote, or is empty,
//!   is put in double quotes. Inside them `\"` stands for a quote and `\\` for a backslash.
//!   Outside them a backslash is an ordinary character, and nothing is trimmed.
//!
//! A key that the type does not have is refused with the nearest one that it has.

mod de;
mod error;
mod lex;
mod ser;

pub use error::OptionError;

use alloc::string::String;
use core::fmt;
use core::marker::PhantomData;

use serde::de::DeserializeOwned;
use serde::{Deserializer, Serialize};

/// Reads a value from its option string.
///
/// # Errors
/// [`OptionError`] says which item is wrong and what would be right.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, OptionError> {
    T::deserialize(de::Text::new(text))
}

/// Writes a value as an option string that [`from_str`] reads back.
///
/// # Errors
/// [`OptionError::Unsupported`] for types that have no option string: maps, sequences, floats.
pub fn to_string<T: Serialize + ?Sized>(value: &T) -> Result<String, OptionError> {
    ser::to_string(value)
}

/// Reads a value from a file format, where it may be written in full or as an option string.
///
/// `structured` is the derive of the type; it sees either the format's own map or the items of
/// the option string.
pub(crate) fn string_or<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Shorthand<'de>,
{
    deserializer.deserialize_any(StringOr(PhantomData))
}

/// A type that can be written as an option string wherever it occurs in a file.
pub(crate) trait Shorthand<'de>: Sized {
    /// The derived reader of the type.
    fn structured<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error>;
}

struct StringOr<T>(PhantomData<T>);

impl<'de, T: Shorthand<'de>> serde::de::Visitor<'de> for StringOr<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table, or an option string such as \"key=value,key=value\"")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        T::structured(de::Text::new(text)).map_err(E::custom)
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::structured(serde::de::value::MapAccessDeserializer::new(map))
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&alloc::format!("{number}"))
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&alloc::format!("{number}"))
    }
}

/// Makes a type that derives `Serialize` and `Deserialize` with `remote = "Self"` readable from
/// an option string everywhere, and printable as one.
macro_rules! shorthand {
    ($type:ty) => {
        impl<'de> $crate::options::Shorthand<'de> for $type {
            fn structured<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                // The derive's inherent function, not the trait's.
                <$type>::deserialize(deserializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::options::string_or(deserializer)
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                // The derive's inherent function, not the trait's.
                <$type>::serialize(self, serializer)
            }
        }

        impl core::str::FromStr for $type {
            type Err = $crate::OptionError;

            fn from_str(text: &str) -> Result<Self, $crate::OptionError> {
                $crate::options::from_str(text)
            }
        }
    };
}
pub(crate) use shorthand;
