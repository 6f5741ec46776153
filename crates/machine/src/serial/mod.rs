//! The host's ends of serial ports and of the debug console.
//!
//! A device of the guest hands its output to an [`OutputQueue`], which never blocks: a thread of the port moves the
//! bytes on to the [`HostEnd`], which may. When the queue is full the device keeps its bytes and the guest waits, as it
//! would for a slow line. In the other direction whoever has bytes for the guest holds a [`SerialInput`], which the
//! machine empties into the device as fast as the guest reads.
//!
//! | host end | |
//! |---|---|
//! | [`NullEnd`] | nobody |
//! | [`StreamEnd`] | any [`std::io::Write`]: standard output, a file, a buffer |
//! | [`SocketEnd`] | a Unix stream socket, one client at a time (not on Windows) |
//! | [`CommandEnd`](crate::CommandEnd) | the agent protocol of a command that runs in the guest |

mod input;
#[cfg(not(unix))]
mod no_socket;
mod output;
#[cfg(unix)]
mod socket;
mod watch;

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    time::Duration,
};

pub use input::{Closed, SerialInput};
pub(crate) use input::{Pump, SerialDevice};
#[cfg(not(unix))]
pub use no_socket::SocketEnd;
pub(crate) use output::OutputQueue;
#[cfg(unix)]
pub use socket::SocketEnd;
pub(crate) use watch::PanicWatch;

/// What is at the other end of a serial port, outside the guest.
pub trait HostEnd: Send {
    /// Called once, before any other method, with the way to send bytes to the guest. An end that the guest only
    /// writes to lets it go.
    fn attach(&mut self, input: SerialInput) {
        let _ = input;
    }

    /// Takes bytes that the guest sent, all of them. May block: the guest's output waits then, and in the end the
    /// guest.
    ///
    /// # Errors
    /// The end is broken: what the guest sends from now on is dropped.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Whether it drops all bytes and has none: such an end is never called.
    fn is_null(&self) -> bool {
        false
    }

    /// The machine has ended and everything it sent has been delivered, or given up.
    fn close(&mut self) {}

    /// How long the end of the machine waits for this end to take what the guest sent last; `None` is as long as it
    /// takes, unless somebody stops the machine.
    fn patience(&self) -> Option<Duration> {
        None
    }
}

/// Nobody: output is dropped.
pub struct NullEnd;

impl HostEnd for NullEnd {
    fn send(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn is_null(&self) -> bool {
        true
    }
}

/// Writes the guest's output to any writer. There is no input, unless the maker of the machine asks it for the port's
/// [`SerialInput`].
pub struct StreamEnd<W>(W);

impl<W: Write + Send> StreamEnd<W> {
    /// Output goes to `writer` and is flushed after each piece.
    pub fn new(writer: W) -> Self {
        Self(writer)
    }
}

impl StreamEnd<File> {
    /// Output goes to the file at `path`, which is made if need be and emptied unless `append`.
    ///
    /// # Errors
    /// The host's.
    pub fn file(path: &Path, append: bool) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.create(true);
        if append {
            options.append(true);
        } else {
            options.write(true).truncate(true);
        }
        Ok(Self(options.open(path)?))
    }
}

impl<W: Write + Send> HostEnd for StreamEnd<W> {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)?;
        self.0.flush()
    }
}
