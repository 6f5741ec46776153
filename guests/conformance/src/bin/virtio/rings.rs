//! Rings, interrupts and faults.

use crate::device::{
    Device, EVENT_IDX, INDIRECT, NEEDS_RESET, NO_VECTOR, PACKED, RING_RESET, SIZE, VERSION_1,
};
use crate::pci::{PAGE, bar, capability};
use caisson_guest_rt::interrupt::{self, Frame};
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::{Group, Suite, apic, ioapic, tsc};
use core::sync::atomic::{AtomicUsize, Ordering};

/// Interrupt vectors of the processor: by message, and by the pin.
const MESSAGE: u8 = 0x51;
const PIN: u8 = 0x52;
/// Microseconds to wait for a device on a busy host.
const PATIENCE: u64 = 20_000_000;
/// Microseconds in which nothing is to happen.
const QUIET: u64 = 2_000;
const WRITE: u16 = 2;
const NEXT: u16 = 1;
const TABLE: u16 = 4;
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;

fn on_message(_: &mut Frame) {
    apic::eoi();
}

/// How often the device gave a cause when the pin interrupted. A level may interrupt
/// once more than there is a cause (a processor that hears of the message again while
/// the line is still high), and whoever shares a line has to cope with that.
static CAUSES: AtomicUsize = AtomicUsize::new(0);

/// Acknowledges at the device, so that the line falls before the I/O APIC hears the end.
fn on_pin(_: &mut Frame) {
    let isr = capability(9, Some(3)).map(|at| bar(0) + u64::from(read::<u32>(at + 8)));
    if let Some(isr) = isr {
        CAUSES.fetch_add(usize::from(read::<u8>(isr) & 1), Ordering::SeqCst);
    }
    apic::eoi();
}

pub fn run(suite: &mut Suite) {
    interrupt::set_handler(MESSAGE, on_message);
    interrupt::set_handler(PIN, on_pin);
    suite.group("split ring", split);
    suite.group("split ring with events", events);
    suite.group("packed ring", packed);
    suite.group("messages", messages);
    suite.group("the pin", pin);
    suite.group("reset of a queue", queue_reset);
    suite.group("broken rings", broken);
}

fn wait(done: impl FnMut() -> bool) -> bool {
    tsc::wait_until(PATIENCE, done)
}

/// Offers one buffer of 16 bytes as the `count`-th and waits for it.
fn one(g: &mut Group, device: &Device, count: u16) {
    let slot = (count - 1) % SIZE;
    let gpa = device.buffers + 16 * u64::from(slot);
    device.descriptor(device.descriptors, slot, gpa, 16, [WRITE, 0]);
    device.offer(slot, count);
    g.that("a buffer comes back", wait(|| device.used() == count));
    let (id, len) = device.used_element(count);
    g.eq("its ID", id, slot.into());
    g.eq("its length", len, 16);
}

fn split(g: &mut Group) {
    let device = Device::set_up(VERSION_1 | INDIRECT, NO_VECTOR);
    g.eq("status", device.status(), 15);
    for count in 1..=3 * SIZE {
        one(g, &device, count);
    }
    let words = |at: u64| read::<u64>(at);
    let first = words(device.buffers);
    g.that(
        "it is not all the same",
        (1..8).any(|n| words(device.buffers + 8 * n) != first),
    );
    // A chain, and a table of three through one descriptor.
    let count = 3 * SIZE + 1;
    device.descriptor(device.descriptors, 5, device.buffers, 7, [WRITE | NEXT, 2]);
    device.descriptor(device.descriptors, 2, device.buffers + 64, 9, [WRITE, 0]);
    device.offer(5, count);
    g.that("a chain comes back", wait(|| device.used() == count));
    g.that("as one", device.used_element(count) == (5, 16));
    let table = device.buffers + 0x800;
    for n in 0..3u16 {
        let flags = if n < 2 { WRITE | NEXT } else { WRITE };
        device.descriptor(table, n, device.buffers + 128, 5, [flags, n + 1]);
    }
    device.descriptor(device.descriptors, 7, table, 48, [TABLE, 0]);
    device.offer(7, count + 1);
    g.that("a table comes back", wait(|| device.used() == count + 1));
    g.that("as one", device.used_element(count + 1) == (7, 15));
}

fn events(g: &mut Group) {
    let device = Device::set_up(VERSION_1 | EVENT_IDX, NO_VECTOR);
    let event = device.device + 4 + 8 * u64::from(SIZE);
    for count in 1..=2 * SIZE {
        one(g, &device, count);
        g.that(
            "it wants to hear of the next",
            wait(|| read::<u16>(event) == count),
        );
    }
}

fn packed(g: &mut Group) {
    let device = Device::set_up(VERSION_1 | PACKED, NO_VECTOR);
    let (mut slot, mut wrap) = (0u16, true);
    // Buffers of one and of two entries in turn, over the end of the ring again and again.
    for round in 0..20u16 {
        let entries = 1 + round % 2;
        let own = |wrap: bool| if wrap { AVAILABLE } else { USED };
        let (first, first_wrap) = (slot, wrap);
        let mut flags = [0; 2];
        let mut places = [0; 2];
        for n in 0..entries {
            let more = if n + 1 < entries { NEXT } else { 0 };
            flags[usize::from(n)] = WRITE | more | own(wrap);
            places[usize::from(n)] = slot;
            slot += 1;
            if slot == SIZE {
                (slot, wrap) = (0, !wrap);
            }
        }
        // The first entry last: it makes the buffer available.
        for n in (0..usize::from(entries)).rev() {
            let gpa = device.buffers + 32 * n as u64;
            let words = [100 + round, flags[n]];
            device.descriptor(device.descriptors, places[n], gpa, 20, words);
        }
        device.notify();
        let at = device.descriptors + 16 * u64::from(first);
        let both = if first_wrap { AVAILABLE | USED } else { 0 };
        let back = || read::<u16>(at + 14) & (AVAILABLE | USED) == both;
        g.that("a buffer comes back", wait(back));
        g.eq("its ID", read::<u16>(at + 12), 100 + round);
        g.eq("its length", read::<u32>(at + 8), 20 * u32::from(entries));
    }
}

/// Switches MSI-X on or off, and has vector 1 send [`MESSAGE`].
fn set_msix(on: bool) -> u64 {
    let at = capability(0x11, None).expect("MSI-X");
    write(PAGE + 4, crate::pci::ENABLED);
    let table = bar(2);
    write(at + 2, if on { 0x8000u16 } else { 0 });
    write(table + 16, 0xFEE0_0000u32 | apic::id() << 12);
    write(table + 20, 0u32);
    write(table + 24, u32::from(MESSAGE));
    write(table + 28, 0u32);
    table
}

fn messages(g: &mut Group) {
    let table = set_msix(true);
    let device = Device::set_up(VERSION_1, 1);
    g.eq("the vector is taken", device.vector(), 1);
    for count in 1..=20u16 {
        let before = interrupt::count(MESSAGE);
        one(g, &device, count);
        g.that(
            "a message comes",
            wait(|| interrupt::count(MESSAGE) == before + 1),
        );
    }
    // Masked, it is pending; unmasked, it comes, and once.
    let before = interrupt::count(MESSAGE);
    write(table + 28, 1u32);
    one(g, &device, 21);
    let pending = || read::<u64>(table + 0x800) == 2;
    g.that("the pending bit", wait(pending));
    tsc::delay(QUIET);
    g.eq(
        "no message while it is masked",
        interrupt::count(MESSAGE),
        before,
    );
    write(table + 0x800, 0u64);
    g.that("it cannot be written", pending());
    write(table + 28, 0u32);
    g.that("it comes", wait(|| interrupt::count(MESSAGE) == before + 1));
    g.eq("no longer pending", read::<u64>(table + 0x800), 0);
    // The ring's own flag.
    write(device.driver, 1u16);
    one(g, &device, 22);
    tsc::delay(QUIET);
    g.eq("not wanted", interrupt::count(MESSAGE), before + 1);
    set_msix(false);
}

fn pin(g: &mut Group) {
    set_msix(false);
    // INTA# of device 1 is wired to input 17: level-triggered.
    let entry = u64::from(apic::id()) << 56 | ioapic::LEVEL | u64::from(PIN);
    ioapic::set_entry(17, entry);
    let device = Device::set_up(VERSION_1, NO_VECTOR);
    for count in 1..=10u16 {
        let before = CAUSES.load(Ordering::SeqCst);
        one(g, &device, count);
        g.that(
            "an interrupt comes",
            wait(|| CAUSES.load(Ordering::SeqCst) == before + 1),
        );
    }
    tsc::delay(QUIET);
    g.eq("each once", CAUSES.load(Ordering::SeqCst), 10);
    // Switched off in the command register, it waits in the status register.
    write(PAGE + 4, crate::pci::ENABLED | 1 << 10);
    one(g, &device, 11);
    g.that("the status bit", wait(|| read::<u16>(PAGE + 6) & 8 != 0));
    tsc::delay(QUIET);
    g.eq("the pin is off", CAUSES.load(Ordering::SeqCst), 10);
    write(PAGE + 4, crate::pci::ENABLED);
    g.that("it comes", wait(|| CAUSES.load(Ordering::SeqCst) == 11));
    g.eq("ISR was read", read::<u8>(device.isr), 0);
    ioapic::set_entry(17, ioapic::MASKED);
}

fn queue_reset(g: &mut Group) {
    let device = Device::set_up(VERSION_1 | RING_RESET, NO_VECTOR);
    one(g, &device, 1);
    device.reset_queue();
    g.that("it is off", !device.is_queue_enabled());
    for at in [device.driver + 2, device.device + 2] {
        write(at, 0u16);
    }
    device.enable_queue(NO_VECTOR);
    g.that("it is on", device.is_queue_enabled());
    one(g, &device, 1);
}

/// What makes a ring unusable.
type Break = fn(&Device);

fn broken(g: &mut Group) {
    let cases: [(&str, u64, Break); 9] = [
        ("a loop", 0, |d| {
            d.descriptor(d.descriptors, 0, d.buffers, 1, [WRITE | NEXT, 1]);
            d.descriptor(d.descriptors, 1, d.buffers, 1, [WRITE | NEXT, 0]);
            d.offer(0, 1);
        }),
        ("a head that is not there", 0, |d| d.offer(SIZE, 1)),
        ("a next that is not there", 0, |d| {
            d.descriptor(d.descriptors, 0, d.buffers, 1, [WRITE | NEXT, 0xFFFF]);
            d.offer(0, 1);
        }),
        ("an index far ahead", 0, |d| d.offer(0, SIZE + 1)),
        ("a buffer in no memory", 0, |d| {
            d.descriptor(d.descriptors, 0, 0xD000_0000, 16, [WRITE, 0]);
            d.offer(0, 1);
        }),
        ("a buffer that wraps around", 0, |d| {
            d.descriptor(d.descriptors, 0, u64::MAX - 3, 16, [WRITE, 0]);
            d.offer(0, 1);
        }),
        ("a table within a table", INDIRECT, |d| {
            let table = d.buffers + 0x800;
            d.descriptor(table, 0, table, 16, [TABLE, 0]);
            d.descriptor(d.descriptors, 0, table, 16, [TABLE, 0]);
            d.offer(0, 1);
        }),
        ("a table nobody agreed on", 0, |d| {
            d.descriptor(d.descriptors, 0, d.buffers, 16, [TABLE, 0]);
            d.offer(0, 1);
        }),
        ("a packed chain without end", PACKED, |d| {
            for slot in (0..SIZE).rev() {
                let flags = WRITE | NEXT | AVAILABLE;
                d.descriptor(d.descriptors, slot, d.buffers, 1, [0, flags]);
            }
            d.notify();
        }),
    ];
    for (what, features, make) in cases {
        let device = Device::set_up(VERSION_1 | features, NO_VECTOR);
        make(&device);
        let stopped = || device.status() == 15 | NEEDS_RESET;
        g.check(wait(stopped), format_args!("{what}: it needs no reset"));
    }
    let device = Device::set_up(VERSION_1, NO_VECTOR);
    one(g, &device, 1);
    device.set_status(0);
    g.eq("reset", device.status(), 0);
}
