//! Guest RAM.

use serde::{Deserialize, Serialize};

use crate::options::shorthand;
use crate::{ByteSize, defaults};

/// How much RAM the guest has and what backs it on the host.
///
/// As an option string, the size comes first: `1G`, `1G,hugepages=on`, `512M,shared=off`.
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
    /// Back it with the host's huge pages (2 MiB). The machine does not start if the host has
    /// too few of them reserved.
    #[serde(skip_serializing_if = "is_off")]
    pub hugepages: bool,
    /// Back it with an anonymous file (memfd) that another process could map, rather than with
    /// private memory.
    #[serde(skip_serializing_if = "is_on")]
    pub shared: bool,
}

shorthand!(Memory);

fn is_off(flag: &bool) -> bool {
    !*flag
}

fn is_on(flag: &bool) -> bool {
    *flag
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            size: defaults::MEMORY,
            hugepages: false,
            shared: true,
        }
    }
}
