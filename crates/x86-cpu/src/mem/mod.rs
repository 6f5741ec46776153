//! Guest memory as instructions reach it: linear addresses.
//!
//! Hot handlers probe the TLB inline ([`fast`]). Everything else comes here: a
//! slow access is *begun*, which yields a host pointer to operate on (guest
//! memory itself, or the bounce buffer for device registers and page-crossing
//! operands), and *ended*, which carries a bounced store to where it belongs.

pub mod ea;
pub mod fast;
mod linear;
mod slow;

pub use ea::{address_mask, gpr_offset, segment_number};
pub use linear::Privilege;
pub use slow::{MAX_OPERAND, Mmio, PendingAccess, Replay};
