//! Debian packages (deb(5)): an `ar` archive of `debian-binary`, `control.tar.*`, `data.tar.*`.
//!
//! The archive may be hostile: names cannot leave the target folder, what a member unpacks to is
//! bounded by [`Limits`], and nothing that is not a plain file, folder or symbolic link is made.
//! Owners, set-user-ID bits and maintainer scripts are left out.

mod ar;
mod tar;
mod unpack;

pub use unpack::{unpack, unpack_some};

use crate::error::ImageError;
use ar::Members;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;
use tar::{Entries, EntryKind};

/// How much a package may unpack to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of the decompressed archive.
    pub bytes: u64,
    /// Files, folders and links in it.
    pub entries: u64,
    /// Memory for the decompressor, in bytes.
    pub memory: u64,
}

impl Default for Limits {
    /// 4 GiB, a million entries, and 256 MiB of memory: beyond any package of Debian's that a
    /// guest is made of.
    fn default() -> Self {
        Limits {
            bytes: 4 << 30,
            entries: 1 << 20,
            memory: 256 << 20,
        }
    }
}

/// A plain file in a package.
pub(crate) struct Member<'a> {
    /// Its path without a leading `./`.
    pub(crate) path: &'a str,
    /// Its length, in bytes.
    pub(crate) len: u64,
    /// Its content.
    pub(crate) content: &'a mut dyn Read,
}

/// Goes through the plain files of the package `deb`, in the archive's order, until `visit` breaks.
pub(crate) fn for_each_file<B>(
    deb: &Path,
    limits: Limits,
    mut visit: impl FnMut(Member<'_>) -> Result<ControlFlow<B>, ImageError>,
) -> Result<Option<B>, ImageError> {
    let mut data = open_data(deb, limits)?;
    let mut entries = Entries::new(&mut data, limits.entries);
    while let Some(mut entry) = entries.next().map_err(|error| broken(deb, &error))? {
        if entry.kind != EntryKind::File {
            continue;
        }
        let path = std::mem::take(&mut entry.path);
        let len = entry.len;
        let flow = visit(Member {
            path: &path,
            len,
            content: &mut entry,
        })?;
        if let ControlFlow::Break(value) = flow {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// The content of the first plain file whose path `wanted` accepts, with that path.
///
/// # Errors
/// If the package is damaged, has no such file, or the file is longer than `max` bytes.
pub(crate) fn read_file(
    deb: &Path,
    what: &str,
    max: u64,
    wanted: impl Fn(&str) -> bool,
) -> Result<(String, Vec<u8>), ImageError> {
    for_each_file(deb, Limits::default(), |member| {
        if !wanted(member.path) {
            return Ok(ControlFlow::Continue(()));
        }
        if member.len > max {
            return Err(ImageError::malformed(
                deb,
                format!(
                    "{} has {} bytes, more than a {what} can",
                    member.path, member.len
                ),
            ));
        }
        let mut content = Vec::new();
        member
            .content
            .read_to_end(&mut content)
            .map_err(|error| broken(deb, &error))?;
        Ok(ControlFlow::Break((member.path.to_owned(), content)))
    })?
    .ok_or_else(|| ImageError::Missing {
        package: deb
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        wanted: what.to_owned(),
    })
}

fn broken(deb: &Path, error: &io::Error) -> ImageError {
    ImageError::malformed(deb, format!("not a sound Debian package: {error}"))
}

/// The decompressed `data.tar` of a package.
fn open_data(deb: &Path, limits: Limits) -> Result<Box<dyn Read>, ImageError> {
    let file = File::open(deb).map_err(ImageError::io("open", deb, 0))?;
    let mut members = Members::new(BufReader::with_capacity(1 << 17, file))
        .map_err(|error| broken(deb, &error))?;
    while let Some(name) = members.next().map_err(|error| broken(deb, &error))? {
        let Some(suffix) = name.strip_prefix("data.tar") else {
            continue;
        };
        let suffix = suffix.to_owned();
        let reader = decompress(&suffix, members.into_content(), limits)
            .map_err(|error| broken(deb, &error))?;
        return Ok(Box::new(Bounded {
            inner: reader,
            left: limits.bytes,
        }));
    }
    Err(ImageError::malformed(
        deb,
        "not a sound Debian package: it has no data.tar",
    ))
}

fn decompress(
    suffix: &str,
    reader: impl Read + 'static,
    limits: Limits,
) -> io::Result<Box<dyn Read>> {
    Ok(match suffix {
        "" => Box::new(reader),
        ".xz" => {
            let stream = liblzma::stream::Stream::new_stream_decoder(limits.memory, 0)?;
            Box::new(liblzma::read::XzDecoder::new_stream(reader, stream))
        }
        ".zst" => {
            let mut decoder = zstd::stream::read::Decoder::new(reader)?;
            decoder.window_log_max(limits.memory.max(1).ilog2())?;
            Box::new(decoder)
        }
        ".gz" => Box::new(flate2::read::MultiGzDecoder::new(reader)),
        other => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("data.tar{other} is compressed in a way that is not known here"),
            ));
        }
    })
}

/// Fails, rather than ends, once more than its bytes have been read.
struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(count as u64)
            .ok_or_else(|| io::Error::other("it unpacks to more than is allowed"))?;
        Ok(count)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;

    pub(crate) fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = b"!<arch>\n".to_vec();
        for (name, content) in members {
            out.extend(
                format!(
                    "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n",
                    0,
                    0,
                    0,
                    100644,
                    content.len()
                )
                .bytes(),
            );
            out.extend(*content);
            if content.len() % 2 == 1 {
                out.push(b'\n');
            }
        }
        out
    }

    pub(crate) fn tar_with(entries: &[(&str, ::tar::EntryType, &str, &[u8])]) -> Vec<u8> {
        let mut builder = ::tar::Builder::new(Vec::new());
        for (path, kind, link, content) in entries {
            let mut header = ::tar::Header::new_gnu();
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
            header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    pub(crate) fn deb(folder: &Path, suffix: &str, tar: &[u8]) -> std::path::PathBuf {
        let data = match suffix {
            ".xz" => liblzma::encode_all(tar, 1).unwrap(),
            ".zst" => zstd::encode_all(tar, 1).unwrap(),
            ".gz" => {
                let mut out = flate2::write::GzEncoder::new(Vec::new(), Default::default());
                out.write_all(tar).unwrap();
                out.finish().unwrap()
            }
            _ => tar.to_vec(),
        };
        let path = folder.join(format!("x{suffix}.deb"));
        let member = format!("data.tar{suffix}");
        let bytes = ar(&[
            ("debian-binary", b"2.0\n"),
            ("control.tar.gz", b"odd"),
            (&member, &data),
        ]);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn each_compression_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let tar = tar_with(&[
            ("./", ::tar::EntryType::Directory, "", b""),
            ("./bin/x", ::tar::EntryType::Regular, "", b"content"),
        ]);
        for suffix in ["", ".gz", ".xz", ".zst"] {
            let deb = deb(folder.path(), suffix, &tar);
            let (path, content) = read_file(&deb, "program", 100, |p| p == "bin/x").unwrap();
            assert_eq!((path.as_str(), &content[..]), ("bin/x", &b"content"[..]));
            assert!(matches!(
                read_file(&deb, "program", 100, |p| p == "bin/y"),
                Err(ImageError::Missing { .. })
            ));
            assert!(matches!(
                read_file(&deb, "program", 3, |p| p == "bin/x"),
                Err(ImageError::Malformed { .. })
            ));
        }
        let other = deb(folder.path(), ".rar", &tar);
        let error = read_file(&other, "program", 9, |_| true).unwrap_err();
        assert!(error.to_string().contains("data.tar.rar"));
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let big = vec![0; 1 << 20];
        let tar = tar_with(&[("./big", ::tar::EntryType::Regular, "", &big)]);
        let limits = Limits {
            bytes: 1 << 18,
            ..Limits::default()
        };
        for suffix in [".gz", ".xz", ".zst"] {
            let deb = deb(folder.path(), suffix, &tar);
            let error = unpack(&deb, &folder.path().join("out"), limits).unwrap_err();
            assert!(
                error.to_string().contains("more than is allowed"),
                "{error}"
            );
        }
    }

    #[test]
    fn damaged_packages_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let tar = tar_with(&[("./x", ::tar::EntryType::Regular, "", &[7; 3000])]);
        for suffix in ["", ".gz", ".xz", ".zst"] {
            let whole = std::fs::read(deb(folder.path(), suffix, &tar)).unwrap();
            let path = folder.path().join("cut.deb");
            for cut in [0, 4, 8, 60, 70, 140, whole.len() / 2] {
                std::fs::write(&path, &whole[..cut]).unwrap();
                assert!(
                    read_file(&path, "file", 1 << 20, |p| p == "x").is_err(),
                    "{suffix} cut at {cut}"
                );
            }
        }
    }
}
