//! `caisson run --disk`: images that are opened, refused, locked and put in order.

mod support;

use std::io::{Read, Write};
use std::process::Stdio;

use support::{Bench, asm, kernel};

/// A kernel that says something and ends the machine.
fn hello(bench: &Bench) -> String {
    let code = [asm::print("hello"), asm::debug_exit(0)].concat();
    bench.file("k", kernel(&code))
}

#[test]
fn a_machine_runs_with_disks_of_each_kind() {
    let bench = Bench::new();
    let image = hello(&bench);
    for (name, size) in [("a.raw", "1M"), ("b.qcow2", "1G"), ("c.vhd", "4M")] {
        let made = bench.run(["disk", "create", name, size]);
        assert_eq!(made.code, Some(0), "{made:?}");
    }
    let run = bench.run([
        "run",
        "--kernel",
        &image,
        "--debug-exit",
        "--disk",
        "a.raw,readonly",
        "--disk",
        "b.qcow2,bus=nvme,iops=100,limit-group=slow",
        "--disk",
        "c.vhd,ephemeral,bandwidth=1M,limit-group=fast",
        "--disk",
        "path=a.raw,readonly,cache=direct,id=second",
    ]);
    assert_eq!((run.code, run.stderr.as_str()), (Some(1), ""), "{run:?}");
    assert_eq!(run.stdout, "hello");
    let checked = bench.run(["disk", "check", "b.qcow2"]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
}

#[test]
fn what_cannot_be_opened_is_said_with_the_way_out() {
    let bench = Bench::new();
    let image = hello(&bench);
    bench.file("noise", vec![1u8; 4096]);
    bench.file("lies.qcow2", vec![1u8; 4096]);
    for (disk, code, parts) in [
        (
            "none.raw",
            1,
            &["none.raw", "No such file", "check the path"][..],
        ),
        ("noise", 1, &["cannot tell the format", "format="]),
        ("lies.qcow2,format=qcow2", 1, &["lies.qcow2", "qcow2"]),
        ("a.raw,bus=scsi", 2, &["scsi", "virtio"]),
        (
            "a.raw,readonly,ephemeral",
            2,
            &["a.raw", "drop readonly or ephemeral"],
        ),
        ("a.raw,iops=0", 2, &["a.raw", "at least 1"]),
        (
            "a.raw,iops-burst=4",
            2,
            &["a.raw", "give bandwidth or iops"],
        ),
        ("a.raw,limit-group=x", 2, &["a.raw", "limit-group"]),
        (
            "a.raw,id=much-longer-than-twenty-bytes",
            2,
            &["a.raw", "1 to 20"],
        ),
    ] {
        let run = bench.run(["run", "--kernel", &image, "--disk", disk]);
        assert_eq!(run.code, Some(code), "{disk}: {run:?}");
        for part in parts {
            assert!(run.stderr.contains(part), "{disk}: no {part}: {run:?}");
        }
    }
    let twice = ["--disk", "a.raw", "--disk", "a.raw,readonly"];
    let run = bench.run(["run", "--kernel", &image].iter().chain(&twice));
    assert_eq!(run.code, Some(2));
    assert!(run.stderr.contains("given twice"), "{run:?}");
    let nap = ["--save-on-exit", "nap", "--disk", "a.raw,ephemeral"];
    let run = bench.run(["run", "--kernel", &image].iter().chain(&nap));
    assert_eq!(run.code, Some(2));
    assert!(run.stderr.contains("throw-away layer"), "{run:?}");
}

#[test]
fn the_second_machine_that_would_write_is_told_who_does() {
    let bench = Bench::new();
    let code = [asm::print(">"), asm::echo_until_q(), asm::debug_exit(0)].concat();
    let waits = bench.file("w", kernel(&code));
    let image = hello(&bench);
    assert_eq!(bench.run(["disk", "create", "a.qcow2", "8M"]).code, Some(0));
    let machine = ["run", "--name", "first", "--kernel", &waits, "--debug-exit"];
    let mut first = support::spawn(
        bench
            .command(machine.iter().chain(&["--disk", "a.qcow2"]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped()),
    );
    let mut said = [0];
    first
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    for disk in [
        "a.qcow2",
        "a.qcow2,bus=nvme",
        "a.qcow2,ephemeral",
        "a.qcow2,readonly",
    ] {
        let second = bench.run(["run", "--kernel", &image, "--debug-exit", "--disk", disk]);
        assert_eq!(second.code, Some(1), "{disk}: {second:?}");
        assert!(
            second.stderr.contains("in use by machine \"first\""),
            "{disk}: {second:?}"
        );
    }
    first.stdin.as_mut().unwrap().write_all(b"q").unwrap();
    assert_eq!(first.wait().unwrap().code(), Some(1));
    let second = bench.run([
        "run",
        "--kernel",
        &image,
        "--debug-exit",
        "--disk",
        "a.qcow2",
    ]);
    assert_eq!(second.code, Some(1), "{second:?}");
    assert_eq!(second.stdout, "hello");
}
