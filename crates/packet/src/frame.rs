//! An Ethernet frame with what is left to do to it.

use alloc::vec::Vec;

/// The longest frame, in bytes: an Ethernet header with a VLAN tag and an IP packet of 65535 bytes.
pub const MAX_FRAME: usize = 18 + 65535;

/// The state of the transport checksum in a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// It is there, right or wrong.
    #[default]
    Present,
    /// It is known to be right, or nobody needs it.
    Verified,
    /// The field holds the sum over the pseudo-header; the rest is to be added over all bytes from `start` on.
    Partial {
        /// Where the sum starts, in bytes from the start of the frame.
        start: u16,
        /// Where the field is, in bytes from `start`.
        offset: u16,
    },
}

/// What a frame longer than the MTU is cut into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentationKind {
    /// TCP segments over IPv4.
    Tcp4,
    /// TCP segments over IPv6.
    Tcp6,
    /// UDP datagrams, over either.
    Udp,
}

/// How a frame is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// Into what.
    pub kind: SegmentationKind,
    /// Payload of each piece but the last, in bytes; not 0.
    pub payload: u16,
    /// Bytes of headers in front of the payload. A hint: the headers themselves count.
    pub headers: u16,
}

/// An Ethernet frame without its check sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// From the destination address on, at most [`MAX_FRAME`].
    pub bytes: Vec<u8>,
    /// The transport checksum.
    pub checksum: Checksum,
    /// Whether it is to be cut. Its checksum is [`Checksum::Partial`] then.
    pub segmentation: Option<Segmentation>,
}

impl From<Vec<u8>> for Frame {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            ..Self::default()
        }
    }
}
