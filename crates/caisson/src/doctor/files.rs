//! The programs and folders that fetching guest images needs.

use std::env;
use std::path::{Path, PathBuf};

use caisson_image::ImageStore;
use rustix::fs::{Access, access, statvfs};

use super::{Finding, Status};

/// What fetching and unpacking the default image takes, with room to spare.
const SPACE_WANTED: u64 = 512 << 20;

pub(super) fn findings() -> Vec<Finding> {
    vec![apt(), cache()]
}

fn apt() -> Finding {
    let topic = "apt";
    match find_program("apt-get") {
        Some(path) => Finding::new(
            topic,
            Status::Ok,
            format!("{}: images can be fetched", path.display()),
        ),
        None => Finding::new(
            topic,
            Status::Warn,
            "there is no apt-get, which fetches the default image's packages",
        )
        .remedy("install apt, or bring your own kernel: caisson run --kernel FILE --initrd FILE"),
    }
}

fn find_program(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file() && access(path, Access::EXEC_OK).is_ok())
}

fn cache() -> Finding {
    let topic = "image cache";
    let folder = match ImageStore::open_default() {
        Ok(store) => store.root().to_owned(),
        Err(error) => {
            return Finding::new(topic, Status::Warn, error.to_string())
                .remedy("set XDG_CACHE_HOME to a folder that you may write to");
        }
    };
    // It is made on first use, so what counts is the first folder that exists.
    let Some(existing) = folder.ancestors().find(|path| path.exists()) else {
        return Finding::new(
            topic,
            Status::Warn,
            format!("{} cannot be made", folder.display()),
        )
        .remedy("set XDG_CACHE_HOME to a folder that you may write to");
    };
    judge(topic, &folder, existing)
}

fn judge(topic: &'static str, folder: &Path, existing: &Path) -> Finding {
    let shown = folder.display();
    if let Err(error) = access(existing, Access::WRITE_OK | Access::EXEC_OK) {
        return Finding::new(
            topic,
            Status::Warn,
            format!("{shown} cannot be written to: {error}"),
        )
        .remedy("set XDG_CACHE_HOME to a folder that you may write to");
    }
    match statvfs(existing) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let finding = format!("{shown}, {} MiB free", free >> 20);
            if free < SPACE_WANTED {
                Finding::new(topic, Status::Warn, finding).remedy(format!(
                    "fetching the default image wants {} MiB: free some, or set XDG_CACHE_HOME to a larger disk",
                    SPACE_WANTED >> 20
                ))
            } else {
                Finding::new(topic, Status::Ok, finding)
            }
        }
        Err(error) => Finding::new(topic, Status::Note, format!("{shown}: {error}")),
    }
}
