//! From a path to a disk: which format, which backing files, which layers.

use std::{
    io,
    path::{Path, PathBuf},
    rc::Rc,
};

use caisson_memory::Pinned;

use crate::{
    OpenError,
    file::{CacheMode, FileLayer, FileOptions, HostFile},
    format::{Format, FormatError, Opener, overlay, probe},
    layer::{Answer, Layer},
    limit::RateLimit,
    runtime::{LocalFuture, Runtime},
};

/// The longest chain of backing files.
const MAX_CHAIN: usize = 200;

/// Which backing files an image may name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BackingPolicy {
    /// None: an image that names one is refused.
    #[default]
    Deny,
    /// Those in these folders or below them, symbolic links followed.
    Below(Vec<PathBuf>),
    /// Any. For images that no guest could ever write to.
    Allow,
}

/// A throw-away layer that takes all writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ephemeral {
    /// In memory: it takes as much as the guest writes.
    Memory,
    /// In a file without a name in this folder.
    Folder(PathBuf),
}

/// How a disk is opened.
#[derive(Clone)]
pub struct DiskOptions {
    /// The image.
    pub path: PathBuf,
    /// Its format; without it, it must be beyond doubt.
    pub format: Option<Format>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What writes and flushes promise.
    pub cache: CacheMode,
    /// Which backing files it may have.
    pub backing: BackingPolicy,
    /// Where writes go instead of the image.
    pub ephemeral: Option<Ephemeral>,
    /// The unit of requests, in bytes: 512 or 4096.
    pub logical_block: u32,
    /// A rate limit, of its own or shared.
    pub limit: Option<RateLimit>,
}

impl DiskOptions {
    /// The image at `path`, to be read and written, with everything else as is usual.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: None,
            read_only: false,
            cache: CacheMode::default(),
            backing: BackingPolicy::default(),
            ephemeral: None,
            logical_block: 512,
            limit: None,
        }
    }
}

/// Opens a disk with its throw-away layer.
pub(crate) async fn open_disk(
    runtime: &Runtime,
    options: &DiskOptions,
) -> Result<Rc<dyn Layer>, OpenError> {
    let write = !options.read_only && options.ephemeral.is_none();
    let image = open_image(runtime, options, write).await?;
    match &options.ephemeral {
        None => Ok(image),
        Some(place) => overlay::over(runtime, image, place),
    }
}

/// Opens an image with its backing files.
///
/// # Errors
/// See [`OpenError`].
pub async fn open_image(
    runtime: &Runtime,
    options: &DiskOptions,
    write: bool,
) -> Result<Rc<dyn Layer>, OpenError> {
    let files = Files {
        runtime: runtime.clone(),
        cache: options.cache,
        policy: options.backing.clone(),
    };
    files
        .open(options.path.clone(), options.format, write, Vec::new())
        .await
}

/// Opens files for formats that name others.
struct Files {
    runtime: Runtime,
    cache: CacheMode,
    policy: BackingPolicy,
}

impl Files {
    /// Opens the image at `path`; `above` are the files that lead to it.
    fn open(
        &self,
        path: PathBuf,
        format: Option<Format>,
        write: bool,
        above: Vec<PathBuf>,
    ) -> LocalFuture<'_, Result<Rc<dyn Layer>, OpenError>> {
        Box::pin(async move {
            let options = FileOptions {
                cache: self.cache,
                write,
                lock: true,
            };
            let file = HostFile::open(&self.runtime, &path, options)?;
            let failed = |source| OpenError::Io {
                path: path.clone(),
                source,
            };
            let file = Rc::new(FileLayer::new(file, None).map_err(failed)?);
            let format = match format {
                Some(format) => format,
                None => probe::format_of(&*file, &path).await?,
            };
            let mut chain = above;
            chain.push(path.canonicalize().map_err(failed)?);
            let opener = ChainOpener { files: self, chain };
            let opened = format.open(file, write, &opener).await;
            opened.map_err(|error| match error {
                FormatError::Io(source) => failed(source),
                FormatError::Refused(why) => OpenError::Format {
                    path: path.clone(),
                    format: format.name(),
                    why,
                },
                FormatError::Below(error) => *error,
            })
        })
    }
}

/// Opens what an image names.
struct ChainOpener<'a> {
    files: &'a Files,
    /// The image and those above it.
    chain: Vec<PathBuf>,
}

impl ChainOpener<'_> {
    fn resolve(&self, name: &str) -> Result<PathBuf, String> {
        let Some(image) = self.chain.last() else {
            return Err("there is no image above it".into());
        };
        if self.files.policy == BackingPolicy::Deny {
            return Err(
                "backing files are not allowed for this disk; allow them (backing=on, or --allow-backing) if you trust the image"
                    .into(),
            );
        }
        let path = image.parent().unwrap_or(Path::new("/")).join(name);
        let path = path.canonicalize().map_err(|error| {
            format!("{error}; restore the file, or name another with `qemu-img rebase -u`")
        })?;
        if let BackingPolicy::Below(folders) = &self.files.policy
            && !folders.iter().any(|folder| {
                folder
                    .canonicalize()
                    .is_ok_and(|folder| path.starts_with(folder))
            })
        {
            return Err("it is outside of the folders that are allowed".into());
        }
        if self.chain.contains(&path) {
            return Err("the chain of backing files is a circle".into());
        }
        if self.chain.len() >= MAX_CHAIN {
            return Err(format!("the chain has more than {MAX_CHAIN} files"));
        }
        Ok(path)
    }
}

impl Opener for ChainOpener<'_> {
    fn open<'a>(
        &'a self,
        name: &'a str,
        format: Option<Format>,
    ) -> LocalFuture<'a, Result<Rc<dyn Layer>, FormatError>> {
        Box::pin(async move {
            let refused = |why| {
                FormatError::Below(Box::new(OpenError::Backing {
                    path: self.chain.last().cloned().unwrap_or_default(),
                    backing: name.to_owned(),
                    why,
                }))
            };
            let path = self.resolve(name).map_err(refused)?;
            let opened = self.files.open(path, format, false, self.chain.clone());
            opened
                .await
                .map_err(|error| FormatError::Below(Box::new(error)))
        })
    }
}

/// Fails all that would change the layer below.
pub(crate) fn read_only_error() -> io::Error {
    io::ErrorKind::ReadOnlyFilesystem.into()
}

/// Reads from what may be shorter than what is over it: beyond its end there are zeroes.
pub(crate) fn read_or_zeroes<'a>(layer: &'a dyn Layer, at: u64, into: Pinned) -> Answer<'a> {
    Box::pin(async move {
        let there = layer.size().saturating_sub(at).min(into.len() as u64) as usize;
        if there < into.len() {
            into.fill(there, into.len() - there, 0);
        }
        if there > 0 {
            layer.read(at, into.slice(0, there)).await?;
        }
        Ok(())
    })
}
