//! What can be wrong with an option string.

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt::Display;

use thiserror::Error;

use crate::suggest::closest;

/// Why an option string could not be read (or, for [`Unsupported`](Self::Unsupported), written).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OptionError {
    /// Nothing where an item should be.
    #[error("there is an empty item in \"{0}\"; separate items with single commas")]
    EmptyItem(String),
    /// A quoted value without its closing quote.
    #[error("the quote that opens at {0:?} is never closed")]
    OpenQuote(String),
    /// Text between a closing quote and the next comma.
    #[error("unexpected {0:?} after the closing quote; only a comma may follow it")]
    AfterQuote(String),
    /// A backslash in a quoted value before something else than a quote or a backslash.
    #[error("in a quoted value, \\ stands before \" or another \\ only, not before {0:?}")]
    Escape(String),
    /// An item after the first has no key.
    #[error("\"{0}\" has no key; only the first item may leave it out")]
    NoKey(String),
    /// A key that needs a value has none.
    #[error("\"{0}\" needs a value: write {0}=…")]
    NoValue(String),
    /// A value where there is nothing to set.
    #[error("\"{0}\" takes no value")]
    NoContent(String),
    /// A key or variant that the type does not have.
    #[error("unknown {what} \"{typed}\"{hint}; known: {known}")]
    Unknown {
        /// `key` or `value`.
        what: &'static str,
        /// What was written.
        typed: String,
        /// The nearest known one, as ` (did you mean "…"?)`, or empty.
        hint: String,
        /// Every known one.
        known: String,
    },
    /// A key twice.
    #[error("\"{0}\" is given twice")]
    Twice(String),
    /// A key that must be there is not.
    #[error("\"{0}\" is missing: add {0}=…")]
    Missing(String),
    /// A value of the wrong kind for its key.
    #[error("\"{value}\" is not {expected}")]
    Value {
        /// What was written.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// A type that has no option string.
    #[error("{0} cannot be written as an option string")]
    Unsupported(&'static str),
    /// What a type said about its value.
    #[error("{0}")]
    Custom(String),
}

impl OptionError {
    fn unknown(what: &'static str, typed: &str, known: &'static [&'static str]) -> Self {
        let hint = closest(typed, known.iter().copied())
            .map(|word| format!(" (did you mean \"{word}\"?)"))
            .unwrap_or_default();
        OptionError::Unknown {
            what,
            typed: typed.to_string(),
            hint,
            known: known.join(", "),
        }
    }
}

impl serde::de::Error for OptionError {
    fn custom<T: Display>(message: T) -> Self {
        OptionError::Custom(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        OptionError::unknown("key", field, expected)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        OptionError::unknown("value", variant, expected)
    }

    fn duplicate_field(field: &'static str) -> Self {
        OptionError::Twice(field.to_string())
    }

    fn missing_field(field: &'static str) -> Self {
        OptionError::Missing(field.to_string())
    }
}

impl serde::ser::Error for OptionError {
    fn custom<T: Display>(message: T) -> Self {
        OptionError::Custom(message.to_string())
    }
}
