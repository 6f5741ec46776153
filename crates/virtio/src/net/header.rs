//! The header in front of each frame (§5.1.6).

use caisson_packet::{Checksum, Frame, Segmentation, SegmentationKind};

use super::config::{CSUM, GUEST_CSUM, HOST_TSO4, HOST_TSO6, HOST_USO};

/// Its length in bytes, with the number of buffers, which version 1 always has.
pub(super) const HEADER_LEN: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_UDP: u8 = 5;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

impl Header {
    pub(super) fn from_bytes(bytes: [u8; HEADER_LEN]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1] = bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
            num_buffers: u16::from_le_bytes([n0, n1]),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [
            self.flags,
            self.gso_type,
            h0,
            h1,
            g0,
            g1,
            s0,
            s1,
            o0,
            o1,
            n0,
            n1,
        ]
    }

    /// What the driver left to the device for a frame of `len` bytes; `None` if it must not.
    pub(super) fn offloads(
        self,
        len: usize,
        features: u64,
    ) -> Option<(Checksum, Option<Segmentation>)> {
        let mut checksum = Checksum::Present;
        if self.flags & NEEDS_CSUM != 0 {
            let end = usize::from(self.csum_start) + usize::from(self.csum_offset) + 2;
            if features & CSUM == 0 || end > len {
                return None;
            }
            checksum = Checksum::Partial {
                start: self.csum_start,
                offset: self.csum_offset,
            };
        }
        let (kind, feature) = match self.gso_type {
            GSO_NONE => return Some((checksum, None)),
            GSO_TCP4 => (SegmentationKind::Tcp4, HOST_TSO4),
            GSO_TCP6 => (SegmentationKind::Tcp6, HOST_TSO6),
            GSO_UDP => (SegmentationKind::Udp, HOST_USO),
            _ => return None,
        };
        if features & feature == 0 || self.gso_size == 0 || checksum == Checksum::Present {
            return None;
        }
        let segmentation = Segmentation {
            kind,
            payload: self.gso_size,
            headers: self.hdr_len,
        };
        Some((checksum, Some(segmentation)))
    }

    /// The header of `frame`, which lies in `buffers` buffers, for a driver that accepts `offloads`.
    pub(super) fn of(frame: &Frame, buffers: u16, offloads: u64) -> Self {
        let mut header = Self {
            num_buffers: buffers,
            ..Self::default()
        };
        match frame.checksum {
            Checksum::Present => {}
            Checksum::Verified if offloads & GUEST_CSUM == 0 => {}
            Checksum::Verified => header.flags = DATA_VALID,
            Checksum::Partial { start, offset } => {
                header.flags = NEEDS_CSUM;
                (header.csum_start, header.csum_offset) = (start, offset);
            }
        }
        if let Some(segmentation) = frame.segmentation {
            header.gso_type = match segmentation.kind {
                SegmentationKind::Tcp4 => GSO_TCP4,
                SegmentationKind::Tcp6 => GSO_TCP6,
                SegmentationKind::Udp => GSO_UDP,
            };
            header.gso_size = segmentation.payload;
            header.hdr_len = segmentation.headers;
        }
        header
    }
}
