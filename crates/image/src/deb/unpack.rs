//! Unpacking a whole package into a folder.

use super::tar::{Entries, Entry, EntryKind};
use super::{Limits, broken, open_data};
use crate::durable::create_folder;
use crate::error::ImageError;
use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

/// Unpacks the files of the package `deb` into the folder `into`, which is created.
///
/// Every path is taken relative to `into`. A path with `..`, or one that leads through a symbolic
/// link which the package itself made, is refused, so nothing outside `into` is ever written.
/// Symbolic links are made as they are: follow them only inside a guest.
///
/// # Errors
/// If the package is damaged, hostile or over the limits, or the folder cannot be written. What was
/// unpacked until then is left for the caller to remove.
pub fn unpack(deb: &Path, into: &Path, limits: Limits) -> Result<(), ImageError> {
    unpack_some(deb, into, limits, |_| true)
}

/// As [`unpack`], but only what `wanted` accepts by its path, which has no leading `./` and no trailing slash. Folders
/// above it are made as needed.
///
/// # Errors
/// As those of [`unpack`]; a hard link to a file that was not wanted counts as damage.
pub fn unpack_some(
    deb: &Path,
    into: &Path,
    limits: Limits,
    wanted: impl Fn(&str) -> bool,
) -> Result<(), ImageError> {
    create_folder(into)?;
    let mut data = open_data(deb, limits)?;
    let mut entries = Entries::new(&mut data, limits.entries);
    while let Some(mut entry) = entries.next().map_err(|error| broken(deb, &error))? {
        if wanted(&entry.path) {
            place(deb, into, &mut entry, limits)?;
        }
    }
    Ok(())
}

fn place<R: Read>(
    deb: &Path,
    into: &Path,
    entry: &mut Entry<'_, R>,
    limits: Limits,
) -> Result<(), ImageError> {
    if entry.path.is_empty() {
        return Ok(());
    }
    let target = inside(deb, into, &entry.path)?;
    let failed = |action| ImageError::io(action, &target, limits.bytes.min(entry.len.max(1 << 20)));
    match &entry.kind {
        EntryKind::Folder => match fs::symlink_metadata(&target) {
            // A package may bring a folder that another made a link: merged /usr.
            Ok(_) if target.is_dir() => Ok(()),
            _ => fs::create_dir(&target).map_err(failed("create")),
        },
        EntryKind::File => {
            replace(&target).map_err(failed("replace"))?;
            let mode = entry.mode | 0o600;
            let mut file = fs::File::options()
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(&target)
                .map_err(failed("create"))?;
            copy(deb, entry, &mut file, &target)?;
            file.set_permissions(Permissions::from_mode(mode))
                .map_err(ImageError::io("set the mode of", &target, 0))
        }
        EntryKind::Symlink(link) => {
            replace(&target).map_err(failed("replace"))?;
            symlink(link, &target).map_err(failed("create"))
        }
        EntryKind::Hardlink(link) => {
            let link = inside(deb, into, link)?;
            let plain = fs::symlink_metadata(&link).is_ok_and(|found| found.is_file());
            if !plain {
                return Err(ImageError::malformed(
                    deb,
                    format!("{} is a link to what is no file of the package", entry.path),
                ));
            }
            replace(&target).map_err(failed("replace"))?;
            fs::hard_link(&link, &target).map_err(failed("create"))
        }
        EntryKind::Other => Ok(()),
    }
}

/// Copies a file's content; a failing read is the package's fault, a failing write the disk's.
fn copy<R: Read>(
    deb: &Path,
    entry: &mut Entry<'_, R>,
    file: &mut fs::File,
    target: &Path,
) -> Result<(), ImageError> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = entry
            .read(&mut buffer)
            .map_err(|error| broken(deb, &error))?;
        if count == 0 {
            return Ok(());
        }
        io::Write::write_all(file, &buffer[..count])
            .map_err(ImageError::io("write", target, entry.len))?;
    }
}

fn replace(target: &Path) -> io::Result<()> {
    match fs::symlink_metadata(target) {
        Ok(found) if !found.is_dir() => fs::remove_file(target),
        _ => Ok(()),
    }
}

/// The place of `path` under `into`, whose parent folders are created. Every parent is a real
/// folder, never a link.
fn inside(deb: &Path, into: &Path, path: &str) -> Result<PathBuf, ImageError> {
    let refuse = |why| ImageError::malformed(deb, format!("the path {path:?} {why}"));
    let mut place = into.to_owned();
    let mut components = Path::new(path).components().peekable();
    while let Some(component) = components.next() {
        let Component::Normal(name) = component else {
            return Err(refuse("leaves the package"));
        };
        place.push(name);
        if components.peek().is_none() {
            break;
        }
        match fs::symlink_metadata(&place) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(refuse("leads through something that is not a folder")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir(&place).map_err(ImageError::io("create", &place, 1 << 20))?
            }
            Err(error) => return Err(ImageError::io("look at", &place, 0)(error)),
        }
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::tests::{deb, tar_with};
    use ::tar::EntryType::{Directory, Fifo, Link, Regular, Symlink};

    fn unpack_tar(folder: &Path, tar: &[u8]) -> Result<PathBuf, ImageError> {
        let deb = deb(folder, ".gz", tar);
        let into = folder.join("jail/out");
        unpack(&deb, &into, Limits::default())?;
        Ok(into)
    }

    #[test]
    fn files_folders_and_links_arrive() {
        let folder = tempfile::tempdir().unwrap();
        let tar = tar_with(&[
            ("./", Directory, "", b""),
            ("./usr/", Directory, "", b""),
            ("./usr/bin/tool", Regular, "", b"tool"),
            ("./usr/bin/same", Link, "./usr/bin/tool", b""),
            ("./bin", Symlink, "usr/bin", b""),
            ("./run/pipe", Fifo, "", b""),
            ("./usr/bin/tool", Regular, "", b"newer"),
        ]);
        let into = unpack_tar(folder.path(), &tar).unwrap();
        assert_eq!(fs::read(into.join("usr/bin/tool")).unwrap(), b"newer");
        assert_eq!(fs::read(into.join("usr/bin/same")).unwrap(), b"tool");
        assert_eq!(
            fs::read_link(into.join("bin")).unwrap(),
            Path::new("usr/bin")
        );
        assert!(!into.join("run/pipe").exists());
        let mode = fs::metadata(into.join("usr/bin/tool"))
            .unwrap()
            .permissions();
        assert_eq!(mode.mode() & 0o7777, 0o755);
    }

    #[test]
    fn only_what_is_wanted_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let tar = tar_with(&[
            ("./usr/", Directory, "", b""),
            ("./usr/src/x-1.0/", Directory, "", b""),
            ("./usr/src/x-1.0/library/deep/a", Regular, "", b"a"),
            ("./usr/src/x-1.0/library-not", Regular, "", b"b"),
            ("./usr/src/x-1.0/compiler/c", Regular, "", b"c"),
        ]);
        let deb = deb(folder.path(), ".gz", &tar);
        let into = folder.path().join("out");
        unpack_some(&deb, &into, Limits::default(), |path| {
            path.starts_with("usr/src/x-1.0/library/")
        })
        .unwrap();
        let source = into.join("usr/src/x-1.0");
        assert_eq!(fs::read(source.join("library/deep/a")).unwrap(), b"a");
        assert_eq!(fs::read_dir(&source).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&into).unwrap().count(), 1);
    }

    #[test]
    fn nothing_is_written_outside_the_folder() {
        let outside = tempfile::tempdir().unwrap();
        let secret = outside.path().join("secret");
        fs::write(&secret, "untouched").unwrap();
        let away = outside.path().to_str().unwrap();
        let through: &[(&str, _, &str, &[u8])] = &[
            ("./d", Symlink, away, b""),
            ("./d/secret", Regular, "", b"x"),
        ];
        let hostile: [&[(&str, _, &str, &[u8])]; 6] = [
            &[("../escaped", Regular, "", b"x")],
            &[("./a/../../escaped", Regular, "", b"x")],
            &[("./../escaped", Symlink, "x", b"")],
            through,
            &[("./h", Link, "../../x.gz.deb", b"")],
            &[
                ("./s", Symlink, away, b""),
                ("./h", Link, "./s/secret", b""),
            ],
        ];
        for entries in hostile {
            let folder = tempfile::tempdir().unwrap();
            let error = unpack_tar(folder.path(), &tar_with(entries)).unwrap_err();
            assert!(matches!(error, ImageError::Malformed { .. }), "{error}");
            assert!(!folder.path().join("escaped").exists());
            assert!(!folder.path().join("jail/escaped").exists());
        }
        assert_eq!(fs::read(&secret).unwrap(), b"untouched");

        // An absolute path lands inside, and a link is replaced rather than written through.
        let folder = tempfile::tempdir().unwrap();
        let secret_path = secret.to_str().unwrap();
        let tar = tar_with(&[
            ("/etc/abs", Regular, "", b"x"),
            ("./f", Symlink, secret_path, b""),
            ("./f", Regular, "", b"mine"),
        ]);
        let into = unpack_tar(folder.path(), &tar).unwrap();
        assert!(into.join("etc/abs").exists());
        assert_eq!(fs::read(into.join("f")).unwrap(), b"mine");
        assert_eq!(fs::read(&secret).unwrap(), b"untouched");
    }
}
