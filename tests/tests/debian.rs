//! A real Debian, on every backend.

use std::time::Duration;

use caisson_agent_protocol::wire::ExitStatus;
use caisson_config::OnReboot;
use caisson_image::GuestMode;
use caisson_machine::Outcome;
use caisson_tests::{
    debian::{BOOT, run, run_on_host, spec},
    vm::{Moves, Vm, backends},
};

/// The end of the shell's prompt.
const PROMPT: &str = "# ";

/// Compile-like work whose results do not depend on the machine: text made, sorted, counted, packed and hashed.
const SCRIPT: &str = r#"
set -e
mkdir -p /tmp/load && cd /tmp/load 2>/dev/null || { mkdir -p load && cd load; }
rm -rf src && mkdir src
i=0
while [ $i -lt 60 ]; do
    awk -v n=$i 'BEGIN {
        srand(n)
        for (f = 0; f < 20; f++) {
            printf "int f%d_%d(int a, int b) {\n", n, f
            for (l = 0; l < 8; l++) printf "    a = a * %d + (b >> %d) - %d;\n", (n * 31 + f * 7 + l) % 97, l % 5, (n + l) % 13
            print "    return a ^ b;\n}\n"
        }
    }' > src/unit$i.c
    i=$((i + 1))
done
cat src/*.c | tr -cs 'a-zA-Z0-9_' '\n' | sort | uniq -c | sort -k1,1nr -k2 | head -20
cat src/*.c | sed -e 's/int/long/g' -e 's/[ ]*$//' | grep -c return
cat src/*.c | sha256sum
cat src/*.c | md5sum
cat src/*.c | gzip -9 | gzip -dc | sha256sum
tar cf - src | tar tf - | sort | sha256sum
tar cf - src | tar xOf - | wc -lc
awk 'BEGIN { x = 0.5; for (i = 0; i < 20000; i++) { x = 3.7 * x * (1 - x) + i * 1e-9 } printf "%.12f\n", x }'
awk 'BEGIN { for (i = 2; i < 4000; i++) { p = 1; for (d = 2; d * d <= i; d++) if (i % d == 0) { p = 0; break } n += p } print n }'
echo $((1234567 * 7654321 % 1000003)) $((0x7fffffff << 5))
"#;

#[test]
fn boots_to_a_shell_that_survives_a_move() {
    for backend in backends() {
        let spec = spec(&backend, GuestMode::Shell).expect("there is an image");
        let vm = Vm::start(&spec).expect("the machine starts");
        let at = vm.com1.wait_for(PROMPT, 0, BOOT).expect("a prompt");
        vm.type_text("echo sum-$((6 * 7))\n").unwrap();
        let at = vm
            .com1
            .wait_for("sum-42", at, BOOT)
            .expect("the shell answers");
        let at = vm.com1.wait_for(PROMPT, at, BOOT).expect("a prompt");
        vm.change_process().expect("the machine moves");
        vm.type_text("echo still-$((40 + 2)); poweroff -f\n")
            .unwrap();
        vm.com1
            .wait_for("still-42", at, BOOT)
            .expect("the shell answers after the move");
        assert_eq!(vm.wait(BOOT).expect("it powers off"), Outcome::PowerOff);
    }
}

#[test]
fn four_vcpus_and_memory_above_four_gib_are_there() {
    for backend in backends() {
        let mut spec = spec(&backend, GuestMode::Command).expect("there is an image");
        spec.cpus = 4;
        spec.memory_mib = 6 << 10;
        let script = "grep -c ^processor /proc/cpuinfo; awk '/MemTotal/ { print ($2 > 5900000) }' /proc/meminfo; \
            for n in 0 1 2 3; do taskset $((1 << n)) sh -c 'i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo $i' & \
            done; wait";
        let done = run(&spec, &["sh", "-c", script], b"", BOOT).expect("the command runs");
        assert_eq!(
            done.stdout, "4\n1\n2000\n2000\n2000\n2000\n",
            "{}",
            done.stderr
        );
        assert_eq!(done.status, ExitStatus::Code(0));
    }
}

#[test]
fn a_compile_like_load_gives_the_hosts_results() {
    let expected = run_on_host(SCRIPT).expect("the script runs on the host");
    assert!(expected.lines().count() > 25, "{expected}");
    for backend in backends() {
        for cpus in [1, 4] {
            let mut spec = spec(&backend, GuestMode::Command).expect("there is an image");
            spec.cpus = cpus;
            let done = run(&spec, &["sh", "-c", SCRIPT], b"", BOOT).expect("the script runs");
            assert_eq!(
                done.stdout,
                expected,
                "{cpus} vCPUs on {}: {}",
                backend.name(),
                done.stderr
            );
            assert_eq!(done.status, ExitStatus::Code(0));
        }
    }
}

#[test]
fn ten_moves_on_the_way_change_no_result() {
    let expected = run_on_host(SCRIPT).expect("the script runs on the host");
    for backend in backends() {
        for cpus in [1, 4] {
            let mut spec = spec(&backend, GuestMode::Command).expect("there is an image");
            spec.cpus = cpus;
            spec.moves = Moves::After(vec![Duration::from_millis(300); 10]);
            let done = run(&spec, &["sh", "-c", SCRIPT], b"", BOOT).expect("the script runs");
            assert_eq!(done.stdout, expected, "{cpus} vCPUs: {}", done.stderr);
            assert_eq!(done.status, ExitStatus::Code(0));
            // The first is before the first instruction.
            assert_eq!(done.moves, 11, "{cpus} vCPUs");
        }
    }
}

#[test]
fn input_output_and_status_of_a_command_are_exact() {
    let input: Vec<u8> = (0..200_000u32).map(|n| (n * 7 + n / 251) as u8).collect();
    for backend in backends() {
        let spec = spec(&backend, GuestMode::Command).expect("there is an image");
        let script = "sha256sum; echo oops >&2; exit 7";
        let done = run(&spec, &["sh", "-c", script], &input, BOOT).expect("the command runs");
        assert_eq!(done.stdout, format!("{}  -\n", sha256(&input)));
        assert_eq!(
            (done.stderr.as_str(), done.status),
            ("oops\n", ExitStatus::Code(7))
        );
        let missing = run(&spec, &["no-such-program"], b"", BOOT).expect("the guest runs");
        assert_eq!(missing.status, ExitStatus::Code(127));
    }
}

#[test]
fn reboot_and_panic_end_as_they_should() {
    for backend in backends() {
        let mut shell = spec(&backend, GuestMode::Shell).expect("there is an image");
        shell.on_reboot = OnReboot::Restart;
        let vm = Vm::start(&shell).expect("the machine starts");
        let at = vm.com1.wait_for(PROMPT, 0, BOOT).expect("a prompt");
        vm.type_text("reboot -f\n").unwrap();
        let at = vm
            .com1
            .wait_for("Linux version", at, BOOT)
            .expect("it starts again");
        let _ = vm
            .com1
            .wait_for(PROMPT, at, BOOT)
            .expect("a prompt after the reboot");
        vm.type_text("echo c > /proc/sysrq-trigger\n").unwrap();
        let outcome = vm.wait(BOOT).expect("it ends");
        assert!(
            matches!(&outcome, Outcome::Panic(what) if what.contains("sysrq")),
            "{outcome}\n{}",
            vm.com1
        );

        let mut rootless = spec(&backend, GuestMode::Shell).expect("there is an image");
        rootless.boot.initrd = None;
        let vm = Vm::start(&rootless).expect("the machine starts");
        let outcome = vm.wait(BOOT).expect("it ends");
        assert!(
            matches!(&outcome, Outcome::Panic(what) if what.contains("VFS")),
            "{outcome}\n{}",
            vm.com1
        );
    }
}

#[test]
fn a_pause_is_not_noticed() {
    for backend in backends() {
        let vm = Vm::start(&spec(&backend, GuestMode::Shell).expect("there is an image"))
            .expect("it starts");
        let at = vm.com1.wait_for(PROMPT, 0, BOOT).expect("a prompt");
        vm.pause().unwrap();
        let before = vm.now_ns().unwrap();
        vm.type_text("cat /proc/uptime | cut -d. -f1; echo up-done\n")
            .unwrap();
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(vm.now_ns().unwrap(), before);
        vm.resume().unwrap();
        vm.com1
            .wait_for("\nup-done", at, BOOT)
            .expect("the shell answers");
        vm.stop().unwrap();
        assert_eq!(vm.wait(BOOT).expect("it stops"), Outcome::Stopped);
        assert!(
            !vm.com1.text().contains("clocksource: timekeeping watchdog"),
            "{}",
            vm.com1
        );
    }
}

/// SHA-256 in hexadecimal, by the host's own program.
fn sha256(bytes: &[u8]) -> String {
    use std::io::Write;
    let mut child = std::process::Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("sha256sum is part of coreutils");
    let mut stdin = child.stdin.take().expect("it was piped");
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output().expect("it ends");
    writer
        .join()
        .expect("no panic")
        .expect("it reads its input");
    String::from_utf8_lossy(&output.stdout)
        .chars()
        .take(64)
        .collect()
}
