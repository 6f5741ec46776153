//! `caisson disk`: images of disks.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Result;
use caisson_config::ByteSize;
use caisson_image::human_bytes;
use caisson_storage::{
    BackingPolicy, DiskOptions, Format, OpenError,
    format::qcow2::{CheckReport, SnapshotInfo},
    manage::{self, ImageInfo, NewImage, SnapshotAction},
};
use serde::Serialize;

use crate::cli::{DiskArgs, DiskCommand, SnapshotCommand};
use crate::exit::{Exit, UsageError};
use crate::image::progress;

/// Does what `caisson disk` was asked.
pub(crate) fn run(args: &DiskArgs) -> Result<Exit> {
    match &args.command {
        DiskCommand::Create {
            path,
            size,
            format,
            cluster,
            fixed,
            backing,
            backing_format,
        } => {
            if size.is_none() && backing.is_none() {
                return Err(UsageError(
                    "the size of the new disk is missing; write one, as in 20G".into(),
                )
                .into());
            }
            manage::create(&NewImage {
                path: path.clone(),
                format: format_for(path, *format)?,
                size: size.map(ByteSize::bytes),
                cluster: cluster.map(cluster_size).transpose()?,
                fixed: *fixed,
                version: None,
                backing: backing.clone().zip(*backing_format),
            })?;
        }
        DiskCommand::Info { path, format, json } => {
            let info = InfoRow::new(&manage::info(path, *format)?);
            print(&info, *json, InfoRow::text)?;
        }
        DiskCommand::Check {
            path,
            format,
            repair,
            json,
        } => {
            let report = CheckRow::new(manage::check(path, *format, *repair)?);
            print(&report, *json, CheckRow::text)?;
            let left = report.corruptions + report.leaks;
            if left > report.repaired {
                return Ok(Exit::Failed);
            }
        }
        DiskCommand::Resize {
            path,
            size,
            format,
            shrink,
            allow_backing,
        } => {
            let options = options(path, *format, *allow_backing);
            manage::resize(&options, |old| size.of(old), *shrink)?;
        }
        DiskCommand::Convert {
            from,
            to,
            format,
            to_format,
            cluster,
            fixed,
            allow_backing,
            quiet,
        } => {
            let new = NewImage {
                path: to.clone(),
                format: format_for(to, *to_format)?,
                size: None,
                cluster: cluster.map(cluster_size).transpose()?,
                fixed: *fixed,
                version: None,
                backing: None,
            };
            let options = options(from, *format, *allow_backing);
            let bar = progress(*quiet);
            let mut begun = false;
            let converted = manage::convert(&options, &new, &mut |done, total| {
                if !std::mem::replace(&mut begun, true) {
                    bar.begin("copying", Some(total));
                }
                bar.advance(done);
            });
            bar.finish();
            converted?;
        }
        DiskCommand::Snapshot { command } => snapshot(command)?,
    }
    Ok(Exit::Clean)
}

fn snapshot(command: &SnapshotCommand) -> Result<()> {
    let act = |path: &Path, action| manage::snapshot(path, None, &action);
    match command {
        SnapshotCommand::Ls { path, json } => {
            let list = act(path, SnapshotAction::List)?;
            let rows: Vec<SnapshotRow> = list.iter().map(SnapshotRow::new).collect();
            print(&rows, *json, |rows| snapshot_table(rows))?;
        }
        SnapshotCommand::Create { path, name } => {
            act(path, SnapshotAction::Create(name.clone()))?;
        }
        SnapshotCommand::Apply { path, name } => {
            act(path, SnapshotAction::Apply(name.clone()))?;
        }
        SnapshotCommand::Rm { path, name } => {
            act(path, SnapshotAction::Delete(name.clone()))?;
        }
    }
    Ok(())
}

fn options(path: &Path, format: Option<Format>, allow_backing: bool) -> DiskOptions {
    let mut options = DiskOptions::new(path);
    options.format = format;
    if allow_backing {
        options.backing = BackingPolicy::Allow;
    }
    options
}

/// The format of a new file.
fn format_for(path: &Path, said: Option<Format>) -> Result<Format> {
    let named = || caisson_storage::format::probe::named(path);
    said.or_else(named).ok_or_else(|| {
        let error = OpenError::Ambiguous {
            path: path.to_owned(),
            why: "its name ends in none of .raw, .img, .qcow2, .vhd and .vhdx".into(),
        };
        UsageError(error.to_string()).into()
    })
}

fn cluster_size(size: ByteSize) -> Result<u32> {
    u32::try_from(size.bytes()).map_err(|_| {
        UsageError(format!(
            "a cluster of {size} is too large; 256M is the most"
        ))
        .into()
    })
}

fn print<T: Serialize>(value: &T, json: bool, text: impl FnOnce(&T) -> String) -> Result<()> {
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, value)?;
        writeln!(out)?;
    } else {
        out.write_all(text(value).as_bytes())?;
    }
    Ok(())
}

/// What `disk info` prints.
#[derive(Debug, Serialize)]
struct InfoRow {
    format: &'static str,
    /// Of the disk, in bytes.
    size: u64,
    /// Of the file, in bytes.
    file_length: u64,
    /// What the file takes on the host's disk, in bytes.
    file_used: u64,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    qcow2: Option<Qcow2Row>,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    blocks: Option<BlocksRow>,
}

/// What the other formats have that are made of blocks.
#[derive(Debug, Serialize)]
struct BlocksRow {
    /// Bytes; `None` where the disk lies in one piece.
    block: Option<u64>,
    fixed: bool,
    parent: Option<String>,
    files: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Qcow2Row {
    version: u32,
    cluster: u64,
    refcount_bits: u32,
    compression: &'static str,
    subclusters: bool,
    dirty: bool,
    corrupt: bool,
    backing: Option<String>,
    backing_format: Option<String>,
    snapshots: Vec<SnapshotRow>,
}

impl InfoRow {
    fn new(info: &ImageInfo) -> Self {
        let qcow2 = info.qcow2.as_ref().map(|q| Qcow2Row {
            version: q.version,
            cluster: q.cluster,
            refcount_bits: q.refcount_bits,
            compression: match q.compression {
                caisson_storage::format::qcow2::Compression::Deflate => "deflate",
                caisson_storage::format::qcow2::Compression::Zstd => "zstd",
            },
            subclusters: q.subclusters,
            dirty: q.dirty,
            corrupt: q.corrupt,
            backing: q.backing.clone(),
            backing_format: q.backing_format.clone(),
            snapshots: q.snapshots.iter().map(SnapshotRow::new).collect(),
        });
        Self {
            format: info.format.name(),
            size: info.size,
            file_length: info.file_len,
            file_used: info.file_used,
            qcow2,
            blocks: info.blocks.as_ref().map(|b| BlocksRow {
                block: b.block,
                fixed: b.fixed,
                parent: b.parent.clone(),
                files: b.files.clone(),
            }),
        }
    }

    fn text(&self) -> String {
        let mut lines = vec![
            ("format", self.format.to_owned()),
            (
                "disk",
                format!("{} ({} bytes)", human_bytes(self.size), self.size),
            ),
            (
                "file",
                format!("{} on the host's disk", human_bytes(self.file_used)),
            ),
        ];
        if let Some(q) = &self.qcow2 {
            lines.push(("version", q.version.to_string()));
            lines.push(("cluster", human_bytes(q.cluster)));
            if let Some(backing) = &q.backing {
                let format = q.backing_format.as_deref().unwrap_or("format not said");
                lines.push(("backing", format!("{backing} ({format})")));
            }
            if q.dirty {
                lines.push(("dirty", "yes: its reference counts are incomplete".into()));
            }
            if q.corrupt {
                lines.push(("corrupt", "yes: it is only opened for reading".into()));
            }
            if !q.snapshots.is_empty() {
                lines.push(("snapshots", q.snapshots.len().to_string()));
            }
        }
        if let Some(b) = &self.blocks {
            if let Some(block) = b.block {
                lines.push(("block", human_bytes(block)));
            }
            if b.fixed {
                lines.push(("fixed", "yes: all of the disk is in the file".into()));
            }
            if let Some(parent) = &b.parent {
                lines.push(("parent", parent.clone()));
            }
            if !b.files.is_empty() {
                lines.push(("files", b.files.join(", ")));
            }
        }
        lines.iter().fold(String::new(), |text, (key, value)| {
            text + &format!("{key:10} {value}\n")
        })
    }
}

/// What `disk check` prints.
#[derive(Debug, Serialize)]
struct CheckRow {
    corruptions: u64,
    leaks: u64,
    repaired: u64,
    allocated_clusters: u64,
    total_clusters: u64,
    messages: Vec<String>,
}

impl CheckRow {
    fn new(report: CheckReport) -> Self {
        Self {
            corruptions: report.corruptions,
            leaks: report.leaks,
            repaired: report.repaired,
            allocated_clusters: report.allocated_clusters,
            total_clusters: report.total_clusters,
            messages: report.messages,
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for message in &self.messages {
            text += &format!("{message}\n");
        }
        if self.corruptions + self.leaks == 0 {
            text += "nothing is wrong\n";
        } else {
            text += &format!(
                "{} corruptions, {} leaked clusters, {} repaired\n",
                self.corruptions, self.leaks, self.repaired
            );
        }
        text
    }
}

#[derive(Debug, Serialize)]
struct SnapshotRow {
    id: String,
    name: String,
    /// Seconds since 1970.
    created: u32,
    /// Bytes of machine state.
    vm_state: u64,
    /// Of the disk then, in bytes.
    size: u64,
}

impl SnapshotRow {
    fn new(snapshot: &SnapshotInfo) -> Self {
        Self {
            id: snapshot.id.clone(),
            name: snapshot.name.clone(),
            created: snapshot.seconds,
            vm_state: snapshot.vm_state,
            size: snapshot.disk_size,
        }
    }
}

fn snapshot_table(rows: &[SnapshotRow]) -> String {
    let mut text = format!("{:4}  {:24}  {}\n", "ID", "NAME", "DISK");
    for row in rows {
        text += &format!("{:4}  {:24}  {}\n", row.id, row.name, human_bytes(row.size));
    }
    text
}
