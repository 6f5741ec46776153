//! A machine that is saved when it is left, and one that goes on from what was saved.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use caisson_config::MachineConfig;
use caisson_machine::{Elapsed, Machine, Phase, Snapshot};

use crate::cli::{GuestTime, RestoreFrom};

/// The description of the machine, beside its snapshot.
const DESCRIPTION: &str = "machine.toml";

/// Where a machine goes when it is left.
#[derive(Debug)]
pub(super) struct SaveTo {
    folder: PathBuf,
    /// The machine's own, as TOML.
    description: String,
}

impl SaveTo {
    /// Saves `config`'s machine to `folder`. Relative paths in the description are as of now.
    pub(super) fn new(folder: &Path, config: &MachineConfig) -> Result<Self> {
        let here = std::env::current_dir().context("cannot tell the current folder")?;
        let mut config = config.clone();
        config.paths_mut().for_each(|path| path.resolve(&here));
        Ok(Self {
            folder: here.join(folder),
            description: config.to_toml()?,
        })
    }

    /// Stops the machine's time and writes everything. On failure the machine can run on.
    pub(super) fn save(&self, machine: &Machine) -> Result<()> {
        if machine.phase() != Phase::Created {
            machine.pause()?;
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .and_then(|()| fs::write(self.folder.join(DESCRIPTION), &self.description))
            .with_context(|| format!("cannot write to \"{}\"", self.folder.display()))?;
        Ok(machine.save(&self.folder)?)
    }

    /// How to go on with it.
    pub(super) fn farewell(&self) -> String {
        let folder = self.folder.display();
        format!("saved; `caisson run --restore {folder}` goes on")
    }
}

/// What a machine goes on from.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) snapshot: Snapshot,
    pub(super) elapsed: Elapsed,
}

impl Saved {
    /// Opens and checks it.
    pub(super) fn open(from: &RestoreFrom) -> Result<Self> {
        let snapshot = Snapshot::open(from.path.as_path())?;
        if from.verify {
            snapshot.verify_memory()?;
        }
        let elapsed = match from.time {
            GuestTime::Continue => Elapsed::Hidden,
            GuestTime::Jump => Elapsed::Seen,
        };
        Ok(Self { snapshot, elapsed })
    }
}

/// The description that was saved with the machine, if there is one.
pub(super) fn description(from: &RestoreFrom) -> Result<Option<MachineConfig>> {
    let path = from.path.as_path().join(DESCRIPTION);
    if !path.exists() {
        return Ok(None);
    }
    let mut config = MachineConfig::load(&path)?;
    // A machine that is saved has no command; what was typed at the old one's standard input is gone with it.
    config.command.clear();
    Ok(Some(config))
}
