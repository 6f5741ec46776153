//! Tests of system instructions on the test machine.

mod control;
mod debug;
mod delivery;
mod far;
mod iret;
mod legacy;
mod random;
mod segment;
mod syscall;
mod task;

use crate::{
    fault::{Exception, Fault, vector},
    state::{Segment, seg},
    testenv::{GDT, Machine, STACK, TSS, descriptor, sel},
};

/// The words on top of the present stack, last pushed first.
fn frame<const N: usize>(m: &mut Machine, size: u64) -> [u64; N] {
    let sp = m.cpu.regs[crate::state::reg::RSP] & m.cpu.stack_mask();
    let base = m.cpu.regs[crate::state::reg::SEG_BASE + seg::SS];
    core::array::from_fn(|i| m.read(base + sp + i as u64 * size, size as usize))
}

fn exception(vector: u8, error: Option<u32>) -> Exception {
    Exception {
        vector,
        error,
        payload: 0,
    }
}
