//! A Unix stream socket at a port: listens, and serves one client at a time.

use std::{
    fs,
    io::{self, PipeReader, PipeWriter},
    os::{
        fd::AsFd,
        unix::{
            fs::FileTypeExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{HostEnd, SerialInput};

/// How often a write to a client that does not read looks whether the client is still the one.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// How long a client that does not read may keep an ended machine from going away.
const PATIENCE: Duration = Duration::from_secs(2);

/// The listening end. While nobody is connected, output is dropped; while a client is connected and does not read, the
/// guest waits; the next client is served when the present one has gone.
pub struct SocketEnd {
    path: PathBuf,
    listener: Option<UnixListener>,
    shared: Arc<Shared>,
    input: Option<SerialInput>,
    thread: Option<JoinHandle<()>>,
    /// Lets go of `Shared::closing` when the end closes.
    open: Option<PipeWriter>,
}

struct Shared {
    client: Mutex<Option<Arc<UnixStream>>>,
    /// Hangs up when the end closes.
    closing: PipeReader,
}

impl SocketEnd {
    /// Listens at `path`. A socket there that nobody listens at any more is replaced.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] when somebody listens there or the path is not a socket; otherwise the host's.
    pub fn listen(path: &Path) -> io::Result<Self> {
        if let Ok(found) = fs::symlink_metadata(path)
            && found.file_type().is_socket()
            && UnixStream::connect(path)
                .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
        {
            fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let (closing, open) = io::pipe()?;
        Ok(Self {
            path: path.to_owned(),
            listener: Some(listener),
            shared: Arc::new(Shared {
                client: Mutex::new(None),
                closing,
            }),
            input: None,
            thread: None,
            open: Some(open),
        })
    }
}

impl Shared {
    /// Waits until `fd` is ready for `flags`. `false` when the end closes first.
    fn wait(&self, fd: &impl AsFd, flags: PollFlags) -> bool {
        let mut fds = [
            PollFd::new(fd, flags),
            PollFd::new(&self.closing, PollFlags::IN),
        ];
        loop {
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
                Ok(_) => return fds[1].revents().is_empty(),
            }
        }
    }

    fn serve(&self, listener: &UnixListener, input: &SerialInput) {
        use std::io::Read;
        let mut buffer = [0; 4096];
        while self.wait(listener, PollFlags::IN) {
            let Ok((stream, _)) = listener.accept() else {
                continue;
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let stream = Arc::new(stream);
            *self.client.lock() = Some(stream.clone());
            while self.wait(&stream, PollFlags::IN) {
                match (&*stream).read(&mut buffer) {
                    Ok(0) => break,
                    Ok(n) => {
                        if input.push(buffer.get(..n).unwrap_or_default()).is_err() {
                            return;
                        }
                    }
                    Err(e)
                        if matches!(
                            e.kind(),
                            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                        ) => {}
                    Err(_) => break,
                }
            }
            self.drop_client(&stream);
        }
    }

    fn drop_client(&self, stream: &Arc<UnixStream>) {
        let mut client = self.client.lock();
        if client
            .as_ref()
            .is_some_and(|client| Arc::ptr_eq(client, stream))
        {
            *client = None;
        }
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

impl HostEnd for SocketEnd {
    fn attach(&mut self, input: SerialInput) {
        if let Some(listener) = self.listener.take() {
            let shared = self.shared.clone();
            self.input = Some(input.clone());
            // Without the thread nobody is ever served, and output is dropped.
            self.thread = thread::Builder::new()
                .name("serial-socket".into())
                .spawn(move || shared.serve(&listener, &input))
                .ok();
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        use std::io::Write;
        let mut ended: Option<Instant> = None;
        while !bytes.is_empty() {
            let Some(stream) = self.shared.client.lock().clone() else {
                return Ok(());
            };
            match (&*stream).write(bytes) {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(&stream, PollFlags::OUT)];
                    let _ = poll(&mut fds, Some(&LOOK));
                    if self.input.as_ref().is_some_and(SerialInput::is_closed)
                        && ended.get_or_insert_with(Instant::now).elapsed() > PATIENCE
                    {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.shared.drop_client(&stream),
            }
        }
        Ok(())
    }

    fn close(&mut self) {
        // The thread may be waiting for the guest to read.
        if let Some(input) = &self.input {
            input.close();
        }
        self.open = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(stream) = self.shared.client.lock().take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    fn patience(&self) -> Option<Duration> {
        Some(PATIENCE)
    }
}

impl Drop for SocketEnd {
    fn drop(&mut self) {
        self.close();
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::serial::{OutputQueue, Pump, SerialDevice};

    struct Collect(Mutex<Vec<u8>>);
    impl SerialDevice for Collect {
        fn offer(&self, bytes: &[u8]) -> usize {
            self.0.lock().extend_from_slice(bytes);
            bytes.len()
        }
        fn output_ready(&self) {}
    }

    fn connect(end: &SocketEnd, path: &Path) -> UnixStream {
        let stream = UnixStream::connect(path).unwrap();
        while end.shared.client.lock().is_none() {
            thread::yield_now();
        }
        stream
    }

    #[test]
    fn one_client_after_another_is_served() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("com1");
        let mut end = SocketEnd::listen(&path).unwrap();
        let input = SerialInput::default();
        let device = Arc::new(Collect(Mutex::default()));
        let pump = Pump::new(input.clone(), OutputQueue::new(None), device.clone());
        end.attach(input.clone());
        end.send(b"nobody hears this").unwrap();
        for text in ["first", "second"] {
            let mut client = connect(&end, &path);
            end.send(text.as_bytes()).unwrap();
            let mut got = vec![0; text.len()];
            client.read_exact(&mut got).unwrap();
            assert_eq!(got, text.as_bytes());
            client.write_all(text.as_bytes()).unwrap();
            while device.0.lock().len() < text.len() {
                pump.run();
                thread::yield_now();
            }
            assert_eq!(core::mem::take(&mut *device.0.lock()), text.as_bytes());
            drop(client);
            while end.shared.client.lock().is_some() {
                thread::yield_now();
            }
        }
        input.close();
        end.close();
        drop(end);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_in_use_is_refused_and_a_dead_one_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("com1");
        let end = SocketEnd::listen(&path).unwrap();
        assert_eq!(
            SocketEnd::listen(&path).err().unwrap().kind(),
            io::ErrorKind::AddrInUse
        );
        assert!(path.exists());
        drop(end);
        drop(UnixListener::bind(&path).unwrap());
        assert!(SocketEnd::listen(&path).is_ok());
        let file = folder.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert_eq!(
            SocketEnd::listen(&file).err().unwrap().kind(),
            io::ErrorKind::AddrInUse
        );
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }
}
