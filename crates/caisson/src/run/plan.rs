//! What is to be run: the description from file and flags, checked before anything is started.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use caisson_config::{Disk, Ephemeral, Limits, MachineConfig};
use caisson_hypervisor::Hypervisor;
use caisson_image::{DEBIAN, DEBIAN_12};
use caisson_machine::CpuSpec;

use crate::backend;
use crate::cli::RunArgs;
use crate::exit::UsageError;
use crate::host;

use super::saving;

/// The description that the flags and the config file make, and the backend for it.
pub(super) fn config(args: &RunArgs) -> Result<(MachineConfig, Arc<dyn Hypervisor>)> {
    let saved = args.restore.as_ref().map(saving::description).transpose()?;
    let mut config = match (&args.config, saved.flatten()) {
        (_, Some(saved)) => saved,
        (Some(path), None) => MachineConfig::load(path)?,
        (None, None) => MachineConfig::default(),
    };
    args.apply(&mut config);
    if args.save_on_exit.is_some() && !config.command.is_empty() {
        return Err(UsageError(
            "a machine that runs one command cannot be saved: the command's input and output end with caisson; leave out --save-on-exit or the command".into(),
        )
        .into());
    }
    if args.keep.is_some() && !is_debian(&config) {
        return Err(UsageError(
            "--keep is for images with a disk, as `caisson run debian`; give the machine a disk with --disk instead".into(),
        )
        .into());
    }
    let hypervisor = backend::choose(config.accel, config.soft_tier)?;
    let limits = Limits {
        max_cpus: hypervisor.max_vcpus(),
        host_memory: host::memory(),
    };
    config
        .validate(&limits)
        .map_err(|invalid| UsageError(invalid.to_string()))?;
    super::nets::check(&config)?;
    Ok((config, hypervisor))
}

/// Whether the machine runs the image with a disk of its own.
pub(super) fn is_debian(config: &MachineConfig) -> bool {
    let image = config.effective_image();
    image.is_some_and(|image| [DEBIAN, DEBIAN_12].contains(&image.as_str()))
}

/// Refuses to save a machine whose disks end with this process.
pub(super) fn check_can_be_saved(config: &MachineConfig) -> Result<()> {
    let thrown_away = |disk: &&Disk| disk.ephemeral != Ephemeral::Off;
    match config.disk.iter().find(thrown_away) {
        None => Ok(()),
        Some(disk) => Err(UsageError(format!(
            "a machine with a throw-away layer cannot be saved: what was written to \"{}\" ends with caisson; leave out --save-on-exit, or keep what is written (a copy of the image, or --keep with an image of Caisson's)",
            disk.path.as_str()
        ))
        .into()),
    }
}

/// Checks the files that a description names for what can be said without reading them.
pub(super) fn check_files(config: &MachineConfig) -> Result<()> {
    for (what, path) in [("kernel", &config.kernel), ("initrd", &config.initrd)] {
        if let Some(path) = path {
            check_file(what, path.as_path())?;
        }
    }
    Ok(())
}

/// Refuses a processor that the backend cannot give on this host, before an image is fetched for it.
pub(super) fn check_cpu(config: &MachineConfig, hypervisor: &dyn Hypervisor) -> Result<()> {
    let ram = config.memory.size.bytes();
    CpuSpec::open(&config.cpu)?.table(hypervisor, config.cpus, ram)?;
    Ok(())
}

fn check_file(what: &str, path: &Path) -> Result<()> {
    let shown = path.display();
    let metadata = fs::metadata(path).map_err(|error| unreadable(what, path, &error))?;
    if metadata.is_dir() {
        return Err(anyhow!(
            "{what} \"{shown}\" is a directory; name the file in it"
        ));
    }
    // Others (a pipe from the shell) are read when the machine is made: opening one here would wait.
    if metadata.is_file() {
        if metadata.len() == 0 {
            return Err(anyhow!(
                "{what} \"{shown}\" is empty; was it downloaded to its end?"
            ));
        }
        File::open(path).map_err(|error| unreadable(what, path, &error))?;
    }
    Ok(())
}

fn unreadable(what: &str, path: &Path, error: &io::Error) -> anyhow::Error {
    let remedy = match error.kind() {
        ErrorKind::NotFound => "check the path",
        ErrorKind::PermissionDenied => {
            "make it readable for you (chmod, or copy it), or run as its owner"
        }
        _ => "check the path and the file system",
    };
    anyhow!(
        "cannot read {what} \"{}\": {error}; {remedy}",
        path.display()
    )
}
