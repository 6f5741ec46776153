//! The network behind a device.

use alloc::vec::Vec;
use core::task::{Context, Poll};

use crate::Frame;

/// What a network is. It stays for as long as the backend lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketInfo {
    /// The largest payload of an Ethernet frame that is not to be segmented, in bytes: 1280 to 65521.
    pub mtu: u16,
    /// Whether the backend takes frames whose checksum is left open, and TCP and UDP frames of up to 64 KiB that are to
    /// be segmented.
    pub offloads: bool,
}

/// What the guest accepts in the frames that it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums that are left open, or known to be right.
    pub checksum: bool,
    /// TCP over IPv4 of up to 64 KiB in one frame.
    pub tcp4: bool,
    /// TCP over IPv6 of up to 64 KiB in one frame.
    pub tcp6: bool,
    /// UDP datagrams of one flow and size in one frame of up to 64 KiB, over IPv4.
    pub udp4: bool,
    /// The same over IPv6.
    pub udp6: bool,
}

/// A network that a device is put in front of. See the [crate] for what either side may assume.
pub trait PacketBackend: Send + Sync {
    /// What the network is.
    fn info(&self) -> PacketInfo;

    /// Says what the guest accepts from now on. Frames that wait already may be of the kind before.
    fn set_receive_offloads(&self, offloads: Offloads);

    /// Ready while a frame can be sent. One task at a time may wait.
    fn poll_send(&self, cx: &mut Context<'_>) -> Poll<()>;

    /// Takes a frame of the guest's. It may stay queued until [`PacketBackend::kick`]. Without room it is lost. Does not
    /// block.
    fn send(&self, frame: Frame);

    /// A batch of frames is complete. Spurious calls are harmless.
    fn kick(&self);

    /// Ready with the next frame for the guest. One task at a time may wait.
    fn poll_receive(&self, cx: &mut Context<'_>) -> Poll<Frame>;

    /// The guest starts anew and remembers nothing: connections of its are ended, frames for it dropped.
    fn reset(&self);

    /// What a backend in another process has to know so that the guest's connections end there instead of hanging.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes over what [`PacketBackend::save`] gave, maybe in another process, maybe of another kind of backend. Bytes
    /// that make no sense are ignored.
    fn restore(&self, saved: &[u8]) {
        let _ = saved;
    }
}
