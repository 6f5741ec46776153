//! Harness for whole-VM tests.
