//! Debian in a machine: the small image, commands in it, and the same commands on the host.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use caisson_agent_protocol::{StartRequest, wire::ExitStatus};
use caisson_config::VirtioTransport;
use caisson_hypervisor::Hypervisor;
use caisson_image::{
    CmdlineOptions, GuestMode, ImageStore, MiniImage, TerminalProgress, default_cmdline,
};
use caisson_machine::{BootSpec, CommandEnding, Input, Outcome, command};

use crate::vm::{Console, Vm, VmSpec};

/// Time for Debian to boot, on a slow and busy host without optimisation.
pub const BOOT: Duration = Duration::from_secs(600);
/// The largest file that a test starts from, in bytes.
const LIMIT: u64 = 512 << 20;

/// The small image, fetched on first use.
///
/// # Errors
/// It cannot be fetched or made.
pub fn image() -> Result<&'static MiniImage> {
    static IMAGE: OnceLock<Result<MiniImage, String>> = OnceLock::new();
    let image = IMAGE.get_or_init(|| {
        let store = ImageStore::open_default().map_err(|error| error.to_string())?;
        store
            .ensure_mini(&TerminalProgress::default())
            .map_err(|error| error.to_string())
    });
    image
        .as_ref()
        .map_err(|error| anyhow!("cannot get the image: {error}"))
}

/// A machine that boots the small image in `mode`.
///
/// # Errors
/// The image cannot be fetched.
pub fn spec(backend: &Arc<dyn Hypervisor>, mode: GuestMode) -> Result<VmSpec> {
    spec_of(backend, mode, image()?)
}

/// A machine whose image loads the kernel modules `modules` and which has virtio devices on `transport`.
///
/// # Errors
/// The image cannot be fetched or made.
pub fn virtio_spec(
    backend: &Arc<dyn Hypervisor>,
    transport: VirtioTransport,
    modules: &[&str],
) -> Result<VmSpec> {
    let store = ImageStore::open_default()?;
    let image = store.ensure_mini_with(modules, &TerminalProgress::default())?;
    let mut spec = spec_of(backend, GuestMode::Shell, &image)?;
    spec.virtio = Some(transport);
    Ok(spec)
}

fn spec_of(backend: &Arc<dyn Hypervisor>, mode: GuestMode, image: &MiniImage) -> Result<VmSpec> {
    let options = CmdlineOptions {
        mode,
        boot_log: true,
        speculation: false,
        ..CmdlineOptions::default()
    };
    let mut spec = VmSpec::new(backend, Input::open("kernel", &image.kernel, LIMIT)?);
    spec.boot = BootSpec {
        initrd: Some(Input::open("initrd", &image.initramfs, LIMIT)?),
        cmdline: default_cmdline(&options),
        ..spec.boot
    };
    spec.memory_mib = 256;
    Ok(spec)
}

/// What a command left.
#[derive(Debug, PartialEq, Eq)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// How often its machine went on in a fresh process.
    pub moves: u32,
}

/// Boots the image, runs `arguments` with `stdin` in it, and waits until the guest has powered off.
///
/// # Errors
/// The machine does not do so within `patience`.
pub fn run(
    spec: &VmSpec,
    arguments: &[&str],
    stdin: &[u8],
    patience: Duration,
) -> Result<Finished> {
    let (stdout, stderr) = (Console::default(), Console::default());
    let request = StartRequest {
        arguments: arguments
            .iter()
            .map(|argument| argument.as_bytes().to_vec())
            .collect(),
        ..StartRequest::default()
    };
    let (end, session) = command(&request, Box::new(stdout.clone()), Box::new(stderr.clone()))?;
    let vm = Vm::start_with(spec, Some(Box::new(end)))?;
    let (sender, stdin) = (session.clone(), stdin.to_vec());
    let feeder = std::thread::spawn(move || {
        sender.send_stdin(&stdin);
        sender.close_stdin();
    });
    let outcome = vm
        .wait(patience)
        .with_context(|| format!("running {arguments:?}"))?;
    feeder
        .join()
        .map_err(|_| anyhow!("the thread that feeds standard input panicked"))?;
    ensure!(
        outcome == Outcome::PowerOff,
        "{arguments:?}: {outcome}\n{}",
        vm.com1
    );
    match session.wait() {
        CommandEnding::Exit(status) => Ok(Finished {
            status,
            stdout: stdout.text(),
            stderr: stderr.text(),
            moves: vm.moves(),
        }),
        other => bail!("{arguments:?}: {other:?}\n{}", vm.com1),
    }
}

/// Runs `script` with the image's own busybox on the host, in an empty environment, and gives its standard output.
///
/// # Errors
/// The busybox cannot be had, or the script fails.
pub fn run_on_host(script: &str) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let busybox = unpack_busybox(folder.path())?;
    let applets = folder.path().join("bin");
    fs::create_dir(&applets)?;
    let installed = Command::new(&busybox)
        .args(["--install", "-s"])
        .arg(&applets)
        .output()?;
    ensure!(
        installed.status.success(),
        "{}",
        String::from_utf8_lossy(&installed.stderr)
    );
    let work = folder.path().join("work");
    fs::create_dir(&work)?;
    let output = Command::new(&busybox)
        .args(["sh", "-c", script])
        .env_clear()
        .env("PATH", &applets)
        .current_dir(&work)
        .stdin(Stdio::null())
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Takes the busybox out of the image's initramfs, so that host and guest run the same program.
fn unpack_busybox(folder: &Path) -> Result<PathBuf> {
    let archive = fs::read(&image()?.initramfs)?;
    let bytes = find_file(&archive, "bin/busybox").context("the image has no busybox")?;
    let path = folder.join("busybox");
    fs::write(&path, bytes)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// The contents of the regular file `name` in a `newc` archive (cpio(5)).
fn find_file<'a>(archive: &'a [u8], name: &str) -> Option<&'a [u8]> {
    const HEADER: usize = 110;
    let mut at = 0;
    loop {
        let header = archive
            .get(at..at + HEADER)
            .filter(|header| header.starts_with(b"070701"))?;
        let field = |number: usize| {
            let digits = header.get(6 + 8 * number..14 + 8 * number)?;
            usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        };
        let (size, name_len) = (field(6)?, field(11)?);
        let found = archive
            .get(at + HEADER..at + HEADER + name_len)?
            .strip_suffix(b"\0")?;
        let contents = (at + HEADER + name_len).next_multiple_of(4);
        if found == name.as_bytes() && size > 0 {
            return archive.get(contents..contents + size);
        }
        at = (contents + size).next_multiple_of(4);
    }
}
