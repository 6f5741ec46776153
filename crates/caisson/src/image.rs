//! `caisson image`: the cache of guest images.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Result, anyhow};
use caisson_config::{Accel, ImageName, defaults};
use caisson_image::{
    DEBIAN, DEBIAN_12, ImageInfo, ImageStore, MINI, Progress, Silent, TerminalProgress, human_bytes,
};
use serde::Serialize;

use crate::cli::{ImageArgs, ImageCommand};
use crate::exit::Exit;
use crate::run;

/// Images that exist, with what they are.
const KNOWN: [(&str, &str); 2] = [
    (MINI, "Debian's cloud kernel with a small root of busybox"),
    (
        DEBIAN,
        "Debian 12 with systemd on a disk of its own, made on this host",
    ),
];

/// Where a slow job reports: a progress bar, or nowhere.
pub(crate) fn progress(quiet: bool) -> Box<dyn Progress> {
    if quiet {
        Box::new(Silent)
    } else {
        Box::new(TerminalProgress::new())
    }
}

/// Does what `caisson image` was asked.
pub(crate) fn run(args: &ImageArgs) -> Result<Exit> {
    let store = ImageStore::open_default()?;
    let mut out = io::stdout().lock();
    match &args.command {
        ImageCommand::Pull { name, quiet } => {
            let name = name_or_default(name);
            let info = match name {
                DEBIAN | DEBIAN_12 => {
                    run::debian::build(&store, Accel::Auto, &*progress(*quiet))?;
                    let made = store.list()?.into_iter().find(|info| info.name == DEBIAN);
                    made.ok_or_else(|| anyhow!("the image \"{name}\" was removed meanwhile"))?
                }
                _ => store.pull(name, &*progress(*quiet))?,
            };
            if !quiet {
                writeln!(
                    out,
                    "{}: Linux {}, {} in {}",
                    info.name,
                    info.version,
                    human_bytes(info.bytes),
                    info.path.display()
                )?;
            }
        }
        ImageCommand::Ls { json } => {
            let rows = rows(&store.list()?);
            if *json {
                serde_json::to_writer_pretty(&mut out, &rows)?;
                writeln!(out)?;
            } else {
                out.write_all(table(&rows).as_bytes())?;
            }
        }
        ImageCommand::Rm { name } => store.remove(name.as_str(), &*progress(false))?,
        ImageCommand::Path { name, json } => {
            let path = store.path(name_or_default(name))?;
            if *json {
                serde_json::to_writer_pretty(&mut out, &files(&path)?)?;
                writeln!(out)?;
            } else {
                writeln!(out, "{}", path.display())?;
            }
        }
    }
    Ok(Exit::Clean)
}

fn name_or_default(name: &Option<ImageName>) -> &str {
    name.as_ref().map_or(defaults::IMAGE, ImageName::as_str)
}

/// A line of `image ls`.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    description: &'static str,
    /// Whether it is in the cache; the rest is there only then.
    pulled: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    /// Seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
}

fn rows(images: &[ImageInfo]) -> Vec<Row> {
    let known = KNOWN.iter().map(|(name, description)| {
        let info = images.iter().find(|info| info.name == *name);
        Row {
            name: (*name).to_owned(),
            description,
            pulled: info.is_some(),
            version: info.map(|info| info.version.clone()),
            bytes: info.map(|info| info.bytes),
            created: info
                .and_then(|info| Some(info.created.duration_since(UNIX_EPOCH).ok()?.as_secs())),
            path: info.map(|info| info.path.clone()),
        }
    });
    known.collect()
}

fn table(rows: &[Row]) -> String {
    let mut cells = vec![["NAME", "VERSION", "SIZE", "WHAT IT IS"].map(str::to_owned)];
    for row in rows {
        cells.push([
            row.name.clone(),
            row.version.clone().unwrap_or_else(|| "not pulled".into()),
            row.bytes.map(human_bytes).unwrap_or_else(|| "-".into()),
            row.description.to_owned(),
        ]);
    }
    let width = |column: usize| cells.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    cells
        .iter()
        .fold(String::new(), |text, [name, version, size, what]| {
            let [a, b, c] = widths;
            text + &format!("{name:a$}  {version:b$}  {size:c$}  {what}\n")
        })
}

/// The files of an image's folder by name, with their full paths.
fn files(folder: &Path) -> Result<serde_json::Value> {
    let mut files = Vec::new();
    for entry in folder.read_dir()? {
        files.push(entry?.path());
    }
    files.sort();
    Ok(serde_json::json!({ "path": folder, "files": files }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_image_exists() {
        assert!(KNOWN.iter().any(|(name, _)| *name == defaults::IMAGE));
    }

    #[test]
    fn images_that_are_not_here_are_listed_too() {
        assert_eq!(
            table(&rows(&[])),
            "NAME    VERSION     SIZE  WHAT IT IS\n\
             mini    not pulled  -     Debian's cloud kernel with a small root of busybox\n\
             debian  not pulled  -     Debian 12 with systemd on a disk of its own, made on this host\n"
        );
        let info = ImageInfo {
            name: MINI.into(),
            version: "6.1".into(),
            bytes: 3 << 20,
            created: UNIX_EPOCH,
            path: "/x".into(),
        };
        assert_eq!(
            serde_json::to_string(&rows(&[info])).unwrap(),
            r#"[{"name":"mini","description":"Debian's cloud kernel with a small root of busybox","pulled":true,"version":"6.1","bytes":3145728,"created":0,"path":"/x"},{"name":"debian","description":"Debian 12 with systemd on a disk of its own, made on this host","pulled":false}]"#
        );
    }
}
