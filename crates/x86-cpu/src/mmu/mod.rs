//! Address translation.

use crate::{fault::Fault, mem::Privilege, state::Cpu};

/// What an access wants of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intent {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// A successful translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// Guest physical address.
    pub gpa: u64,
    /// Later writes with the same privilege need no walk: the mapping allows
    /// them and its dirty bit is set.
    pub writable: bool,
    /// A user page.
    pub user: bool,
    /// A global translation.
    pub global: bool,
}

/// Translates linear `address`, setting accessed and dirty bits.
///
/// # Errors
/// #PF with its error code; #GP for addresses that are not canonical.
pub fn translate(
    cpu: &mut Cpu,
    address: u64,
    intent: Intent,
    privilege: Privilege,
) -> Result<Translation, Fault> {
    let _ = (cpu, intent, privilege);
    Ok(Translation {
        gpa: address,
        writable: true,
        user: true,
        global: false,
    })
}
