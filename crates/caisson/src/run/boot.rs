//! What the machine starts: an image's kernel, or the user's.

use std::env;
use std::io;

use anyhow::{Result, anyhow};
use caisson_config::{DiskBus, MachineConfig, VirtioTransport, closest, defaults};
use caisson_image::{CmdlineOptions, DEBIAN, GuestMode, ImageStore, MINI, default_cmdline};
use caisson_machine::{BootSpec, Input};

use super::{debian, plan};
use crate::{image, terminal};

/// The kernel, initrd and command line of `config`; an image is fetched if it is not here.
pub(super) fn spec(config: &MachineConfig, quiet: bool, boot_log: bool) -> Result<BootSpec> {
    let ram = config.memory.size.bytes();
    let initrd = match &config.initrd {
        Some(path) => Some(Input::open("initrd", path.as_path(), ram)?),
        None => None,
    };
    let Some(name) = config.effective_image() else {
        let path = config
            .kernel
            .as_ref()
            .ok_or_else(|| anyhow!("there is no kernel to run"))?;
        return Ok(BootSpec {
            kernel: Input::open("kernel", path.as_path(), ram)?,
            initrd,
            modules: Vec::new(),
            cmdline: config
                .cmdline
                .clone()
                .unwrap_or_else(|| defaults::CMDLINE.into()),
        });
    };
    if plan::is_debian(config) {
        let image = ImageStore::open_default()?.debian()?;
        let image = image.ok_or_else(|| anyhow!("the image \"debian\" was removed meanwhile"))?;
        return Ok(BootSpec {
            kernel: Input::open("kernel", &image.kernel, ram)?,
            initrd,
            modules: Vec::new(),
            cmdline: debian::cmdline(config, boot_log),
        });
    }
    if name.as_str() != MINI {
        let hint = closest(name.as_str(), [MINI, DEBIAN])
            .map(|name| format!(" (did you mean \"{name}\"?)"))
            .unwrap_or_default();
        return Err(anyhow!(
            "no image is named \"{name}\"{hint}; `caisson image ls` lists them"
        ));
    }
    let store = ImageStore::open_default()?;
    let image = store.ensure_mini_with(&modules(config), &*image::progress(quiet))?;
    Ok(BootSpec {
        kernel: Input::open("kernel", &image.kernel, ram)?,
        initrd: Some(match initrd {
            Some(initrd) => initrd,
            None => Input::open("initrd", &image.initramfs, ram)?,
        }),
        modules: Vec::new(),
        cmdline: default_cmdline(&options(config, boot_log)),
    })
}

/// The modules of Debian's kernel that drive the machine's devices. NVMe and ext4 are built in.
fn modules(config: &MachineConfig) -> Vec<&'static str> {
    let disk = config.disk.iter().any(|disk| disk.bus == DiskBus::Virtio);
    let drivers = [
        (disk, "virtio_blk"),
        (!config.console.is_empty(), "virtio_console"),
        (config.rng, "virtio_rng"),
        (config.cards().next().is_some(), "virtio_net"),
    ];
    let drivers = drivers.into_iter().filter(|(there, _)| *there);
    let mut modules: Vec<_> = drivers.map(|(_, module)| module).collect();
    if !modules.is_empty() {
        modules.push(match config.virtio {
            VirtioTransport::Pci => "virtio_pci",
            VirtioTransport::Mmio => "virtio_mmio",
        });
    }
    modules
}

fn options(config: &MachineConfig, boot_log: bool) -> CmdlineOptions {
    let mut extra = String::new();
    if config.serial.len() > 2 {
        extra += &format!("8250.nr_uarts={} ", config.serial.len());
    }
    extra += config.cmdline.as_deref().unwrap_or_default();
    let at_terminal = terminal::is_terminal(io::stdin()) && terminal::is_terminal(io::stdout());
    CmdlineOptions {
        mode: if config.command.is_empty() {
            GuestMode::Shell
        } else {
            GuestMode::Command
        },
        hostname: Some(config.name.to_string()),
        term: env::var("TERM").ok().filter(|_| at_terminal),
        size: terminal::size(io::stdout()).filter(|_| at_terminal),
        boot_log,
        // The software CPU runs instructions one after the other.
        speculation: false,
        extra,
    }
}
