//! A `caisson` that is killed leaves nothing behind that is in anybody's way.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::{Bench, asm, kernel};

/// What takes longer does not come.
const PATIENCE: Duration = Duration::from_secs(60);

/// Connects to the socket of a machine that is about to listen, and hears that it runs.
fn talk(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    let mut client = loop {
        match UnixStream::connect(socket) {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::sleep(Duration::from_millis(5));
    };
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"ping").unwrap();
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer, *b"ping");
    client
}

fn start(bench: &Bench, image: &str, socket: &Path, accel: &str) -> Child {
    let backend = format!("socket={}", socket.display());
    support::spawn(
        bench
            .command([
                "run",
                "--accel",
                accel,
                "--kernel",
                image,
                "--debug-exit",
                "--serial",
                &backend,
            ])
            .stdout(Stdio::null()),
    )
}

/// Everything in the folders that a machine may write to.
fn files(bench: &Bench) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![bench.path("")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path.clone());
            }
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Processes whose parent was `pid`.
fn children(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default()
}

#[test]
fn after_kill_9_the_next_machine_starts_in_the_same_place() {
    let mut accels = vec!["soft"];
    if Path::new("/dev/kvm").exists() {
        accels.push("kvm");
    }
    for accel in accels {
        let bench = Bench::new();
        let code = [asm::echo_until_q(), asm::debug_exit(3)].concat();
        let image = bench.file("k", kernel(&code));
        let socket = bench.path("com1");
        let before = files(&bench);
        for _ in 0..3 {
            let mut child = start(&bench, &image, &socket, accel);
            let mut client = talk(&socket);
            assert_eq!(children(child.id()), "", "it has processes of its own");
            child.kill().unwrap();
            child.wait().unwrap();
            // Whoever was connected learns of it.
            assert_eq!(client.read(&mut [0]).unwrap_or(0), 0);
            assert!(UnixStream::connect(&socket).is_err(), "nobody listens");
            let mut left = files(&bench);
            left.retain(|path| *path != socket);
            assert_eq!(left, before, "only the socket's name is left");
        }
        let mut child = start(&bench, &image, &socket, accel);
        talk(&socket).write_all(b"q").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(7));
        assert_eq!(files(&bench), before, "the last one removed the socket");
    }
}
