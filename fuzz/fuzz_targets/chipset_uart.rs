//! Any accesses to a serial port with input waiting and an output that is full at first; then its state saved and
//! restored.
#![no_main]

use caisson_chipset::testing::uart;
use caisson_device::testing::{ManualTime, check_state, exercise};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let time = ManualTime::new();
    let (mut device, output) = uart();
    output.set_full(true);
    let (before, after) = input.split_at(input.len() / 2);
    exercise(&mut device, &time, before);
    device.receive(before);
    output.set_full(false);
    device.output_ready();
    exercise(&mut device, &time, after);
    check_state(&device, &mut uart().0);
});
