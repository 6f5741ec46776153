//! A writer of the cpio format that Linux unpacks as an initramfs: `newc`
//! (Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's source).

use std::io::{self, Write};

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Writes entries in the order given, all owned by root and dated 1970.
pub(crate) struct Writer<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(out: W) -> Self {
        Writer { out, inode: 0 }
    }

    pub(crate) fn folder(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(path, FOLDER | mode, 2, (0, 0), &[])
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | mode, 1, (0, 0), content)
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, SYMLINK | 0o777, 1, (0, 0), target.as_bytes())
    }

    pub(crate) fn character_device(
        &mut self,
        path: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> io::Result<()> {
        self.entry(path, CHARACTER_DEVICE | mode, 1, (major, minor), &[])
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.inode = u32::MAX;
        self.entry("TRAILER!!!", 0, 1, (0, 0), &[])?;
        self.out.flush()
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        links: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let len = u32::try_from(content.len()).map_err(|_| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("{path} has 4 GiB or more, which the archive's format cannot hold"),
            )
        })?;
        self.inode = self.inode.wrapping_add(1);
        let name = path.len() as u32 + 1;
        write!(
            self.out,
            "070701{:08X}{mode:08X}{:08X}{:08X}{links:08X}{:08X}{len:08X}{:08X}{:08X}{:08X}{:08X}{name:08X}{:08X}{path}\0",
            self.inode, 0, 0, 0, 0, 0, device.0, device.1, 0
        )?;
        self.pad(110 + path.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, len: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..len.next_multiple_of(4) - len])
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    pub(in crate::initramfs) struct Read {
        pub(in crate::initramfs) path: String,
        pub(in crate::initramfs) mode: u32,
        pub(in crate::initramfs) device: (u32, u32),
        pub(in crate::initramfs) content: Vec<u8>,
    }

    /// Reads an archive by the format's description, checking what the kernel checks.
    pub(in crate::initramfs) fn read(mut archive: &[u8]) -> Vec<Read> {
        let mut entries = Vec::new();
        loop {
            let header = std::str::from_utf8(&archive[..110]).unwrap();
            assert_eq!(&header[..6], "070701");
            let field = |index: usize| {
                u32::from_str_radix(&header[6 + 8 * index..14 + 8 * index], 16).unwrap()
            };
            let (name, len) = (field(11) as usize, field(6) as usize);
            let path = std::str::from_utf8(&archive[110..110 + name - 1]).unwrap();
            assert_eq!(archive[110 + name - 1], 0);
            assert_eq!((field(2), field(3), field(5)), (0, 0, 0), "owner and time");
            let start = (110 + name).next_multiple_of(4);
            let content = archive[start..start + len].to_vec();
            if path == "TRAILER!!!" {
                assert_eq!(archive.len(), start);
                return entries;
            }
            entries.push(Read {
                path: path.to_owned(),
                mode: field(1),
                device: (field(9), field(10)),
                content,
            });
            archive = &archive[(start + len).next_multiple_of(4)..];
        }
    }

    #[test]
    fn entries_read_back_whatever_their_lengths() {
        let mut out = Vec::new();
        let mut writer = Writer::new(&mut out);
        writer.folder("d", 0o700).unwrap();
        for len in 0..9 {
            let path = format!("d/{}", "n".repeat(len + 1));
            writer.file(&path, 0o644, &b"12345678"[..len]).unwrap();
        }
        writer.symlink("l", "d/n").unwrap();
        writer.character_device("c", 0o600, 4, 64).unwrap();
        writer.finish().unwrap();
        let entries = read(&out);
        assert_eq!(entries.len(), 12);
        for (len, entry) in entries[1..10].iter().enumerate() {
            assert_eq!(entry.content, b"12345678"[..len]);
            assert_eq!(entry.mode, 0o100_644);
        }
        assert_eq!(entries[10].content, b"d/n");
        assert_eq!((entries[11].device, entries[11].mode), ((4, 64), 0o020_600));
    }
}
