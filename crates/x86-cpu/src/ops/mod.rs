//! Handlers of micro-operations.
//!
//! A handler that touches memory exists twice: the fast one probes the TLB
//! inline and has no call in it, so that it compiles to straight code ending in
//! a jump; on a miss it jumps to the slow one, which goes through
//! [`Cpu::begin_read`](crate::state::Cpu::begin_read) and its kin.
//!
//! # Safety
//! Every handler may only be run by [`crate::exec`], with a live `Cpu` whose
//! `env` is set, and a micro-operation inside a block that ends in a terminator.

#![allow(
    clippy::missing_safety_doc,
    reason = "every handler has the one contract stated above"
)]

pub mod access;
pub mod alu;
pub mod atomic;
pub mod bits;
pub mod branch;
pub mod generic;
pub mod io;
pub mod misc;
pub mod moves;
pub mod muldiv;
pub mod native;
pub mod shift;
pub mod string;
