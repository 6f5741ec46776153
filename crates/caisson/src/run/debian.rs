//! The image `debian`: made in a machine of its own when it is first asked for.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use caisson_agent_protocol::StartRequest;
use caisson_config::{
    Accel, ByteSize, Disk, DiskBus, DiskCache, DiskFormat, Ephemeral, HostPath, MachineConfig,
    OnReboot, SoftTier,
};
use caisson_image::{
    CmdlineOptions, DebianImage, GuestMode, ImageStore, Progress, default_cmdline, step,
};
use caisson_machine::{BootSpec, CommandEnding, HostEnd, Input, Machine, MachineSpec, command};
use caisson_storage::{
    DiskOptions, Format,
    manage::{self, NewImage},
};

use super::disks::Disks;
use super::tail::Tail;
use crate::backend;

/// Memory of the machine that makes the image: the packages lie in it.
const MEMORY: ByteSize = ByteSize::from_mib(1024);
/// How much of what the machine says is kept in case it fails, in bytes, and shown then, in lines.
const TAIL: usize = 16 << 10;
const SHOWN: usize = 12;

/// The image, made if it is not here.
pub(crate) fn ensure(accel: Accel, progress: &dyn Progress) -> Result<DebianImage> {
    let store = ImageStore::open_default()?;
    match store.debian()? {
        Some(image) => Ok(image),
        None => build(&store, accel, progress),
    }
}

/// What the disk with the image's root is known by.
const ROOT_ID: &str = "caisson-root";

/// Gives the machine its disk, the first: the image's, with a throw-away layer; or `keep`, made as a copy of it if there
/// is none.
pub(super) fn add_root(
    config: &mut MachineConfig,
    image: &DebianImage,
    keep: Option<&HostPath>,
    progress: &dyn Progress,
) -> Result<()> {
    // One that goes on after it was saved has it already.
    let is_root = |disk: &Disk| disk.id.as_deref() == Some(ROOT_ID);
    if config.disk.iter().any(is_root) {
        return Ok(());
    }
    let disk = |path, format| Disk {
        bus: DiskBus::Nvme,
        format: Some(format),
        id: Some(ROOT_ID.to_owned()),
        ..Disk::new(path)
    };
    let root = match keep {
        None => Disk {
            ephemeral: Ephemeral::Memory,
            cache: DiskCache::Unsafe,
            ..disk(host_path(&image.disk)?, DiskFormat::Raw)
        },
        Some(keep) => {
            if !keep.as_path().exists() {
                copy(&image.disk, keep.as_path(), progress)?;
            }
            disk(keep.clone(), DiskFormat::Qcow2)
        }
    };
    config.disk.insert(0, root);
    Ok(())
}

fn copy(image: &Path, to: &Path, progress: &dyn Progress) -> Result<()> {
    let mut from = DiskOptions::new(image);
    from.format = Some(Format::Raw);
    let new = NewImage {
        fixed: false,
        path: to.to_owned(),
        format: Format::Qcow2,
        size: None,
        cluster: None,
        version: None,
        backing: None,
    };
    let mut begun = false;
    let copied = manage::convert(&from, &new, &mut |done, total| {
        if !std::mem::replace(&mut begun, true) {
            progress.begin("copying the image", Some(total));
        }
        progress.advance(done);
    });
    progress.finish();
    Ok(copied?)
}

fn host_path(path: &Path) -> Result<HostPath> {
    let text = path.to_str().ok_or_else(|| {
        anyhow!(
            "the cache folder \"{}\" is not UTF-8; set XDG_CACHE_HOME to another",
            path.display()
        )
    })?;
    Ok(text.parse()?)
}

/// The image's kernel command line.
pub(super) fn cmdline(config: &MachineConfig, boot_log: bool) -> String {
    let mut line = String::from(
        "console=ttyS0 root=/dev/nvme0n1 rootfstype=ext4 rw panic=-1 reboot=k tsc=reliable no_timer_check",
    );
    if config.accel != Accel::Kvm {
        // The software CPU runs instructions one after the other.
        line += " mitigations=off";
    }
    if !boot_log {
        line += " quiet systemd.show_status=auto";
    }
    if config.command.is_empty() {
        line += &format!(" systemd.hostname={}", config.name);
        let user = rustix::process::getuid();
        let name = std::env::var("USER").unwrap_or_default();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        if !user.is_root() && !name.is_empty() && name.bytes().all(plain) {
            line += &format!(" caisson.user={name} caisson.uid={}", user.as_raw());
        }
    } else {
        line += &format!(
            " init=/usr/lib/caisson/init caisson.exec=1 caisson.hostname={}",
            config.name
        );
    }
    if let Some(more) = &config.cmdline {
        line += " ";
        line += more;
    }
    line
}

/// Makes the image anew.
pub(crate) fn build(
    store: &ImageStore,
    accel: Accel,
    progress: &dyn Progress,
) -> Result<DebianImage> {
    let mini = store.ensure_mini_with(&["virtio_pci", "virtio_blk"], progress)?;
    let build = store.prepare_debian(progress)?;
    let disk = |path: &Path, bus, readonly| -> Result<Disk> {
        Ok(Disk {
            bus,
            format: Some(DiskFormat::Raw),
            readonly,
            // It is thrown away unless it is made to its end, and made durable then.
            cache: DiskCache::Unsafe,
            ..Disk::new(host_path(path)?)
        })
    };
    let config = MachineConfig {
        name: "debian-build".parse()?,
        accel,
        soft_tier: SoftTier::Native,
        memory: caisson_config::Memory {
            size: MEMORY,
            ..Default::default()
        },
        disk: vec![
            disk(&build.disk(), DiskBus::Nvme, false)?,
            disk(&build.packages(), DiskBus::Virtio, true)?,
        ],
        command: build.command(),
        on_reboot: OnReboot::Stop,
        ..MachineConfig::default()
    };
    let hypervisor = backend::choose(config.accel, config.soft_tier)?;
    backend::require_usable(&*hypervisor)?;
    let request = StartRequest {
        arguments: config
            .command
            .iter()
            .map(|word| word.clone().into_bytes())
            .collect(),
        ..StartRequest::default()
    };
    let said = Arc::new(Mutex::new(Tail::new(TAIL)));
    let steps = Arc::new(Mutex::new(Steps::default()));
    let (end, session) = command(
        &request,
        Box::new(StepsEnd(steps.clone())),
        Box::new(Said(said.clone())),
    )?;
    let ram = MEMORY.bytes();
    let boot = BootSpec {
        kernel: Input::open("kernel", &mini.kernel, ram)?,
        initrd: Some(Input::open("initrd", &mini.initramfs, ram)?),
        modules: Vec::new(),
        cmdline: default_cmdline(&CmdlineOptions {
            mode: GuestMode::Command,
            speculation: false,
            ..CmdlineOptions::default()
        }),
    };
    let disks = Disks::open(&config)?;
    let console = Said(said.clone());
    let mut spec = MachineSpec::from_config(&config, hypervisor, boot, || Some(Box::new(console)))?;
    spec.disks = disks.specs();
    spec.serial[1] = Some(Box::new(end));
    let machine = Machine::new(spec)?;
    machine.start()?;
    session.close_stdin();
    let over = Mutex::new(false);
    let ending = std::thread::scope(|scope| {
        scope.spawn(|| report(&steps, &over, progress));
        let ending = session.wait();
        *over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        ending
    });
    if ending != CommandEnding::MachineEnded {
        machine.stop();
    }
    machine.wait();
    let in_order = disks.close();
    match ending {
        CommandEnding::Exit(status) if status.shell_code() == 0 && in_order => {}
        ending => {
            let said = said.lock().unwrap_or_else(PoisonError::into_inner);
            let lines = said.lines(SHOWN).join("\n");
            return Err(anyhow!("{lines}")).with_context(|| {
                format!("the image \"debian\" could not be made ({ending:?}); try again, or `caisson run` starts the small guest")
            });
        }
    }
    Ok(build.finish()?)
}

/// Shows how far the machine is.
fn report(steps: &Mutex<Steps>, over: &Mutex<bool>, progress: &dyn Progress) {
    let mut shown = None;
    loop {
        let now = {
            let steps = steps.lock().unwrap_or_else(PoisonError::into_inner);
            steps.now.clone()
        };
        if now != shown {
            if let Some((done, total, what)) = &now {
                progress.begin(&format!("making debian: {what} ({done} of {total})"), None);
            }
            shown = now;
        }
        if *over.lock().unwrap_or_else(PoisonError::into_inner) {
            return progress.finish();
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

/// The last step that was announced.
#[derive(Default)]
struct Steps {
    line: Vec<u8>,
    now: Option<(u64, u64, String)>,
}

struct StepsEnd(Arc<Mutex<Steps>>);

impl Write for StepsEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut steps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            if *byte != b'\n' {
                // A line that never ends is none of ours.
                if steps.line.len() < 1024 {
                    steps.line.push(*byte);
                }
                continue;
            }
            let line = std::mem::take(&mut steps.line);
            let line = String::from_utf8_lossy(&line);
            if let Some((done, total, what)) = step(&line) {
                let printable = what.chars().filter(|c| !c.is_control()).collect();
                steps.now = Some((done, total, printable));
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps the end of what the machine says besides.
struct Said(Arc<Mutex<Tail>>);

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl HostEnd for Said {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(bytes);
        Ok(())
    }
}
