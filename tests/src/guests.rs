//! The bare-metal guests of `guests/`: how they are built, and what each needs
//! and should end with.
//!
//! A guest prints to the debug console (port 0xE9) and COM1. Its last line is
//! `caisson-guest: NAME: ok (N checks)` or `caisson-guest: NAME: FAIL (...)`;
//! then it writes 0x10 or another value to the debug-exit device.

use anyhow::{Context, Result, anyhow, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

/// What the debug-exit device makes (2v + 1) of the 0x10 that a guest writes
/// whose checks all passed.
pub const SUCCESS: u8 = 0x21;

/// A boot protocol that every guest's image can be entered through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// The PVH entry note.
    Pvh,
    /// A Multiboot 1 header with address fields.
    Multiboot,
}

/// How a guest's run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A write of [`SUCCESS`] to the debug-exit device.
    Success,
    /// A triple fault, which resets the machine or ends it.
    TripleFault,
    /// ACPI power-off (S5).
    PowerOff,
    /// A reset through the keyboard controller.
    Reset,
}

/// One guest: what to give it and what to expect.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// Name of its binary.
    pub name: &'static str,
    /// Number of vCPUs it needs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Time after which it has hung, on a slow host.
    pub timeout: Duration,
    /// How it ends.
    pub end: End,
    /// Whether it needs virtio devices on a PCI bus.
    pub virtio: bool,
    /// Why it does not pass on a KVM that emulates the guest's kernel (kvm_pvm), found by running
    /// it there.
    pub beyond_emulation: Option<&'static str>,
}

impl Guest {
    /// The same guest, which an emulated kernel does not carry.
    const fn beyond(self, why: &'static str) -> Self {
        Self {
            beyond_emulation: Some(why),
            ..self
        }
    }
}

const fn guest(name: &'static str, cpus: u32) -> Guest {
    Guest {
        name,
        cpus,
        memory_mib: 128,
        timeout: Duration::from_secs(60),
        end: End::Success,
        virtio: false,
        beyond_emulation: None,
    }
}

/// Every guest, in the order of what builds on what.
pub const GUESTS: &[Guest] = &[
    guest("hello", 1),
    guest("exceptions", 1).beyond("INT n raises #UD, CR0.TS and EM are ignored"),
    guest("modes", 1).beyond("no 32-bit paging; ring 3 outside long mode is emulated with gaps"),
    guest("segments", 1).beyond("no call gates, LAR, LSL, ARPL or conforming code"),
    guest("paging", 1).beyond("reserved bits of CR0 and CR4 are taken, no STAC and CLAC"),
    guest("access", 1).beyond("SMAP stops instruction fetches too, and it takes minutes"),
    guest("idt", 1).beyond("INT n raises #UD"),
    guest("debug", 1).beyond("no instruction breakpoints"),
    guest("encodings", 1).beyond("IOPL is always 0, LOCK MFENCE passes"),
    guest("syscall", 1).beyond("SYSCALL and SYSRET are the host kernel's own"),
    guest("msrs", 1).beyond("the PAT takes any type, the TSC cannot be moved, CR4.TSD is ignored"),
    guest("io", 1).beyond("IOPL is always 0"),
    guest("strings", 1).beyond("it passes, in more than a minute"),
    guest("smc", 1),
    guest("fpu", 1).beyond("CPUID offers no XSAVE, though XCR0 enables AVX"),
    guest("timer", 1)
        .beyond("reserved bits of x2APIC registers are taken, and illegal vectors not reported"),
    Guest {
        virtio: true,
        timeout: Duration::from_secs(240),
        ..guest("virtio", 1)
    },
    Guest {
        timeout: Duration::from_secs(240),
        ..guest("smp", 4)
    }
    .beyond("only three of four vCPUs were up in the second that each has, on a busy host"),
    guest("adversary", 1).beyond("nothing of it was done after 13 minutes, on a busy host"),
    guest("bench", 1).beyond(
        "it measures the software CPU; nothing of it was done after 13 minutes, on a busy host",
    ),
    Guest {
        end: End::TripleFault,
        ..guest("triple-fault", 1)
    },
    Guest {
        end: End::PowerOff,
        ..guest("power-off", 1)
    },
    Guest {
        end: End::Reset,
        ..guest("reset", 1)
    },
];

/// Path of a guest's ELF, building all guests on first use.
///
/// # Errors
/// When the build fails, or no guest has that name.
pub fn guest_path(name: &str) -> Result<PathBuf> {
    static BUILD: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let dir = BUILD
        .get_or_init(|| build().map_err(|e| format!("{e:#}")))
        .as_ref()
        .map_err(|e| anyhow!("cannot build the bare-metal guests: {e}"))?;
    let path = dir.join(name);
    ensure!(
        path.is_file(),
        "there is no guest \"{name}\" in {}",
        dir.display()
    );
    Ok(path)
}

/// The image of a guest that can be entered through one protocol only, made
/// beside the built one by blanking the other protocol's marker.
///
/// # Errors
/// When the guest cannot be built or the copy cannot be written.
pub fn image_for(name: &str, protocol: Protocol) -> Result<PathBuf> {
    let path = guest_path(name)?;
    let mut bytes =
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    // Multiboot's magic, or the type, name and size words of the PVH note.
    let (suffix, marker): (_, &[u8]) = match protocol {
        Protocol::Pvh => ("pvh", &0x1BAD_B002u32.to_le_bytes()),
        Protocol::Multiboot => ("multiboot", b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0"),
    };
    let aligned = |&at: &usize| at % 4 == 0;
    let at = bytes
        .windows(marker.len())
        .enumerate()
        .filter(|(_, w)| *w == marker)
        .map(|(at, _)| at)
        .find(aligned)
        .with_context(|| format!("{} has no {suffix} counterpart to blank", path.display()))?;
    // The type word for a note (so that it stays well-formed), the magic else.
    let word = if protocol == Protocol::Pvh {
        at
    } else {
        at + 8
    };
    bytes[word..word + 4].fill(0xFF);
    let copy = path.with_extension(suffix);
    // A rename, so that another test never reads half a file.
    let partial = path.with_extension(format!(
        "{suffix}.{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::write(&partial, &bytes)
        .with_context(|| format!("cannot write {}", partial.display()))?;
    std::fs::rename(&partial, &copy).with_context(|| format!("cannot write {}", copy.display()))?;
    Ok(copy)
}

/// Builds the guests' workspace and gives the folder of its programs.
fn build() -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guests");
    let target = target_dir()?.join("guests");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--quiet", "--offline", "--target-dir"])
        .arg(&target)
        .current_dir(&workspace);
    // The guests' own configuration decides flags and target, not the caller's.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text == "RUSTFLAGS"
            || text == "CARGO_ENCODED_RUSTFLAGS"
            || text.starts_with("CARGO_BUILD_")
            || text.starts_with("CARGO_PROFILE_")
            || (text.starts_with("CARGO_TARGET_") && text.ends_with("_RUSTFLAGS"))
        {
            command.env_remove(&name);
        }
    }
    let output = command.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!(
            "cargo build in {} failed:\n{}",
            workspace.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(target.join("x86_64-unknown-linux-gnu/debug"))
}

/// Cargo's target folder: from the environment, or from where this test runs.
fn target_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("CARGO_TARGET_DIR") {
        return Ok(std::path::absolute(dir)?);
    }
    let exe = std::env::current_exe()?;
    exe.ancestors()
        .find(|dir| dir.join("CACHEDIR.TAG").is_file())
        .map(Path::to_path_buf)
        .with_context(|| {
            format!(
                "{} is not inside a cargo target folder; set CARGO_TARGET_DIR",
                exe.display()
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_guest_is_built_and_bootable_through_both_protocols() {
        for guest in GUESTS {
            let elf = std::fs::read(guest_path(guest.name).unwrap()).unwrap();
            assert_eq!(&elf[..5], b"\x7FELF\x02", "{}", guest.name);
            let pvh = std::fs::read(image_for(guest.name, Protocol::Pvh).unwrap()).unwrap();
            let multiboot =
                std::fs::read(image_for(guest.name, Protocol::Multiboot).unwrap()).unwrap();
            assert_eq!(
                elf.iter().zip(&pvh).filter(|(a, b)| a != b).count(),
                4,
                "{}",
                guest.name
            );
            assert!(elf != multiboot && pvh != multiboot);
        }
    }

    #[test]
    fn an_unknown_guest_is_an_error_that_names_it() {
        let error = guest_path("no-such-guest").unwrap_err().to_string();
        assert!(error.contains("no-such-guest"), "{error}");
    }
}
