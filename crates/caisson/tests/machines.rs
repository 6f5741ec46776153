//! Whole runs of the binary with kernels of a few instructions: streams, status, ports.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use support::{Bench, asm, kernel};

#[test]
fn the_consoles_bytes_are_exact_and_the_debug_exit_is_the_status() {
    let bench = Bench::new();
    let text = "no\r\nnoise\n\x1b[1m";
    let image = bench.file(
        "k",
        kernel(&[asm::print(text), asm::debug_exit(20)].concat()),
    );
    let run = bench.run(["run", "--kernel", &image, "--debug-exit"]);
    assert_eq!(run.stdout, text, "{run:?}");
    assert_eq!(run.stderr, "");
    assert_eq!(run.code, Some(41));
}

#[test]
fn standard_input_is_typed_into_the_guest() {
    let bench = Bench::new();
    // The first byte of output says that the guest is listening.
    let code = [asm::print(">"), asm::echo_until_q(), asm::debug_exit(0)].concat();
    let image = bench.file("k", kernel(&code));
    let mut child = support::spawn(
        bench
            .command(["run", "--kernel", &image, "--debug-exit"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped()),
    );
    let data: Vec<u8> = (0..=255)
        .cycle()
        .take(3000)
        .filter(|byte| *byte != b'q')
        .collect();
    let mut stdin = child.stdin.take().unwrap();
    let sent = data.clone();
    let writer = thread::spawn(move || {
        stdin.write_all(&sent).unwrap();
        stdin.write_all(b"q").unwrap();
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.stdout[..1], *b">");
    assert!(
        output.stdout[1..] == data,
        "{} bytes of {}",
        output.stdout.len(),
        data.len()
    );
}

#[test]
fn ports_lead_to_files_and_sockets() {
    let bench = Bench::new();
    let image = bench.file(
        "k",
        kernel(&[asm::print("new"), asm::debug_exit(0)].concat()),
    );
    let log = bench.file("log", "old");
    let file = format!("file={log}");
    for (backend, contents) in [
        (file.clone(), "new"),
        (format!("{file},append=on"), "newnew"),
    ] {
        let run = bench.run([
            "run",
            "--kernel",
            &image,
            "--debug-exit",
            "--serial",
            &backend,
        ]);
        assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""), "{run:?}");
        assert_eq!(std::fs::read_to_string(&log).unwrap(), contents);
    }

    let code = [asm::echo_until_q(), asm::debug_exit(3)].concat();
    let image = bench.file("k", kernel(&code));
    let socket = bench.path("com1");
    let backend = format!("socket={}", socket.display());
    let mut child = support::spawn(&mut bench.command([
        "run",
        "--kernel",
        &image,
        "--debug-exit",
        "--serial",
        &backend,
    ]));
    let mut client = loop {
        match UnixStream::connect(&socket) {
            Ok(client) => break client,
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    };
    client.write_all(b"ping").unwrap();
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer, *b"ping");
    client.write_all(b"q").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert!(!socket.exists(), "the socket is removed");
}

#[test]
fn a_guest_that_crashes_is_status_3_with_the_reason() {
    let bench = Bench::new();
    let image = bench.file("k", kernel(&asm::triple_fault()));
    let run = bench.run(["run", "--kernel", &image, "--name", "wild"]);
    assert_eq!(run.code, Some(3), "{run:?}");
    assert!(run.stderr.contains("machine \"wild\""), "{run:?}");
    assert!(run.stderr.contains("triple"), "{run:?}");

    // Linux's words on the console before a reset are a panic, not a reboot.
    let words = "Kernel panic - not syncing: Attempted to kill init!\r\n";
    let image = bench.file("k", kernel(&[asm::print(words), asm::reset()].concat()));
    let run = bench.run(["run", "--kernel", &image]);
    assert_eq!(run.code, Some(3), "{run:?}");
    assert!(run.stderr.contains("Attempted to kill init!"), "{run:?}");
}

#[test]
fn a_reset_restarts_the_guest_or_ends_the_machine() {
    let bench = Bench::new();
    let image = bench.file("k", kernel(&[asm::print("boot."), asm::reset()].concat()));
    let run = bench.run(["run", "--kernel", &image, "--no-reboot"]);
    assert_eq!(
        (run.code, run.stdout.as_str()),
        (Some(0), "boot."),
        "{run:?}"
    );

    let mut child = support::spawn(
        bench
            .command(["run", "--kernel", &image])
            .stdout(Stdio::piped()),
    );
    let mut seen = [0; 15];
    child.stdout.take().unwrap().read_exact(&mut seen).unwrap();
    assert_eq!(seen, *b"boot.boot.boot.");
    // With its reader gone, nobody could see or stop the machine: it ends by itself.
    child.wait().unwrap();
}

#[test]
fn a_machine_that_is_left_is_saved_and_goes_on() {
    let bench = Bench::new();
    let code = [asm::print(">"), asm::echo_until_q(), asm::debug_exit(5)].concat();
    let image = bench.file("k", kernel(&code));
    let mut child = support::spawn(
        bench
            .command(["run", "--kernel", &image, "--debug-exit", "--accel", "soft"])
            .args(["--memory", "8M", "--save-on-exit", "nap"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    );
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut seen = [0; 4];
    stdout.read_exact(&mut seen[..1]).unwrap();
    stdin.write_all(b"abc").unwrap();
    stdout.read_exact(&mut seen[1..]).unwrap();
    assert_eq!(seen, *b">abc");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("caisson run --restore"), "{said}");

    // Twice, and the second time by its own description alone, from another folder.
    for more in [&["--accel", "soft"][..], &[]] {
        let mut child = support::spawn(
            bench
                .command(["run", "--quiet", "--restore"])
                .arg(format!("{},verify=on", bench.path("nap").display()))
                .args(more)
                .current_dir("/")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped()),
        );
        child.stdin.take().unwrap().write_all(b"defq").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.stdout, b"def");
        assert_eq!(output.status.code(), Some(11));
    }

    let run = bench.run(["run", "--restore", "nap", "--memory", "16M"]);
    assert_eq!(run.code, Some(1), "{run:?}");
    assert!(run.stderr.contains("bytes of memory"), "{run:?}");
    let run = bench.run(["run", "--restore", "nowhere"]);
    assert_eq!(run.code, Some(1), "{run:?}");
    assert!(run.stderr.contains("nowhere"), "{run:?}");
    let run = bench.run(["run", "--save-on-exit", "x", "--", "true"]);
    assert_eq!(run.code, Some(2), "{run:?}");
}
