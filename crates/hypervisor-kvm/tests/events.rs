//! Doorbells and interrupt events on KVM.
//!
//! Where there is no KVM, or it refuses the power, there is nothing to test, and
//! each test says so.

mod board;

use std::sync::Arc;

use caisson_hypervisor::{
    Doorbell, DoorbellMatch, Doorbells, Event, InterruptEvents, Msi, RawEvent, Space,
};
use caisson_memory::{Gpa, Vtl};

use board::{Board, END, Log, SLEEP, board, run, while_running};

/// Beyond RAM: the guest reaches it, and nothing is there.
const REGISTER: u64 = 0x20_0000;
const PORT: u64 = 0x510;

fn doorbells(board: &Board) -> Option<&dyn Doorbells> {
    let power = board.partition.power().doorbells;
    if power.is_none() {
        println!("not tested: this host's KVM has no doorbells");
    }
    power
}

fn interrupts(board: &Board) -> Option<&dyn InterruptEvents> {
    let power = board.partition.power().interrupt_events;
    if power.is_none() {
        println!("not tested: this host's KVM has no interrupt events");
    }
    power
}

fn at(space: Space, address: u64, matches: DoorbellMatch) -> Doorbell {
    Doorbell {
        space,
        address: Gpa(address),
        matches,
    }
}

fn value(length: u8, value: u64) -> DoorbellMatch {
    DoorbellMatch::Value { length, value }
}

fn fixed(vector: u8) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: vector.into(),
    }
}

/// mov edi, REGISTER; then per write mov byte/word/dword/qword [rdi+offset], value
fn stores(writes: &[(u8, u8, u32)]) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend((REGISTER as u32).to_le_bytes());
    for &(offset, length, value) in writes {
        let value = value.to_le_bytes();
        match length {
            1 => code.extend([0xc6, 0x47, offset, value[0]]),
            2 => code.extend([0x66, 0xc7, 0x47, offset, value[0], value[1]]),
            4 => code.extend([0xc7, 0x47, offset]),
            _ => code.extend([0x48, 0xc7, 0x47, offset]),
        }
        if length >= 4 {
            code.extend(value);
        }
    }
    code.extend(END);
    code
}

/// mov dx, PORT; then per write mov eax, value; out dx, al/ax/eax
fn outs(writes: &[(u8, u32)]) -> Vec<u8> {
    let mut code = vec![0x66, 0xba];
    code.extend((PORT as u16).to_le_bytes());
    for &(length, value) in writes {
        code.push(0xb8);
        code.extend(value.to_le_bytes());
        match length {
            1 => code.push(0xee),
            2 => code.extend([0x66, 0xef]),
            _ => code.push(0xef),
        }
    }
    code.extend(END);
    code
}

/// Runs `code` once more and gives what reached the bus.
fn again(
    board: &Board,
    vcpu: &mut dyn caisson_hypervisor::Vcpu,
    code: &[u8],
) -> Vec<(u64, Vec<u8>)> {
    let state = board.long_mode(vcpu, code);
    vcpu.set_state(Vtl::VTL0, &state).unwrap();
    let log = Log::default();
    run(vcpu, &log);
    let writes = log.writes.into_inner().unwrap();
    writes.into_iter().map(|(_, at, data)| (at, data)).collect()
}

#[test]
fn a_doorbell_takes_what_matches_and_nothing_else() {
    let Some(board) = board() else { return };
    let Some(power) = doorbells(&board) else {
        return;
    };
    let register = |doorbell: Doorbell| {
        let event = power.event().unwrap();
        let handle = power.register(Vtl::VTL0, doorbell, event.clone()).unwrap();
        assert_eq!(handle.doorbell(), doorbell);
        (event, handle)
    };
    let mmio = |offset, matches| at(Space::Mmio, REGISTER + offset, matches);
    let (any, _any) = register(mmio(0, DoorbellMatch::Any));
    let (word, _word) = register(mmio(8, DoorbellMatch::Length(2)));
    let (five, _five) = register(mmio(16, value(4, 5)));
    let (six, six_handle) = register(mmio(16, value(4, 6)));
    let (wide, _wide) = register(mmio(24, value(8, 7)));
    let mut vcpu = board.vcpu(&END);
    let heard = || [&any, &word, &five, &six, &wide].map(|event| event.take());

    let code = stores(&[(0, 1, 1), (0, 2, 2), (0, 4, 3), (0, 8, 4), (8, 2, 9)]);
    assert_eq!(again(&board, &mut *vcpu, &code), []);
    assert_eq!(heard(), [true, true, false, false, false]);

    let code = stores(&[(16, 4, 5), (24, 8, 7)]);
    assert_eq!(again(&board, &mut *vcpu, &code), []);
    assert_eq!(heard(), [false, false, true, false, true]);

    // The wrong length, value or address.
    let code = stores(&[
        (8, 1, 9),
        (8, 4, 9),
        (16, 2, 5),
        (16, 4, 7),
        (24, 4, 7),
        (1, 1, 1),
    ]);
    let to = |offset, data: &[u8]| (REGISTER + offset, data.to_vec());
    assert_eq!(
        again(&board, &mut *vcpu, &code),
        [
            to(8, &[9]),
            to(8, &[9, 0, 0, 0]),
            to(16, &[5, 0]),
            to(16, &[7, 0, 0, 0]),
            to(24, &[7, 0, 0, 0]),
            to(1, &[1]),
        ]
    );
    assert_eq!(heard(), [false; 5]);

    // One of two that share an address goes.
    drop(six_handle);
    let code = stores(&[(16, 4, 6), (16, 4, 5)]);
    assert_eq!(again(&board, &mut *vcpu, &code), [to(16, &[6, 0, 0, 0])]);
    assert_eq!(heard(), [false, false, true, false, false]);
    assert_eq!(vcpu.stats().mmio, 7);
}

#[test]
fn doorbells_are_at_ports_too_and_share_events() {
    let Some(board) = board() else { return };
    let Some(power) = doorbells(&board) else {
        return;
    };
    let event = power.event().unwrap();
    let handles = [value(1, 5), value(2, 5), DoorbellMatch::Length(4)].map(|matches| {
        let doorbell = at(Space::Pio, PORT, matches);
        power.register(Vtl::VTL0, doorbell, event.clone()).unwrap()
    });
    let mut vcpu = board.vcpu(&END);
    for (length, value) in [(1, 5), (2, 5), (4, 99)] {
        let code = outs(&[(length, value)]);
        assert_eq!(again(&board, &mut *vcpu, &code), [], "{length} {value}");
        assert!(event.take(), "{length} {value}");
    }
    let code = outs(&[(1, 6), (2, 0x105)]);
    let both = [(PORT, vec![6]), (PORT, vec![5, 1])];
    assert_eq!(again(&board, &mut *vcpu, &code), both);
    assert!(!event.is_signalled());
    // Memory at the same number is something else.
    drop(handles);
    let code = outs(&[(1, 5), (2, 5), (4, 99)]);
    assert_eq!(again(&board, &mut *vcpu, &code).len(), 3, "all are gone");
    assert!(!event.is_signalled());
}

/// An event of some other kind of host, or a descriptor that is none, or none of an event.
struct Wrong(RawEvent);

impl Event for Wrong {
    fn signal(&self) {}
    fn take(&self) -> bool {
        false
    }
    fn is_signalled(&self) -> bool {
        false
    }
    fn raw(&self) -> RawEvent {
        self.0
    }
}

fn wrong_events() -> Vec<Arc<dyn Event>> {
    [
        RawEvent::Handle(7),
        RawEvent::Descriptor(-1),
        RawEvent::Descriptor(0),
    ]
    .map(|raw| Arc::new(Wrong(raw)) as Arc<dyn Event>)
    .into()
}

#[test]
fn doorbells_that_make_no_sense_are_refused() {
    let Some(board) = board() else { return };
    let Some(power) = doorbells(&board) else {
        return;
    };
    let event = power.event().unwrap();
    let good = at(Space::Mmio, REGISTER, DoorbellMatch::Length(4));
    let refusal = |doorbell, event: &Arc<dyn Event>| {
        let refusal = power.register(Vtl::VTL0, doorbell, event.clone()).err();
        refusal.unwrap().to_string()
    };
    let odd = at(Space::Mmio, REGISTER, DoorbellMatch::Length(3));
    assert!(refusal(odd, &event).contains("not 3"));
    for wrong in wrong_events() {
        refusal(good, &wrong);
    }
    let held = power.register(Vtl::VTL0, good, event.clone()).unwrap();
    let overlapping = refusal(at(Space::Mmio, REGISTER, value(4, 1)), &event);
    assert!(overlapping.contains("another one"), "{overlapping}");
    drop(held);
    let held = power.register(Vtl::VTL0, good, event.clone());
    assert!(held.is_ok(), "the place is free again");
    let other = Vtl::new(1).unwrap();
    assert!(power.register(other, good, event).is_err());
}

#[test]
fn an_event_interrupts_the_guest() {
    let Some(board) = board() else { return };
    let Some(power) = interrupts(&board) else {
        return;
    };
    let mut vcpu = board.vcpu_with_interrupts(&SLEEP);
    let events = [0x41, 0x42].map(|vector| {
        let event = power.event().unwrap();
        let msi = Some(fixed(vector));
        let handle = power.register(Vtl::VTL0, event.clone(), msi).unwrap();
        (event, handle)
    });
    let log = Log::default();
    while_running(&mut *vcpu, &log, || {
        for _ in 0..3 {
            events[0].0.signal();
            log.wait_for(&[0x41]);
            events[1].0.signal();
            log.wait_for(&[0x42]);
        }
        // Another message, twice over.
        events[0].1.update(Some(fixed(0x51))).unwrap();
        events[0].1.update(Some(fixed(0x52))).unwrap();
        events[0].0.signal();
        log.wait_for(&[0x52]);
        events[1].0.signal();
        log.wait_for(&[0x42]);
        let [(first, handle), (second, _handle)] = events;
        drop(handle);
        first.signal();
        second.signal();
        log.wait_for(&[0x42]);
        assert!(first.is_signalled(), "nobody heard it");
    });
    assert_eq!(log.vectors(), []);
}

#[test]
fn a_masked_interrupt_waits() {
    let Some(board) = board() else { return };
    let Some(power) = interrupts(&board) else {
        return;
    };
    let mut vcpu = board.vcpu_with_interrupts(&SLEEP);
    let event = power.event().unwrap();
    let interrupt = power.register(Vtl::VTL0, event.clone(), None).unwrap();
    let log = Log::default();
    while_running(&mut *vcpu, &log, || {
        assert!(!interrupt.is_pending());
        event.signal();
        event.signal();
        assert!(interrupt.is_pending());
        interrupt.update(Some(fixed(0x61))).unwrap();
        log.wait_for(&[0x61]);
        assert!(!interrupt.is_pending());
        // Masked and unmasked with nothing between: nothing comes.
        interrupt.update(None).unwrap();
        assert!(!interrupt.is_pending());
        interrupt.update(Some(fixed(0x62))).unwrap();
        event.signal();
        log.wait_for(&[0x62]);
        // A message that no APIC hears masks it.
        let bad = Msi {
            address: 0x1_fee0_0000,
            data: 0x63,
        };
        let refusal = interrupt.update(Some(bad)).unwrap_err().to_string();
        assert!(refusal.contains("0x1fee00000"), "{refusal}");
        event.signal();
        assert!(interrupt.is_pending());
        interrupt.update(Some(fixed(0x64))).unwrap();
        log.wait_for(&[0x64]);
    });
    assert_eq!(log.vectors(), []);
}

#[test]
fn events_that_make_no_sense_raise_nothing() {
    let Some(board) = board() else { return };
    let Some(power) = interrupts(&board) else {
        return;
    };
    let msi = Some(fixed(0x41));
    for wrong in wrong_events() {
        assert!(power.register(Vtl::VTL0, wrong, msi).is_err());
    }
    let event = power.event().unwrap();
    let first = power.register(Vtl::VTL0, event.clone(), msi).unwrap();
    let second = power.register(Vtl::VTL0, event.clone(), msi).err().unwrap();
    assert!(second.to_string().contains("another interrupt"), "{second}");
    drop(first);
    let first = power.register(Vtl::VTL0, event.clone(), msi);
    assert!(first.is_ok(), "the event is free again");
    assert!(power.register(Vtl::new(1).unwrap(), event, msi).is_err());
}

#[test]
fn handles_outlive_their_partition() {
    let Some(board) = board() else { return };
    let power = board.partition.power();
    let (Some(doorbells), Some(interrupts)) = (power.doorbells, power.interrupt_events) else {
        println!("not tested: no powers");
        return;
    };
    let event = doorbells.event().unwrap();
    let doorbell = at(Space::Mmio, REGISTER, DoorbellMatch::Any);
    let bell = doorbells.register(Vtl::VTL0, doorbell, event).unwrap();
    let event = interrupts.event().unwrap();
    let msi = Some(fixed(0x41));
    let interrupt = interrupts.register(Vtl::VTL0, event.clone(), msi).unwrap();
    drop(board);
    event.signal();
    let refusal = interrupt.update(msi).unwrap_err().to_string();
    assert!(refusal.contains("gone"), "{refusal}");
    drop((bell, interrupt));
}

#[test]
fn hundreds_of_events_have_routes_beside_the_io_apics() {
    let Some(board) = board() else { return };
    let Some(power) = interrupts(&board) else {
        return;
    };
    let mut vcpu = board.vcpu_with_interrupts(&SLEEP);
    let bound: Vec<_> = (0..300u32)
        .map(|n| {
            let event = power.event().unwrap();
            let vector = 0x30 + (n % 0xc0) as u8;
            let msi = Some(fixed(vector));
            let handle = power.register(Vtl::VTL0, event.clone(), msi).unwrap();
            (vector, event, handle)
        })
        .collect();
    let level = |vector: u8| Msi {
        address: 0xfee0_0000,
        data: 0xc000 | u32::from(vector),
    };
    let log = Log::default();
    while_running(&mut *vcpu, &log, || {
        // More than an I/O APIC has inputs: each end is told all the same, and
        // oldest first where there are more than fit.
        for vector in 0x30..=0xef {
            board.partition.raise_msi(Vtl::VTL0, level(vector));
            log.wait_for(&[vector]);
        }
        for (vector, event, _) in &bound {
            event.signal();
            log.wait_for(&[*vector]);
        }
    });
    let ends = log.ends.lock().unwrap();
    let expected: Vec<u8> = (0x30..=0xef).collect();
    assert_eq!(ends[..expected.len()], expected);
}
