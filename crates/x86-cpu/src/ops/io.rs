//! IN and OUT.

use super::access::{get, set, slow};
use crate::{
    fault::Fault,
    state::{Cpu, reg},
    sys,
    uop::Uop,
};

const RDX: u8 = (reg::RDX * 8) as u8;

unsafe fn port(cpu: &Cpu, u: *const Uop) -> u16 {
    // SAFETY: the handler contract. `src` 1 says that the port is immediate.
    unsafe {
        if (*u).src == 1 {
            (*u).imm as u16
        } else {
            get::<u16>(cpu, RDX) as u16
        }
    }
}

/// IN; `aux` is the size in bytes.
pub unsafe extern "sysv64" fn input(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        slow(cpu, u, |c| {
            let (port, size) = (port(c, u), (*u).aux as usize);
            sys::check_io(c, port, size as u64)?;
            sys::debug::match_port(c, port, size as u64);
            let mut b = [0; 4];
            c.device_read(true, u64::from(port), &mut b[..size])?;
            let v = u64::from(u32::from_le_bytes(b));
            match size {
                1 => set::<u8>(c, 0, v),
                2 => set::<u16>(c, 0, v),
                _ => set::<u32>(c, 0, v),
            }
            Ok(())
        })
    }
}

/// OUT; `aux` is the size in bytes.
pub unsafe extern "sysv64" fn output(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        slow(cpu, u, |c| -> Result<(), Fault> {
            let (port, size) = (port(c, u), (*u).aux as usize);
            sys::check_io(c, port, size as u64)?;
            sys::debug::match_port(c, port, size as u64);
            let b = (c.regs[0] as u32).to_le_bytes();
            c.device_write(true, u64::from(port), &b[..size])
        })
    }
}
