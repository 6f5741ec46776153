//! A function through its registers, as a guest and its bus see it.

use caisson_device::{AddressRange, Device, Msi, ResetKind, Space, testing::check_state};
use caisson_pci::{
    BarKind, BarSpec, FunctionHandles, FunctionSpec, HostBridge,
    testing::{ECAM, LINE, Sample, VECTORS, exercise},
};
use proptest::prelude::*;

const COMMAND: u64 = 0x04;
const BAR0: u64 = 0x10;
const IO: u64 = 1;
const MEMORY: u64 = 2;
const MASTER: u64 = 4;
const NO_PIN: u64 = 1 << 10;

/// The offset of the capability `id`.
fn capability(sample: &mut Sample, id: u64) -> u64 {
    let mut at = sample.config(0x34, 1);
    while at != 0 {
        if sample.config(at, 1) == id {
            return at;
        }
        at = sample.config(at + 1, 1);
    }
    panic!("no capability {id:#x}");
}

/// Switches MSI-X on with `vector` sending `data`.
fn msix(sample: &mut Sample, vector: u64, data: u32) -> u64 {
    let at = capability(sample, 0x11);
    sample.set_config(at + 2, 2, 0x8000);
    let entry = [0xfee0_0000u64.to_le_bytes(), u64::from(data).to_le_bytes()].concat();
    sample.function.write_msix(1, vector * 16, &entry);
    at
}

#[test]
fn the_header_tells_what_it_is_and_cannot_be_changed() {
    let mut sample = Sample::new();
    for offset in (0..0x40).step_by(4) {
        if offset != 4 {
            sample.set_config(offset, 4, 0xffff_ffff);
        }
    }
    assert_eq!(sample.config(0x00, 4), 0x5678_1234);
    assert_eq!(sample.config(0x08, 4), 0x0108_0209);
    assert_eq!(sample.config(0x0e, 1), 0, "one function, header of type 0");
    assert_eq!(sample.config(0x2c, 4), 0xef01_abcd);
    assert_eq!(sample.config(0x3d, 1), 1, "INTA#");
    assert_eq!(sample.config(0x06, 2) & 0x10, 0x10, "it has capabilities");
    assert_eq!(sample.config(0x100, 4), 0, "no extended capabilities");
}

#[test]
fn sizing_a_register_gives_its_size_at_any_width() {
    for step in [1usize, 2, 4] {
        let mut sample = Sample::new();
        for at in (BAR0..BAR0 + 16).step_by(step) {
            sample.set_config(at, step, u64::MAX);
        }
        assert_eq!(sample.config(BAR0, 4), 0xffe1, "32 ports");
        assert_eq!(sample.config(BAR0 + 4, 4), 0xffff_e000, "8 KiB below 4 GiB");
        assert_eq!(sample.config(BAR0 + 8, 4), 0xfff0_0004, "1 MiB anywhere");
        assert_eq!(sample.config(BAR0 + 12, 4), 0xffff_ffff);
        assert_eq!(sample.config(BAR0 + 16, 4), 0, "no such register");
        assert_eq!(
            sample.claims.changes(),
            0,
            "nothing answers while it is off"
        );
    }
}

#[test]
fn ranges_answer_where_the_guest_puts_them_while_they_are_on() {
    let mut sample = Sample::new();
    sample.set_config(COMMAND, 2, MEMORY);
    let range = |sample: &Sample, region| sample.claims.get(region).map(|claim| claim.range);
    assert_eq!(range(&sample, 1), None);
    assert_eq!(
        range(&sample, 2),
        Some(AddressRange::mmio(0xc000_2000, 8192))
    );
    assert_eq!(
        range(&sample, 3),
        Some(AddressRange::mmio(0xc010_0000, 1 << 20))
    );
    sample.set_config(BAR0 + 12, 4, 0x12);
    assert_eq!(
        range(&sample, 3),
        Some(AddressRange::mmio(0x12_c010_0000, 1 << 20))
    );
    sample.set_config(COMMAND, 2, IO);
    assert_eq!(range(&sample, 1), Some(AddressRange::pio(0x2000, 32)));
    assert_eq!((range(&sample, 2), range(&sample, 3)), (None, None));
    sample.set_config(BAR0, 4, 0xffff_5040);
    assert_eq!(range(&sample, 1), Some(AddressRange::pio(0x5040, 32)));
    let changes = sample.claims.changes();
    sample.set_config(0x3c, 1, 5);
    assert_eq!(
        sample.claims.changes(),
        changes,
        "other registers move nothing"
    );
    sample.reset(ResetKind::System);
    assert_eq!(range(&sample, 1), None);
    assert_eq!(sample.config(BAR0, 4), 0x2001, "as firmware had placed it");
}

#[test]
fn the_pin_follows_the_device_unless_it_is_off_or_replaced() {
    let mut sample = Sample::new();
    sample.function.set_intx(true);
    assert!(sample.lines.level(LINE));
    assert_eq!(sample.config(6, 1) & 8, 8);
    sample.set_config(COMMAND, 2, NO_PIN);
    assert!(!sample.lines.level(LINE));
    assert_eq!(sample.config(6, 1) & 8, 8, "the status bit does not care");
    sample.set_config(COMMAND, 2, 0);
    assert!(sample.lines.level(LINE));
    msix(&mut sample, 0, 0x41);
    assert!(!sample.lines.level(LINE));
    let at = capability(&mut sample, 0x11);
    sample.set_config(at + 2, 2, 0);
    assert!(sample.lines.level(LINE));
    sample.function.set_intx(false);
    assert!(!sample.lines.level(LINE));
}

#[test]
fn masked_msix_messages_stay_pending_until_they_may_go() {
    let mut sample = Sample::new();
    let last = VECTORS - 1;
    let at = msix(&mut sample, u64::from(last), 0x41);
    let message = Msi {
        address: 0xfee0_0000,
        data: 0x41,
    };
    let pending = |sample: &mut Sample| {
        let mut word = [0; 8];
        sample.function.read_msix(1, 4096 + 8, &mut word);
        u64::from_le_bytes(word)
    };
    sample.function.signal(last);
    assert_eq!(sample.msis.take(), [], "it may not write to memory");
    assert_eq!(pending(&mut sample), 2);
    sample.set_config(COMMAND, 2, MASTER);
    assert_eq!(sample.msis.take(), [message]);
    assert_eq!(pending(&mut sample), 0);

    let control = u64::from(last) * 16 + 12;
    sample.function.write_msix(1, control, &[1]);
    sample.function.signal(last);
    sample.function.signal(last);
    assert_eq!((sample.msis.take(), pending(&mut sample)), (vec![], 2));
    sample.function.write_msix(1, 4096, &[0; 16]);
    assert_eq!(pending(&mut sample), 2, "pending bits cannot be written");
    sample.set_config(at + 2, 2, 0xc000);
    sample.function.write_msix(1, control, &[0, 0, 0, 0]);
    assert_eq!(sample.msis.take(), [], "the function's mask holds");
    sample.set_config(at + 2, 2, 0x8000);
    assert_eq!(sample.msis.take(), [message]);
    sample.function.signal(VECTORS);
    sample.function.signal(u16::MAX);
    assert_eq!(sample.msis.take(), [], "there are no such vectors");
}

#[test]
fn msi_has_as_many_messages_as_the_guest_gave_and_masks_them() {
    let mut sample = Sample::new();
    let at = capability(&mut sample, 5);
    assert_eq!(sample.config(at + 2, 2), 0x186, "8 vectors, 64 bits, masks");
    sample.set_config(at + 4, 8, 0xfee0_1003);
    sample.set_config(at + 12, 2, 0x4f);
    // Four vectors, on.
    sample.set_config(at + 2, 2, 0x21);
    sample.set_config(COMMAND, 2, MASTER);
    sample.function.signal(6);
    let message = Msi {
        address: 0xfee0_1000,
        data: 0x4e,
    };
    assert_eq!(sample.msis.take(), [message]);
    sample.set_config(at + 16, 4, 0xffff_ffff);
    assert_eq!(sample.config(at + 16, 4), 0xff);
    sample.function.signal(2);
    assert_eq!((sample.msis.take(), sample.config(at + 20, 4)), (vec![], 4));
    sample.set_config(at + 16, 4, 0);
    assert_eq!(
        (sample.msis.take(), sample.config(at + 20, 4)),
        (vec![message], 0)
    );
    sample.function.set_intx(true);
    assert!(!sample.lines.level(LINE));
}

#[test]
fn state_comes_back_with_ranges_pin_and_pending_messages() {
    let mut sample = Sample::new();
    sample.set_config(COMMAND, 2, MEMORY | IO);
    sample.set_config(BAR0 + 4, 4, 0xd000_0000);
    let at = msix(&mut sample, 65, 0x77);
    sample.function.signal(65);
    sample.function.set_intx(true);
    let mut fresh = Sample::new();
    check_state(&sample, &mut fresh);
    for region in 1..4 {
        assert_eq!(fresh.claims.get(region), sample.claims.get(region));
    }
    fresh.set_config(COMMAND, 2, MASTER);
    assert_eq!(fresh.msis.take().len(), 1);
    fresh.set_config(at + 2, 2, 0);
    assert!(fresh.lines.level(LINE));
}

#[test]
fn impossible_functions_are_refused() {
    let sound = |bars: Vec<BarSpec>, msix| {
        let sample = Sample::new();
        let spec = FunctionSpec {
            place: sample.function.place(),
            identity: caisson_pci::Identity {
                vendor: 1,
                device: 2,
                revision: 0,
                class: 0,
                subsystem_vendor: 0,
                subsystem: 0,
            },
            bars,
            pin: None,
            msi: 0,
            msix,
            capabilities: vec![],
        };
        let handles = FunctionHandles {
            claims: sample.claims.clone(),
            msi: sample.msis.clone(),
            line: None,
        };
        caisson_pci::Function::new(spec, handles).map(drop)
    };
    let bar = |index, size, address| BarSpec {
        index,
        kind: BarKind::Memory64,
        size,
        address,
        label: "x",
    };
    assert!(sound(vec![bar(0, 4096, 0)], None).is_ok());
    for (bars, msix) in [
        (vec![bar(5, 4096, 0)], None),
        (vec![bar(0, 4096, 0), bar(1, 4096, 0)], None),
        (vec![bar(0, 3000, 0)], None),
        (vec![bar(0, 4096, 2048)], None),
        (
            vec![bar(0, 4096, 0)],
            Some(caisson_pci::MsixSpec {
                vectors: 256,
                bar: 0,
                table: 0,
                pending: 2048,
            }),
        ),
    ] {
        let error = sound(bars, msix).unwrap_err();
        assert!(error.to_string().starts_with("PCI function 00:03.0"));
    }
}

#[test]
fn the_host_bridge_is_found_and_changes_nothing() {
    let mut bridge = HostBridge::new(ECAM).unwrap();
    bridge.reset(ResetKind::PowerOn);
    let read = |bridge: &mut HostBridge, offset| {
        caisson_device::testing::read(bridge, Space::Mmio, ECAM + offset, 4)
    };
    assert_eq!(read(&mut bridge, 0), 0x0008_1b36);
    assert_eq!(read(&mut bridge, 8) >> 16, 0x0600);
    caisson_device::testing::write(&mut bridge, Space::Mmio, ECAM + 4, 4, u64::MAX);
    assert_eq!(read(&mut bridge, 4), 0x0544, "bus master, errors, no pin");
    check_state(&bridge, &mut HostBridge::new(ECAM).unwrap());
}

/// What a record of version 1 is, byte for byte: it must be read for ever.
#[test]
fn a_record_of_version_1_restores() {
    let mut sample = Sample::new();
    sample.set_config(COMMAND, 2, MEMORY | MASTER);
    sample.set_config(BAR0 + 8, 4, 0xd000_0000);
    let state = sample.function.state();
    let mut bytes = Vec::new();
    Device::save(&sample).unwrap().encode(&mut bytes);
    // The parts whose place the format fixes: the length of configuration space, and its first bytes.
    let body = Device::save(&sample).unwrap().body().to_vec();
    assert_eq!(body[..2], [0x80, 0x02]);
    assert_eq!(body[2..6], [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(body[2 + 0x18..2 + 0x1c], [4, 0, 0, 0xd0]);
    assert_eq!(
        body[2 + 256..2 + 258],
        [0xa0, 0x08],
        "66 entries of 16 bytes"
    );
    assert_eq!(body.len(), 2 + 256 + 2 + 66 * 16 + 1 + 2 + 1 + 1);
    let mut fresh = Sample::new();
    fresh.function.restore(&state).unwrap();
    assert_eq!(fresh.function.state(), state);
}

proptest! {
    #[test]
    fn whatever_a_guest_writes_the_invariants_hold(input in prop::collection::vec(any::<u8>(), 0..600)) {
        exercise(&input);
    }
}
