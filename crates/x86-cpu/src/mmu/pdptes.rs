//! The four page-directory-pointer-table entries of PAE paging, which the
//! processor loads with CR3 (Intel SDM Vol. 3 §5.4.1).

use super::{entry::Slot, walk::address_mask};
use crate::{fault::Fault, state::Cpu};

/// Reads the PDPTEs that `cr3` points to.
///
/// # Errors
/// #GP(0) when a present one has reserved bits set; nothing has changed then.
pub fn load_pdptes(cpu: &mut Cpu, cr3: u64) -> Result<[u64; 4], Fault> {
    let table = cr3 & 0xffff_ffe0;
    let reserved = !(address_mask(cpu) | 0xe19);
    let mut out = [0; 4];
    for (i, out) in out.iter_mut().enumerate() {
        let value = Slot::find(cpu, table + 8 * i as u64, true).load();
        if value & 1 != 0 && value & reserved != 0 {
            return Err(Fault::gp(0));
        }
        *out = value;
    }
    Ok(out)
}
