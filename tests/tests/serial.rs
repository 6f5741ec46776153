//! Serial ports at files and sockets, with a real guest behind them.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use caisson_config::{CharBackend, FileBackend, HugePages, MachineConfig, Memory, SocketBackend};
use caisson_image::GuestMode;
use caisson_machine::{Machine, MachineSpec, Outcome};
use caisson_tests::{
    debian::{BOOT, spec},
    vm::backends,
};

/// Reads from `stream` until `text` has come.
fn read_until(stream: &mut UnixStream, text: &str) -> String {
    stream.set_read_timeout(Some(BOOT)).unwrap();
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !seen
        .windows(text.len())
        .any(|window| window == text.as_bytes())
    {
        let n = stream
            .read(&mut buffer)
            .unwrap_or_else(|e| panic!("{e}:\n{}", String::from_utf8_lossy(&seen)));
        assert_ne!(
            n,
            0,
            "the machine closed the socket:\n{}",
            String::from_utf8_lossy(&seen)
        );
        seen.extend_from_slice(&buffer[..n]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

#[test]
fn a_shell_on_a_socket_and_a_log_in_a_file() {
    for backend in backends() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().parse().unwrap();
        let template = spec(&backend, GuestMode::Shell).expect("there is an image");
        let config = MachineConfig {
            serial: vec![
                CharBackend::Socket(SocketBackend { path: path("com1") }),
                CharBackend::File(FileBackend {
                    path: path("com2"),
                    append: false,
                }),
            ],
            memory: Memory {
                size: "256M".parse().unwrap(),
                hugepages: HugePages::Auto,
            },
            ..MachineConfig::default()
        };
        let described =
            MachineSpec::from_config(&config, backend.clone(), template.boot.clone(), || None)
                .unwrap();
        let machine = Machine::new(described).unwrap();
        let socket = folder.path().join("com1");
        let mut client = UnixStream::connect(&socket).unwrap();
        machine.start().unwrap();
        read_until(&mut client, "# ");
        client
            .write_all(b"echo one-$((1 + 1)) > /dev/ttyS1; echo first-$((2 + 2))\n")
            .unwrap();
        read_until(&mut client, "first-4");
        drop(client);
        let mut client = UnixStream::connect(&socket).unwrap();
        client
            .write_all(b"echo second-$((3 + 3)); poweroff -f\n")
            .unwrap();
        read_until(&mut client, "second-6");
        assert_eq!(machine.wait_for(BOOT), Some(Outcome::PowerOff));
        let log = std::fs::read_to_string(folder.path().join("com2")).unwrap();
        assert_eq!(log.trim_end(), "one-2");
        drop(machine);
        assert!(!socket.exists());
    }
}
