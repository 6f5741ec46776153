//! What people do with images while no machine uses them: make, look at, check, resize, convert, snapshot. Each call has
//! an executor of its own and blocks until it is done.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    rc::Rc,
};

use caisson_memory::Pinned;

use crate::{
    BackingPolicy, Content, DiskOptions, EngineKind, Format, Layer, OpenError, Runtime,
    file::{FileLayer, FileOptions, HostFile},
    format::{
        FormatError, probe,
        qcow2::{self, CheckReport, Compression, Qcow2, SnapshotInfo},
        vhd::{self, Vhd},
        vhdx::{self, Vhdx},
        vmdk::Vmdk,
    },
    layer::Guid,
    open_image,
    runtime::{LocalFuture, local::join_all},
};

/// How much is copied at once, in bytes.
const CHUNK: u64 = 1 << 20;
/// How many copies are under way at once.
const COPIES: usize = 8;
/// The unit in which zeroes are found in data, in bytes.
const GRAIN: usize = 65_536;

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Where. There must be nothing.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes; of an image with a backing file, that file's if not said.
    pub size: Option<u64>,
    /// Bytes of a cluster of qcow2, or of a block of VHDX.
    pub cluster: Option<u32>,
    /// Whether all of the disk is in the file from the beginning, for formats that have both.
    pub fixed: bool,
    /// Version of qcow2.
    pub version: Option<u32>,
    /// Backing file, as it is to stand in the image, and its format.
    pub backing: Option<(String, Format)>,
}

/// What an image is.
#[derive(Clone, Debug)]
pub struct ImageInfo {
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Length of the file in bytes.
    pub file_len: u64,
    /// What the file takes on its disk, in bytes.
    pub file_used: u64,
    /// What only qcow2 has.
    pub qcow2: Option<Qcow2Info>,
    /// What formats have that are made of blocks, other than qcow2.
    pub blocks: Option<BlocksInfo>,
}

/// What an image in VHD, VHDX or VMDK has besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlocksInfo {
    /// Bytes of a block; `None` where the disk lies in one piece.
    pub block: Option<u64>,
    /// Whether all of the disk is in the file.
    pub fixed: bool,
    /// The image that this one is a difference to, as it is named.
    pub parent: Option<String>,
    /// The files that the disk is in besides, as they are named.
    pub files: Vec<String>,
}

/// What an image in qcow2 has besides.
#[derive(Clone, Debug)]
pub struct Qcow2Info {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Whether it has subclusters.
    pub subclusters: bool,
    /// Whether its refcounts were not written completely.
    pub dirty: bool,
    /// Whether somebody found it damaged.
    pub corrupt: bool,
    /// Backing file.
    pub backing: Option<String>,
    /// Its format, as the image says.
    pub backing_format: Option<String>,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
}

/// Hears how far something is: bytes done, and of how many.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

fn at(path: &Path) -> impl Fn(io::Error) -> OpenError + '_ {
    |source| OpenError::Io {
        path: path.to_owned(),
        source,
    }
}

fn refused(path: &Path, format: Format) -> impl Fn(FormatError) -> OpenError + '_ {
    move |error| match error {
        FormatError::Io(source) => at(path)(source),
        FormatError::Below(below) => *below,
        FormatError::Refused(why) => OpenError::Format {
            path: path.to_owned(),
            format: format.name(),
            why,
        },
    }
}

fn runtime(path: &Path) -> Result<Runtime, OpenError> {
    Runtime::new(EngineKind::Auto).map_err(at(path))
}

type FilePointer = Rc<FileLayer<HostFile>>;

fn open_file(runtime: &Runtime, path: &Path, write: bool) -> Result<FilePointer, OpenError> {
    let options = FileOptions {
        write,
        lock: true,
        ..FileOptions::default()
    };
    let file = HostFile::open(runtime, path, options)?;
    Ok(Rc::new(FileLayer::new(file, None).map_err(at(path))?))
}

async fn format_of(
    file: &dyn Layer,
    path: &Path,
    said: Option<Format>,
) -> Result<Format, OpenError> {
    match said {
        Some(format) => Ok(format),
        None => probe::format_of(file, path).await,
    }
}

/// A file that is removed again unless the work succeeds.
struct Fresh<'a> {
    path: &'a Path,
    keep: bool,
}

impl<'a> Fresh<'a> {
    fn new(path: &'a Path) -> Result<Self, OpenError> {
        let made: io::Result<File> = OpenOptions::new().write(true).create_new(true).open(path);
        made.map_err(|source| OpenError::Open {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self { path, keep: false })
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        if !self.keep {
            // It was ours; if it is gone already, so much the better.
            let _ = fs::remove_file(self.path);
        }
    }
}

/// Makes an image.
///
/// # Errors
/// Something is at the path already, the options contradict each other, or the host's.
pub fn create(new: &NewImage) -> Result<(), OpenError> {
    let runtime = runtime(&new.path)?;
    let mut fresh = Fresh::new(&new.path)?;
    runtime.block_on(create_in(&runtime, new))?;
    fresh.keep = true;
    Ok(())
}

async fn create_in(runtime: &Runtime, new: &NewImage) -> Result<(), OpenError> {
    let fail = |why: &str| OpenError::Format {
        path: new.path.clone(),
        format: new.format.name(),
        why: why.to_owned(),
    };
    let size = match (new.size, &new.backing) {
        (Some(size), _) => size,
        (None, Some((name, format))) => {
            let folder = new.path.parent().unwrap_or(Path::new(""));
            let mut options = DiskOptions::new(folder.join(name));
            options.format = Some(*format);
            options.backing = BackingPolicy::Allow;
            open_image(runtime, &options, false).await?.size()
        }
        (None, None) => return Err(fail("its size is not said")),
    };
    if !size.is_multiple_of(512) {
        return Err(fail("a size is a multiple of 512 bytes"));
    }
    let file = open_file(runtime, &new.path, true)?;
    if new.version.is_some() && new.format != Format::Qcow2 {
        return Err(fail("only qcow2 has versions"));
    }
    if new.fixed && !matches!(new.format, Format::Vhd | Format::Vhdx) {
        return Err(fail("only VHD and VHDX can be fixed"));
    }
    if new.backing.is_some() && new.format == Format::Raw {
        return Err(fail("a raw image has no backing file"));
    }
    if new.cluster.is_some() && !matches!(new.format, Format::Qcow2 | Format::Vhdx) {
        return Err(fail(
            "only qcow2 and VHDX have clusters of a size that is chosen",
        ));
    }
    match new.format {
        Format::Raw => {
            file.resize(size).await.map_err(at(&new.path))?;
            file.flush().await.map_err(at(&new.path))
        }
        Format::Qcow2 => {
            let usual = qcow2::CreateOptions::new(size);
            let options = qcow2::CreateOptions {
                cluster: new.cluster.unwrap_or(usual.cluster),
                version: new.version.unwrap_or(usual.version),
                backing: new.backing.clone(),
                ..usual
            };
            let file: Rc<dyn Layer> = file;
            let made = qcow2::create(&file, &options).await;
            made.map_err(refused(&new.path, new.format))
        }
        Format::Vhd => {
            let file: Rc<dyn Layer> = file;
            let parent = parent_of(runtime, new).await?;
            let parent = parent.map(|(path, id)| vhd::Parent { id, path });
            let made = vhd::create(&file, size, !new.fixed, parent.as_ref()).await;
            made.map_err(refused(&new.path, new.format))
        }
        Format::Vmdk => Err(fail(
            "a VMDK can only be read here; make one with `qemu-img`",
        )),
        Format::Vhdx => {
            let usual = vhdx::CreateOptions::new(size);
            let options = vhdx::CreateOptions {
                block: new.cluster.unwrap_or(usual.block),
                fixed: new.fixed,
                parent: parent_of(runtime, new).await?,
                ..usual
            };
            let file: Rc<dyn Layer> = file;
            let made = vhdx::create(&file, &options).await;
            made.map_err(refused(&new.path, new.format))
        }
    }
}

/// The image that a new one is a difference to: its name, and what it is known by.
async fn parent_of(runtime: &Runtime, new: &NewImage) -> Result<Option<(String, Guid)>, OpenError> {
    let Some((name, format)) = &new.backing else {
        return Ok(None);
    };
    let fail = |why: String| OpenError::Backing {
        path: new.path.clone(),
        backing: name.clone(),
        why,
    };
    if *format != new.format {
        return Err(fail(format!(
            "an image in {} is a difference to one in {} only",
            new.format, new.format
        )));
    }
    if Path::new(name).is_absolute() {
        return Err(fail(
            "it is named relative to the new image in this format".into(),
        ));
    }
    let folder = new.path.parent().unwrap_or(Path::new(""));
    let mut options = DiskOptions::new(folder.join(name));
    options.format = Some(*format);
    options.backing = BackingPolicy::Allow;
    let parent = open_image(runtime, &options, false).await?;
    let id = parent
        .identity()
        .ok_or_else(|| fail("it has no identity".into()))?;
    Ok(Some((name.clone(), id)))
}

/// Looks at an image without its backing file.
///
/// # Errors
/// It does not open.
pub fn info(path: &Path, format: Option<Format>) -> Result<ImageInfo, OpenError> {
    let runtime = runtime(path)?;
    runtime.block_on(async {
        let file = open_file(&runtime, path, false)?;
        let metadata = fs::metadata(path).map_err(at(path))?;
        let format = format_of(&*file, path, format).await?;
        let mut info = ImageInfo {
            format,
            size: file.size(),
            file_len: file.size(),
            file_used: metadata.blocks() * 512,
            qcow2: None,
            blocks: None,
        };
        if format == Format::Vhd {
            let image = Vhd::open_tables(file.clone()).await;
            let image = image.map_err(refused(path, format))?;
            let shape = image.shape();
            info.size = shape.size;
            info.blocks = Some(BlocksInfo {
                block: match shape.kind {
                    vhd::Kind::Fixed => None,
                    vhd::Kind::Dynamic { block, .. } => Some(block.into()),
                },
                fixed: shape.kind == vhd::Kind::Fixed,
                parent: shape.parent.as_ref().map(|parent| parent.path.clone()),
                files: Vec::new(),
            });
        }
        if format == Format::Vmdk {
            let described = Vmdk::describe(file.clone()).await;
            let (size, grain, files) = described.map_err(refused(path, format))?;
            info.size = size;
            info.blocks = Some(BlocksInfo {
                block: grain,
                fixed: false,
                parent: None,
                files,
            });
        }
        if format == Format::Vhdx {
            let image = Vhdx::open_tables(file.clone()).await;
            let image = image.map_err(refused(path, format))?;
            let metadata = image.metadata();
            info.size = metadata.size;
            info.blocks = Some(BlocksInfo {
                block: Some(metadata.block),
                fixed: metadata.fixed,
                parent: metadata.parent.as_ref().map(|parent| {
                    let unknown = || "a path of Windows".to_owned();
                    parent.path.clone().unwrap_or_else(unknown)
                }),
                files: Vec::new(),
            });
        }
        if format == Format::Qcow2 {
            let image = Qcow2::open_tables(file).await;
            let image = image.map_err(refused(path, format))?;
            let header = image.header();
            info.size = header.size;
            info.qcow2 = Some(Qcow2Info {
                version: header.version,
                cluster: header.cluster(),
                refcount_bits: 1 << header.refcount_order,
                compression: header.compression,
                subclusters: header.extended_l2(),
                dirty: header.is_dirty(),
                corrupt: header.is_corrupt(),
                snapshots: image.snapshots().await.map_err(at(path))?,
                backing: header.backing,
                backing_format: header.backing_format,
            });
        }
        Ok(info)
    })
}

/// Checks an image's tables, and puts refcounts right if `repair`. A raw image has none.
///
/// # Errors
/// It does not open, or the host's.
pub fn check(path: &Path, format: Option<Format>, repair: bool) -> Result<CheckReport, OpenError> {
    let runtime = runtime(path)?;
    runtime.block_on(async {
        let file = open_file(&runtime, path, repair)?;
        let format = format_of(&*file, path, format).await?;
        match format {
            Format::Raw => Ok(CheckReport::default()),
            // To open it is to check it.
            Format::Vhd => {
                let image = Vhd::open_tables(file).await;
                image.map_err(refused(path, format))?;
                Ok(CheckReport::default())
            }
            Format::Vmdk => {
                let described = Vmdk::describe(file).await;
                described.map_err(refused(path, format))?;
                Ok(CheckReport::default())
            }
            Format::Vhdx => {
                let image = Vhdx::open_tables(file).await;
                image.map_err(refused(path, format))?;
                Ok(CheckReport::default())
            }
            Format::Qcow2 => {
                let image = Qcow2::open_tables(file).await;
                let image = image.map_err(refused(path, format))?;
                image.check(repair).await.map_err(at(path))
            }
        }
    })
}

/// Changes the size of a disk. To make it smaller needs `shrink`, because it destroys what is cut off.
///
/// # Errors
/// It does not open, would become smaller, or the host's.
pub fn resize(
    options: &DiskOptions,
    size: impl FnOnce(u64) -> Option<u64>,
    shrink: bool,
) -> Result<u64, OpenError> {
    let path = &options.path;
    let runtime = runtime(path)?;
    runtime.block_on(async {
        let image = open_image(&runtime, options, true).await?;
        let fail = |why: &str| {
            let error = io::Error::new(io::ErrorKind::InvalidInput, why);
            Err(at(path)(error))
        };
        let Some(size) = size(image.size()) else {
            return fail("the new size is not a number of bytes that a disk can have");
        };
        if !size.is_multiple_of(512) {
            return fail("a size is a multiple of 512 bytes");
        }
        if size < image.size() && !shrink {
            return fail(
                "the disk would become smaller, which destroys what is beyond its new end; say --shrink if that is wanted",
            );
        }
        image.resize(size).await.map_err(at(path))?;
        image.close().await.map_err(at(path))?;
        Ok(size)
    })
}

/// What to do with the snapshots of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotAction {
    /// List them.
    List,
    /// Make one of this name.
    Create(String),
    /// Remove the one of this name.
    Delete(String),
    /// Make the disk what it was at the one of this name.
    Apply(String),
}

/// Does something with the snapshots of an image, and lists them.
///
/// # Errors
/// The format has none, there is none of that name, or the host's.
pub fn snapshot(
    path: &Path,
    format: Option<Format>,
    action: &SnapshotAction,
) -> Result<Vec<SnapshotInfo>, OpenError> {
    let runtime = runtime(path)?;
    runtime.block_on(async {
        let write = *action != SnapshotAction::List;
        let file = open_file(&runtime, path, write)?;
        let format = format_of(&*file, path, format).await?;
        if format != Format::Qcow2 {
            return Err(OpenError::Format {
                path: path.to_owned(),
                format: format.name(),
                why: "only qcow2 has snapshots; convert it first".into(),
            });
        }
        let image = if write {
            Qcow2::open(file, true, &NothingBelow).await
        } else {
            Qcow2::open_tables(file).await
        };
        let image = image.map_err(refused(path, format))?;
        match action {
            SnapshotAction::List => Ok(()),
            SnapshotAction::Create(name) => image.create_snapshot(name).await,
            SnapshotAction::Delete(name) => image.delete_snapshot(name).await,
            SnapshotAction::Apply(name) => image.apply_snapshot(name).await,
        }
        .map_err(at(path))?;
        let list = image.snapshots().await.map_err(at(path))?;
        if write {
            image.close().await.map_err(at(path))?;
        }
        Ok(list)
    })
}

/// Stands in for a backing file where only tables are changed.
struct NothingBelow;

impl crate::format::Opener for NothingBelow {
    fn open<'a>(
        &'a self,
        _: &'a str,
        _: Option<Format>,
    ) -> LocalFuture<'a, Result<Rc<dyn Layer>, FormatError>> {
        Box::pin(async {
            let empty = FileLayer::new(crate::file::MemoryFile::default(), None)?;
            let empty: Rc<dyn Layer> = Rc::new(empty);
            Ok(empty)
        })
    }
}

/// Copies a disk into a new image, which has no backing file unless `new` says so. Zeroes are not stored.
///
/// # Errors
/// One of them does not open, or the host's. The new image is removed then.
pub fn convert(
    source: &DiskOptions,
    new: &NewImage,
    progress: Progress<'_>,
) -> Result<(), OpenError> {
    let runtime = runtime(&new.path)?;
    let mut fresh = Fresh::new(&new.path)?;
    runtime.block_on(async {
        let from = open_image(&runtime, source, false).await?;
        let size = from.size().next_multiple_of(512);
        let new = NewImage {
            size: Some(new.size.unwrap_or(size)),
            ..new.clone()
        };
        create_in(&runtime, &new).await?;
        let mut options = DiskOptions::new(&new.path);
        options.format = Some(new.format);
        options.backing = BackingPolicy::Allow;
        let to = open_image(&runtime, &options, true).await?;
        if to.size() < from.size() {
            return Err(OpenError::Format {
                path: new.path.clone(),
                format: new.format.name(),
                why: "the new disk is smaller than the old one".into(),
            });
        }
        let below = new.backing.is_some();
        copy(&*from, &*to, below, progress)
            .await
            .map_err(|(reading, error)| {
                let path = if reading { &source.path } else { &new.path };
                at(path)(error)
            })?;
        to.close().await.map_err(at(&new.path))
    })?;
    fresh.keep = true;
    Ok(())
}

/// Copies everything; of an error also whether it was in reading.
async fn copy(
    from: &dyn Layer,
    to: &dyn Layer,
    below: bool,
    progress: Progress<'_>,
) -> Result<(), (bool, io::Error)> {
    let size = from.size();
    let mut here = 0;
    while here < size {
        let mut copies: Vec<LocalFuture<'_, Result<(), (bool, io::Error)>>> = Vec::new();
        while here < size && copies.len() < COPIES {
            let extent = from.extent(here, size - here).await;
            let extent = extent.map_err(|error| (true, error))?;
            let at = here;
            if extent.content == Content::Zero {
                if below {
                    let zeroed = to.write_zeroes(at, extent.len, true).await;
                    zeroed.map_err(|error| (false, error))?;
                }
                here += extent.len;
                continue;
            }
            let len = extent.len.min(CHUNK - at % CHUNK);
            here += len;
            copies.push(Box::pin(copy_some(from, to, at, len as usize, below)));
        }
        for copied in join_all(copies).await {
            copied?;
        }
        progress(here, size);
    }
    Ok(())
}

/// Copies a range without the zeroes in it.
async fn copy_some(
    from: &dyn Layer,
    to: &dyn Layer,
    at: u64,
    len: usize,
    below: bool,
) -> Result<(), (bool, io::Error)> {
    let memory = Pinned::zeroed(len);
    let read = from.read(at, memory.clone()).await;
    read.map_err(|error| (true, error))?;
    let bytes = memory.to_vec();
    let is_zero =
        |start: usize| !below && bytes[start..len.min(start + GRAIN)].iter().all(|&b| b == 0);
    let mut start = 0;
    while start < len {
        let zero = is_zero(start);
        let mut end = (start + GRAIN).min(len);
        while end < len && is_zero(end) == zero {
            end = (end + GRAIN).min(len);
        }
        if !zero {
            let part = memory.slice(start, end - start);
            let written = to.write(at + start as u64, part, false).await;
            written.map_err(|error| (false, error))?;
        }
        start = end;
    }
    Ok(())
}
