//! Hosts whose standard library has no Unix sockets.

use std::{io, path::Path};

use super::HostEnd;

/// The listening end, of which there are none on this host.
pub enum SocketEnd {}

impl SocketEnd {
    /// Refuses.
    ///
    /// # Errors
    /// Always [`io::ErrorKind::Unsupported`].
    pub fn listen(_path: &Path) -> io::Result<Self> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "serial ports on sockets need a Unix host; choose file=PATH, stdio or null",
        ))
    }
}

impl HostEnd for SocketEnd {
    fn send(&mut self, _bytes: &[u8]) -> io::Result<()> {
        match *self {}
    }
}
