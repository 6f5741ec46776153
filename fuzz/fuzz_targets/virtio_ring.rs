//! Any contents of a ring of either format, while buffers are taken from it and given back.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| caisson_virtio::testing::exercise_ring(input));
