//! What passes between a device and its network, in a file that Wireshark and tcpdump read.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{SystemTime, UNIX_EPOCH},
};

use caisson_packet::{Frame, Offloads, PacketBackend, PacketInfo};

use crate::NetError;

/// The most bytes that a capture's file gets. Frames after it are not recorded.
pub const CAPTURE_LIMIT: u64 = 1 << 30;
/// Times in nanoseconds, version 2.4, no zone, frames as they are, Ethernet.
const MAGIC: u32 = 0xa1b2_3c4d;
const SNAP: u32 = 262_144;
const ETHERNET: u32 = 1;

/// A network whose frames are written to a file in pcap format. Frames are there as guest and network pass them on:
/// longer than the MTU, and with checksums left open.
pub struct Capture {
    network: Arc<dyn PacketBackend>,
    file: Mutex<Option<Recording>>,
}

struct Recording {
    out: BufWriter<File>,
    written: u64,
}

impl Recording {
    fn write(&mut self, frame: &[u8]) -> io::Result<()> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let len = frame.len() as u32;
        self.out.write_all(&(now.as_secs() as u32).to_le_bytes())?;
        self.out.write_all(&now.subsec_nanos().to_le_bytes())?;
        self.out.write_all(&len.to_le_bytes())?;
        self.out.write_all(&len.to_le_bytes())?;
        self.out.write_all(frame)?;
        self.written += 16 + u64::from(len);
        Ok(())
    }
}

impl Capture {
    /// Records what passes between a device and `network` to the file `path`, which is emptied first.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn new(network: Arc<dyn PacketBackend>, path: &Path) -> Result<Arc<Self>, NetError> {
        let open = || -> io::Result<Recording> {
            let mut out = BufWriter::new(File::create(path)?);
            for word in [MAGIC, 2 | 4 << 16, 0, 0, SNAP, ETHERNET] {
                out.write_all(&word.to_le_bytes())?;
            }
            out.flush()?;
            Ok(Recording { out, written: 24 })
        };
        let recording = open().map_err(|source| NetError::Capture {
            path: path.to_owned(),
            source,
        })?;
        Ok(Arc::new(Self {
            network,
            file: Mutex::new(Some(recording)),
        }))
    }

    fn record(&self, frame: &Frame) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(recording) = &mut *file
            && (recording.written >= CAPTURE_LIMIT || recording.write(&frame.bytes).is_err())
        {
            let _ = recording.out.flush();
            *file = None;
        }
    }

    fn flush(&self) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(recording) = &mut *file {
            let _ = recording.out.flush();
        }
    }
}

impl PacketBackend for Capture {
    fn info(&self) -> PacketInfo {
        self.network.info()
    }

    fn set_receive_offloads(&self, offloads: Offloads) {
        self.network.set_receive_offloads(offloads);
    }

    fn poll_send(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.network.poll_send(cx)
    }

    fn send(&self, frame: Frame) {
        self.record(&frame);
        self.network.send(frame);
    }

    fn kick(&self) {
        self.flush();
        self.network.kick();
    }

    fn poll_receive(&self, cx: &mut Context<'_>) -> Poll<Frame> {
        let polled = self.network.poll_receive(cx);
        match &polled {
            Poll::Ready(frame) => self.record(frame),
            Poll::Pending => self.flush(),
        }
        polled
    }

    fn reset(&self) {
        self.network.reset();
    }

    fn save(&self) -> Vec<u8> {
        self.network.save()
    }

    fn restore(&self, saved: &[u8]) {
        self.network.restore(saved);
    }
}
