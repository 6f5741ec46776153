//! Processor models: what guests are told, that it is the same on every backend, and that what they are not told of
//! is not there.

use std::{collections::BTreeSet, fs, sync::Arc, time::Duration};

use caisson_config::Cpu;
use caisson_hypervisor::{
    Hypervisor,
    x86::{CpuidEntry, Feature, Level},
};
use caisson_image::GuestMode;
use caisson_machine::{CpuSpec, Input, Machine, Outcome};
use caisson_tests::{
    debian::{BOOT, run, spec},
    guests::{SUCCESS, guest_path},
    vm::{Vm, VmSpec, all_backends, backends},
};

const LIMIT: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// Named features that Linux does not show under that name.
const HIDDEN: [&str; 1] = ["spec_ctrl"];

fn can(backend: &Arc<dyn Hypervisor>, level: Level) -> bool {
    CpuSpec::model(level).table(&**backend, 1, 1 << 30).is_ok()
}

fn soft() -> Arc<dyn Hypervisor> {
    Arc::new(caisson_hypervisor_soft::Soft::default())
}

fn model(level: Level) -> Cpu {
    level.name().parse().expect("it has a name")
}

/// A processor that a file describes, and the folder that goes with the file.
fn described(text: &str) -> (Cpu, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("cpu.toml");
    fs::write(&path, text).expect("a file");
    let cpu = path.to_str().expect("the path is text").parse();
    (cpu.expect("it is a path"), folder)
}

/// What guest `name` prints with processor `cpu`.
fn print(backend: &Arc<dyn Hypervisor>, name: &str, cpu: Cpu, cpus: u32) -> String {
    let path = guest_path(name).expect("the guests build");
    let mut spec = VmSpec::new(
        backend,
        Input::open("kernel", &path, LIMIT).expect("it was built"),
    );
    (spec.cpu, spec.cpus) = (cpu, cpus);
    let vm = Vm::start(&spec).expect("the machine starts");
    let outcome = vm.wait(PATIENCE).expect("it ends");
    let text = vm.debugcon.text();
    assert_eq!(
        outcome,
        Outcome::DebugExit(SUCCESS.into()),
        "{name} on {}:\n{text}",
        backend.name()
    );
    text
}

#[test]
fn a_model_is_the_same_for_every_backend() {
    for level in Level::ALL {
        for cpus in [1, 3] {
            let mut first: Option<(Vec<CpuidEntry>, &'static str)> = None;
            for backend in all_backends() {
                let Ok(Some(table)) = CpuSpec::model(level).table(&*backend, cpus, 1 << 30) else {
                    println!("{} does not give {}", backend.name(), level.name());
                    continue;
                };
                // The clock's frequencies are the machine's, not the model's.
                let clock = |entry: &CpuidEntry| matches!(entry.leaf, 0x15 | 0x16);
                let mut table = table.entries().to_vec();
                table.retain(|entry| !clock(entry));
                match &first {
                    None => first = Some((table, backend.name())),
                    Some((seen, other)) => {
                        let what = format!("{} on {other} and {}", level.name(), backend.name());
                        assert_eq!(*seen, table, "{what}");
                    }
                }
            }
            assert!(first.is_some() || level > Level::V2, "{}", level.name());
        }
    }
}

/// Only where a backend works as meant: a KVM that emulates the guest's kernel (kvm_pvm) shows guests the features of the
/// host's processor, whatever CPUID it was given.
#[test]
fn guests_see_the_same_model_on_every_backend() {
    for level in Level::ALL {
        for cpus in [1, 3] {
            let mut first: Option<(String, &'static str)> = None;
            for backend in backends().iter().filter(|b| can(b, level)) {
                let text = print(backend, "cpuid", model(level), cpus);
                // The clock's frequencies are the machine's, not the model's.
                let cpuid: String = text
                    .lines()
                    .filter(|line| line.starts_with("cpuid "))
                    .filter(|line| !line.starts_with("cpuid 0000001"))
                    .map(|line| format!("{line}\n"))
                    .collect();
                assert!(cpuid.lines().count() > 20, "{text}");
                match &first {
                    None => first = Some((cpuid, backend.name())),
                    Some((seen, other)) => {
                        let what = format!("{} on {other} and {}", level.name(), backend.name());
                        assert_eq!(*seen, cpuid, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_the_software_cpu_does_not_offer_is_not_there() {
    let backend = soft();
    for level in Level::ALL.into_iter().filter(|level| can(&backend, *level)) {
        let _ = print(&backend, "model", model(level), 1);
        // The guests that look at what CPUID offers before they check it.
        for guest in ["encodings", "fpu", "paging", "msrs"] {
            let _ = print(&backend, guest, model(level), 1);
        }
    }
    let _ = print(&backend, "model", Cpu::Host, 1);
    // One group taken out of the middle of the host's processor.
    let (cpu, _folder) = described(
        "base = \"host\"\nremove = [\"popcnt\", \"movbe\", \"rdtscp\", \"smap\", \"fsgsbase\", \"spec_ctrl\", \"stibp\"]",
    );
    let _ = print(&backend, "model", cpu, 1);
}

#[test]
fn linux_shows_the_models_features() {
    for backend in backends() {
        // The highest that it gives here: a boot takes long.
        let highest = Level::ALL.into_iter().rfind(|level| can(&backend, *level));
        if let Some(level) = highest {
            let mut spec = spec(&backend, GuestMode::Command).expect("there is an image");
            spec.cpu = model(level);
            // With its defences, so that it uses the MSRs that it is told of.
            spec.boot.cmdline = spec.boot.cmdline.replace("mitigations=off", "");
            let script = "cat /proc/cpuinfo; dmesg | grep -e 'Linux version' -e 'unchecked MSR'";
            let done = run(&spec, &["sh", "-c", script], b"", BOOT).expect("the command runs");
            let flags: BTreeSet<&str> = done
                .stdout
                .lines()
                .find_map(|line| line.strip_prefix("flags"))
                .expect("there are flags")
                .split_whitespace()
                .collect();
            let known: BTreeSet<&str> = Feature::names().collect();
            let shown: BTreeSet<&str> = flags.intersection(&known).copied().collect();
            let model: BTreeSet<&str> = level
                .feature_names()
                .filter(|name| !HIDDEN.contains(name))
                .collect();
            assert_eq!(shown, model, "{} on {}", level.name(), backend.name());
            // What hides behind other names.
            for flag in ["ibrs", "ibpb", "constant_tsc", "hypervisor", "apic"] {
                assert!(flags.contains(flag), "{flag} is not in {flags:?}");
            }
            let name = format!("Caisson {}", level.name());
            assert!(done.stdout.contains(&name), "{}", done.stdout);
            assert!(done.stdout.contains("39 bits physical, 48 bits virtual"));
            assert!(done.stdout.contains("Linux version"), "there is no log");
            assert!(!done.stdout.contains("unchecked MSR"), "{}", done.stdout);
        }
    }
}

#[test]
fn a_processor_that_is_not_to_be_had_is_refused_with_all_that_is_lacking() {
    for backend in all_backends() {
        let path = guest_path("hello").expect("the guests build");
        let kernel = Input::open("kernel", &path, LIMIT).expect("it was built");
        let mut spec = VmSpec::new(&backend, kernel);
        let (cpu, _folder) = described("base = \"host\"\nadd = [\"vmx\", \"svm\", \"sgx\"]");
        spec.cpu = cpu;
        let error = Machine::new(spec.machine([const { None }; 4], None))
            .err()
            .expect("the machine is refused")
            .to_string();
        for part in ["cpu.toml", backend.name(), "vmx", "svm", "sgx"] {
            assert!(error.contains(part), "{error}");
        }
        // The backend itself refuses what the machine would have.
        let table = backend.offers(1).map(|mut offered| {
            if let Some(vmx) = Feature::named("vmx") {
                offered.promise(vmx, true);
            }
            offered
        });
        let partition = backend.create_partition(caisson_hypervisor::PartitionConfig {
            vcpus: 1,
            memory: caisson_memory::GuestMemory::new(Vec::new()).expect("no memory is a table too"),
            cpuid: Some(table.expect("it says")),
            tsc_hz: None,
            dirty: Default::default(),
        });
        let error = partition.err().expect("it is refused").to_string();
        assert!(error.contains("lacks: vmx"), "{error}");
    }
}
