//! Builds the crates that need no operating system for one that is none.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use caisson_image::{ImageStore, Package, TerminalProgress};

/// The target: no operating system, no standard library.
const TARGET: &str = "x86_64-unknown-none";

/// The crates, which are what a paravisor without an operating system is built from.
const CRATES: &[&str] = &[
    "caisson-memory",
    "caisson-device",
    "caisson-hypervisor",
    "caisson-lapic",
    "caisson-chipset",
    "caisson-firmware",
    "caisson-x86-cpu",
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
    },
}

/// Checks each crate and fails when one of them does not build.
pub(crate) fn check() -> Result<()> {
    let toolchain = toolchain()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
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
        Toolchain::Debian { rustc, libraries } => {
            let target = std::env::var_os("CARGO_TARGET_DIR")
                .map_or_else(|| root.join("target"), PathBuf::from);
            command
                .arg("-Zbuild-std=core,alloc")
                .env("RUSTC_BOOTSTRAP", "1")
                .env("RUSTC", rustc)
                .env("LD_LIBRARY_PATH", joined(libraries)?)
                // Another compiler: its artifacts are not to replace those of the one in use.
                .env("CARGO_TARGET_DIR", target.join("bare"));
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
    // The compiler looks for the source beside itself.
    let prefix = rustc
        .ancestors()
        .nth(2)
        .context("the compiler is in usr/bin")?;
    let place = prefix.join("lib/rustlib/src/rust");
    if !place.join("library/core").is_dir() {
        let parent = place.parent().context("the place has a folder")?;
        std::fs::create_dir_all(parent)
            .with_context(|| format!("cannot make {}", parent.display()))?;
        // What the package put there is a link that leads nowhere outside an installed system.
        let _ = std::fs::remove_file(&place);
        std::os::unix::fs::symlink(&sources, &place)
            .with_context(|| format!("cannot make {}", place.display()))?;
    }
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
    Ok(Toolchain::Debian { rustc, libraries })
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
