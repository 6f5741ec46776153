//! Any bytes as saved state: decoded or refused, and offered to every device.
#![no_main]

use caisson_chipset::testing::DEVICES;
use caisson_device::{
    StateRecord,
    testing::{ManualTime, exercise},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    while let Ok(record) = StateRecord::decode(&mut rest) {
        let mut again = Vec::new();
        record.encode(&mut again);
        assert!(input.windows(again.len()).any(|window| window == again));
    }
    // With a checksum that fits, so that the bodies are reached.
    let Some((chosen, body)) = input.split_first() else {
        return;
    };
    let (_, make) = DEVICES[usize::from(*chosen) % DEVICES.len()];
    let time = ManualTime::new();
    let template = make(&time).save().expect("a new device can be saved");
    let (body, accesses) = body.split_at(body.len() / 2);
    let record =
        StateRecord::new(template.id(), template.version(), body.to_vec()).expect("a short body");
    let mut device = make(&time);
    if device.restore(&record).is_ok() {
        exercise(&mut *device, &time, accesses);
    }
});
