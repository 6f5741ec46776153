//! Every bare-metal guest, on every backend.

use anyhow::{Context, Result, ensure};
use caisson_config::VirtioTransport;
use caisson_hypervisor::Availability;
use caisson_machine::{Input, OnCrash, Outcome};
use caisson_tests::{
    guests::{End, GUESTS, Guest, Protocol, SUCCESS, guest_path, image_for},
    vm::{Vm, VmSpec, all_backends, tiers},
};

const LIMIT: u64 = 64 << 20;

/// Runs one guest to its end.
fn run(spec: &VmSpec, guest: &Guest) -> Result<()> {
    let vm = Vm::start(spec)?;
    let outcome = vm.wait(guest.timeout)?;
    let as_expected = match guest.end {
        End::Success => outcome == Outcome::DebugExit(SUCCESS.into()),
        End::TripleFault => matches!(outcome, Outcome::TripleFault(_)),
        End::PowerOff => outcome == Outcome::PowerOff,
        End::Reset => outcome == Outcome::Reset,
    };
    ensure!(as_expected, "{outcome}\n{}", vm.debugcon);
    if guest.end == End::Success {
        let text = vm.debugcon.text();
        let verdict = format!("caisson-guest: {}: ok (", guest.name);
        ensure!(
            text.contains(&verdict),
            "it says nothing of success:\n{text}"
        );
    }
    Ok(())
}

fn spec(
    backend: &std::sync::Arc<dyn caisson_hypervisor::Hypervisor>,
    guest: &Guest,
    path: &std::path::Path,
) -> VmSpec {
    let mut spec = VmSpec::new(
        backend,
        Input::open("kernel", path, LIMIT).expect("the guest was built"),
    );
    spec.cpus = guest.cpus;
    spec.memory_mib = guest.memory_mib;
    spec.virtio = guest.virtio.then_some(VirtioTransport::Pci);
    spec
}

#[test]
fn every_guest_passes_on_every_backend() {
    let mut failures = Vec::new();
    for backend in all_backends() {
        let slow = backend.probe().availability == Availability::Slow;
        for guest in GUESTS {
            if slow && let Some(why) = guest.beyond_emulation {
                println!("{} is not run on {}: {why}", guest.name, backend.name());
                continue;
            }
            let path = guest_path(guest.name).expect("the guests build");
            for &tier in tiers(&*backend) {
                let mut spec = spec(&backend, guest, &path);
                spec.tier = tier;
                let result = run(&spec, guest).with_context(|| {
                    format!("guest \"{}\" on {}, {tier:?}", guest.name, backend.name())
                });
                if let Err(error) = result {
                    failures.push(format!("{error:#}"));
                }
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} guests fail:\n{}",
        failures.len(),
        failures.join("\n\n")
    );
}

#[test]
fn a_guest_starts_through_each_boot_protocol() {
    let guest = GUESTS.first().expect("there are guests");
    for backend in all_backends() {
        for protocol in [Protocol::Pvh, Protocol::Multiboot] {
            let path = image_for(guest.name, protocol).expect("the guests build");
            let result = run(&spec(&backend, guest, &path), guest);
            result.unwrap_or_else(|error| panic!("{protocol:?} on {}: {error:#}", backend.name()));
        }
    }
}

#[test]
fn a_triple_fault_restarts_a_machine_that_is_to_restart() {
    let Some(guest) = GUESTS.iter().find(|guest| guest.end == End::TripleFault) else {
        panic!("there is a guest that triple-faults");
    };
    for backend in all_backends() {
        let path = guest_path(guest.name).expect("the guests build");
        let mut spec = spec(&backend, guest, &path);
        spec.on_crash = OnCrash::Restart;
        let vm = Vm::start(&spec).expect("the machine starts");
        let banner = "caisson-guest";
        let again = vm
            .debugcon
            .wait_for(banner, 0, guest.timeout)
            .and_then(|at| vm.debugcon.wait_for(banner, at, guest.timeout));
        again.unwrap_or_else(|error| panic!("on {}: {error:#}", backend.name()));
        vm.stop().expect("it stops");
        assert_eq!(vm.wait(guest.timeout).expect("it stops"), Outcome::Stopped);
    }
}
