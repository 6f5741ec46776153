//! The machine around a scripted vCPU: what ends it, what holds it, and what passes through it.

use std::{
    io::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use caisson_config::OnReboot;
use caisson_device::Value;

use crate::{
    Fault, HostEnd, Machine, MachineError, MachineSpec, OnCrash, Outcome, Phase, StreamEnd,
    testing::{Collected, Scripted, Step, spec},
};

const RESET: u16 = 0xcf9;

fn out(port: u16, byte: u8) -> Step {
    Step::Out(port, vec![byte])
}

/// Runs `script` to its end.
fn run(script: Vec<Step>, change: impl FnOnce(&mut MachineSpec)) -> (Outcome, Arc<Scripted>) {
    let backend = Scripted::new(script);
    let mut spec = spec(&backend);
    change(&mut spec);
    let machine = Machine::new(spec).unwrap();
    machine.start().unwrap();
    let outcome = machine
        .wait_for(Duration::from_secs(60))
        .expect("the machine ends");
    assert_eq!(machine.phase(), Phase::Ended);
    (outcome, backend)
}

/// Starts `script`, which does not end by itself.
fn start(script: Vec<Step>, change: impl FnOnce(&mut MachineSpec)) -> (Machine, Arc<Scripted>) {
    let backend = Scripted::new(script);
    let mut spec = spec(&backend);
    change(&mut spec);
    let machine = Machine::new(spec).unwrap();
    machine.start().unwrap();
    (machine, backend)
}

fn until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "it does not come to pass");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn each_power_control_ends_the_machine_its_own_way() {
    let sleep = (1u16 << 13 | 5 << 10).to_le_bytes().to_vec();
    assert_eq!(
        run(vec![Step::Out(0x604, sleep)], |_| {}).0,
        Outcome::PowerOff
    );
    assert_eq!(
        run(vec![Step::Out(0xf4, vec![0x10, 0, 0, 0])], |_| {}).0,
        Outcome::DebugExit(0x21)
    );
    for reset in [
        vec![out(RESET, 6)],
        vec![out(0x92, 1)],
        vec![out(0x64, 0xfe)],
    ] {
        assert_eq!(
            run(reset, |spec| spec.on_reboot = OnReboot::Stop).0,
            Outcome::Reset
        );
    }
}

#[test]
fn a_reset_starts_the_guest_again() {
    let (machine, backend) = start(vec![out(0x80, 7), Step::In(0x80, 1), out(RESET, 6)], |_| {});
    assert_eq!(backend.wait_for_log(3), [[7]; 3]);
    machine.stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
    assert!(matches!(machine.inspect().get("resets"), Some(Value::U64(n)) if *n >= 2));
}

#[test]
fn a_triple_fault_is_a_crash_unless_it_is_to_be_a_reset() {
    let fault = Fault {
        vcpu: 0,
        rip: 0x10_0020,
        cr2: 0,
        cr3: 0,
    };
    assert_eq!(
        run(vec![Step::Shutdown], |_| {}).0,
        Outcome::TripleFault(fault)
    );
    let script = vec![Step::In(0x80, 1), Step::Shutdown];
    let (machine, backend) = start(script, |spec| spec.on_crash = OnCrash::Restart);
    backend.wait_for_log(2);
    drop(machine);
}

#[test]
fn faults_of_the_backend_and_panics_end_the_machine_with_a_reason() {
    let (outcome, _) = run(vec![Step::Fail], |_| {});
    assert!(
        matches!(&outcome, Outcome::Crash(what) if what.contains("0x1234") && what.contains("script")),
        "{outcome}"
    );
    let (outcome, _) = run(vec![Step::Panic], |_| {});
    assert!(
        matches!(&outcome, Outcome::Crash(what) if what.contains("panic in the vcpu0 thread")),
        "{outcome}"
    );
}

#[test]
fn a_panic_of_the_kernel_is_told_from_a_reboot() {
    let text = b"[    1.0] Kernel panic - not syncing: no init\r\n";
    let script = || {
        text.iter()
            .map(|byte| out(0x3f8, *byte))
            .chain([out(RESET, 6)])
            .collect()
    };
    let console = |spec: &mut MachineSpec| {
        spec.serial[0] = Some(Box::new(StreamEnd::new(Collected::default())))
    };
    assert_eq!(run(script(), console).0, Outcome::Panic("no init".into()));
    let restart = |spec: &mut MachineSpec| {
        console(spec);
        spec.on_crash = OnCrash::Restart;
        spec.on_reboot = OnReboot::Stop;
    };
    assert_eq!(run(script(), restart).0, Outcome::Reset);
}

#[test]
fn what_the_guest_prints_is_delivered_before_the_end() {
    let (com1, debugcon) = (Collected::default(), Collected::default());
    let text: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
    let script = text
        .iter()
        .map(|byte| out(0x3f8, *byte))
        .chain([out(0xe9, b'!'), out(0xf4, 0)])
        .collect();
    run(script, |spec| {
        spec.serial[0] = Some(Box::new(StreamEnd::new(com1.clone())));
        spec.debugcon = Some(Box::new(StreamEnd::new(debugcon.clone())));
    });
    assert!(com1.bytes() == text);
    assert_eq!(debugcon.bytes(), b"!");
}

#[test]
fn what_is_typed_reaches_the_guest_in_order() {
    let text: Vec<u8> = (0..100u8).collect();
    // FIFO on, which empties it, so nothing is typed before the log shows it done;
    // then wait for data ready, read, a hundred times.
    let mut script = vec![out(0x3fa, 1), Step::In(0x3fa, 1)];
    for _ in &text {
        script.extend([Step::Until(0x3fd, 1), Step::In(0x3f8, 1)]);
    }
    let (machine, backend) = start(script, |spec| {
        spec.serial[0] = Some(Box::new(StreamEnd::new(std::io::sink())))
    });
    assert!(machine.serial_input(1).is_none());
    backend.wait_for_log(1);
    machine.serial_input(0).unwrap().push(&text).unwrap();
    assert_eq!(backend.wait_for_log(1 + text.len())[1..].concat(), text);
    machine.stop();
    machine.wait();
    assert!(machine.serial_input(0).unwrap().push(b"late").is_err());
}

#[test]
fn a_host_end_that_takes_nothing_does_not_keep_a_stopped_machine() {
    struct Stuck;
    impl Write for Stuck {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            loop {
                std::thread::park();
            }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (machine, backend) = start(vec![out(0x3f8, 1), Step::In(0x80, 1)], |spec| {
        spec.serial[0] = Some(Box::new(StreamEnd::new(Stuck)));
    });
    backend.wait_for_log(1);
    machine.stop();
    assert_eq!(
        machine.wait_for(Duration::from_secs(60)),
        Some(Outcome::Stopped)
    );
}

#[test]
fn a_panicking_host_end_ends_the_machine() {
    struct Broken;
    impl HostEnd for Broken {
        fn send(&mut self, _: &[u8]) -> std::io::Result<()> {
            panic!("the test says so")
        }
    }
    let (machine, _) = start(vec![out(0x3f8, 1)], |spec| {
        spec.serial[0] = Some(Box::new(Broken))
    });
    let outcome = machine.wait_for(Duration::from_secs(60)).unwrap();
    assert!(
        matches!(&outcome, Outcome::Crash(what) if what.contains("com1")),
        "{outcome}"
    );
}

/// The 8259 pair with base vector 0x20 and the interval timer at about 1 kHz.
fn ticking() -> Vec<Step> {
    [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
        (0x43, 0x34),
        (0x40, 0xa9),
        (0x40, 4),
    ]
    .map(|(port, byte)| out(port, byte))
    .into()
}

#[test]
fn timers_of_devices_raise_interrupts() {
    let (machine, backend) = start(ticking(), |_| {});
    until(|| backend.extint());
    machine.stop();
    machine.wait();
}

#[test]
fn msis_of_the_ioapic_reach_the_partition() {
    // Input 4 to vector 0x51, edge; then the serial port's transmit interrupt.
    let store = |address, value: u32| Step::Store(address, value.to_le_bytes().to_vec());
    let script = vec![
        store(0xfec0_0000, 0x18),
        store(0xfec0_0010, 0x51),
        out(0x3fc, 8),
        out(0x3f9, 2),
        Step::In(0x80, 1),
    ];
    let (machine, backend) = start(script, |spec| {
        spec.serial[0] = Some(Box::new(StreamEnd::new(std::io::sink())))
    });
    backend.wait_for_log(1);
    assert_eq!(
        backend.msis().first().map(|msi| msi.data & 0xff),
        Some(0x51)
    );
    drop(machine);
}

#[test]
fn time_and_devices_stand_still_while_paused() {
    let (machine, backend) = start(ticking(), |_| {});
    until(|| backend.extint());
    machine.pause().unwrap();
    machine.pause().unwrap();
    let now = machine.now_ns();
    let saved = machine.save_state().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.now_ns(), now);
    assert_eq!(machine.save_state().unwrap(), saved);
    machine.resume().unwrap();
    until(|| machine.now_ns() > now);
    assert!(matches!(
        machine.save_state(),
        Err(MachineError::Phase { .. })
    ));
    machine.stop();
    machine.wait();
    assert!(matches!(machine.pause(), Err(MachineError::Phase { .. })));
}

#[test]
fn a_machine_goes_on_where_it_was_saved() {
    let mut script = ticking();
    script.extend([out(0x80, 0x5a), Step::In(0x80, 1)]);
    let (machine, backend) = start(script, |_| {});
    backend.wait_for_log(1);
    machine.pause().unwrap();
    let saved = machine.save_state().unwrap();
    drop(machine);

    let other = Scripted::new(vec![Step::In(0x80, 1)]);
    let restored = Machine::restore_state(spec(&other), &saved, |_| Ok(())).unwrap();
    assert_eq!(restored.save_state().unwrap(), saved);
    restored.start().unwrap();
    assert_eq!(other.wait_for_log(1), [[0x5a]]);
    until(|| other.extint());

    let mut more = spec(&other);
    more.vcpus = 2;
    let error = Machine::restore_state(more, &saved, |_| Ok(()))
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("1 vCPUs") && error.contains("has 2"),
        "{error}"
    );
    let mut com1 = spec(&other);
    com1.serial[0] = Some(Box::new(StreamEnd::new(std::io::sink())));
    let error = Machine::restore_state(com1, &saved, |_| Ok(()))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("uart0"), "{error}");
}

#[test]
fn what_nobody_answers_reads_as_ones_and_is_counted() {
    let script = vec![
        Step::In(0x1234, 4),
        Step::Load(0xd000_0000, 64),
        out(0x1234, 1),
        // The data port of the keyboard controller, and nothing beside it.
        Step::In(0x5f, 1),
    ];
    let (machine, backend) = start(script, |_| {});
    let log = backend.wait_for_log(3);
    assert_eq!(log, [vec![0xff; 4], vec![0xff; 64], vec![0xff]]);
    let tree = machine.inspect();
    let count = |kind| match tree.get(&format!("bus/unclaimed/{kind}")) {
        Some(Value::U64(count)) => *count,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        (
            count("port-reads"),
            count("port-writes"),
            count("memory-reads")
        ),
        (2, 1, 1)
    );
    assert!(tree.get("devices/interrupts/8259").is_some());
    assert!(matches!(tree.get("vcpus/0/mmio"), Some(Value::U64(1))));
    drop(machine);
}

#[test]
fn a_machine_that_cannot_be_made_says_why() {
    let backend = Scripted::new(Vec::new());
    let fail = |change: &dyn Fn(&mut MachineSpec)| {
        let mut spec = spec(&backend);
        change(&mut spec);
        Machine::new(spec).err().expect("refused").to_string()
    };
    assert!(fail(&|spec| spec.vcpus = 0).contains("0 vCPUs"));
    assert!(fail(&|spec| spec.vcpus = 10_000).contains("runs 1 to 8"));
    assert!(fail(&|spec| spec.memory.bytes = 4096).contains("1 MiB"));
    assert!(fail(&|spec| spec.memory.bytes = 1 << 50).contains("host"));
    let initrd = |spec: &mut MachineSpec| {
        spec.boot.initrd = Some(crate::Input::bytes("initrd.img", vec![0; 5 << 20]))
    };
    assert!(fail(&initrd).contains("\"initrd.img\" has 5 MiB"));
    let text =
        fail(&|spec| spec.boot.kernel = crate::Input::bytes("notes.txt", *b"just some text\n"));
    assert!(text.contains("notes.txt"), "{text}");
}

#[test]
fn a_device_in_the_way_of_another_is_named() {
    let backend = Scripted::new(Vec::new());
    let mut spec = spec(&backend);
    spec.debug_exit = Some(0x60);
    let error = Machine::new(spec).err().unwrap().to_string();
    assert!(error.contains("i8042"), "{error}");
}

#[test]
fn a_machine_that_never_ran_can_be_stopped() {
    let backend = Scripted::new(Vec::new());
    let machine = Machine::new(spec(&backend)).unwrap();
    machine.stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
    assert!(machine.start().is_err());
}

#[test]
fn a_machine_that_is_dropped_lets_go_of_everything() {
    // Whoever holds the backend holds the partition, and with it memory, descriptors and threads.
    let backend = Scripted::new(Vec::new());
    let held = Arc::strong_count(&backend);
    drop(Machine::new(spec(&backend)).unwrap());
    assert_eq!(Arc::strong_count(&backend), held, "one that never ran");
    let machine = Machine::new(spec(&backend)).unwrap();
    machine.start().unwrap();
    drop(machine);
    assert_eq!(Arc::strong_count(&backend), held, "one that ran");
}
