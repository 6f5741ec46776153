//! Guest RAM.

use core::fmt;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::options::shorthand;
use crate::suggest::closest;
use crate::{ByteSize, defaults};

/// How much RAM the guest has and which of the host's pages back it.
///
/// As an option string, the size comes first: `1G`, `1G,hugepages=on`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    rename_all = "kebab-case",
    remote = "Self"
)]
pub struct Memory {
    /// How much: a multiple of 4 KiB, at least [`Limits::MIN_MEMORY`](crate::Limits::MIN_MEMORY).
    pub size: ByteSize,
    /// Which pages back it.
    #[serde(skip_serializing_if = "HugePages::is_default")]
    pub hugepages: HugePages,
}

shorthand!(Memory);

impl Default for Memory {
    fn default() -> Self {
        Self {
            size: defaults::MEMORY,
            hugepages: HugePages::default(),
        }
    }
}

/// Which of the host's pages back guest RAM. In a file, `true` and `false` stand for `on` and
/// `off`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HugePages {
    /// Small pages that the host's kernel may merge into huge ones by itself.
    #[default]
    Auto,
    /// Pages of 2 MiB from the host's reserve. The machine does not start if the reserve is too
    /// small.
    On,
    /// Small pages only.
    Off,
}

impl HugePages {
    const NAMES: [&'static str; 3] = ["auto", "on", "off"];

    fn is_default(&self) -> bool {
        *self == HugePages::default()
    }
}

impl<'de> Deserialize<'de> for HugePages {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = HugePages;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("auto, on or off")
            }
            fn visit_bool<E: de::Error>(self, on: bool) -> Result<HugePages, E> {
                Ok(if on { HugePages::On } else { HugePages::Off })
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<HugePages, E> {
                match text {
                    "auto" => Ok(HugePages::Auto),
                    "on" | "yes" | "true" => Ok(HugePages::On),
                    "off" | "no" | "false" => Ok(HugePages::Off),
                    other => {
                        let hint = closest(other, HugePages::NAMES);
                        let hint = hint.map(|name| alloc::format!(" (did you mean \"{name}\"?)"));
                        Err(E::custom(format_args!(
                            "unknown value \"{other}\"{} for hugepages; known: auto, on, off",
                            hint.as_deref().unwrap_or_default()
                        )))
                    }
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}
