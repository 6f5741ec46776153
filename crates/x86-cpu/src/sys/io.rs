//! The right to use I/O ports (Intel SDM Vol. 1 §19.5).

use crate::{
    fault::Fault,
    mem::Privilege,
    state::{Cpu, seg},
};

/// Offset of the I/O map base address in a 32-bit or 64-bit TSS.
const MAP_BASE: u64 = 0x66;

/// Whether `size` (1, 2, 4) bytes at `port` may be accessed: by privilege level,
/// or else by the permission bitmap of the TSS.
///
/// # Errors
/// #GP(0); page faults on the TSS.
pub fn check_io(cpu: &mut Cpu, port: u16, size: u64) -> Result<(), Fault> {
    if !cpu.is_protected() || !cpu.is_v86() && cpu.cpl <= cpu.iopl() {
        return Ok(());
    }
    let tr = cpu.segments[seg::TR];
    let limit = u64::from(tr.limit);
    if tr.unusable || tr.kind() & 8 == 0 || limit < MAP_BASE + 1 {
        return Err(Fault::gp(0));
    }
    let at = cpu.wrap_linear(tr.base.wrapping_add(MAP_BASE));
    let map = cpu.read_uint(at, 2, Privilege::Supervisor)?;
    let offset = map + u64::from(port >> 3);
    // Two bytes are always read: a port range can span both.
    if offset + 1 > limit {
        return Err(Fault::gp(0));
    }
    let at = cpu.wrap_linear(tr.base.wrapping_add(offset));
    let bits = cpu.read_uint(at, 2, Privilege::Supervisor)? >> (port & 7);
    if bits & ((1 << size) - 1) != 0 {
        return Err(Fault::gp(0));
    }
    Ok(())
}
