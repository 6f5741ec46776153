//! What a test and the process of its machine say to each other: frames on one stream, in order.
//!
//! A frame is one byte with its kind, four with its length, and its bytes.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::SocketAddrV4,
    path::PathBuf,
};

use caisson_config::{DiskBus, VirtioTransport};
use caisson_machine::Outcome;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The ports of a test's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Port {
    /// The console.
    Com1,
    /// The first virtio console.
    Hvc0,
    /// The guest's agent.
    Com2,
    /// The debug console.
    Debugcon,
}

/// The machine, as the process that makes it needs to know it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Description {
    pub(super) backend: String,
    /// The software CPU translates hot code.
    pub(super) native: bool,
    pub(super) kernel: PathBuf,
    pub(super) initrd: Option<PathBuf>,
    pub(super) modules: Vec<(PathBuf, String)>,
    pub(super) cmdline: String,
    pub(super) cpus: u32,
    /// The processor, as `--cpu` takes it.
    pub(super) cpu: String,
    pub(super) memory_mib: u64,
    pub(super) restart_on_reboot: bool,
    pub(super) restart_on_crash: bool,
    /// Whether something is at its second serial port.
    pub(super) com2: bool,
    /// What carries its virtio devices, if it has an entropy device and a console on that.
    pub(super) virtio: Option<VirtioTransport>,
    /// The content of its disk, if it has one: read when it is made, and kept there when it leaves.
    pub(super) disk: Option<PathBuf>,
    pub(super) disk_bus: DiskBus,
    /// The network that its card is in, if it has one.
    pub(super) net: Option<Box<NetDescription>>,
}

/// The user-mode network that a machine's card is in. The router's address stands for the host's loopback.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NetDescription {
    /// Ports of the host that lead to the guest, as `--net user,forward=` takes them.
    pub forwards: Vec<String>,
    /// Whom to ask for names.
    pub resolver: Option<SocketAddrV4>,
}

/// From the test to the process. Each gets an [`Answer`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Makes the machine.
    Make(Description),
    /// Makes it from the snapshot in the folder.
    Restore(Description, PathBuf),
    Start,
    Pause,
    Resume,
    /// Pauses the machine if it runs, saves it to the folder, and ends it here.
    Leave(PathBuf),
    Stop,
    Now,
    Inspect,
    /// Tells the guest that its first virtio console has so many columns and rows.
    Resize(u16, u16),
}

/// What came of a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    /// Machine time in nanoseconds.
    Now(u64),
    Text(String),
    Failed(String),
}

/// Anything that goes over the stream.
#[derive(Debug)]
pub(super) enum Frame {
    Request(Request),
    Answer(Answer),
    /// The guest wrote, or something is typed at it.
    Bytes(Port, Vec<u8>),
    /// The machine is over.
    Ended(Outcome),
}

impl Frame {
    /// Writes the frame.
    ///
    /// # Errors
    /// The stream's.
    pub(super) fn send(&self, stream: &mut impl Write) -> io::Result<()> {
        let (kind, bytes) = match self {
            Self::Request(request) => (0, json(request)?),
            Self::Answer(answer) => (1, json(answer)?),
            Self::Ended(outcome) => (2, json(outcome)?),
            Self::Bytes(Port::Com1, bytes) => (3, bytes.clone()),
            Self::Bytes(Port::Com2, bytes) => (4, bytes.clone()),
            Self::Bytes(Port::Debugcon, bytes) => (5, bytes.clone()),
            Self::Bytes(Port::Hvc0, bytes) => (6, bytes.clone()),
        };
        let mut frame = vec![kind];
        frame.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        frame.extend_from_slice(&bytes);
        stream.write_all(&frame)
    }

    /// Reads the next frame; `None` at the end of the stream.
    ///
    /// # Errors
    /// The stream's, or a frame that is none.
    pub(super) fn receive(stream: &mut impl Read) -> io::Result<Option<Self>> {
        let mut head = [0; 5];
        match stream.read_exact(&mut head) {
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
                ) =>
            {
                return Ok(None);
            }
            other => other?,
        }
        let [kind, length @ ..] = head;
        let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
        stream.read_exact(&mut bytes)?;
        Ok(Some(match kind {
            0 => Self::Request(parse(&bytes)?),
            1 => Self::Answer(parse(&bytes)?),
            2 => Self::Ended(parse(&bytes)?),
            3 => Self::Bytes(Port::Com1, bytes),
            4 => Self::Bytes(Port::Com2, bytes),
            5 => Self::Bytes(Port::Debugcon, bytes),
            6 => Self::Bytes(Port::Hvc0, bytes),
            _ => return Err(ErrorKind::InvalidData.into()),
        }))
    }
}

fn json(value: &impl Serialize) -> io::Result<Vec<u8>> {
    Ok(serde_json::to_vec(value)?)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    Ok(serde_json::from_slice(bytes)?)
}
