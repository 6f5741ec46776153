//! What holds for every device of the chipset alike: no sequence of accesses breaks it, its state survives save and
//! restore, and states that earlier versions saved can still be restored.

use caisson_chipset::testing::{DEVICES, make, uart};
use caisson_device::{
    Device, Inspector, StateRecord,
    testing::{ManualTime, check_state, exercise},
};
use proptest::prelude::*;

/// Accesses that leave each device in a state with something in it; the same since version 1.
const STORY: &[u8] = &[
    0x10, 0, 0x34, 0x11, 0, 0x11, 0x12, 0, 0x99, 0x0E, 20, 0, 9, 0x10, 1, 0x42, 0x11, 1, 0x20,
    0x30, 0, 0xFF, 0x10, 0, 0x21, 0x0E, 26, 0, 3, 0x13, 0, 0x05, 0x00, 0, 0x10, 1, 0x77, 0x12, 1,
    0x01,
];

fn story(device: &mut dyn Device, time: &ManualTime) {
    exercise(device, time, STORY);
}

/// Compares with, or with `CAISSON_WRITE_GOLDEN=1` writes, the golden file of a device.
fn check_golden(name: &str, device: &dyn Device, fresh: &mut dyn Device) {
    let record = device.save().unwrap();
    let mut bytes = vec![];
    record.encode(&mut bytes);
    let path = format!(
        "{}/tests/golden/{name}.v{}",
        env!("CARGO_MANIFEST_DIR"),
        record.version()
    );
    if std::env::var_os("CAISSON_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, &bytes).unwrap();
    }
    let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    assert_eq!(
        golden, bytes,
        "{path}: the format has changed; raise VERSION and keep a migration"
    );
    let golden = StateRecord::decode(&mut &golden[..]).unwrap();
    fresh.restore(&golden).unwrap();
    assert_eq!(fresh.save().unwrap(), record, "{name}");
}

#[test]
fn golden_states_are_written_and_restored_as_ever() {
    for (name, _) in DEVICES {
        let time = ManualTime::new();
        let (mut device, mut fresh) = (make(name, &time), make(name, &time));
        story(&mut *device, &time);
        check_golden(name, &*device, &mut *fresh);
    }
    let time = ManualTime::new();
    let (mut device, output) = uart();
    output.set_full(true);
    device.receive(b"abc");
    story(&mut device, &time);
    check_golden("uart", &device, &mut uart().0);
}

#[test]
fn records_of_one_device_are_refused_by_the_others() {
    let time = ManualTime::new();
    for (from, _) in DEVICES {
        let record = make(from, &time).save().unwrap();
        for (to, _) in DEVICES.iter().filter(|(to, _)| *to != from) {
            assert!(
                make(to, &time).restore(&record).is_err(),
                "{from} into {to}"
            );
        }
    }
}

#[test]
fn everything_can_be_inspected() {
    let time = ManualTime::new();
    for (name, _) in DEVICES {
        let mut inspector = Inspector::new();
        make(name, &time).inspect(&mut inspector);
        assert!(inspector.iter().count() > 0, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_accesses_break_a_device(input in prop::collection::vec(any::<u8>(), 0..600)) {
        for (name, _) in DEVICES {
            let time = ManualTime::new();
            let mut device = make(name, &time);
            exercise(&mut *device, &time, &input);
            check_state(&*device, &mut *make(name, &time));
        }
        let time = ManualTime::new();
        let (mut device, output) = uart();
        output.set_full(input.len() % 2 == 0);
        device.receive(&input);
        exercise(&mut device, &time, &input);
        check_state(&device, &mut uart().0);
    }

    #[test]
    fn no_damaged_body_breaks_a_device(
        input in prop::collection::vec(any::<u8>(), 0..200), place: prop::sample::Index, value: u8,
    ) {
        for (name, _) in DEVICES {
            let time = ManualTime::new();
            let mut device = make(name, &time);
            exercise(&mut *device, &time, &input);
            let record = device.save().unwrap();
            let mut body = record.body().to_vec();
            if !body.is_empty() {
                let index = place.index(body.len());
                body[index] = value;
            }
            let mut bytes = vec![];
            damaged(&record, &body, &mut bytes);
            let damaged = StateRecord::decode(&mut &bytes[..]).unwrap();
            let mut fresh = make(name, &time);
            if fresh.restore(&damaged).is_ok() {
                exercise(&mut *fresh, &time, &input);
            }
        }
    }
}

/// The bytes of `record` with another body, and a checksum that fits.
fn damaged(record: &StateRecord, body: &[u8], out: &mut Vec<u8>) {
    StateRecord::new(record.id(), record.version(), body.to_vec())
        .unwrap()
        .encode(out);
}
