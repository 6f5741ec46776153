//! Builds the crates that need no operating system for one that is none.

use std::{
    ffi::OsString,
    fs::Permissions,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use caisson_image::{ImageStore, Package, TerminalProgress};

/// The target: no operating system, no standard library.
const TARGET: &str = "x86_64-unknown-none";

/// The crates, which are what a paravisor without an operating system is built from. `x86-cpu` is
/// `no_std` too, but moves guest state through vector registers, which this target's calling
/// convention does without.
const CRATES: &[&str] = &[
    "caisson-memory",
    "caisson-device",
    "caisson-hypervisor",
    "caisson-lapic",
    "caisson-chipset",
    "caisson-firmware",
    "caisson-agent-protocol",
];

/// Where the target's core library comes from.
enum Toolchain {
    /// It is installed beside the compiler in use.
    Installed,
    /// The compiler in use has its library's source: cargo builds it.
    Source,
    /// Debian's compiler and the source that goes with it.
    Debian {
        rustc: PathBuf,
        libraries: Vec<PathBuf>,
        /// The library's source.
        sources: PathBuf,
        /// The library as built for this machine.
        host: PathBuf,
    },
}

/// Checks each crate and fails when one of them does not build.
pub(crate) fn check() -> Result<()> {
    let toolchain = toolchain()?;
    // Without "..": cargo compares paths by their letters.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .context("cannot find the workspace")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(&root)
        .args(["check", "--target", TARGET, "--no-default-features"]);
    for name in CRATES {
        command.args(["--package", name]);
    }
    match &toolchain {
        Toolchain::Installed => {}
        Toolchain::Source => {
            command
                .arg("-Zbuild-std=core,alloc")
                .env("RUSTC_BOOTSTRAP", "1");
        }
        Toolchain::Debian {
            rustc,
            libraries,
            sources,
            host,
        } => {
            let target = std::env::var_os("CARGO_TARGET_DIR")
                .map_or_else(|| root.join("target"), |target| root.join(target))
                .join("bare");
            let script = sysroot(&target.join("sysroot"), sources, host)?;
            command
                .arg("-Zbuild-std=core,alloc")
                .env("RUSTC_BOOTSTRAP", "1")
                // The library is compiled, not only checked, and nobody will debug it.
                .env("CARGO_PROFILE_DEV_DEBUG", "none")
                .env("RUSTC", script)
                .env("CAISSON_RUSTC", rustc)
                .env("LD_LIBRARY_PATH", joined(libraries)?)
                // Another compiler: its artifacts are not to replace those of the one in use.
                .env("CARGO_TARGET_DIR", target);
        }
    }
    let status = command.status().context("cannot run cargo")?;
    ensure!(
        status.success(),
        "a crate that is to need no operating system does not build for {TARGET}"
    );
    println!("{} crates build for {TARGET}", CRATES.len());
    Ok(())
}

fn toolchain() -> Result<Toolchain> {
    let sysroot = PathBuf::from(rustc(&["--print", "sysroot"])?);
    if sysroot
        .join("lib/rustlib")
        .join(TARGET)
        .join("lib")
        .is_dir()
    {
        return Ok(Toolchain::Installed);
    }
    if sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
        return Ok(Toolchain::Source);
    }
    eprintln!("the toolchain has neither {TARGET} nor its library's source: taking Debian's");
    let store = ImageStore::open_default()?;
    let packages = store
        .packages_with_dependencies(&["rustc-web", "rust-web-src"], &TerminalProgress::default())?;
    debian(&packages)
}

/// Finds compiler and source in Debian's packages and puts them together as the compiler expects them.
fn debian(packages: &[Package]) -> Result<Toolchain> {
    let find = |path: &str| {
        packages
            .iter()
            .map(|package| package.root.join(path))
            .find(|path| path.exists())
    };
    let rustc = find("usr/bin/rustc").context("Debian's rustc-web has no usr/bin/rustc")?;
    let sources = packages
        .iter()
        .filter_map(|package| std::fs::read_dir(package.root.join("usr/src")).ok())
        .flat_map(|folder| folder.flatten())
        .map(|entry| entry.path())
        .find(|path| path.join("library/core").is_dir())
        .context("Debian's rust-web-src has no usr/src/…/library/core")?;
    let host = packages
        .iter()
        .map(|package| package.root.join(HOST_LIBRARY))
        .find(|path| has_std(path))
        .context("Debian's libstd-rust-web-dev has no usr/lib/rustlib/x86_64-unknown-linux-gnu")?;
    let libraries = packages
        .iter()
        .flat_map(|package| {
            [
                "usr/lib/x86_64-linux-gnu",
                "usr/lib",
                "lib/x86_64-linux-gnu",
            ]
            .map(|l| package.root.join(l))
        })
        // The C library is the host's own: another one's parts would not go with its loader.
        .filter(|path| path.is_dir() && !path.join("libc.so.6").exists())
        .collect();
    Ok(Toolchain::Debian {
        rustc,
        libraries,
        sources,
        host,
    })
}

/// Where a package has the standard library for programs of this machine, such as build scripts.
const HOST_LIBRARY: &str = "usr/lib/rustlib/x86_64-unknown-linux-gnu";

fn has_std(folder: &Path) -> bool {
    std::fs::read_dir(folder.join("lib")).is_ok_and(|files| {
        files
            .flatten()
            .any(|file| file.file_name().to_string_lossy().starts_with("libstd-"))
    })
}

/// Puts the packages' parts together in `place` as the compiler wants them, and gives a script
/// there that is the compiler with these parts.
fn sysroot(place: &Path, sources: &Path, host: &Path) -> Result<PathBuf> {
    let rustlib = place.join("lib/rustlib");
    let failed = || format!("cannot make {}", place.display());
    if place.exists() {
        std::fs::remove_dir_all(place).with_context(failed)?;
    }
    std::fs::create_dir_all(rustlib.join("src")).with_context(failed)?;
    symlink(sources, rustlib.join("src/rust")).with_context(failed)?;
    symlink(host, rustlib.join("x86_64-unknown-linux-gnu")).with_context(failed)?;
    let script = place.join("rustc");
    let text = "#!/bin/sh\nexec \"$CAISSON_RUSTC\" --sysroot \"${0%/rustc}\" \"$@\"\n";
    std::fs::write(&script, text).with_context(failed)?;
    std::fs::set_permissions(&script, Permissions::from_mode(0o755)).with_context(failed)?;
    Ok(script)
}

fn joined(paths: &[PathBuf]) -> Result<OsString> {
    std::env::join_paths(paths)
        .context("a cache folder's name contains a colon; set XDG_CACHE_HOME to another")
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
