//! What is at the host's end of a serial port or of the debug console.

use serde::{Deserialize, Serialize};

use crate::HostPath;
use crate::options::shorthand;

/// Where the bytes of a character device go to and come from on the host.
///
/// As an option string: `stdio`, `null`, `file=PATH`, `file=PATH,append=on`, `socket=PATH`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", remote = "Self")]
pub enum CharBackend {
    /// Standard input and output of the `caisson` process: the terminal, when they are one.
    #[default]
    Stdio,
    /// Nobody: output is dropped and there is no input.
    Null,
    /// A file that receives the output; there is no input.
    File(FileBackend),
    /// A Unix stream socket that listens for one client at a time. Output without a client is
    /// dropped.
    Socket(SocketBackend),
}

shorthand!(CharBackend);

/// A file that receives output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", remote = "Self")]
pub struct FileBackend {
    /// The file. It is created if it does not exist.
    pub path: HostPath,
    /// Keep what the file has and write behind it, instead of emptying it first.
    #[serde(default, skip_serializing_if = "is_off")]
    pub append: bool,
}

shorthand!(FileBackend);

/// A Unix stream socket that the machine listens on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", remote = "Self")]
pub struct SocketBackend {
    /// Where the socket is created. A socket left there by a process that is gone is replaced.
    pub path: HostPath,
}

shorthand!(SocketBackend);

fn is_off(flag: &bool) -> bool {
    !*flag
}

impl CharBackend {
    /// The host path it uses, if any.
    pub fn path(&self) -> Option<&HostPath> {
        match self {
            CharBackend::File(file) => Some(&file.path),
            CharBackend::Socket(socket) => Some(&socket.path),
            CharBackend::Stdio | CharBackend::Null => None,
        }
    }

    /// The host path it uses, if any, to be changed.
    pub fn path_mut(&mut self) -> Option<&mut HostPath> {
        match self {
            CharBackend::File(file) => Some(&mut file.path),
            CharBackend::Socket(socket) => Some(&mut socket.path),
            CharBackend::Stdio | CharBackend::Null => None,
        }
    }
}
