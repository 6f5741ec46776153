//! The device by which a test kernel ends its machine with a status.

use serde::{Deserialize, Serialize};

use crate::defaults;
use crate::options::shorthand;

/// An I/O port whose writes end the machine: writing `v` makes `caisson` exit with
/// `(v << 1) | 1`, the convention of the `isa-debug-exit` device that test kernels know.
///
/// As an option string, the port comes first: `0xf4`, `port=0x501`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    rename_all = "kebab-case",
    remote = "Self"
)]
pub struct DebugExit {
    /// The I/O port, four bytes wide.
    pub port: u16,
}

shorthand!(DebugExit);

impl Default for DebugExit {
    fn default() -> Self {
        Self {
            port: defaults::DEBUG_EXIT_PORT,
        }
    }
}
