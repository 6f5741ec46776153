//! The manifest of an image: what it was made of and what belongs to it.

use crate::apt::Record;
use crate::durable;
use crate::error::ImageError;
use serde::{Deserialize, Serialize};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The version of the manifest's form. Images of another are made anew.
pub(crate) const SCHEMA: u32 = 1;
const FILE: &str = "manifest.json";
/// The largest manifest that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// `manifest.json` in an image's folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// [`SCHEMA`].
    pub(crate) schema: u32,
    /// The image's name.
    pub(crate) name: String,
    /// The version of its kernel package.
    pub(crate) version: String,
    /// When it was made, in seconds since 1970.
    pub(crate) created: u64,
    /// The packages that it was made of, the kernel's first.
    pub(crate) packages: Vec<Record>,
    /// The kernel.
    pub(crate) kernel: ImageFile,
    /// One initramfs for each list of modules that was asked for.
    #[serde(default)]
    pub(crate) initramfs: Vec<Initramfs>,
    /// Its disk, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) disk: Option<ImageFile>,
}

/// A file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageFile {
    /// Its name in the image's folder.
    pub(crate) file: String,
    /// Its length.
    pub(crate) bytes: u64,
    /// Its SHA-256, lower-case hexadecimal.
    pub(crate) sha256: String,
}

/// An initramfs of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Initramfs {
    /// What Caisson put into it: one made by another version differs.
    pub(crate) recipe: String,
    /// The kernel modules that were asked for, sorted.
    pub(crate) modules: Vec<String>,
    /// The archive.
    #[serde(flatten)]
    pub(crate) file: ImageFile,
}

impl ImageFile {
    /// The file's path, if it is there in full length.
    pub(crate) fn present_in(&self, folder: &Path) -> Option<PathBuf> {
        let plain = !self.file.is_empty() && !self.file.contains('/') && self.file != "..";
        let path = folder.join(&self.file);
        let len = plain.then(|| path.metadata().ok())??.len();
        (len == self.bytes).then_some(path)
    }
}

impl Manifest {
    /// Reads the manifest in `folder`; `None` if there is none, or one that this version does not
    /// understand.
    pub(crate) fn read(folder: &Path) -> Result<Option<Manifest>, ImageError> {
        let path = folder.join(FILE);
        let mut text = String::new();
        let read = std::fs::File::open(&path)
            .and_then(|file| file.take(MAX_BYTES).read_to_string(&mut text));
        match read {
            Ok(_) => Ok(serde_json::from_str(&text)
                .ok()
                .filter(|manifest: &Manifest| manifest.schema == SCHEMA)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ImageError::io("read", &path, 0)(error)),
        }
    }

    /// Writes the manifest in `folder`; from then on the image exists.
    pub(crate) fn write(&self, folder: &Path) -> Result<(), ImageError> {
        durable::write_whole(&folder.join(FILE), 1 << 20, |out| {
            serde_json::to_writer_pretty(&mut *out, self).map_err(io::Error::from)?;
            out.write_all(b"\n")
        })
        .map(drop)
    }

    /// What a list of images says of this one in `folder`.
    pub(crate) fn info(&self, folder: &Path) -> ImageInfo {
        let archives = self.initramfs.iter().map(|archive| archive.file.bytes);
        // A disk is mostly holes: what counts is what it takes.
        let used = |disk: &ImageFile| {
            let found = std::fs::metadata(folder.join(&disk.file));
            found.map_or(0, |found| found.blocks() * 512)
        };
        let archives = archives.chain(self.disk.iter().map(used));
        ImageInfo {
            name: self.name.clone(),
            version: self.version.clone(),
            bytes: archives.fold(self.kernel.bytes, u64::saturating_add),
            created: UNIX_EPOCH
                .checked_add(Duration::from_secs(self.created))
                .unwrap_or(UNIX_EPOCH),
            path: folder.to_owned(),
        }
    }
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its name.
    pub name: String,
    /// The version of its kernel package.
    pub version: String,
    /// The size of its files.
    pub bytes: u64,
    /// When it was made.
    pub created: SystemTime,
    /// The folder with its files.
    pub path: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_that_cannot_be_understood_counts_as_none() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Manifest::read(folder.path()).unwrap(), None);
        let manifest = Manifest {
            schema: SCHEMA,
            name: "mini".into(),
            version: "6.1".into(),
            created: 5,
            packages: Vec::new(),
            kernel: ImageFile {
                file: "vmlinuz".into(),
                bytes: 7,
                sha256: "00".into(),
            },
            initramfs: Vec::new(),
            disk: None,
        };
        manifest.write(folder.path()).unwrap();
        assert_eq!(Manifest::read(folder.path()).unwrap(), Some(manifest));
        for text in ["", "{", "[]", "{\"schema\": 2}"] {
            std::fs::write(folder.path().join(FILE), text).unwrap();
            assert_eq!(Manifest::read(folder.path()).unwrap(), None, "{text}");
        }
    }

    #[test]
    fn a_file_outside_the_folder_or_cut_short_is_not_present() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("f"), "1234").unwrap();
        let file = |name: &str, bytes| ImageFile {
            file: name.into(),
            bytes,
            sha256: String::new(),
        };
        assert!(file("f", 4).present_in(folder.path()).is_some());
        assert!(file("f", 5).present_in(folder.path()).is_none());
        assert!(file("g", 4).present_in(folder.path()).is_none());
        assert!(file("../x/f", 4).present_in(folder.path()).is_none());
        assert!(file("", 4).present_in(folder.path()).is_none());
    }
}
