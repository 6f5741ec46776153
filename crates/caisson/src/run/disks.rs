//! The machine's disks: opened before the machine is made, and put in order when it has ended.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use caisson_config::{self as config, Backing, DiskCache, Ephemeral, MachineConfig};
use caisson_machine::DiskSpec;
use caisson_storage::{
    self as storage, BackingPolicy, Disk, DiskOptions, EngineKind, IoThread, Limits, Rate,
    RateLimit, file::CacheMode,
};

use crate::terminal::say;

/// The disks of a machine, open. Each holds its lock until it is closed.
#[derive(Default)]
pub(super) struct Disks {
    open: Vec<OpenDisk>,
}

struct OpenDisk {
    path: String,
    spec: DiskSpec,
    disk: Arc<Disk>,
}

impl Disks {
    /// Opens what the description names.
    pub(super) fn open(config: &MachineConfig) -> Result<Self> {
        if config.disk.is_empty() {
            return Ok(Self::default());
        }
        let thread = IoThread::start("disks", EngineKind::Auto)
            .context("cannot start the thread that reads and writes the disks")?;
        let mut groups = HashMap::new();
        let mut open = Vec::new();
        for (index, described) in config.disk.iter().enumerate() {
            let options = options(described, limit(config, described, &mut groups))?;
            let path = described.path.as_str().to_owned();
            let disk = Disk::open(&thread, options)
                .map_err(|error| anyhow!("cannot open disk {index}: {error}"))?;
            let disk = Arc::new(disk);
            let id = described.id.clone();
            let spec = DiskSpec {
                id: id.unwrap_or_else(|| format!("disk{index}")),
                backend: disk.clone(),
                bus: described.bus,
            };
            open.push(OpenDisk { path, spec, disk });
        }
        Ok(Self { open })
    }

    /// What the machine is to have.
    pub(super) fn specs(&self) -> Vec<DiskSpec> {
        self.open.iter().map(|open| open.spec.clone()).collect()
    }

    /// Waits for requests that are under way and puts the images in order. Says what went wrong; `false` if something
    /// did.
    pub(super) fn close(&self) -> bool {
        let mut good = true;
        for OpenDisk { path, disk, .. } in &self.open {
            if let Err(error) = disk.close() {
                say(&format!(
                    "error: cannot put \"{path}\" in order: {error}; `caisson disk check` says what is lost"
                ));
                good = false;
            }
            match disk.errors() {
                0 => {}
                errors => say(&format!(
                    "\"{path}\": {errors} requests of the guest failed; -v says why"
                )),
            }
        }
        good
    }
}

fn options(disk: &config::Disk, limit: Option<RateLimit>) -> Result<DiskOptions> {
    let mut options = DiskOptions::new(disk.path.as_path());
    options.format =
        match disk.format {
            None => None,
            Some(format) => Some(format.name().parse::<storage::Format>().map_err(|error| {
                anyhow!("cannot open disk \"{}\": {error}", disk.path.as_str())
            })?),
        };
    options.read_only = disk.readonly;
    options.cache = match disk.cache {
        DiskCache::Writeback => CacheMode::Writeback,
        DiskCache::Direct => CacheMode::Direct,
        DiskCache::Writethrough => CacheMode::Writethrough,
        DiskCache::Unsafe => CacheMode::Unsafe,
    };
    options.backing = match &disk.backing {
        Backing::Off => BackingPolicy::Deny,
        Backing::On => BackingPolicy::Allow,
        Backing::Below(folder) => BackingPolicy::Below(vec![absolute(folder.as_path())?]),
    };
    options.ephemeral = match &disk.ephemeral {
        Ephemeral::Off => None,
        Ephemeral::Memory => Some(storage::Ephemeral::Memory),
        Ephemeral::Folder(folder) => Some(storage::Ephemeral::Folder(folder.as_path().to_owned())),
    };
    options.logical_block = disk.block.bytes();
    options.limit = limit;
    Ok(options)
}

fn absolute(folder: &Path) -> Result<std::path::PathBuf> {
    std::path::absolute(folder)
        .with_context(|| format!("cannot find the folder \"{}\"", folder.display()))
}

/// The rate limit of `disk`: its own, or the one of its group.
fn limit(
    config: &MachineConfig,
    disk: &config::Disk,
    groups: &mut HashMap<String, RateLimit>,
) -> Option<RateLimit> {
    let Some(group) = &disk.limit_group else {
        return disk.is_limited().then(|| RateLimit::new(limits(disk)));
    };
    if let Some(limit) = groups.get(group) {
        return Some(limit.clone());
    }
    let limited = config
        .disk
        .iter()
        .find(|other| other.limit_group.as_ref() == Some(group) && other.is_limited())?;
    let limit = RateLimit::new(limits(limited));
    groups.insert(group.clone(), limit.clone());
    Some(limit)
}

fn limits(disk: &config::Disk) -> Limits {
    let rate = |per_second: u64, burst: Option<u64>| match burst {
        Some(burst) => Rate { per_second, burst },
        None => Rate::per_second(per_second),
    };
    let bandwidth_burst = disk.bandwidth_burst.map(|burst| burst.bytes());
    Limits {
        bytes: disk
            .bandwidth
            .map(|bandwidth| rate(bandwidth.bytes(), bandwidth_burst)),
        operations: disk.iops.map(|iops| rate(iops, disk.iops_burst)),
    }
}
