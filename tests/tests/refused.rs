//! Machines that cannot be: each is refused with the thing, the cause and the way out.

use std::sync::Arc;

use caisson_config::{ByteSize, CharBackend, FileBackend, Limits, MachineConfig, SocketBackend};
use caisson_hypervisor::Hypervisor;
use caisson_machine::{BootSpec, Input, Machine, MachineSpec, host_memory};
use caisson_tests::{
    debian,
    guests::guest_path,
    vm::{VmSpec, backends},
};

const LIMIT: u64 = 64 << 20;

fn hello(backend: &Arc<dyn Hypervisor>) -> VmSpec {
    let path = guest_path("hello").expect("the guests build");
    VmSpec::new(
        backend,
        Input::open("kernel", &path, LIMIT).expect("it was built"),
    )
}

/// The error of a machine that differs from a good one by `change`.
fn refused(backend: &Arc<dyn Hypervisor>, change: impl FnOnce(&mut VmSpec)) -> String {
    let mut spec = hello(backend);
    change(&mut spec);
    let error = Machine::new(spec.machine([const { None }; 4], None))
        .err()
        .expect("the machine is refused");
    format!("{:#}", anyhow::Error::from(error))
}

#[test]
fn vcpus_and_memory_out_of_range() {
    for backend in backends() {
        let text = refused(&backend, |spec| spec.cpus = 0);
        assert!(
            text.contains("0 vCPUs") && text.contains(&backend.max_vcpus().to_string()),
            "{text}"
        );
        let text = refused(&backend, |spec| spec.cpus = 10_000);
        assert!(text.contains("10000 vCPUs"), "{text}");
        let host = host_memory().expect("the host says") >> 20;
        let text = refused(&backend, |spec| spec.memory_mib = host + 1024);
        assert!(text.contains(&host.to_string()), "{text}");
        let text = refused(&backend, |spec| spec.memory_mib = 1);
        assert!(text.contains("1 MiB") && text.contains("memory"), "{text}");
        let limits = Limits {
            max_cpus: backend.max_vcpus(),
            host_memory: host_memory().map(ByteSize::from_bytes),
        };
        let config = MachineConfig {
            cpus: 10_000,
            ..MachineConfig::default()
        };
        assert!(config.validate(&limits).is_err());
    }
}

#[test]
fn kernels_and_initrds_that_do_not_fit_or_are_damaged() {
    let kernel =
        std::fs::read(&debian::image().expect("there is an image").kernel).expect("it is readable");
    for backend in backends() {
        let text = refused(&backend, |spec| {
            spec.boot.initrd = Some(Input::bytes("big.img", vec![0; 129 << 20]))
        });
        assert!(
            text.contains("big.img") && text.contains("129 MiB") && text.contains("128 MiB"),
            "{text}"
        );
        let text = refused(&backend, |spec| {
            spec.boot.kernel = Input::bytes("vmlinuz", kernel.clone());
            spec.memory_mib = 8;
        });
        assert!(text.contains("memory"), "{text}");
        for len in [
            0,
            1,
            511,
            512,
            0x1f1,
            4096,
            kernel.len() / 2,
            // What follows the last eighth may be a signature.
            kernel.len() * 7 / 8,
        ] {
            let text = refused(&backend, |spec| {
                spec.boot.kernel = Input::bytes("cut", &kernel[..len])
            });
            assert!(text.contains("\"cut\""), "{len}: {text}");
        }
        let text = refused(&backend, |spec| {
            spec.boot.kernel = Input::bytes("tool", std::fs::read("/bin/true").unwrap())
        });
        assert!(text.contains("accepted are"), "{text}");
    }
}

#[test]
fn files_that_cannot_be_had() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none");
    let error = Input::open("kernel", &missing, LIMIT)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("none") && error.contains("No such file"),
        "{error}"
    );
    let error = Input::open("initrd", folder.path(), LIMIT)
        .unwrap_err()
        .to_string();
    assert!(error.contains("directory"), "{error}");

    let backend = backends().remove(0);
    let path = |name: &str| {
        folder
            .path()
            .join(name)
            .to_str()
            .expect("it is UTF-8")
            .parse()
            .expect("it is a path")
    };
    let open = |serial: CharBackend| {
        let config = MachineConfig {
            serial: vec![serial],
            ..MachineConfig::default()
        };
        let boot = BootSpec {
            kernel: Input::bytes("k", vec![]),
            initrd: None,
            modules: vec![],
            cmdline: String::new(),
        };
        MachineSpec::from_config(&config, backend.clone(), boot, || None)
            .err()
            .expect("refused")
            .to_string()
    };
    let text = open(CharBackend::Stdio);
    assert!(
        text.contains("COM1") && text.contains("file=PATH"),
        "{text}"
    );
    let text = open(CharBackend::File(FileBackend {
        path: path("no/such/folder"),
        append: false,
    }));
    assert!(text.contains("no/such/folder"), "{text}");
    let _listener = std::os::unix::net::UnixListener::bind(folder.path().join("taken")).unwrap();
    let text = open(CharBackend::Socket(SocketBackend {
        path: path("taken"),
    }));
    assert!(text.contains("in use"), "{text}");
}
