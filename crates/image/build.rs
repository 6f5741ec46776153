//! Builds the guest's init program (`guests/init`) with the compiler that builds this crate.
//!
//! It is a single static program without any library, so one call of `rustc` is enough, and it can
//! be embedded in this crate without a package of its own.

use std::env;
use std::path::Path;
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/init/src");
    let wire = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent-protocol/src/wire");
    for folder in [&guests, &wire] {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    println!("cargo::rerun-if-env-changed=RUSTC");
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("init");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(&rustc);
    command
        .args(["--crate-name", "caisson_init", "--crate-type", "bin"])
        .args([
            "--edition",
            "2024",
            "--target",
            TARGET,
            "--cap-lints",
            "warn",
        ])
        .args([
            "-C",
            "opt-level=s",
            "-C",
            "panic=abort",
            "-C",
            "strip=symbols",
        ])
        .args([
            "-C",
            "relocation-model=static",
            "-C",
            "target-feature=+crt-static",
        ])
        .args([
            "-C",
            "overflow-checks=on",
            "-C",
            "codegen-units=1",
            "-C",
            "lto=fat",
        ]);
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
    ] {
        command.arg("-C").arg(format!("link-arg={argument}"));
    }
    command.arg("-o").arg(&out).arg(guests.join("main.rs"));
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!(
            "the guest's init program did not build ({status}): it needs rustc's {TARGET} target and a C compiler as linker"
        ),
        Err(error) => panic!("cannot run {}: {error}", rustc.display()),
    }
}
