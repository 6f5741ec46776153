//! Whatever a guest, its peers and time may do to the user-mode network's router.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| caisson_user_net::testing::exercise_router(input));
