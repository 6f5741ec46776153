//! Harness for whole-VM tests.

pub mod debian;
pub mod guests;
pub mod process;
pub mod vm;
