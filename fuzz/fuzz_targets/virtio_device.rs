//! Any driver of an entropy device, a console, a disk or a network card under either transport, in the middle of which it is saved and restored.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| caisson_virtio::testing::exercise_device(input));
