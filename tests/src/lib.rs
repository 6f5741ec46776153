//! Harness for whole-VM tests.

pub mod guests;
