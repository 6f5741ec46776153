//! The cache of packages and images.
//!
//! ```text
//! $XDG_CACHE_HOME/caisson/
//!   lock                      held while anything below changes
//!   apt/                      apt's own state and cache
//!   packages/NAME.json        what apt said of a package
//!   packages/NAME_VERSION_ARCH.deb
//!   packages/unpacked/NAME_VERSION_ARCH/
//!   images/NAME/manifest.json and the files that it names
//! ```

use crate::apt::{Apt, Record};
use crate::deb::{self, Limits};
use crate::debian::{self, DEBIAN, DEBIAN_12, DebianBuild, DebianImage};
use crate::durable::{self, create_folder};
use crate::error::ImageError;
use crate::lock::Lock;
use crate::manifest::{ImageInfo, Manifest};
use crate::mini::{self, BUSYBOX, KERNEL_META, MINI, MiniImage, Source};
use crate::progress::Progress;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Package lists younger than this serve when something is needed for the first time.
const FRESH_ENOUGH: Duration = Duration::from_secs(24 * 3600);
/// Package lists younger than this serve even when the newest is asked for.
const JUST_FETCHED: Duration = Duration::from_secs(60);
/// Room for an image's files besides the packages, in bytes.
const IMAGE_SPACE: u64 = 64 << 20;

/// Packages and images under the user's cache folder. Several processes may use one at a time.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

/// A fetched and unpacked package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The package file.
    pub file: PathBuf,
    /// The folder with its files, as they would be under `/`.
    pub root: PathBuf,
}

/// A fetched package, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageFile {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The package file, for [`unpack`](crate::unpack()) and [`unpack_some`](crate::unpack_some()).
    pub file: PathBuf,
}

impl ImageStore {
    /// The store in `$XDG_CACHE_HOME/caisson`, or `~/.cache/caisson`. Nothing is created yet.
    ///
    /// # Errors
    /// If neither variable is set to an absolute path.
    pub fn open_default() -> Result<Self, ImageError> {
        let absolute = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .map(|cache| Self::open(cache.join("caisson")))
            .ok_or(ImageError::NoCacheFolder)
    }

    /// The store in the folder `root`, an absolute path. Nothing is created yet.
    #[must_use]
    pub fn open(root: PathBuf) -> Self {
        ImageStore { root }
    }

    /// The store's folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The images that are here, by name.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn list(&self) -> Result<Vec<ImageInfo>, ImageError> {
        let folder = self.root.join("images");
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(ImageError::io("read", &folder, 0))?,
        };
        let mut images = Vec::new();
        for entry in entries {
            let path = entry.map_err(ImageError::io("read", &folder, 0))?.path();
            if path.is_dir()
                && let Some(manifest) = Manifest::read(&path)?
            {
                images.push(manifest.info(&path));
            }
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// The folder of an image that is here.
    ///
    /// # Errors
    /// If there is no such image, or it has not been pulled.
    pub fn path(&self, name: &str) -> Result<PathBuf, ImageError> {
        let folder = self.image_folder(name)?;
        match Manifest::read(&folder)? {
            Some(_) => Ok(folder),
            None => Err(ImageError::NotPulled {
                name: name.to_owned(),
            }),
        }
    }

    /// Fetches the newest version of an image.
    ///
    /// # Errors
    /// If there is no such image, or it cannot be fetched or made. What was there before then
    /// stays, and what was fetched until then is used by the next attempt.
    pub fn pull(&self, name: &str, progress: &dyn Progress) -> Result<ImageInfo, ImageError> {
        let folder = self.image_folder(name)?;
        let lock = self.lock(progress)?;
        let apt = self.apt();
        apt.refresh(JUST_FETCHED, &lock, progress)?;
        let meta = apt.record(KERNEL_META, &lock)?;
        let kernel = apt.record(mini::kernel_package(&meta)?, &lock)?;
        let busybox = apt.record(BUSYBOX, &lock)?;
        create_folder(&self.packages())?;
        durable::require_space(&self.packages(), kernel.size + busybox.size + IMAGE_SPACE)?;
        let kernel = self.fetch(&apt, kernel, &lock, progress)?;
        let busybox = self.fetch(&apt, busybox, &lock, progress)?;
        let previous = Manifest::read(&folder)?;
        progress.begin("making the guest's initramfs", None);
        let manifest = mini::assemble(&folder, &kernel, &busybox, &[], previous.clone());
        progress.finish();
        let manifest = manifest?;
        for old in previous.iter().flat_map(|previous| &previous.packages) {
            if !manifest.packages.contains(old) {
                self.forget(old)?;
            }
        }
        Ok(manifest.info(&folder))
    }

    /// Removes an image and the packages that it was made of.
    ///
    /// # Errors
    /// If there is no such image, it was not pulled, or its files cannot be removed.
    pub fn remove(&self, name: &str, progress: &dyn Progress) -> Result<(), ImageError> {
        let folder = self.image_folder(name)?;
        let _lock = self.lock(progress)?;
        if !folder.exists() {
            return Err(ImageError::NotPulled {
                name: name.to_owned(),
            });
        }
        if let Some(manifest) = Manifest::read(&folder)? {
            for record in &manifest.packages {
                self.forget(record)?;
            }
        }
        durable::remove(&folder)
    }

    /// The small guest, fetched if it is not here, and its initramfs made anew if another version
    /// of Caisson made it. Without network and apt once it is here.
    ///
    /// # Errors
    /// If it cannot be fetched or made.
    pub fn ensure_mini(&self, progress: &dyn Progress) -> Result<MiniImage, ImageError> {
        self.ensure_mini_with(&[], progress)
    }

    /// As [`ensure_mini`](Self::ensure_mini), with an initramfs that loads the kernel modules
    /// named and what they depend on.
    ///
    /// # Errors
    /// If it cannot be fetched or made, or the kernel has no such module.
    pub fn ensure_mini_with(
        &self,
        modules: &[&str],
        progress: &dyn Progress,
    ) -> Result<MiniImage, ImageError> {
        let mut modules: Vec<String> = modules.iter().map(|&name| name.to_owned()).collect();
        modules.sort();
        modules.dedup();
        let folder = self.image_folder(MINI)?;
        let existing = || -> Result<Option<MiniImage>, ImageError> {
            Ok(Manifest::read(&folder)?.and_then(|found| mini::find(&found, &folder, &modules)))
        };
        if let Some(image) = existing()? {
            return Ok(image);
        }
        if !self.can_assemble(&folder)? {
            self.pull(MINI, progress)?;
        }
        let lock = self.lock(progress)?;
        // Another process may have been quicker.
        if let Some(image) = existing()? {
            return Ok(image);
        }
        let manifest = Manifest::read(&folder)?.ok_or_else(|| ImageError::NotPulled {
            name: MINI.to_owned(),
        })?;
        let source = |record: &Record| Source {
            record: record.clone(),
            file: self.packages().join(record.file_name()),
        };
        let [kernel, busybox] = &manifest.packages[..] else {
            return Err(ImageError::malformed(
                &folder,
                "its manifest does not name two packages; `caisson image rm mini` removes it",
            ));
        };
        let (kernel, busybox) = (source(kernel), source(busybox));
        progress.begin("making the guest's initramfs", None);
        let made = mini::assemble(&folder, &kernel, &busybox, &modules, Some(manifest));
        progress.finish();
        drop(lock);
        let made = made?;
        mini::find(&made, &folder, &modules).ok_or_else(|| {
            ImageError::malformed(&folder, "its files were removed while they were made")
        })
    }

    /// Fetches a package by its name and unpacks it, unless it is here already.
    ///
    /// # Errors
    /// If there is no such package, or it cannot be fetched or unpacked.
    pub fn package(&self, name: &str, progress: &dyn Progress) -> Result<Package, ImageError> {
        if let Some(record) = self.known(name)
            && let Some(package) = self.present(&record)
        {
            return Ok(package);
        }
        let lock = self.lock(progress)?;
        let apt = self.apt();
        let source = match self.known(name).filter(|known| self.has_file(known)) {
            Some(record) => self.fetch(&apt, record, &lock, progress)?,
            None => {
                apt.refresh(FRESH_ENOUGH, &lock, progress)?;
                let record = apt.record(name, &lock)?;
                match self.fetch(&apt, record, &lock, progress) {
                    // The list may be of before an update that replaced the package.
                    Err(ImageError::Apt { .. }) => {
                        apt.refresh(Duration::ZERO, &lock, progress)?;
                        let record = apt.record(name, &lock)?;
                        self.fetch(&apt, record, &lock, progress)?
                    }
                    other => other?,
                }
            }
        };
        self.unpacked(&source)
    }

    /// Fetches packages and all that they depend on (recommendations left out) and unpacks each in
    /// a folder of its own.
    ///
    /// # Errors
    /// If there is no such package, or one cannot be fetched or unpacked.
    pub fn packages_with_dependencies(
        &self,
        names: &[&str],
        progress: &dyn Progress,
    ) -> Result<Vec<Package>, ImageError> {
        let lock = self.lock(progress)?;
        let apt = self.apt();
        apt.refresh(FRESH_ENOUGH, &lock, progress)?;
        let records = apt.closure(names, &lock)?;
        create_folder(&self.packages())?;
        let missing = records.iter().filter(|record| !self.has_file(record));
        let needed = missing.map(|record| record.size).sum::<u64>()
            + records
                .iter()
                .map(|record| record.installed_size)
                .sum::<u64>();
        durable::require_space(&self.packages(), needed)?;
        let mut packages = Vec::new();
        for record in records {
            let source = self.fetch(&apt, record, &lock, progress)?;
            packages.push(self.unpacked(&source)?);
        }
        Ok(packages)
    }

    /// Fetches the newest versions of packages without what they depend on, and leaves them packed:
    /// for those of which only a part is wanted. In the order of `names`.
    ///
    /// # Errors
    /// If there is no such package, or one cannot be fetched.
    pub fn package_files(
        &self,
        names: &[&str],
        progress: &dyn Progress,
    ) -> Result<Vec<PackageFile>, ImageError> {
        let lock = self.lock(progress)?;
        let apt = self.apt();
        apt.refresh(FRESH_ENOUGH, &lock, progress)?;
        let mut files = Vec::new();
        for name in names {
            let record = apt.record(name, &lock)?;
            let source = self.fetch(&apt, record, &lock, progress)?;
            files.push(PackageFile {
                name: source.record.name,
                version: source.record.version,
                file: source.file,
            });
        }
        Ok(files)
    }

    /// The image `debian`, if it is here.
    ///
    /// # Errors
    /// If its folder cannot be read.
    pub fn debian(&self) -> Result<Option<DebianImage>, ImageError> {
        let folder = self.image_folder(DEBIAN)?;
        Ok(Manifest::read(&folder)?.and_then(|found| debian::find(&found, &folder)))
    }

    /// Fetches what the image `debian` is made of, and lays out the disks of the machine that makes it. Until the result is
    /// dropped or finished, the store is locked.
    ///
    /// # Errors
    /// If a package cannot be fetched. What was fetched until then is used by the next attempt.
    pub fn prepare_debian(&self, progress: &dyn Progress) -> Result<DebianBuild, ImageError> {
        let folder = self.image_folder(DEBIAN)?;
        let lock = self.lock(progress)?;
        let apt = self.apt();
        apt.refresh(FRESH_ENOUGH, &lock, progress)?;
        let meta = apt.record(KERNEL_META, &lock)?;
        let kernel = apt.record(mini::kernel_package(&meta)?, &lock)?;
        let records = apt.closure(debian::PACKAGES, &lock)?;
        let sources = apt.sources(&lock)?;
        create_folder(&self.packages())?;
        create_folder(&folder)?;
        let missing = records.iter().chain([&kernel]);
        let missing = missing.filter(|record| !self.has_file(record));
        let needed = missing.map(|record| record.size).sum::<u64>() + debian::SPACE;
        durable::require_space(&self.packages(), needed)?;
        let kernel = self.fetch(&apt, kernel, &lock, progress)?;
        let vmlinuz = mini::write_kernel(&folder, &kernel)?;
        let mut packages = Vec::new();
        for record in records {
            packages.push(self.fetch(&apt, record, &lock, progress)?);
        }
        debian::prepare(&folder, (&kernel, vmlinuz), &packages, &sources, lock)
    }

    fn image_folder(&self, name: &str) -> Result<PathBuf, ImageError> {
        if name == MINI {
            return Ok(self.root.join("images").join(MINI));
        }
        if [DEBIAN, DEBIAN_12].contains(&name) {
            return Ok(self.root.join("images").join(DEBIAN));
        }
        Err(ImageError::UnknownImage {
            name: name.to_owned(),
            known: format!("{MINI}, {DEBIAN}"),
        })
    }

    fn packages(&self) -> PathBuf {
        self.root.join("packages")
    }

    fn apt(&self) -> Apt {
        Apt::new(self.root.join("apt"))
    }

    /// Takes the store's lock and clears away what interrupted runs left.
    fn lock(&self, progress: &dyn Progress) -> Result<Lock, ImageError> {
        let lock = Lock::take(&self.root.join("lock"), progress)?;
        for folder in [
            self.packages(),
            self.packages().join("unpacked"),
            self.root.join("images").join(MINI),
            self.root.join("images").join(DEBIAN),
        ] {
            durable::remove_unfinished(&folder)?;
        }
        Ok(lock)
    }

    /// Whether the image in `folder` can be made from packages that are here.
    fn can_assemble(&self, folder: &Path) -> Result<bool, ImageError> {
        Ok(Manifest::read(folder)?.is_some_and(|manifest| {
            manifest.packages.len() == 2
                && manifest.packages.iter().all(|record| self.has_file(record))
        }))
    }

    fn record_path(&self, name: &str) -> PathBuf {
        self.packages().join(format!("{name}.json"))
    }

    /// What was recorded of a package when it was fetched.
    fn known(&self, name: &str) -> Option<Record> {
        let text = std::fs::read(self.record_path(name)).ok()?;
        let record: Record = serde_json::from_slice(&text).ok()?;
        (record.name == name).then_some(record)
    }

    fn has_file(&self, record: &Record) -> bool {
        self.packages()
            .join(record.file_name())
            .metadata()
            .is_ok_and(|found| found.is_file() && found.len() == record.size)
    }

    /// The package of `record`, if it is here, unpacked.
    fn present(&self, record: &Record) -> Option<Package> {
        let package = self.describe(record);
        (self.has_file(record) && package.root.is_dir()).then_some(package)
    }

    fn describe(&self, record: &Record) -> Package {
        let file_name = record.file_name();
        let stem = file_name.trim_end_matches(".deb");
        Package {
            name: record.name.clone(),
            version: record.version.clone(),
            file: self.packages().join(&file_name),
            root: self.packages().join("unpacked").join(stem),
        }
    }

    /// Makes sure of the package file of `record`, fetching it if need be.
    fn fetch(
        &self,
        apt: &Apt,
        record: Record,
        lock: &Lock,
        progress: &dyn Progress,
    ) -> Result<Source, ImageError> {
        let folder = self.packages();
        create_folder(&folder)?;
        let file = if self.has_file(&record) {
            folder.join(record.file_name())
        } else {
            apt.download(&record, &folder, lock, progress)?
        };
        if let Some(old) = self.known(&record.name).filter(|old| *old != record) {
            self.forget(&old)?;
        }
        durable::write_whole(&self.record_path(&record.name), 1 << 16, |out| {
            serde_json::to_writer_pretty(&mut *out, &record).map_err(io::Error::from)?;
            out.write_all(b"\n")
        })?;
        Ok(Source { record, file })
    }

    fn unpacked(&self, source: &Source) -> Result<Package, ImageError> {
        let package = self.describe(&source.record);
        if package.root.is_dir() {
            return Ok(package);
        }
        let parent = self.packages().join("unpacked");
        create_folder(&parent)?;
        durable::require_space(&parent, source.record.installed_size)?;
        let needed = source.record.installed_size;
        let staging = tempfile::Builder::new()
            .prefix(durable::UNFINISHED)
            .tempdir_in(&parent)
            .map_err(ImageError::io("create a folder in", &parent, needed))?;
        let inner = staging.path().join("root");
        deb::unpack(&source.file, &inner, Limits::default()).map_err(|error| match error {
            ImageError::NoSpace {
                path, available, ..
            } => ImageError::NoSpace {
                path,
                needed,
                available,
            },
            other => other,
        })?;
        std::fs::rename(&inner, &package.root).map_err(ImageError::io(
            "move into place",
            &package.root,
            needed,
        ))?;
        Ok(package)
    }

    /// Removes a package's files.
    fn forget(&self, record: &Record) -> Result<(), ImageError> {
        let package = self.describe(record);
        durable::remove(&package.root)?;
        durable::remove(&package.file)?;
        if self.known(&record.name).as_ref() == Some(record) {
            durable::remove(&self.record_path(&record.name))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn an_empty_store_has_nothing_and_says_how_to_get_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::open(folder.path().join("new"));
        assert_eq!(store.list().unwrap(), []);
        let error = store.path("mini").unwrap_err().to_string();
        assert!(error.contains("caisson image pull mini"), "{error}");
        assert!(matches!(
            store.remove("mini", &Silent),
            Err(ImageError::NotPulled { .. })
        ));
    }

    #[test]
    fn names_of_images_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::open(folder.path().to_owned());
        for name in ["", "../..", "maxi", "mini/.."] {
            let error = store.pull(name, &Silent).unwrap_err();
            assert!(matches!(error, ImageError::UnknownImage { .. }), "{name}");
            assert!(store.remove(name, &Silent).is_err());
            assert!(store.path(name).is_err());
        }
        assert!(matches!(
            store.package("../x", &Silent),
            Err(ImageError::BadPackageName { .. } | ImageError::NoApt { .. })
        ));
    }
}
