//! Which hypervisor backend runs the vCPUs.

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::options::shorthand;

/// What runs the guest's instructions. More backends will join: match with a wildcard arm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", remote = "Self")]
#[non_exhaustive]
pub enum Accel {
    /// The fastest backend that works on this host.
    #[default]
    Auto,
    /// KVM, through `/dev/kvm`: the host's hardware virtualisation on Linux.
    Kvm,
    /// The software CPU: an x86-64 in user space that needs no privileges and no hardware support.
    Soft,
}

shorthand!(Accel);

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accel::Auto => "auto",
            Accel::Kvm => "kvm",
            Accel::Soft => "soft",
        })
    }
}
