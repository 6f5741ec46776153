//! Any driver of an NVMe controller, in the middle of which it is saved and restored.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| caisson_nvme::testing::exercise(input));
