//! Checks the crates that are to build for other targets than the machine at hand: the devices for
//! one without an operating system, and everything above a hypervisor backend for the hosts that
//! we mean to support.

mod debian;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

/// Some crates and the targets that they are checked for together.
struct Job {
    targets: &'static [&'static str],
    crates: &'static [&'static str],
    /// Further arguments to cargo.
    arguments: &'static [&'static str],
    /// The parts of Rust's library that they need.
    library: &'static str,
}

const JOBS: &[Job] = &[
    // What a paravisor without an operating system is built from. `x86-cpu` is `no_std` too, but
    // moves guest state through vector registers, which this target's calling convention does without.
    Job {
        targets: &["x86_64-unknown-none"],
        crates: &[
            "caisson-memory",
            "caisson-device",
            "caisson-block",
            "caisson-packet",
            "caisson-user-net",
            "caisson-hypervisor",
            "caisson-lapic",
            "caisson-chipset",
            "caisson-pci",
            "caisson-virtio",
            "caisson-nvme",
            "caisson-firmware",
            "caisson-agent-protocol",
        ],
        arguments: &["--no-default-features"],
        library: "core,alloc",
    },
    // The hosts. `image` is not among them: it runs apt, and two of the libraries that it unpacks
    // packages with are C, for which another host's compiler would be needed.
    Job {
        targets: &[
            "aarch64-unknown-linux-gnu",
            "aarch64-apple-darwin",
            "x86_64-pc-windows-msvc",
            "aarch64-pc-windows-msvc",
        ],
        crates: &[
            "caisson-memory",
            "caisson-device",
            "caisson-block",
            "caisson-packet",
            "caisson-user-net",
            "caisson-hypervisor",
            "caisson-lapic",
            "caisson-chipset",
            "caisson-pci",
            "caisson-virtio",
            "caisson-nvme",
            "caisson-firmware",
            "caisson-agent-protocol",
            "caisson-config",
            "caisson-machine",
        ],
        arguments: &[],
        library: "std,panic_abort",
    },
    // The software CPU runs on x86-64 processors only.
    Job {
        targets: &["x86_64-pc-windows-msvc"],
        crates: &["caisson-x86-cpu"],
        arguments: &[],
        library: "std,panic_abort",
    },
];

/// A compiler with the library's source, for targets whose library is not installed.
struct Builder {
    /// The compiler to use instead of the one in use.
    rustc: Option<PathBuf>,
    environment: Vec<(&'static str, OsString)>,
}

/// Checks each crate for each of its targets, or for those in `only`, and fails when one does not
/// build.
pub(crate) fn check(only: &[String]) -> Result<()> {
    let known = |target: &str| JOBS.iter().any(|job| job.targets.contains(&target));
    if let Some(unknown) = only.iter().find(|target| !known(target)) {
        bail!("nothing is checked for the target {unknown:?}");
    }
    // Without "..": cargo compares paths by their letters.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .context("cannot find the workspace")?;
    // Another compiler, or other flags: the artifacts are not to replace those of the tests.
    let folder = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root.join("target"), |target| root.join(target))
        .join("bare");
    let sysroot = PathBuf::from(rustc(&["--print", "sysroot"])?);
    let mut builder = None;
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for job in JOBS {
        let wanted = job
            .targets
            .iter()
            .copied()
            .filter(|target| only.is_empty() || only.iter().any(|o| o == target));
        let (installed, missing): (Vec<&str>, Vec<&str>) =
            wanted.partition(|target| has_library(&sysroot, target));
        if !installed.is_empty() {
            run(cargo(&root, job, &installed), &installed)?;
        }
        if !missing.is_empty() {
            let builder = match &mut builder {
                Some(builder) => builder,
                none => none.insert(builder_for(&sysroot, &missing, &folder)?),
            };
            let mut command = cargo(&root, job, &missing);
            builder.equip(&mut command, job, &folder);
            run(command, &missing)?;
        }
        for target in installed.into_iter().chain(missing) {
            match counts.iter_mut().find(|(counted, _)| *counted == target) {
                Some((_, count)) => *count += job.crates.len(),
                None => counts.push((target, job.crates.len())),
            }
        }
    }
    for (target, count) in counts {
        let crates = if count == 1 {
            "crate builds"
        } else {
            "crates build"
        };
        println!("{count} {crates} for {target}");
    }
    Ok(())
}

fn cargo(root: &Path, job: &Job, targets: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(root)
        .args(["check", "--lib"])
        .args(job.arguments);
    for name in job.crates {
        command.args(["--package", name]);
    }
    // One run for all targets: what runs on this machine, such as derive macros, is built once.
    for target in targets {
        command.args(["--target", target]);
    }
    command
}

fn run(mut command: Command, targets: &[&str]) -> Result<()> {
    let status = command.status().context("cannot run cargo")?;
    ensure!(
        status.success(),
        "a crate does not build for {}",
        targets.join(" or ")
    );
    Ok(())
}

impl Builder {
    /// Has `command` build the library, as cheaply as possible: it is neither run nor debugged.
    fn equip(&self, command: &mut Command, job: &Job, folder: &Path) {
        command
            .arg(format!("-Zbuild-std={}", job.library))
            // Without backtraces, which bring five crates.
            .arg("-Zbuild-std-features=")
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_DIR", folder)
            .env("CARGO_PROFILE_DEV_DEBUG", "none")
            // cargo builds the library even when it only checks. With this the compiler stops where
            // code would be made of it. What runs on this machine is not concerned.
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTFLAGS", "-Zno-codegen");
        if let Some(rustc) = &self.rustc {
            command.env("RUSTC", rustc);
        }
        for (name, value) in &self.environment {
            command.env(name, value);
        }
    }
}

fn builder_for(sysroot: &Path, missing: &[&str], folder: &Path) -> Result<Builder> {
    if sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
        return Ok(Builder {
            rustc: None,
            environment: Vec::new(),
        });
    }
    eprintln!(
        "the toolchain has neither the library for {} nor its source: taking Debian's",
        missing.join(", ")
    );
    debian::builder(&folder.join("sysroot"))
}

fn has_library(sysroot: &Path, target: &str) -> bool {
    sysroot
        .join("lib/rustlib")
        .join(target)
        .join("lib")
        .is_dir()
}

fn rustc(arguments: &[&str]) -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(&rustc)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {rustc:?}"))?;
    if !output.status.success() {
        bail!(
            "{rustc:?} {arguments:?} fails: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
