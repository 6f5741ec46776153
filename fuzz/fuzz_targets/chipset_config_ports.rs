//! Any accesses to the device "config-ports"; then its state saved and restored.
#![no_main]

use caisson_chipset::testing::make;
use caisson_device::testing::{ManualTime, check_state, exercise};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let time = ManualTime::new();
    let mut device = make("config-ports", &time);
    exercise(&mut *device, &time, input);
    check_state(&*device, &mut *make("config-ports", &time));
});
