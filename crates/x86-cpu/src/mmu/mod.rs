//! Address translation (Intel SDM Vol. 3 chapter 5): no paging, 32-bit, PAE,
//! 4-level and 5-level paging.
//!
//! A walk reads the guest's tables where they are, sets accessed bits on the
//! way down (a leaf's only when the access is allowed) and the dirty bit for
//! writes, each by a compare-exchange in guest memory. Tables in holes or
//! device space read as all-ones; tables in ROM keep their accessed and dirty
//! bits as they are. Protection keys and shadow stacks are not offered.

mod entry;
mod pdptes;
mod walk;

#[cfg(test)]
mod tests;

pub use pdptes::load_pdptes;

use crate::{
    fault::Fault,
    mem::Privilege,
    state::{Cpu, cr0, cr4, efer},
};

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
    /// Part of a page larger than 4 KiB.
    pub large: bool,
}

/// Error code bits of #PF (Intel SDM Vol. 3 §5.7).
#[allow(missing_docs, reason = "the manual's names")]
pub mod error_code {
    pub const P: u32 = 1;
    pub const W: u32 = 1 << 1;
    pub const U: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const I: u32 = 1 << 4;
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
    if cpu.cr0 & cr0::PG == 0 {
        return Ok(Translation {
            gpa: address & 0xffff_ffff,
            writable: true,
            user: true,
            global: false,
            large: false,
        });
    }
    let address = if cpu.efer & efer::LMA != 0 {
        if !cpu.canonical(address) {
            return Err(Fault::gp(0));
        }
        address
    } else {
        address & 0xffff_ffff
    };
    cpu.stats.walks += 1;
    walk::walk(cpu, address, intent, privilege).inspect_err(|_| {
        // A page fault drops what is cached for its address (Intel SDM Vol. 3
        // §5.10.4.1): an entry that still allows less demanding accesses must
        // not outlive the one that the guest is about to change.
        cpu.tlbs.flush_page(address);
    })
}

/// Whether fetches are told apart in page-fault error codes.
fn reports_fetch(cpu: &Cpu) -> bool {
    cpu.cr4 & cr4::SMEP != 0 || cpu.cr4 & cr4::PAE != 0 && cpu.efer & efer::NXE != 0
}
