//! Which format an image is in, where that is beyond doubt.
//!
//! The guest of a raw image can write any format's header to its start, and with it the name of a backing file that it
//! would like to read. So the content alone is never believed: name and content must say the same.

use std::path::Path;

use super::Format;
use crate::{
    OpenError,
    layer::{Layer, read_bytes},
};

/// What the content looks like.
enum Looks {
    /// One of ours.
    Like(Format),
    /// Another format's, by name.
    Other(&'static str),
    /// Nothing that we know.
    Plain,
}

fn looks(head: &[u8], tail: &[u8]) -> Looks {
    match head {
        [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 2 | 3, ..] => Looks::Like(Format::Qcow2),
        [b'Q', b'F', b'I', 0xfb, ..] => Looks::Other("qcow of an unknown version"),
        [b'v', b'h', b'd', b'x', b'f', b'i', b'l', b'e', ..] => Looks::Like(Format::Vhdx),
        [b'K', b'D', b'M', b'V', ..] | [b'C', b'O', b'W', b'D', ..] => Looks::Like(Format::Vmdk),
        _ if head.starts_with(b"# Disk DescriptorFile") => Looks::Like(Format::Vmdk),
        _ if head.starts_with(b"conectix") || tail.starts_with(b"conectix") => {
            Looks::Like(Format::Vhd)
        }
        _ if head.get(64..68) == Some(&[0x7f, 0x10, 0xda, 0xbe]) => Looks::Other("VDI"),
        _ if head.starts_with(b"QED\0") => Looks::Other("QED"),
        _ if head.starts_with(b"LUKS\xba\xbe") => Looks::Other("LUKS"),
        _ => Looks::Plain,
    }
}

/// The format that a file's name says.
pub fn named(path: &Path) -> Option<Format> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    match &*extension {
        "raw" | "img" | "iso" => Some(Format::Raw),
        "qcow2" | "qcow" => Some(Format::Qcow2),
        "vhd" | "vpc" => Some(Format::Vhd),
        "vhdx" => Some(Format::Vhdx),
        "vmdk" => Some(Format::Vmdk),
        _ => None,
    }
}

/// The format of the image in `file`, which is at `path`.
///
/// # Errors
/// It is not beyond doubt, or the file cannot be read.
pub async fn format_of(file: &dyn Layer, path: &Path) -> Result<Format, OpenError> {
    let failed = |source| OpenError::Io {
        path: path.to_owned(),
        source,
    };
    let head = read_bytes(file, 0, 512).await.map_err(failed)?;
    let tail = match file.size().checked_sub(512) {
        Some(at) => read_bytes(file, at, 512).await.map_err(failed)?,
        None => Vec::new(),
    };
    let doubt = |why: String| {
        Err(OpenError::Ambiguous {
            path: path.to_owned(),
            why,
        })
    };
    match (looks(&head, &tail), named(path)) {
        (Looks::Like(found), Some(name)) if found == name => Ok(found),
        (Looks::Plain, Some(Format::Raw)) => Ok(Format::Raw),
        (Looks::Like(found), Some(name)) => doubt(format!(
            "it is named as {name} but begins as {found}, which a guest can have written"
        )),
        (Looks::Like(found), None) => doubt(format!(
            "it begins as {found}, which the guest of a raw image can have written, and its name does not tell"
        )),
        (Looks::Other(found), _) => doubt(format!("it looks like {found}")),
        (Looks::Plain, Some(name)) => doubt(format!("it is named as {name} but is not")),
        (Looks::Plain, None) => doubt("neither its name nor its content tells".into()),
    }
}
