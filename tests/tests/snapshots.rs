//! Machines in files: what fits goes on, what does not is refused with every reason, and nothing that was done to the
//! files makes Caisson crash.

use std::{fs, path::Path, sync::Arc, time::Duration};

use caisson_device::StateRecord;
use caisson_hypervisor::{Hypervisor, x86::Level};
use caisson_machine::{
    Elapsed, Input, Machine, MachineError, MachineSpec, Outcome, SavedMachine, Snapshot, StreamEnd,
};
use caisson_tests::{
    guests::{SUCCESS, guest_path},
    vm::{Console, Moves, Vm, VmSpec, all_backends, backends},
};

const LIMIT: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(300);

fn described(backend: &Arc<dyn Hypervisor>, console: &Console) -> MachineSpec {
    let kernel = guest_path("timer").expect("the guests build");
    let spec = VmSpec::new(backend, Input::open("kernel", &kernel, LIMIT).unwrap());
    let com1 = Box::new(StreamEnd::new(console.clone()));
    spec.machine([Some(com1), None, None, None], None)
}

/// Saves a machine to `folder` soon after its start. (How it goes on from any moment is for the tests that move each
/// guest; here it is about the files.)
fn save(backend: &Arc<dyn Hypervisor>, folder: &Path) {
    let machine = Machine::new(described(backend, &Console::default())).expect("a machine");
    machine.start().unwrap();
    machine.pause().unwrap();
    machine.save(folder).expect("it is saved");
}

fn refusal(spec: MachineSpec, folder: &Path) -> MachineError {
    Snapshot::open(folder)
        .and_then(|snapshot| Machine::restore(spec, &snapshot, Elapsed::Hidden))
        .err()
        .expect("it is refused")
}

#[test]
fn any_number_of_machines_go_on_from_one_snapshot() {
    for backend in backends() {
        let folder = tempfile::tempdir().unwrap();
        save(&backend, folder.path());
        let snapshot = Snapshot::open(folder.path()).unwrap();
        snapshot.verify_memory().unwrap();
        let started: Vec<_> = (0..2)
            .map(|_| {
                let console = Console::default();
                let spec = described(&backend, &console);
                let machine = Machine::restore(spec, &snapshot, Elapsed::Hidden).unwrap();
                machine.start().unwrap();
                (machine, console)
            })
            .collect();
        for (machine, console) in &started {
            let outcome = machine.wait_for(PATIENCE);
            assert_eq!(
                outcome,
                Some(Outcome::DebugExit(SUCCESS.into())),
                "{console}"
            );
        }
        // Neither wrote to what it came from.
        snapshot.verify_memory().unwrap();
    }
}

/// The processor is a model, so that there is nothing in it that one backend has alone.
#[test]
fn a_guest_goes_from_backend_to_backend() {
    const ROUNDS: usize = 4;
    let backends = all_backends();
    let Some(first) = backends.first().filter(|_| backends.len() > 1) else {
        println!("there is only one backend here");
        return;
    };
    let path = guest_path("travel").expect("the guests build");
    let mut spec = VmSpec::new(first, Input::open("kernel", &path, LIMIT).unwrap());
    spec.cpu = Level::V1.name().parse().unwrap();
    spec.moves = Moves::After(Vec::new());
    let vm = Vm::start(&spec).expect("it starts");
    let mut seen = 0;
    for _ in 0..ROUNDS {
        for backend in backends.iter().rev() {
            seen = vm.debugcon.wait_for("\nround ", seen, PATIENCE).unwrap();
            vm.move_to(backend)
                .unwrap_or_else(|error| panic!("to {}: {error:#}", backend.name()));
        }
    }
    vm.debugcon.wait_for("\nround ", seen, PATIENCE).unwrap();
    vm.type_text(".").unwrap();
    let outcome = vm.wait(PATIENCE).unwrap();
    assert_eq!(
        outcome,
        Outcome::DebugExit(SUCCESS.into()),
        "{}",
        vm.debugcon
    );
}

#[test]
fn time_goes_on_where_it_stood_or_jumps() {
    for backend in backends() {
        let folder = tempfile::tempdir().unwrap();
        save(&backend, folder.path());
        let snapshot = Snapshot::open(folder.path()).unwrap();
        let now = |elapsed| {
            let spec = described(&backend, &Console::default());
            Machine::restore(spec, &snapshot, elapsed).unwrap().now_ns()
        };
        let hidden = now(Elapsed::Hidden);
        assert_eq!(now(Elapsed::Hidden), hidden);
        std::thread::sleep(Duration::from_millis(50));
        assert!(now(Elapsed::Seen) >= hidden + 50_000_000);
    }
}

#[test]
fn a_snapshot_of_another_machine_is_refused_with_every_reason() {
    for backend in backends() {
        let folder = tempfile::tempdir().unwrap();
        save(&backend, folder.path());
        let mut spec = described(&backend, &Console::default());
        spec.vcpus = 3;
        spec.memory.bytes *= 2;
        let MachineError::CannotRestore(reasons) = refusal(spec, folder.path()) else {
            panic!("not for these reasons");
        };
        assert_eq!(reasons.len(), 2, "{reasons:?}");
        assert!(
            reasons[0].contains("1 vCPUs") && reasons[0].contains("has 3"),
            "{reasons:?}"
        );
        assert!(reasons[1].contains("bytes of memory"), "{reasons:?}");

        let mut spec = described(&backend, &Console::default());
        spec.serial[0] = None;
        spec.debug_exit = None;
        let MachineError::CannotRestore(reasons) = refusal(spec, folder.path()) else {
            panic!("not for these reasons");
        };
        assert!(
            reasons.iter().any(|reason| reason.contains("debug-exit")),
            "{reasons:?}"
        );
        assert!(
            reasons.iter().any(|reason| reason.contains("com1-host")),
            "{reasons:?}"
        );
    }
}

/// Where the parts begin in the file, and its end.
fn borders(file: &[u8]) -> Vec<usize> {
    let mut borders = vec![32];
    let mut rest = &file[32..];
    while let Some((length, tail)) = rest.split_first() {
        rest = &tail[usize::from(*length)..];
        StateRecord::decode(&mut rest).expect("it was just written");
        borders.push(file.len() - rest.len());
    }
    borders
}

#[test]
fn files_that_were_cut_or_changed_are_refused() {
    for backend in backends() {
        let folder = tempfile::tempdir().unwrap();
        save(&backend, folder.path());
        let path = folder.path().join("state");
        let file = fs::read(&path).unwrap();
        let borders = borders(&file);
        assert!(borders.len() > 10, "{borders:?}");
        let refused = |bytes: &[u8], what: &str| {
            fs::write(&path, bytes).unwrap();
            let error = Snapshot::open(folder.path()).err();
            assert!(error.is_some(), "{what}");
        };
        for border in &borders[..borders.len() - 1] {
            refused(&file[..*border], "cut at a border");
        }
        refused(b"", "empty");
        for bit in (0..file.len() * 8).step_by(61) {
            let mut bytes = file.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            refused(&bytes, "a bit");
        }
        fs::write(&path, &file).unwrap();
        let memory = fs::OpenOptions::new()
            .write(true)
            .open(folder.path().join("memory"))
            .unwrap();
        memory.set_len(16 << 20).unwrap();
        let error = Snapshot::open(folder.path()).expect_err("it is short");
        assert!(error.to_string().contains("bytes instead of"), "{error}");
        fs::remove_file(folder.path().join("memory")).unwrap();
        assert!(Snapshot::open(folder.path()).is_err());
    }
}

/// The file's parts changed by `change`, under the right checksums.
fn rewrite(folder: &Path, change: impl FnOnce(&mut Vec<(String, StateRecord)>)) {
    let path = folder.join("state");
    let saved = SavedMachine::decode(&fs::read(&path).unwrap()).unwrap();
    let mut parts = saved.parts().to_vec();
    change(&mut parts);
    fs::write(&path, SavedMachine::from_parts(parts).encode()).unwrap();
}

#[test]
fn parts_from_the_future_and_parts_that_are_not_there_are_refused_by_name() {
    for backend in backends() {
        let folder = tempfile::tempdir().unwrap();
        save(&backend, folder.path());
        let path = folder.path().join("state");
        let file = fs::read(&path).unwrap();
        let count = SavedMachine::decode(&file).unwrap().parts().len();
        for index in 0..count {
            let mut part = String::new();
            rewrite(folder.path(), |parts| {
                let (name, record) = &mut parts[index];
                part.clone_from(name);
                *record = StateRecord::new(record.id(), 999, record.body().to_vec()).unwrap();
            });
            let spec = described(&backend, &Console::default());
            let text = refusal(spec, folder.path()).to_string();
            assert!(
                text.contains("version 999") && text.contains(&part),
                "{part}: {text}"
            );
            fs::write(&path, &file).unwrap();
        }
        rewrite(folder.path(), |parts| {
            parts.push(("tpm".into(), StateRecord::new("tpm", 1, vec![1]).unwrap()));
        });
        let text = refusal(described(&backend, &Console::default()), folder.path()).to_string();
        assert!(text.contains("\"tpm\""), "{text}");
        fs::write(&path, &file).unwrap();
        rewrite(folder.path(), |parts| {
            parts.retain(|(name, _)| name != "vcpu0")
        });
        let text = refusal(described(&backend, &Console::default()), folder.path()).to_string();
        assert!(text.contains("\"vcpu0\""), "{text}");
    }
}

#[test]
fn files_of_two_snapshots_are_not_taken_for_one() {
    for backend in backends() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        save(&backend, one.path());
        save(&backend, two.path());
        fs::copy(one.path().join("memory"), two.path().join("memory")).unwrap();
        let text = refusal(described(&backend, &Console::default()), two.path()).to_string();
        assert!(text.contains("another snapshot"), "{text}");
    }
}

/// Machines that Caisson saved when its files had their first layouts: a name, the guest, its vCPUs.
const KEPT: [(&str, &str, u32); 2] = [("v1-timer", "timer", 1), ("v1-smp", "smp", 4)];

fn kept_spec(guest: &str, cpus: u32, console: &Console) -> MachineSpec {
    let soft: Arc<dyn Hypervisor> = Arc::new(caisson_hypervisor_soft::Soft::default());
    let kernel = guest_path(guest).expect("the guests build");
    let mut spec = VmSpec::new(&soft, Input::open("kernel", &kernel, LIMIT).unwrap());
    spec.cpus = cpus;
    // What every host has.
    spec.cpu = "x86-64-v1".parse().unwrap();
    let com1 = Box::new(StreamEnd::new(console.clone()));
    spec.machine([Some(com1), None, None, None], None)
}

/// Saves such a machine and packs its memory.
fn keep(folder: &Path, guest: &str, cpus: u32) {
    let machine = Machine::new(kept_spec(guest, cpus, &Console::default())).unwrap();
    machine.start().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    machine.pause().unwrap();
    machine.save(folder).unwrap();
    let memory = fs::File::open(folder.join("memory")).unwrap();
    let packed = fs::File::create(folder.join("memory.zst")).unwrap();
    zstd::stream::copy_encode(memory, packed, 19).unwrap();
    fs::remove_file(folder.join("memory")).unwrap();
}

/// They are never written anew: whoever changes a record keeps reading the old one, and adds a machine here.
/// `UPDATE_GOLDEN=1` writes those that are missing.
/// How often a kept machine may be begun.
const KEPT_ATTEMPTS: u32 = 5;

#[test]
fn machines_saved_by_earlier_versions_go_on() {
    for (name, guest, cpus) in KEPT {
        let kept = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("kept")
            .join(name);
        if !kept.exists() && std::env::var_os("UPDATE_GOLDEN").is_some() {
            keep(&kept, guest, cpus);
        }
        let folder = tempfile::tempdir().unwrap();
        fs::copy(kept.join("state"), folder.path().join("state")).unwrap();
        let packed = fs::File::open(kept.join("memory.zst")).unwrap();
        let memory = fs::File::create(folder.path().join("memory")).unwrap();
        zstd::stream::copy_decode(packed, memory).unwrap();
        let snapshot = Snapshot::open(folder.path()).unwrap();
        snapshot.verify_memory().unwrap();
        let expected = Some(Outcome::DebugExit(SUCCESS.into()));
        // The guest in the file is as old as the file: it allows 2 ms for what a busy host can
        // keep it from for longer. So it is asked more than once.
        let mut outcome = None;
        let mut printed = String::new();
        for _ in 0..KEPT_ATTEMPTS {
            let console = Console::default();
            let spec = kept_spec(guest, cpus, &console);
            let machine = Machine::restore(spec, &snapshot, Elapsed::Hidden).unwrap();
            machine.start().unwrap();
            outcome = machine.wait_for(PATIENCE);
            printed = console.text();
            if outcome == expected {
                break;
            }
        }
        assert_eq!(outcome, expected, "{name}: {printed}");
    }
}
