//! Segmentation: limit, type and null checks, far transfers through code
//! segments, call gates and IRET, conforming code, the LDT, the 32-bit task
//! switch, and what long mode changes in each.
//!
//! QEMU TCG 7.2 fails this: it checks no limits on data accesses, knows no
//! debug trap of tasks and loads a null or non-canonical TR and LDTR.
#![no_std]
#![no_main]

mod limits;
mod loads;
mod long_mode;
mod tasks;
mod transfers;

use caisson_guest_rt::guest;
use caisson_guest_rt::legacy::{LegacyContext, sel};
use caisson_guest_rt::memory::write_bytes;
use caisson_guest_rt::paging::Arena;
use caisson_guest_rt::{Group, Suite};

guest!("segments", main);

const CODE_AT: u32 = 0x1_0000;
const DATA_AT: u32 = 0x2_0000;
const STACK_AT: u32 = 0x3_1000;
const NONE: u32 = u32::MAX;
const FREE: u32 = sel::FREE;

fn expect(g: &mut Group, what: &str, c: &mut LegacyContext, vector: u32, error: u32, eip: u32) {
    let got = c.enter();
    let at = c.eip;
    g.check(
        got == (vector, error) && at == eip,
        format_args!("{what}: got vector {:#x} error {:#x} at {at:#x}, want {vector:#x} {error:#x} at {eip:#x}", got.0, got.1),
    );
}

fn ring0(code: &[u8]) -> LegacyContext {
    write_bytes(CODE_AT.into(), code);
    LegacyContext::protected(CODE_AT, STACK_AT)
}

fn ring3(code: &[u8]) -> LegacyContext {
    write_bytes(CODE_AT.into(), code);
    LegacyContext::user(CODE_AT, STACK_AT)
}

fn main(suite: &mut Suite) {
    limits::limits(suite);
    loads::loads(suite);
    transfers::transfers(suite);
    tasks::tasks(suite);
    let a = Arena::new();
    long_mode::long_mode(suite, &a);
}
