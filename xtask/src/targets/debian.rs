//! Debian's compiler and the source of its library, without installing either.
//!
//! Of the packages that Debian's `rustc-web` depends on, those for linking are left out: a check
//! links nothing but what runs on this machine, and that with this machine's linker.

use std::{
    ffi::OsString,
    fs::{self, Permissions},
    io::ErrorKind,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use caisson_image::{
    ImageStore, Limits, Package, PackageFile, TerminalProgress, unpack, unpack_some,
};

use super::Builder;

/// The compiler's shared parts and its library for this machine, with all that they depend on.
const LIBRARIES: &str = "libstd-rust-web-dev";
/// The compiler itself, and the library's source.
const COMPILER: &str = "rustc-web";
const SOURCE: &str = "rust-web-src";

/// Where a package has the standard library for programs of this machine, such as build scripts.
const HOST_LIBRARY: &str = "usr/lib/rustlib/x86_64-unknown-linux-gnu";

/// Names the packages that a folder was made of.
const STAMP: &str = "packages";

/// Fetches Debian's packages and puts them together in `place` as the compiler wants them.
pub(super) fn builder(place: &Path) -> Result<Builder> {
    let store = ImageStore::open_default()?;
    let progress = TerminalProgress::default();
    let libraries = store.packages_with_dependencies(&[LIBRARIES], &progress)?;
    let files = store.package_files(&[COMPILER, SOURCE], &progress)?;
    let [compiler, source] = &files[..] else {
        unreachable!("two were asked for");
    };
    let of_library = libraries.iter().find(|package| package.name == LIBRARIES);
    let version = of_library.map(|package| package.version.as_str());
    for file in &files {
        ensure!(
            Some(file.version.as_str()) == version,
            "Debian's {LIBRARIES} and {} are of different versions; try again with newer package lists",
            file.name
        );
    }
    let host = libraries
        .iter()
        .map(|package| package.root.join(HOST_LIBRARY))
        .find(|path| has_std(path))
        .with_context(|| format!("Debian's {LIBRARIES} has no {HOST_LIBRARY}"))?;
    let stamp = format!("{compiler:?}\n{source:?}\n{}\n", host.display());
    if fs::read_to_string(place.join(STAMP)).is_ok_and(|found| found == stamp) {
        return equipped(place, &libraries);
    }

    let failed = || format!("cannot make {}", place.display());
    let parent = place.parent().context("the root is no place")?;
    fs::create_dir_all(parent).with_context(failed)?;
    let staging = tempfile::Builder::new()
        .prefix(".sysroot-")
        .tempdir_in(parent)
        .with_context(failed)?;
    assemble(staging.path(), compiler, source, &host).with_context(failed)?;
    fs::write(staging.path().join(STAMP), stamp).with_context(failed)?;
    match fs::remove_dir_all(place) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).with_context(failed)?,
        _ => {}
    }
    fs::rename(staging.keep(), place).with_context(failed)?;
    equipped(place, &libraries)
}

/// Unpacks what is needed of the packages into `folder`, with a script that is the compiler with these parts.
fn assemble(
    folder: &Path,
    compiler: &PackageFile,
    source: &PackageFile,
    host: &Path,
) -> Result<()> {
    unpack(&compiler.file, folder, Limits::default())?;
    ensure!(
        folder.join("usr/bin/rustc").exists(),
        "Debian's {COMPILER} has no usr/bin/rustc"
    );
    // The compiler's own source is most of the package.
    unpack_some(&source.file, folder, Limits::default(), |path| {
        let mut parts = path.split('/');
        parts.next() == Some("usr")
            && parts.next() == Some("src")
            && parts.nth(1) == Some("library")
    })?;
    let source = fs::read_dir(folder.join("usr/src"))
        .with_context(|| format!("Debian's {SOURCE} has no usr/src"))?
        .flatten()
        .map(|entry| entry.file_name())
        .find(|name| {
            let library = folder.join("usr/src").join(name).join("library");
            library.join("core").is_dir()
        })
        .with_context(|| format!("Debian's {SOURCE} has no usr/src/…/library/core"))?;
    let rustlib = folder.join("lib/rustlib");
    fs::create_dir_all(rustlib.join("src"))?;
    symlink(
        Path::new("../../../usr/src").join(source),
        rustlib.join("src/rust"),
    )?;
    symlink(host, rustlib.join("x86_64-unknown-linux-gnu"))?;
    let script = folder.join("rustc");
    let text = "#!/bin/sh\nexec \"${0%/rustc}/usr/bin/rustc\" --sysroot \"${0%/rustc}\" \"$@\"\n";
    fs::write(&script, text)?;
    fs::set_permissions(&script, Permissions::from_mode(0o755))?;
    Ok(())
}

fn equipped(place: &Path, libraries: &[Package]) -> Result<Builder> {
    const FOLDERS: [&str; 3] = [
        "usr/lib/x86_64-linux-gnu",
        "usr/lib",
        "lib/x86_64-linux-gnu",
    ];
    let paths: Vec<PathBuf> = libraries
        .iter()
        .flat_map(|package| FOLDERS.map(|folder| package.root.join(folder)))
        // The C library is the host's own: another one's parts would not go with its loader.
        .filter(|path| path.is_dir() && !path.join("libc.so.6").exists())
        .collect();
    Ok(Builder {
        rustc: Some(place.join("rustc")),
        environment: vec![("LD_LIBRARY_PATH", joined(&paths)?)],
    })
}

fn has_std(folder: &Path) -> bool {
    fs::read_dir(folder.join("lib")).is_ok_and(|files| {
        files
            .flatten()
            .any(|file| file.file_name().to_string_lossy().starts_with("libstd-"))
    })
}

fn joined(paths: &[PathBuf]) -> Result<OsString> {
    std::env::join_paths(paths)
        .context("a cache folder's name contains a colon; set XDG_CACHE_HOME to another")
}
