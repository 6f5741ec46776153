//! What the driver sees of the card: features and configuration (§5.1.3, §5.1.4).

use caisson_packet::{Offloads, PacketInfo, Segmentation, SegmentationKind};

use super::Net;

pub(super) const CSUM: u64 = 1;
pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
pub(super) const HOST_TSO4: u64 = 1 << 11;
pub(super) const HOST_TSO6: u64 = 1 << 12;
pub(super) const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
pub(super) const CTRL_VQ: u64 = 1 << 17;
pub(super) const CTRL_RX: u64 = 1 << 18;
pub(super) const CTRL_VLAN: u64 = 1 << 19;
pub(super) const CTRL_RX_EXTRA: u64 = 1 << 20;
const GUEST_ANNOUNCE: u64 = 1 << 21;
pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
const GUEST_USO4: u64 = 1 << 54;
const GUEST_USO6: u64 = 1 << 55;
pub(super) const HOST_USO: u64 = 1 << 56;

/// What the driver may accept in received frames, and switch off and on again. Without `GUEST_ECN`: no frame for the
/// guest has congestion marks that differ between its segments.
pub(super) const ECN_FREE_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;
/// What has to be agreed on for the driver to be asked to announce itself.
pub(super) const ANNOUNCED: u64 = GUEST_ANNOUNCE | STATUS | CTRL_VQ;

/// Bytes of the configuration up to the MTU.
const LEN: usize = 12;
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

pub(super) fn offered(info: &PacketInfo) -> u64 {
    let features = MTU | MAC | STATUS | MRG_RXBUF | GUEST_ANNOUNCE | ECN_FREE_OFFLOADS;
    let control =
        CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS;
    let outward = match info.offloads {
        true => CSUM | HOST_TSO4 | HOST_TSO6 | HOST_USO,
        false => 0,
    };
    features | control | outward
}

/// What a backend may put into frames for a driver that accepts `features`.
pub(super) fn offloads(features: u64) -> Offloads {
    let checksum = features & GUEST_CSUM != 0;
    let has = |bit: u64| checksum && features & bit != 0;
    Offloads {
        checksum,
        tcp4: has(GUEST_TSO4),
        tcp6: has(GUEST_TSO6),
        udp4: has(GUEST_USO4),
        udp6: has(GUEST_USO6),
    }
}

/// The feature that lets the driver take a frame that is to be cut like this.
pub(super) fn accepted_by(segmentation: Segmentation, frame: &[u8]) -> u64 {
    match segmentation.kind {
        SegmentationKind::Tcp4 => GUEST_TSO4,
        SegmentationKind::Tcp6 => GUEST_TSO6,
        // By the EtherType.
        SegmentationKind::Udp if frame.get(12..14) == Some(&[0x86, 0xdd]) => GUEST_USO6,
        SegmentationKind::Udp => GUEST_USO4,
    }
}

impl Net {
    pub(super) fn config_image(&self) -> [u8; LEN] {
        let mut image = [0; LEN];
        image[..6].copy_from_slice(&self.state.mac.0);
        let announce = if self.state.announce { ANNOUNCE } else { 0 };
        image[6..8].copy_from_slice(&(LINK_UP | announce).to_le_bytes());
        // One pair of queues, where a driver asks.
        image[8..10].copy_from_slice(&1u16.to_le_bytes());
        image[10..].copy_from_slice(&self.info.mtu.to_le_bytes());
        image
    }
}
