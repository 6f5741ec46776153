//! Any register accesses, posted interrupts and time to a local APIC; its state saved, restored and turned into a
//! register page and back.
#![no_main]

use caisson_lapic::{ApicBus, Config, Effects, Lapic, Message, Pending, Time};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let bus = ApicBus::new(&[0, 1, 0x1_0000]);
    let mut lapic = Lapic::new(Config {
        directed_eoi: input.len() % 2 == 0,
        ..Config::new(0, true)
    });
    let mut now = Time { nanos: 0, tsc: 0 };
    let mut input = input.iter().copied();
    while let Some(operation) = input.next() {
        let mut number = |bytes: usize| -> u64 {
            (0..bytes).fold(0, |value, _| {
                value << 8 | u64::from(input.next().unwrap_or(0))
            })
        };
        let mut effects = Effects::default();
        match operation % 12 {
            0 | 1 => {
                effects = lapic.write_mmio(number(1) << 4, &(number(4) as u32).to_le_bytes(), now);
            }
            2 => {
                let mut data = [0; 8];
                let len = 1 + usize::from(operation >> 5);
                lapic.read_mmio(number(2), &mut data[..len], now);
            }
            3 | 4 => {
                effects = lapic
                    .write_msr(0x800 + number(1) as u32, number(8), now)
                    .unwrap_or_default()
            }
            5 => drop(lapic.read_msr(0x800 + number(1) as u32, now)),
            6 => {
                let base = 0xFEE0_0000 | number(2) << 8;
                effects = lapic.set_apic_base(base, now).unwrap_or_default();
            }
            7 => effects = lapic.set_tsc_deadline(number(8), now),
            8 => {
                if let Some(message) = Message::from_msi(0xFEE0_0000 | number(3), number(4) as u32)
                {
                    bus.deliver(&message, None, |_| {});
                }
            }
            9 => {
                let mailbox = bus.mailbox(0).expect("three mailboxes");
                mailbox.set_lint0(operation & 0x80 != 0);
                mailbox.pulse_lint1();
            }
            10 => {
                let step = number(2) << (number(1) % 48);
                now = Time {
                    nanos: now.nanos.saturating_add(step),
                    tsc: now.tsc.saturating_add(step),
                };
                lapic.advance_timer(now);
            }
            _ => match lapic.pending() {
                Some(Pending::Vector(vector)) => {
                    assert!(vector >= 16);
                    lapic.accept(vector);
                    assert!(
                        lapic
                            .highest_pending()
                            .is_none_or(|next| next >> 4 > vector >> 4)
                    );
                }
                Some(Pending::ExtInt) => lapic.accept_ext_int(),
                None => {}
            },
        }
        if let Some(ipi) = effects.ipi {
            bus.send(0, &ipi, |_| {});
        }
        let _ = lapic.collect(bus.mailbox(0).expect("three mailboxes"));
        bus.publish(0, lapic.identity());
    }
    let mut other = lapic.clone();
    other
        .restore(&lapic.save())
        .expect("what was saved can be restored");
    assert_eq!(other.save(), lapic.save());
    let page = lapic.to_page(now);
    other.load_page(&page, now);
    assert_eq!(other.to_page(now)[..], page[..]);
});
