//! Any accesses to a PCI function's configuration space and MSI-X structures, signals, and moves through saved state.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| caisson_pci::testing::exercise(input));
